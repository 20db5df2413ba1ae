"""What enters a ViT's first block: prefix tokens, embedded patches, their positions added; and its LayerNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.product_types import widened
from tokcomp_kernels.reference.add_layer_norm import layer_norm


@checked
def embed_patches_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    prefix: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    with widened(images):
        tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).mT
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(images), -1, -1), tokens], dim=1)
    x = (tokens + position).contiguous()
    return x, layer_norm(x, norm_weight, norm_bias, norm_eps)

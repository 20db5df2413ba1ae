"""Gradient of masked_merge: a token's own copy or mean, and for a source its share of the mean it went into."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import gather_rows


@checked
def masked_merge_backward_reference(grad: Tensor, destination: Tensor) -> Tensor:
    num_tokens = grad.shape[1]
    dtype = accumulate_dtype(grad)
    own = torch.arange(num_tokens, device=grad.device)
    inside = (destination >= 0) & (destination < num_tokens)
    destination = torch.where(inside, destination, own)
    is_source = destination != own  # [B, N]
    count = torch.ones(destination.shape, dtype=dtype, device=grad.device)
    share = 1.0 / count.scatter_add(1, destination, is_source.to(dtype))
    scaled = grad.to(dtype) * share[:, :, None]
    joined = torch.where(is_source[:, :, None], gather_rows(scaled, destination), 0.0)
    return (scaled + joined).to(grad.dtype).contiguous()

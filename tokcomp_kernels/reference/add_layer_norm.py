"""A residual sum and its LayerNorm, the two steps between a branch's last product and the next branch's first."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype


@checked
def add_layer_norm_reference(
    x: Tensor, branch: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    total = (x + branch).contiguous()
    return total, layer_norm(total, weight, bias, norm_eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension: statistics and scaling in the accumulation type, one rounding at the end."""
    dtype = accumulate_dtype(x)
    weight, bias = (None if one is None else one.to(dtype) for one in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)

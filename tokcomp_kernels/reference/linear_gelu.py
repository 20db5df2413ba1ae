"""A linear layer and the exact (erf) GELU after it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.product_types import widened


@checked
def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with widened(x):
        return F.gelu(F.linear(x, weight, bias)).contiguous()

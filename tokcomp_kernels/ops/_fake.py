"""What fakes share: they mirror the dtypes and strides that kernels allocate."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def token_major(q: Tensor) -> Tensor:
    """An output of attention: a [B, H, N, D] view of contiguous [B, N, H, D]."""
    batch, heads, num_tokens, width = q.shape
    return q.new_empty(batch, num_tokens, heads, width).transpose(1, 2)

"""What fakes share: they mirror the strides that kernels allocate."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype


def token_major(q: Tensor) -> Tensor:
    """An output of attention: a [B, H, N, D] view of contiguous [B, N, H, D]."""
    batch, heads, num_tokens, width = q.shape
    return q.new_empty(batch, num_tokens, heads, width).transpose(1, 2)


def merged(x: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens x [B, N, C]: those that are left, [B, M, C], their sizes, [B, M], and where each token went, [B, N]."""
    batch, num_tokens, channels = x.shape
    return (
        x.new_empty(batch, num_kept, channels),
        x.new_empty(batch, num_kept, dtype=accumulate_dtype(x)),
        x.new_empty(batch, num_tokens, dtype=torch.int64),
    )

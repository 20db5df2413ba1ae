"""What fakes share: they mirror the strides that kernels allocate."""

from __future__ import annotations

from torch import Tensor


def token_major(q: Tensor) -> Tensor:
    """An output of attention: a [B, H, N, D] view of contiguous [B, N, H, D]."""
    batch, heads, num_tokens, width = q.shape
    return q.new_empty(batch, num_tokens, heads, width).transpose(1, 2)

"""Pieces of the cosine similarity that prune_merge and tome_merge share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_squares(row_ptrs, mask_rows, num_channels, BLOCK_C: tl.constexpr):
    """Sum of squares of each row, in float32; 0 for a masked row."""
    squares = tl.zeros([row_ptrs.shape[0]], tl.float32)
    for start in range(0, num_channels, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        mask = mask_rows[:, None] & (offs_c < num_channels)[None, :]
        rows = tl.load(row_ptrs[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_C]
        squares += tl.sum(rows * rows, axis=1)
    return squares


@triton.jit
def inverse_norm(squares):
    """1 / norm, or 0 for a row of zeros; NaN gives 0 too, and the cosine is NaN from the dot product then."""
    norm = tl.sqrt_rn(squares)
    return tl.where(squares > 0.0, tl.div_rn(1.0, tl.where(squares > 0.0, norm, 1.0)), 0.0)

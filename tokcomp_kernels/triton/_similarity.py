"""Pieces of the cosine similarity that the merging operators share."""

from __future__ import annotations

import triton
import triton.language as tl

from tokcomp_kernels.triton._common import dot


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


@triton.jit
def best_matches(
    x_ptr,
    order_ptr,
    src_ptrs,
    mask_s,
    first,
    end,
    num_channels,
    stride_xn,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For each source row, the largest cosine with the tokens of rank ``first .. end - 1``, and the lowest such rank.

    ``order_ptr`` holds the token of each rank. A cosine that is NaN counts as 0.
    """
    inv_src = inverse_norm(row_squares(src_ptrs, mask_s, num_channels, BLOCK_C))  # [BLOCK_S]
    best = tl.full([BLOCK_S], float("-inf"), tl.float32)
    best_rank = tl.zeros([BLOCK_S], tl.int32) + first
    for start in range(first, end, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < end
        dst_token = tl.load(order_ptr + offs_d, mask=mask_d, other=0).to(tl.int64)  # [BLOCK_D]
        dst_ptrs = x_ptr + dst_token * stride_xn
        dots = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
        squares = tl.zeros([BLOCK_D], tl.float32)
        for start_c in range(0, num_channels, BLOCK_C):
            offs_c = start_c + tl.arange(0, BLOCK_C)
            mask_c = offs_c < num_channels
            dst = tl.load(dst_ptrs[:, None] + offs_c[None, :], mask=mask_d[:, None] & mask_c[None, :], other=0.0)
            src = tl.load(src_ptrs[None, :] + offs_c[:, None], mask=mask_s[None, :] & mask_c[:, None], other=0.0)
            dots = dot(dst, src, dots)  # [BLOCK_D, BLOCK_C] x [BLOCK_C, BLOCK_S]
            wide = dst.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
        cosine = dots * inv_src[None, :] * inverse_norm(squares)[:, None]  # [BLOCK_D, BLOCK_S]
        cosine = tl.where(cosine == cosine, cosine, 0.0)
        cosine = tl.where(mask_d[:, None], cosine, float("-inf"))
        block_best = tl.max(cosine, axis=0)
        block_rank = tl.min(tl.where(cosine == block_best[None, :], offs_d[:, None], end), axis=0)
        # Ranks run upwards, so only a strictly better block takes over: the lowest rank wins ties.
        better = block_best > best
        best = tl.where(better, block_best, best)
        best_rank = tl.where(better, block_rank, best_rank)
    return best, best_rank

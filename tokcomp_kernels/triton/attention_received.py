"""attention_received in two kernels: each block of queries adds up its own columns of the map; the mean of these sums.

A program owns one (image, head, block of queries), so q and k are read from memory once, and no two programs add to the
same sum. Where BLOCK_N says that all keys fit they are tiles of a single pass, as in attention; more keys come twice:
for the sum of each row, then for its probabilities.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._attention import (
    finite_max,
    first_of,
    forward_options,
    key_tiles,
    load_parts,
    part_scores,
    width_tiles,
)
from tokcomp_kernels.triton._common import cdiv, device_guard, inner_contiguous, require_supported, strides
from tokcomp_kernels.triton._reduce import reduce_groups


@triton.jit
def _store_columns(ptr, powers, share, offs_m, offs_n, N):
    """The sums of a tile's columns, each row times its share; rows beyond N count for nothing, whatever they hold."""
    shares = tl.where((offs_m < N)[:, None], powers * share[:, None], 0.0)  # [BLOCK_M, BLOCK_N]
    tl.store(ptr + offs_n, tl.sum(shares, 0), mask=offs_n < N)


@triton.jit(do_not_specialize=["H", "N", "stride_sb"])
def _attention_received_kernel(
    q_ptr,
    k_ptr,
    size_ptr,
    sums_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_sb,
    stride_sn,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
):
    """sums_ptr [B, H, blocks, N]: each key's probabilities over a block of queries; their mean is the result."""
    num_blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    sums_ptr += pid.to(tl.int64) * N
    if HAS_SIZE:
        size_ptr += b * stride_sb
    offs_m = (pid % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    WIDTHS: tl.constexpr = width_tiles(D)
    q = load_parts(q_ptr, offs_m, stride_qn, N, D, WIDTHS)  # [BLOCK_M, WIDTHS]
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    weight = num_blocks.to(tl.float32) / N  # the mean over heads and blocks makes 1 / (H * N) of it

    if KEYS > 0:
        TILES: tl.constexpr = key_tiles(KEYS)
        scores = ()  # [BLOCK_M, TILES]
        for i in tl.static_range(len(TILES)):
            offs_n = first_of(TILES, i) + tl.arange(0, TILES[i])
            k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS, i + 1 < len(TILES))  # [TILES[i], WIDTHS]
            tile = part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE, i + 1 < len(TILES))
            row_max = tl.maximum(row_max, tl.max(tile, 1))
            scores = scores + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
        row_max = finite_max(row_max)
        powers = ()  # [BLOCK_M, TILES]
        for i in tl.static_range(len(TILES)):
            tile = tl.exp2(scores[i] - row_max[:, None])
            row_sum += tl.sum(tile, 1)
            powers = powers + (tile,)  # type: ignore[assignment]  # noqa: RUF005
        for i in tl.static_range(len(TILES)):
            offs_n = first_of(TILES, i) + tl.arange(0, TILES[i])
            _store_columns(sums_ptr, powers[i], weight / row_sum, offs_m, offs_n, N)
    else:
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS)  # [BLOCK_N, WIDTHS]
            tile = part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
            new_max = tl.maximum(row_max, tl.max(tile, 1))
            subtract = finite_max(new_max)
            row_sum = row_sum * tl.exp2(row_max - subtract) + tl.sum(tl.exp2(tile - subtract[:, None]), 1)
            row_max = new_max
        row_max = finite_max(row_max)
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS)  # [BLOCK_N, WIDTHS]
            tile = part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
            _store_columns(sums_ptr, tl.exp2(tile - row_max[:, None]), weight / row_sum, offs_m, offs_n, N)


@checked
def attention_received_triton(
    q: Tensor, k: Tensor, *, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 0
) -> Tensor:
    """``tokcomp::attention_received`` in Triton, for float16, bfloat16 and float32."""
    op = "attention_received"
    require_supported(op, "q", q)
    batch, heads, num_tokens, width = q.shape
    q, k = inner_contiguous(q), inner_contiguous(k)
    options = forward_options(op, q.device, num_tokens, width, q.element_size())
    groups = heads * cdiv(num_tokens, options["BLOCK_M"])
    sums = torch.empty(batch, groups, num_tokens, dtype=torch.float32, device=q.device)
    if sums.numel() > 0:
        with device_guard(q):
            _attention_received_kernel[(batch * groups,)](
                q_ptr=q,
                k_ptr=k,
                size_ptr=size,
                sums_ptr=sums,
                **strides(q, "stride_qb", "stride_qh", "stride_qn"),
                **strides(k, "stride_kb", "stride_kh", "stride_kn"),
                **strides(size, "stride_sb", "stride_sn"),
                H=heads,
                N=num_tokens,
                scale=width**-0.5 if scale is None else float(scale),
                HAS_SIZE=size is not None,
                **options,
            )
    return reduce_groups(sums, mean=True, dtype=torch.float32)

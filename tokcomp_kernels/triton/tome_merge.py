"""tome_merge in three kernels: each source's best match, which edges merge and where every token goes, the means.

Candidates are the unprotected even positions (set A), destinations the unprotected odd ones (set B); ``a`` and ``b``
below index these sets. The similarity of a block of A with a block of B lives in registers only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference._common import descending_order, size_or_ones
from tokcomp_kernels.triton._common import cdiv, device_guard, dot, inner_contiguous, require_supported, strides
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._order import MAX_COUNTED, count_before
from tokcomp_kernels.triton._rows import merge_rows
from tokcomp_kernels.triton._similarity import inverse_norm, row_squares

_COUNTS = ["num_tokens", "num_prefix_tokens", "num_a", "num_b", "num_merged"]


@triton.jit(do_not_specialize=_COUNTS)
def _tome_merge_match_kernel(
    metric_ptr,
    best_ptr,
    best_b_ptr,
    num_prefix_tokens,
    num_a,
    num_b,
    num_channels,
    stride_mb,
    stride_mn,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    metric_ptr += batch * stride_mb
    first_a = num_prefix_tokens + num_prefix_tokens % 2
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    offs_a = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
    mask_a = offs_a < num_a
    a_ptrs = metric_ptr + (first_a + 2 * offs_a).to(tl.int64) * stride_mn
    inv_a = inverse_norm(row_squares(a_ptrs, mask_a, num_channels, BLOCK_K))  # [BLOCK_A]

    best = tl.full([BLOCK_A], float("-inf"), tl.float32)
    best_b = tl.zeros([BLOCK_A], tl.int32)
    for start in range(0, num_b, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B)
        mask_b = offs_b < num_b
        b_ptrs = metric_ptr + (first_b + 2 * offs_b).to(tl.int64) * stride_mn
        dots = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        for start_k in range(0, num_channels, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < num_channels
            a = tl.load(a_ptrs[:, None] + offs_k[None, :], mask=mask_a[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(b_ptrs[None, :] + offs_k[:, None], mask=mask_b[None, :] & mask_k[:, None], other=0.0)
            dots = dot(a, b, dots)  # [BLOCK_A, BLOCK_K] x [BLOCK_K, BLOCK_B]
        inv_b = inverse_norm(row_squares(b_ptrs, mask_b, num_channels, BLOCK_K))  # [BLOCK_B]
        cosine = dots * inv_a[:, None] * inv_b[None, :]  # [BLOCK_A, BLOCK_B]
        cosine = tl.where(cosine == cosine, cosine, 0.0)
        cosine = tl.where(mask_b[None, :], cosine, float("-inf"))
        block_best = tl.max(cosine, axis=1)
        block_b = tl.min(tl.where(cosine == block_best[:, None], offs_b[None, :], num_b), axis=1)
        # b runs upwards, so only a strictly better block takes over: the lowest b wins ties.
        better = block_best > best
        best = tl.where(better, block_best, best)
        best_b = tl.where(better, block_b, best_b)

    tl.store(best_ptr + batch * num_a + offs_a, best, mask=mask_a)
    tl.store(best_b_ptr + batch * num_a + offs_a, best_b, mask=mask_a)


@triton.jit(do_not_specialize=_COUNTS)
def _tome_merge_assign_kernel(
    best_ptr,
    best_b_ptr,
    rank_ptr,
    order_ptr,
    dst_ptr,
    source_ptr,
    num_tokens,
    num_prefix_tokens,
    num_a,
    num_b,
    num_merged,
    HAS_RANK: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    order_ptr += batch * num_tokens
    dst_ptr += batch * num_merged
    source_ptr += batch * num_tokens
    num_kept = num_tokens - num_merged
    first_a = num_prefix_tokens + num_prefix_tokens % 2
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    first_b_slot = num_prefix_tokens + num_a - num_merged

    merged_before = 0  # merged edges below this block
    for start in range(0, num_a, BLOCK_A):
        offs_a = start + tl.arange(0, BLOCK_A)
        mask_a = offs_a < num_a
        if HAS_RANK:
            rank = tl.load(rank_ptr + batch * num_a + offs_a, mask=mask_a, other=num_a)
        else:
            rank = count_before(best_ptr + batch * num_a, offs_a, 0, num_a, 1, BLOCK_J)  # [BLOCK_A]
        merged = mask_a & (rank < num_merged)
        index = merged_before + tl.cumsum(merged.to(tl.int32), axis=0) - merged.to(tl.int32)  # merged edges below a
        merged_before += tl.sum(merged.to(tl.int32), axis=0)
        position = first_a + 2 * offs_a
        dst = first_b_slot + tl.load(best_b_ptr + batch * num_a + offs_a, mask=mask_a, other=0)
        slot = num_prefix_tokens + offs_a - index
        tl.store(order_ptr + tl.where(merged, num_kept + index, slot), position, mask=mask_a)
        tl.store(dst_ptr + index, dst, mask=merged)
        tl.store(source_ptr + position, tl.where(merged, dst, slot).to(tl.int64), mask=mask_a)
    for start in range(0, num_b, BLOCK_A):
        offs_b = start + tl.arange(0, BLOCK_A)
        mask_b = offs_b < num_b
        position = first_b + 2 * offs_b
        slot = first_b_slot + offs_b
        tl.store(order_ptr + slot, position, mask=mask_b)
        tl.store(source_ptr + position, slot.to(tl.int64), mask=mask_b)
    for start in range(0, num_prefix_tokens, BLOCK_A):
        position = start + tl.arange(0, BLOCK_A)
        mask = position < num_prefix_tokens
        tl.store(order_ptr + position, position, mask=mask)
        tl.store(source_ptr + position, position.to(tl.int64), mask=mask)


@checked
def tome_merge_triton(
    x: Tensor, metric: Tensor, r: int, *, size: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokcomp::tome_merge`` by Triton: x [B, N, C], metric [B, N, K] -> [B, M, C], size [B, M], source [B, N]."""
    require_supported("tome_merge", "x", x)
    batch, num_tokens, _ = x.shape
    num_merged = min(r, (num_tokens - num_prefix_tokens) // 2)
    if num_merged == 0 or batch == 0:
        positions = torch.arange(num_tokens, device=x.device).repeat(batch, 1)
        kept = x[:, : num_tokens - num_merged].clone(memory_format=torch.contiguous_format)
        return kept, size_or_ones(size, x)[:, : num_tokens - num_merged].contiguous(), positions
    x = inner_contiguous(x)
    with device_guard(x):
        order, dst, source = _match(metric, num_merged, num_prefix_tokens)
        x_out, size_out = merge_rows("tome_merge", x, size, order, dst, None, average="size")
    return x_out, size_out, source


def _match(metric: Tensor, num_merged: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order [B, N] int32 (the token of each slot, then the sources), the sources' slots [B, r] int32, source [B, N]."""
    batch, num_tokens, channels = metric.shape
    metric = inner_contiguous(metric.float() if metric.dtype == torch.float64 else metric)
    num_a = (num_tokens + 1) // 2 - (num_prefix_tokens + 1) // 2
    num_b = num_tokens // 2 - num_prefix_tokens // 2
    best = torch.empty((batch, num_a), dtype=torch.float32, device=metric.device)
    best_b = torch.empty((batch, num_a), dtype=torch.int32, device=metric.device)
    order = torch.empty((batch, num_tokens), dtype=torch.int32, device=metric.device)
    dst = torch.empty((batch, num_merged), dtype=torch.int32, device=metric.device)
    source = torch.empty((batch, num_tokens), dtype=torch.int64, device=metric.device)
    config = launch_config("tome_merge", "match", metric.device, K=channels, itemsize=metric.itemsize)
    _tome_merge_match_kernel[(batch, cdiv(num_a, config["BLOCK_A"]))](
        metric_ptr=metric,
        best_ptr=best,
        best_b_ptr=best_b,
        num_prefix_tokens=num_prefix_tokens,
        num_a=num_a,
        num_b=num_b,
        num_channels=channels,
        **strides(metric, "stride_mb", "stride_mn"),
        **config,
    )
    rank = None
    if num_a > MAX_COUNTED:
        edges = descending_order(best, 0)
        places = torch.arange(num_a, dtype=torch.int32, device=metric.device).expand(batch, -1)
        rank = torch.empty_like(places, memory_format=torch.contiguous_format).scatter_(1, edges, places)
    config = launch_config("tome_merge", "assign", metric.device, A=num_a)
    _tome_merge_assign_kernel[(batch,)](
        best_ptr=best,
        best_b_ptr=best_b,
        rank_ptr=rank,
        order_ptr=order,
        dst_ptr=dst,
        source_ptr=source,
        num_tokens=num_tokens,
        num_prefix_tokens=num_prefix_tokens,
        num_a=num_a,
        num_b=num_b,
        num_merged=num_merged,
        HAS_RANK=rank is not None,
        **config,
    )
    return order, dst, source

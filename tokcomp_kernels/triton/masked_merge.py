"""masked_merge in three kernels: rank the live tokens, match each source with its destination, write every row.

How many tokens merge is known on the device alone: grids cover what could be, loops end at what is. What one thread
writes another reads in a later kernel, never in the same one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference.masked_merge import live_order
from tokcomp_kernels.triton._common import (
    cdiv,
    device_guard,
    effective_size,
    inner_contiguous,
    narrow,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._order import MAX_COUNTED, count_before_live
from tokcomp_kernels.triton._similarity import best_matches

#: Programs that share the source tiles of one image. A search merges 10 to 20 tokens in a block: one or two tiles.
MATCH_PROGRAMS = 4
_COUNTS = ["num_tokens", "num_prefix_tokens"]


@triton.jit(do_not_specialize=[*_COUNTS, "stride_ib", "stride_mb"])
def _masked_merge_select_kernel(
    importance_ptr,
    mask_ptr,
    counts_ptr,
    rank_ptr,
    order_ptr,
    destination_ptr,
    num_merged_ptr,
    num_tokens,
    num_prefix_tokens,
    stride_ib,
    stride_in,
    stride_mb,
    stride_mn,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    before, live = count_before_live(
        importance_ptr + batch * stride_ib,
        mask_ptr + batch * stride_mb,
        offs_n,
        num_prefix_tokens,
        num_tokens,
        stride_in,
        stride_mn,
        BLOCK_J,
    )
    rank = tl.where(offs_n < num_prefix_tokens, offs_n, num_prefix_tokens + before)  # [BLOCK_N]
    tl.store(rank_ptr + batch * num_tokens + offs_n, rank.to(tl.int64), mask=mask_n)
    tl.store(order_ptr + batch * num_tokens + rank, offs_n, mask=mask_n)
    # The match kernel puts the sources' destinations in their place.
    tl.store(destination_ptr + batch * num_tokens + offs_n, offs_n.to(tl.int64), mask=mask_n)
    if tl.program_id(1) == 0:
        num_kept = tl.load(counts_ptr + 1)
        num_alive = tl.minimum((num_prefix_tokens + live).to(tl.int64), tl.load(counts_ptr))
        merges = (num_kept > num_prefix_tokens) & (num_kept < num_alive)
        # Where nothing merges, the difference of two counts of any value is not looked at.
        tl.store(num_merged_ptr + batch, tl.where(merges, num_alive - num_kept, 0).to(tl.int32))


@triton.jit(do_not_specialize=_COUNTS)
def _masked_merge_match_kernel(
    x_ptr,
    counts_ptr,
    order_ptr,
    num_merged_ptr,
    dst_ptr,
    similarity_ptr,
    destination_ptr,
    num_tokens,
    num_prefix_tokens,
    num_channels,
    stride_xb,
    stride_xn,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    num_merged = tl.load(num_merged_ptr + batch)
    x_ptr += batch * stride_xb
    first = batch * num_tokens
    for start in range(tl.program_id(1) * BLOCK_S, num_merged, tl.num_programs(1) * BLOCK_S):
        num_kept = tl.load(counts_ptr + 1).to(tl.int32)
        offs_s = start + tl.arange(0, BLOCK_S)
        mask_s = offs_s < num_merged
        src_token = tl.load(order_ptr + first + num_kept + offs_s, mask=mask_s, other=0).to(tl.int64)  # [BLOCK_S]
        best, best_rank = best_matches(
            x_ptr,
            order_ptr + first,
            x_ptr + src_token * stride_xn,
            mask_s,
            num_prefix_tokens,
            num_kept,
            num_channels,
            stride_xn,
            BLOCK_S,
            BLOCK_D,
            BLOCK_C,
        )
        tl.store(dst_ptr + first + offs_s, best_rank, mask=mask_s)
        tl.store(similarity_ptr + first + offs_s, best, mask=mask_s)
        dst_token = tl.load(order_ptr + first + best_rank, mask=mask_s, other=0).to(tl.int64)
        tl.store(destination_ptr + first + src_token, dst_token, mask=mask_s)


@triton.jit(do_not_specialize=["num_tokens", "min_weighted_size", "stride_sb"])
def _masked_merge_apply_kernel(
    x_ptr,
    size_ptr,
    counts_ptr,
    rank_ptr,
    order_ptr,
    num_merged_ptr,
    dst_ptr,
    similarity_ptr,
    x_out_ptr,
    size_out_ptr,
    num_tokens,
    num_channels,
    min_weighted_size,
    stride_xb,
    stride_xn,
    stride_sb,
    stride_sn,
    HAS_SIZE: tl.constexpr,
    HAS_MIN: tl.constexpr,
    WEIGHTED_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    first = batch * num_tokens
    x_ptr += batch * stride_xb
    if HAS_SIZE:
        size_ptr += batch * stride_sb
    num_merged = tl.load(num_merged_ptr + batch)
    num_kept = tl.load(counts_ptr + 1)

    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_tokens
    mask_c = offs_c < num_channels
    rank = tl.load(rank_ptr + first + offs_n, mask=mask_n, other=-1).to(tl.int32)  # [BLOCK_N]
    rows = tl.load(
        x_ptr + offs_n[:, None] * stride_xn + offs_c[None, :], mask=mask_n[:, None] & mask_c[None, :], other=0.0
    ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
    total_size = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_SIZE:
        total_size = effective_size(tl.load(size_ptr + offs_n * stride_sn, mask=mask_n, other=1.0))
    if HAS_MIN:
        # A source keeps what it adds to its destination as its own size, and all that take part are bounded alike.
        takes_part = (num_merged > 0) & (rank < num_kept + num_merged)
        if WEIGHTED_SIZE:
            is_source = takes_part & (rank >= num_kept)
            total_size *= tl.load(similarity_ptr + first + rank - num_kept, mask=is_source, other=1.0)
        bounded = tl.where(total_size > min_weighted_size, total_size, min_weighted_size)
        total_size = tl.where(takes_part, bounded, total_size)
    count = tl.zeros([BLOCK_N], tl.int32)

    # Every token of the block takes its next source in turn, so each sum runs in the order of rank.
    for start in range(0, num_merged, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        dst = tl.load(dst_ptr + first + offs_s, mask=offs_s < num_merged, other=-2)
        mine = dst[None, :] == rank[:, None]  # [BLOCK_N, BLOCK_S]
        longest = tl.max(tl.sum(mine.to(tl.int32), axis=1), axis=0)
        taken = tl.full([BLOCK_N], -1, tl.int32)
        for _ in range(longest):
            left = mine & (offs_s[None, :] > taken[:, None])
            following = tl.min(tl.where(left, offs_s[None, :], num_merged), axis=1)  # [BLOCK_N]
            found = following < num_merged
            src_token = tl.load(order_ptr + first + num_kept + following, mask=found, other=0).to(tl.int64)
            src_rows = tl.load(
                x_ptr + src_token[:, None] * stride_xn + offs_c[None, :],
                mask=found[:, None] & mask_c[None, :],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
            rows = tl.where(found[:, None], rows + src_rows, rows)
            weight = tl.full([BLOCK_N], 1.0, tl.float32)
            if HAS_SIZE:
                weight = effective_size(tl.load(size_ptr + src_token * stride_sn, mask=found, other=1.0))
            if WEIGHTED_SIZE:
                weight *= tl.load(similarity_ptr + first + following, mask=found, other=0.0)
            if HAS_MIN:
                weight = tl.where(weight > min_weighted_size, weight, min_weighted_size)
            total_size += tl.where(found, weight, 0.0)
            count += found.to(tl.int32)
            taken = tl.where(found, following, taken)

    # A token that nothing joined is divided by 1, which keeps it exactly.
    if tl.max(count, axis=0) > 0:
        rows = tl.div_rn(rows, tl.broadcast_to((1 + count).to(tl.float32)[:, None], [BLOCK_N, BLOCK_C]))
    tl.store(
        x_out_ptr + (first + offs_n)[:, None] * num_channels + offs_c[None, :],
        narrow(rows, x_out_ptr.dtype.element_ty),
        mask=mask_n[:, None] & mask_c[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(size_out_ptr + first + offs_n, effective_size(total_size), mask=mask_n)


@checked
def masked_merge_triton(
    x: Tensor,
    importance: Tensor,
    token_mask: Tensor,
    counts: Tensor,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    min_weighted_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tokcomp::masked_merge`` by Triton: x [B, N, C], the others [B, N] -> [B, N, C], and size, rank, destination."""
    require_supported("masked_merge", "x", x)
    x, counts = inner_contiguous(x), counts.contiguous()
    batch, num_tokens, channels = x.shape
    x_out = torch.empty((batch, num_tokens, channels), dtype=x.dtype, device=x.device)
    size_out = torch.empty((batch, num_tokens), dtype=torch.float32, device=x.device)
    if size_out.numel() == 0:
        empty = torch.empty((batch, num_tokens), dtype=torch.int64, device=x.device)
        return x_out, size_out, empty, empty.clone()
    with device_guard(x):
        rank, order, destination, num_merged = _select(importance, token_mask, counts, num_prefix_tokens)
        dst = torch.empty((batch, num_tokens), dtype=torch.int32, device=x.device)
        similarity = torch.empty((batch, num_tokens), dtype=torch.float32, device=x.device)
        config = launch_config("masked_merge", "match", x.device, C=channels, itemsize=x.itemsize)
        programs = min(MATCH_PROGRAMS, cdiv(num_tokens, config["BLOCK_S"]))
        _masked_merge_match_kernel[(batch, programs)](
            x_ptr=x,
            counts_ptr=counts,
            order_ptr=order,
            num_merged_ptr=num_merged,
            dst_ptr=dst,
            similarity_ptr=similarity,
            destination_ptr=destination,
            num_tokens=num_tokens,
            num_prefix_tokens=num_prefix_tokens,
            num_channels=channels,
            **strides(x, "stride_xb", "stride_xn"),
            **config,
        )
        config = launch_config("masked_merge", "apply", x.device, C=channels)
        channel_blocks = max(1, cdiv(channels, config["BLOCK_C"]))
        _masked_merge_apply_kernel[(batch, cdiv(num_tokens, config["BLOCK_N"]), channel_blocks)](
            x_ptr=x,
            size_ptr=size,
            counts_ptr=counts,
            rank_ptr=rank,
            order_ptr=order,
            num_merged_ptr=num_merged,
            dst_ptr=dst,
            similarity_ptr=similarity,
            x_out_ptr=x_out,
            size_out_ptr=size_out,
            num_tokens=num_tokens,
            num_channels=channels,
            min_weighted_size=0.0 if min_weighted_size is None else float(min_weighted_size),
            **strides(x, "stride_xb", "stride_xn"),
            **strides(size, "stride_sb", "stride_sn"),
            HAS_SIZE=size is not None,
            HAS_MIN=min_weighted_size is not None,
            WEIGHTED_SIZE=similarity_weighted_size,
            **config,
        )
    return x_out, size_out, rank, destination


def _select(
    importance: Tensor, token_mask: Tensor, counts: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rank [B, N], the token of each rank [B, N] int32, destination but for the sources' entries, sources [B] int32."""
    batch, num_tokens = importance.shape
    device = importance.device
    if num_tokens > MAX_COUNTED:
        own = torch.arange(num_tokens, device=device).expand(batch, -1)
        alive = (token_mask.to(torch.float32) > 0) | (own < num_prefix_tokens)
        order = live_order(importance, alive, num_prefix_tokens)
        rank = torch.empty_like(order).scatter_(1, order, own)
        num_alive, num_kept = alive.sum(1).minimum(counts[0]), counts[1]
        num_merged = torch.where((num_kept > num_prefix_tokens) & (num_kept < num_alive), num_alive - num_kept, 0)
        return rank, order.to(torch.int32), own.contiguous(), num_merged.to(torch.int32)
    rank, destination = (torch.empty((batch, num_tokens), dtype=torch.int64, device=device) for _ in range(2))
    order = torch.empty((batch, num_tokens), dtype=torch.int32, device=device)
    num_merged = torch.empty((batch,), dtype=torch.int32, device=device)
    config = launch_config("masked_merge", "select", device, N=num_tokens)
    _masked_merge_select_kernel[(batch, cdiv(num_tokens, config["BLOCK_N"]))](
        importance_ptr=importance,
        mask_ptr=token_mask,
        counts_ptr=counts,
        rank_ptr=rank,
        order_ptr=order,
        destination_ptr=destination,
        num_merged_ptr=num_merged,
        num_tokens=num_tokens,
        num_prefix_tokens=num_prefix_tokens,
        **strides(importance, "stride_ib", "stride_in"),
        **strides(token_mask, "stride_mb", "stride_mn"),
        **config,
    )
    return rank, order, destination, num_merged

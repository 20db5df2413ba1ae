"""bipartite_merge in five kernels: who may leave and who receives, each source's best match, which sources merge, where
every token goes, the rows.

How many sources and destinations an image has is known on the device alone: grids cover what could be, loops end at
what is. The similarity of a block of sources with a block of destinations lives in registers only. What one thread
writes another reads in a later kernel, never in the same one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference._common import descending_order, size_or_ones
from tokcomp_kernels.triton._common import cdiv, device_guard, inner_contiguous, require_supported, strides
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._order import MAX_COUNTED, count_before
from tokcomp_kernels.triton._rows import merge_rows
from tokcomp_kernels.triton._similarity import best_matches


@triton.jit(do_not_specialize=["num_tokens", "stride_rb"])
def _bipartite_merge_partition_kernel(
    role_ptr,
    sources_ptr,
    destinations_ptr,
    counts_ptr,
    best_ptr,
    joins_ptr,
    num_tokens,
    stride_rb,
    stride_rn,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    first = batch * num_tokens
    num_sources = 0
    num_destinations = 0
    for start in range(0, num_tokens, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_tokens
        role = tl.load(role_ptr + batch * stride_rb + offs_n.to(tl.int64) * stride_rn, mask=mask_n, other=0)
        leaves, receives = (role == 1).to(tl.int32), (role == 2).to(tl.int32)  # [BLOCK_N]
        tl.store(sources_ptr + first + num_sources + tl.cumsum(leaves, axis=0) - 1, offs_n, mask=leaves > 0)
        place = num_destinations + tl.cumsum(receives, axis=0) - 1
        tl.store(destinations_ptr + first + place, offs_n, mask=receives > 0)
        # Beyond the last source -inf, which a sort of the whole row puts last; the match kernel fills in the others.
        tl.store(best_ptr + first + offs_n, tl.full([BLOCK_N], float("-inf"), tl.float32), mask=mask_n)
        # The rank kernel fills in the sources.
        tl.store(joins_ptr + first + offs_n, tl.full([BLOCK_N], -1, tl.int32), mask=mask_n & (leaves == 0))
        num_sources += tl.sum(leaves, axis=0)
        num_destinations += tl.sum(receives, axis=0)
    tl.store(counts_ptr + 2 * batch, num_sources)
    tl.store(counts_ptr + 2 * batch + 1, num_destinations)


@triton.jit(do_not_specialize=["num_tokens", "threshold"])
def _bipartite_merge_match_kernel(
    metric_ptr,
    sources_ptr,
    destinations_ptr,
    counts_ptr,
    best_ptr,
    match_ptr,
    num_tokens,
    num_channels,
    threshold,
    stride_mb,
    stride_mn,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    metric_ptr += batch * stride_mb
    first = batch * num_tokens
    num_sources = tl.load(counts_ptr + 2 * batch)
    begin = tl.program_id(1) * BLOCK_S
    if begin < num_sources:
        num_destinations = tl.load(counts_ptr + 2 * batch + 1)
        offs_s = begin + tl.arange(0, BLOCK_S)
        mask_s = offs_s < num_sources
        src_token = tl.load(sources_ptr + first + offs_s, mask=mask_s, other=0).to(tl.int64)  # [BLOCK_S]
        best, index = best_matches(
            metric_ptr,
            destinations_ptr + first,
            metric_ptr + src_token * stride_mn,
            mask_s,
            0,
            num_destinations,
            num_channels,
            stride_mn,
            BLOCK_S,
            BLOCK_D,
            BLOCK_C,
        )
        tl.store(best_ptr + first + offs_s, best, mask=mask_s)
        match = tl.load(destinations_ptr + first + index, mask=mask_s & (index < num_destinations), other=-1)
        tl.store(match_ptr + first + offs_s, tl.where(best > threshold, match, -1), mask=mask_s)


@triton.jit(do_not_specialize=["num_tokens", "num_merged"])
def _bipartite_merge_rank_kernel(
    sources_ptr,
    counts_ptr,
    best_ptr,
    match_ptr,
    joins_ptr,
    num_tokens,
    num_merged,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    first = batch * num_tokens
    num_sources = tl.load(counts_ptr + 2 * batch)
    offs_s = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_s = offs_s < num_sources
    rank = count_before(best_ptr + first, offs_s, 0, num_sources, 1, BLOCK_J)  # [BLOCK_N]
    token = tl.load(sources_ptr + first + offs_s, mask=mask_s, other=0)
    match = tl.load(match_ptr + first + offs_s, mask=mask_s, other=-1)
    tl.store(joins_ptr + first + token, tl.where(rank < num_merged, match, -1), mask=mask_s)


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "num_merged"])
def _bipartite_merge_assign_kernel(
    joins_ptr,
    order_ptr,
    dst_ptr,
    source_ptr,
    num_tokens,
    num_kept,
    num_merged,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    joins_ptr += batch * num_tokens
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    joins = tl.load(joins_ptr + offs_n, mask=mask_n, other=-1)
    target = tl.where(joins >= 0, joins, offs_n)  # [BLOCK_N]
    before = tl.zeros([BLOCK_N, BLOCK_J], tl.int32)
    before_target = tl.zeros([BLOCK_N, BLOCK_J], tl.int32)
    for start in range(0, num_tokens, BLOCK_J):
        offs_j = start + tl.arange(0, BLOCK_J)
        merged = tl.load(joins_ptr + offs_j, mask=offs_j < num_tokens, other=-1) >= 0  # [BLOCK_J]
        before += (merged[None, :] & (offs_j[None, :] < offs_n[:, None])).to(tl.int32)
        before_target += (merged[None, :] & (offs_j[None, :] < target[:, None])).to(tl.int32)
    # The slot of a token that does not merge is the number of those before it that do not either.
    slot = target - tl.sum(before_target, axis=1)
    inside = slot < num_kept  # fewer sources than are to merge: the last tokens find no slot
    tl.store(source_ptr + batch * num_tokens + offs_n, tl.where(inside, slot, -1).to(tl.int64), mask=mask_n)
    stays = (joins < 0) & inside
    # Behind the slots' tokens all others, by position.
    index = offs_n - tl.minimum(offs_n - tl.sum(before, axis=1), num_kept)
    place = tl.where(stays, slot, num_kept + index)
    tl.store(order_ptr + batch * (num_kept + num_merged) + place, offs_n, mask=mask_n)
    dst = tl.where(inside, slot, -1)
    tl.store(dst_ptr + batch * num_merged + index, dst, mask=mask_n & (stays == 0))


@checked
def bipartite_merge_triton(
    x: Tensor,
    metric: Tensor,
    role: Tensor,
    r: int,
    *,
    size: Tensor | None = None,
    average: str = "size",
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokcomp::bipartite_merge`` by Triton: x [B, N, C], metric [B, N, K], role [B, N] -> [B, M, C], size, source."""
    require_supported("bipartite_merge", "x", x)
    batch, num_tokens, _ = x.shape
    if r == 0 or batch == 0:
        num_kept = num_tokens - r if threshold is None else num_tokens
        positions = torch.arange(num_tokens, device=x.device).repeat(batch, 1)
        kept = x[:, :num_kept].clone(memory_format=torch.contiguous_format)
        return kept, size_or_ones(size, x)[:, :num_kept].contiguous(), positions
    x = inner_contiguous(x)
    with device_guard(x):
        order, dst, source = _match(metric, role, r, threshold)
        padded = threshold is not None
        x_out, size_out = merge_rows("bipartite_merge", x, size, order, dst, None, average=average, padded=padded)
    return x_out, size_out, source


def _match(metric: Tensor, role: Tensor, num_merged: int, threshold: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Order [B, M + r] int32 (the token of each slot, then the others), their slots [B, r] int32 or -1, source [B, N].

    With a threshold M = N, and places of either that no token takes hold -1; otherwise M = N - r.
    """
    batch, num_tokens, channels = metric.shape
    num_kept = num_tokens - num_merged if threshold is None else num_tokens
    device = metric.device
    metric = inner_contiguous(metric.float() if metric.dtype == torch.float64 else metric)
    sources, destinations, joins, match = torch.empty((4, batch, num_tokens), dtype=torch.int32, device=device).unbind()
    counts = torch.empty((batch, 2), dtype=torch.int32, device=device)
    best = torch.empty((batch, num_tokens), dtype=torch.float32, device=device)
    config = launch_config("bipartite_merge", "partition", device, N=num_tokens)
    _bipartite_merge_partition_kernel[(batch,)](
        role_ptr=role,
        sources_ptr=sources,
        destinations_ptr=destinations,
        counts_ptr=counts,
        best_ptr=best,
        joins_ptr=joins,
        num_tokens=num_tokens,
        **strides(role, "stride_rb", "stride_rn"),
        **config,
    )
    config = launch_config("bipartite_merge", "match", device, K=channels, itemsize=metric.itemsize)
    _bipartite_merge_match_kernel[(batch, cdiv(num_tokens, config["BLOCK_S"]))](
        metric_ptr=metric,
        sources_ptr=sources,
        destinations_ptr=destinations,
        counts_ptr=counts,
        best_ptr=best,
        match_ptr=match,
        num_tokens=num_tokens,
        num_channels=channels,
        threshold=float("-inf") if threshold is None else threshold,
        **strides(metric, "stride_mb", "stride_mn"),
        **config,
    )
    if num_tokens > MAX_COUNTED:
        return _assign_sorted(sources, counts, best, match, num_merged, num_kept)
    config = launch_config("bipartite_merge", "rank", device, N=num_tokens)
    grid = (batch, cdiv(num_tokens, config["BLOCK_N"]))
    _bipartite_merge_rank_kernel[grid](
        sources_ptr=sources,
        counts_ptr=counts,
        best_ptr=best,
        match_ptr=match,
        joins_ptr=joins,
        num_tokens=num_tokens,
        num_merged=num_merged,
        **config,
    )
    order = torch.empty((batch, num_kept + num_merged), dtype=torch.int32, device=device)
    dst = torch.empty((batch, num_merged), dtype=torch.int32, device=device)
    if threshold is not None:
        order.fill_(-1)
        dst.fill_(-1)
    source = torch.empty((batch, num_tokens), dtype=torch.int64, device=device)
    _bipartite_merge_assign_kernel[grid](
        joins_ptr=joins,
        order_ptr=order,
        dst_ptr=dst,
        source_ptr=source,
        num_tokens=num_tokens,
        num_kept=num_kept,
        num_merged=num_merged,
        **config,
    )
    return order, dst, source


def _assign_sorted(
    sources: Tensor, counts: Tensor, best: Tensor, match: Tensor, num_merged: int, num_kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What the rank and assign kernels find, for more tokens than are counted; the lists hold counts [B, 2] entries."""
    batch, num_tokens = best.shape
    first = descending_order(best, 0)[:, :num_merged]  # places in the list of sources
    merges = (first < counts[:, :1]) & (counts[:, 1:] > 0) & (match.gather(1, first) >= 0)
    # What does not merge is written beside the tokens. Lists of any content, as where nothing is launched, do no harm.
    token = torch.where(merges, sources.gather(1, first), num_tokens).clamp(0, num_tokens).long()
    joins = torch.full((batch, num_tokens + 1), -1, dtype=torch.int64, device=best.device)
    joins = joins.scatter_(1, token, torch.where(merges, match.gather(1, first), -1).long())[:, :num_tokens]
    slots = (joins < 0).cumsum(1) - 1
    source = torch.where(joins < 0, slots, slots.gather(1, joins.clamp(0, num_tokens - 1)))
    source = source.masked_fill(source >= num_kept, -1)
    leaves = (joins >= 0) | (source < 0)
    order = leaves.to(torch.int32).sort(dim=1, stable=True).indices
    count = (~leaves).sum(1, keepdim=True)
    place = torch.arange(num_kept + num_merged, device=best.device)
    place = torch.where(place < num_kept, torch.where(place < count, place, -1), place - num_kept + count)
    found = (place >= 0) & (place < num_tokens)
    order = torch.where(found, order.gather(1, place.clamp(0, num_tokens - 1)), -1)
    dst = torch.where(found, source.gather(1, order.clamp(min=0)), -1)[:, num_kept:]
    return order.to(torch.int32), dst.to(torch.int32), source

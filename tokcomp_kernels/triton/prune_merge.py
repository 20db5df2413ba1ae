"""prune_merge in three kernels: rank the tokens, write the kept rows and match the sources with them, write the means.

The similarity of a block of sources with a block of slots lives in registers only, and rows of pruned tokens are never
read. ``_merge_kernels`` holds those for rows that fit the registers; wider ones are matched and merged in passes
over their channels here. What one thread writes another reads in a later kernel, never in the same one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference._common import descending_order, head_mean
from tokcomp_kernels.triton._common import (
    begin_grid,
    cdiv,
    dependent_launch,
    device_guard,
    inner_contiguous,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import MAX_RESIDENT, launch_config
from tokcomp_kernels.triton._merge_norm import TABLE, Norm, merge_ranked
from tokcomp_kernels.triton._order import MAX_COUNTED, count_before
from tokcomp_kernels.triton._rows import merge_rows
from tokcomp_kernels.triton._similarity import best_matches

_COUNTS = ["num_tokens", "num_kept", "num_merged", "num_prefix_tokens"]


@triton.jit(do_not_specialize=[*_COUNTS, "num_heads", "stride_ib", "stride_ih"])
def _prune_merge_select_kernel(
    importance_ptr,
    order_ptr,
    source_ptr,
    num_tokens,
    num_kept,
    num_merged,
    num_prefix_tokens,
    num_heads,
    stride_ib,
    stride_ih,
    stride_in,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin_grid(DEPENDENT)
    batch = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_tokens
    num_alive = num_kept + num_merged
    before = count_before(
        importance_ptr + batch * stride_ib,
        offs_n,
        num_prefix_tokens,
        num_tokens,
        stride_in,
        BLOCK_J,
        num_heads,
        stride_ih,
        HEADS,
    )
    rank = tl.where(offs_n < num_prefix_tokens, offs_n, num_prefix_tokens + before)  # [BLOCK_N]
    tl.store(order_ptr + batch * num_alive + rank, offs_n, mask=mask_n & (rank < num_alive))
    # The match kernel fills in the sources.
    is_source = (rank >= num_kept) & (rank < num_alive)
    slot = tl.where(rank < num_kept, rank, -1).to(tl.int64)
    tl.store(source_ptr + batch * num_tokens + offs_n, slot, mask=mask_n & ~is_source)


@triton.jit(do_not_specialize=_COUNTS)
def _prune_merge_match_kernel(
    x_ptr,
    order_ptr,
    dst_ptr,
    similarity_ptr,
    source_ptr,
    num_tokens,
    num_kept,
    num_merged,
    num_prefix_tokens,
    num_channels,
    stride_xb,
    stride_xn,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    x_ptr += batch * stride_xb
    order_ptr += batch * (num_kept + num_merged)
    offs_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < num_merged
    src_token = tl.load(order_ptr + num_kept + offs_s, mask=mask_s, other=0).to(tl.int64)  # [BLOCK_S]
    src_ptrs = x_ptr + src_token * stride_xn
    best, best_slot = best_matches(
        x_ptr,
        order_ptr,
        src_ptrs,
        mask_s,
        num_prefix_tokens,
        num_kept,
        num_channels,
        stride_xn,
        BLOCK_S,
        BLOCK_D,
        BLOCK_C,
    )
    tl.store(dst_ptr + batch * num_merged + offs_s, best_slot, mask=mask_s)
    tl.store(similarity_ptr + batch * num_merged + offs_s, best, mask=mask_s)
    tl.store(source_ptr + batch * num_tokens + src_token, best_slot.to(tl.int64), mask=mask_s)


@checked
def prune_merge_triton(
    x: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokcomp::prune_merge`` by Triton: x [B, N, C], importance [B, N] -> [B, M, C], size [B, M], source [B, N]."""
    require_supported("prune_merge", "x", x)
    x_out, _, size_out, source = launch_prune_merge(
        x,
        None,
        importance,
        num_prune_kept,
        num_merge_kept,
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        similarity_weighted_size=similarity_weighted_size,
        norm=None,
    )
    return x_out, size_out, source


def launch_prune_merge(
    x: Tensor,
    branch: Tensor | None,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None,
    num_prefix_tokens: int,
    similarity_weighted_size: bool,
    norm: Norm | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """prune_merge of x, or of x + branch, and the LayerNorm of its rows where one is asked for; arguments are checked.

    Returns x_out [B, M, C], normalized [B, M, C] or None, size_out [B, M] float32, source [B, N] int64.
    """
    num_tokens, channels = x.shape[1:]
    num_alive = min(num_tokens, num_prune_kept)
    num_kept = min(num_alive, num_merge_kept)
    num_merged = num_alive - num_kept
    x = inner_contiguous(x)
    branch = None if branch is None else inner_contiguous(branch)
    with device_guard(x):
        order, source = _select(importance, num_kept, num_merged, num_prefix_tokens)
        if channels * x.itemsize <= MAX_RESIDENT:
            x_out, normalized, size_out = merge_ranked(
                x,
                branch,
                order,
                source,
                num_kept,
                size=size,
                num_prefix_tokens=num_prefix_tokens,
                similarity_weighted_size=similarity_weighted_size,
                norm=norm,
            )
            return x_out, normalized, size_out, source
        x = x if branch is None else x + branch
        dst, similarity = _match(x, order, source, num_kept, num_prefix_tokens)
        weights = similarity if similarity_weighted_size else None
        x_out, size_out = merge_rows(TABLE, x, size, order, dst, weights, average="mean")
        return x_out, None if norm is None else norm.of(x_out), size_out, source


def _match(x: Tensor, order: Tensor, source: Tensor, num_kept: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Each source's slot, [B, S] int32, and its cosine, [B, S] float32; fills in source at the sources."""
    batch, num_tokens, channels = x.shape
    num_merged = order.shape[1] - num_kept
    dst = torch.empty((batch, num_merged), dtype=torch.int32, device=x.device)
    similarity = torch.empty((batch, num_merged), dtype=torch.float32, device=x.device)
    if dst.numel() > 0:
        config = launch_config(TABLE, "match", x.device, S=num_merged, C=channels, itemsize=x.itemsize)
        _prune_merge_match_kernel[(batch, cdiv(num_merged, config["BLOCK_S"]))](
            x_ptr=x,
            order_ptr=order,
            dst_ptr=dst,
            similarity_ptr=similarity,
            source_ptr=source,
            num_tokens=num_tokens,
            num_kept=num_kept,
            num_merged=num_merged,
            num_prefix_tokens=num_prefix_tokens,
            num_channels=channels,
            **strides(x, "stride_xb", "stride_xn"),
            **config,
        )
    return dst, similarity


def _select(importance: Tensor, num_kept: int, num_merged: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """The first M + S tokens of the order, [B, M + S] int32, and source [B, N] but for the sources' entries."""
    batch, num_tokens = importance.shape[0], importance.shape[-1]
    num_alive = num_kept + num_merged
    if num_tokens > MAX_COUNTED:
        order = descending_order(head_mean(importance), num_prefix_tokens)
        rank = torch.arange(num_tokens, device=importance.device).expand(batch, -1)
        source = torch.empty_like(order).scatter_(1, order, torch.where(rank < num_kept, rank, -1))
        return order[:, :num_alive].to(torch.int32).contiguous(), source
    order = torch.empty((batch, num_alive), dtype=torch.int32, device=importance.device)
    source = torch.empty((batch, num_tokens), dtype=torch.int64, device=importance.device)
    if source.numel() > 0:
        config = launch_config(TABLE, "select", importance.device, N=num_tokens)
        rows = importance if importance.dim() == 3 else importance[:, None]  # [B, H, N]
        _prune_merge_select_kernel[(batch, cdiv(num_tokens, config["BLOCK_N"]))](
            importance_ptr=importance,
            order_ptr=order,
            source_ptr=source,
            num_tokens=num_tokens,
            num_kept=num_kept,
            num_merged=num_merged,
            num_prefix_tokens=num_prefix_tokens,
            num_heads=rows.shape[1],
            **strides(rows, "stride_ib", "stride_ih", "stride_in"),
            HEADS=importance.dim() == 3,
            **config,
            **dependent_launch(importance),
        )
    return order, source

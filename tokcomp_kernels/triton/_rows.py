"""Group means and sums: the kernel that writes the rows and sizes of merged tokens, for the operators that merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels.triton._common import cdiv, effective_size, narrow, strides
from tokcomp_kernels.triton._configs import launch_config


@triton.jit(do_not_specialize=["num_kept", "num_merged", "stride_sb"])
def _merge_apply_kernel(
    x_ptr,
    size_ptr,
    order_ptr,
    dst_ptr,
    similarity_ptr,
    x_out_ptr,
    size_out_ptr,
    num_kept,
    num_merged,
    num_channels,
    stride_xb,
    stride_xn,
    stride_sb,
    stride_sn,
    HAS_SIZE: tl.constexpr,
    HAS_SIMILARITY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DIVIDED: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    x_ptr += batch * stride_xb
    order_ptr += batch * (num_kept + num_merged)
    dst_ptr += batch * num_merged
    if HAS_SIZE:
        size_ptr += batch * stride_sb
    if HAS_SIMILARITY:
        similarity_ptr += batch * num_merged

    slots = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = slots < num_kept
    mask_c = offs_c < num_channels
    token = tl.load(order_ptr + slots, mask=mask_m, other=0).to(tl.int64)  # [BLOCK_M]
    alive = mask_m
    if PADDED:
        alive = mask_m & (token >= 0)
    own_rows = tl.load(
        x_ptr + token[:, None] * stride_xn + offs_c[None, :], mask=alive[:, None] & mask_c[None, :], other=0.0
    ).to(tl.float32)  # [BLOCK_M, BLOCK_C]
    total_size = tl.full([BLOCK_M], 1.0, tl.float32)
    if HAS_SIZE:
        total_size = effective_size(tl.load(size_ptr + token * stride_sn, mask=alive, other=1.0))
    rows = own_rows
    if WEIGHTED:
        rows = own_rows * total_size[:, None]
    count = tl.zeros([BLOCK_M], tl.int32)

    # Every slot of the block takes its next source in turn, so each sum runs in the order of the sources.
    for start in range(0, num_merged, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        dst = tl.load(dst_ptr + offs_s, mask=offs_s < num_merged, other=-1)
        mine = dst[None, :] == slots[:, None]  # [BLOCK_M, BLOCK_S]
        longest = tl.max(tl.sum(mine.to(tl.int32), axis=1), axis=0)
        taken = tl.full([BLOCK_M], -1, tl.int32)
        for _ in range(longest):
            left = mine & (offs_s[None, :] > taken[:, None])
            following = tl.min(tl.where(left, offs_s[None, :], num_merged), axis=1)  # [BLOCK_M]
            found = following < num_merged
            src_token = tl.load(order_ptr + num_kept + following, mask=found, other=0).to(tl.int64)
            src_rows = tl.load(
                x_ptr + src_token[:, None] * stride_xn + offs_c[None, :],
                mask=found[:, None] & mask_c[None, :],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            src_size = tl.full([BLOCK_M], 1.0, tl.float32)
            if HAS_SIZE:
                src_size = effective_size(tl.load(size_ptr + src_token * stride_sn, mask=found, other=1.0))
            if WEIGHTED:
                rows += src_rows * src_size[:, None]
            else:
                rows += src_rows
            if HAS_SIMILARITY:
                src_size *= tl.load(similarity_ptr + following, mask=found, other=0.0)
            total_size += tl.where(found, src_size, 0.0)
            count += found.to(tl.int32)
            taken = tl.where(found, following, taken)

    if DIVIDED:
        divisor = total_size if WEIGHTED else (1 + count).to(tl.float32)
        # A slot that nothing joined keeps its token exactly.
        rows = tl.where(
            (count > 0)[:, None], tl.div_rn(rows, tl.broadcast_to(divisor[:, None], [BLOCK_M, BLOCK_C])), own_rows
        )
    out_slots = batch * num_kept + slots
    tl.store(
        x_out_ptr + out_slots[:, None] * num_channels + offs_c[None, :],
        narrow(rows, x_out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_c[None, :],
    )
    if tl.program_id(2) == 0:
        total_size = effective_size(total_size)
        if PADDED:
            total_size = tl.where(alive, total_size, 0.0)
        tl.store(size_out_ptr + out_slots, total_size, mask=mask_m)


def merge_rows(
    op: str,
    x: Tensor,
    size: Tensor | None,
    order: Tensor,
    dst: Tensor,
    similarity: Tensor | None,
    *,
    average: str,
    padded: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rows and sizes of the merged tokens.

    Args:
        op: operator whose table of tile sizes is read.
        x: [B, N, C], rows contiguous.
        size: [B, N], or None for ones.
        order: [B, M + S] int32: the token of each slot, then the sources, in the order in which they are added.
        dst: [B, S] int32: each source's slot; -1 for one that none takes.
        similarity: [B, S] float32 that scales a source's size, or None.
        average: what a group's rows become: ``size``, their mean weighted by size; ``mean``, the plain mean; ``sum``.
        padded: whether slots may have no token, -1 in ``order``: they become zeros of size 0.

    Returns:
        x_out [B, M, C] in x's dtype and size_out [B, M] float32.
    """
    batch, _, channels = x.shape
    num_merged = dst.shape[1]
    num_kept = order.shape[1] - num_merged
    x_out = torch.empty((batch, num_kept, channels), dtype=x.dtype, device=x.device)
    size_out = torch.empty((batch, num_kept), dtype=torch.float32, device=x.device)
    if size_out.numel() == 0:
        return x_out, size_out
    config = launch_config(op, "apply", x.device, S=num_merged, C=channels)
    grid = (batch, cdiv(num_kept, config["BLOCK_M"]), max(1, cdiv(channels, config["BLOCK_C"])))
    _merge_apply_kernel[grid](
        x_ptr=x,
        size_ptr=size,
        order_ptr=order,
        dst_ptr=dst,
        similarity_ptr=similarity,
        x_out_ptr=x_out,
        size_out_ptr=size_out,
        num_kept=num_kept,
        num_merged=num_merged,
        num_channels=channels,
        **strides(x, "stride_xb", "stride_xn"),
        **strides(size, "stride_sb", "stride_sn"),
        HAS_SIZE=size is not None,
        HAS_SIMILARITY=similarity is not None,
        WEIGHTED=average == "size",
        DIVIDED=average != "sum",
        PADDED=padded,
        **config,
    )
    return x_out, size_out

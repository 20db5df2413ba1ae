"""unmerge: every position reads the row its token went to. Backward: the rows of a slot, added in position order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._common import cdiv, device_guard, inner_contiguous, narrow, require_supported, strides
from tokcomp_kernels.triton._configs import launch_config


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "stride_sb"])
def _unmerge_fwd_kernel(
    x_ptr,
    source_ptr,
    fill_ptr,
    out_ptr,
    num_tokens,
    num_kept,
    num_channels,
    stride_xb,
    stride_xm,
    stride_sb,
    stride_sn,
    stride_fb,
    stride_fn,
    HAS_FILL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_n = offs_n < num_tokens
    mask_c = offs_c < num_channels
    source = tl.load(source_ptr + batch * stride_sb + offs_n * stride_sn, mask=mask_n, other=-1)  # [BLOCK_N]
    present = (source >= 0) & (source < num_kept)
    slot = tl.where(present, source, 0)
    rows = tl.load(
        x_ptr + batch * stride_xb + slot[:, None] * stride_xm + offs_c[None, :],
        mask=present[:, None] & mask_c[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_C]
    if HAS_FILL:
        pruned = mask_n & ~present
        fill = tl.load(
            fill_ptr + batch * stride_fb + offs_n[:, None] * stride_fn + offs_c[None, :],
            mask=pruned[:, None] & mask_c[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_C]
        rows = tl.where(present[:, None], rows, fill)
    tl.store(
        out_ptr + (batch * num_tokens + offs_n)[:, None] * num_channels + offs_c[None, :],
        rows,
        mask=mask_n[:, None] & mask_c[None, :],
    )


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "stride_sb"])
def _unmerge_bwd_kernel(
    grad_ptr,
    source_ptr,
    out_ptr,
    num_tokens,
    num_kept,
    num_channels,
    stride_gb,
    stride_gn,
    stride_sb,
    stride_sn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    grad_ptr += batch * stride_gb
    source_ptr += batch * stride_sb
    slots = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = slots < num_kept
    mask_c = offs_c < num_channels
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    # Every slot of the block takes its next position in turn, so each sum runs in position order.
    for start in range(0, num_tokens, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        source = tl.load(source_ptr + offs_n.to(tl.int64) * stride_sn, mask=offs_n < num_tokens, other=-1)
        mine = (source[None, :] == slots[:, None]) & mask_m[:, None]  # [BLOCK_M, BLOCK_N]
        longest = tl.max(tl.sum(mine.to(tl.int32), axis=1), axis=0)
        taken = tl.full([BLOCK_M], -1, tl.int32)
        for _ in range(longest):
            left = mine & (offs_n[None, :] > taken[:, None])
            following = tl.min(tl.where(left, offs_n[None, :], num_tokens), axis=1)  # [BLOCK_M]
            found = following < num_tokens
            position = tl.where(found, following, 0).to(tl.int64)
            total += tl.load(
                grad_ptr + position[:, None] * stride_gn + offs_c[None, :],
                mask=found[:, None] & mask_c[None, :],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_M, BLOCK_C]
            taken = tl.where(found, following, taken)
    out_rows = batch * num_kept + slots
    tl.store(
        out_ptr + out_rows[:, None] * num_channels + offs_c[None, :],
        narrow(total, out_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_c[None, :],
    )


@checked
def unmerge_triton(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> Tensor:
    """``tokcomp::unmerge`` by Triton: x [B, M, C], source [B, N], pruned_fill [B, N, C] -> [B, N, C]."""
    require_supported("unmerge", "x", x)
    x = inner_contiguous(x)
    fill = None if pruned_fill is None else inner_contiguous(pruned_fill)
    batch, num_kept, channels = x.shape
    num_tokens = source.shape[1]
    out = torch.empty((batch, num_tokens, channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = launch_config("unmerge", "forward", x.device, C=channels)
    grid = (batch, cdiv(num_tokens, config["BLOCK_N"]), cdiv(channels, config["BLOCK_C"]))
    with device_guard(x):
        _unmerge_fwd_kernel[grid](
            x_ptr=x,
            source_ptr=source,
            fill_ptr=fill,
            out_ptr=out,
            num_tokens=num_tokens,
            num_kept=num_kept,
            num_channels=channels,
            **strides(x, "stride_xb", "stride_xm"),
            **strides(source, "stride_sb", "stride_sn"),
            **strides(fill, "stride_fb", "stride_fn"),
            HAS_FILL=fill is not None,
            **config,
        )
    return out


@checked
def unmerge_backward_triton(grad: Tensor, source: Tensor, num_tokens: int) -> Tensor:
    """``tokcomp::_unmerge_backward`` by Triton: grad [B, N, C], source [B, N] -> [B, num_tokens, C]."""
    require_supported("_unmerge_backward", "grad", grad)
    grad = inner_contiguous(grad)
    batch, num_positions, channels = grad.shape
    out = torch.empty((batch, num_tokens, channels), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    config = launch_config("unmerge", "backward", grad.device, C=channels)
    grid = (batch, cdiv(num_tokens, config["BLOCK_M"]), cdiv(channels, config["BLOCK_C"]))
    with device_guard(grad):
        _unmerge_bwd_kernel[grid](
            grad_ptr=grad,
            source_ptr=source,
            out_ptr=out,
            num_tokens=num_positions,
            num_kept=num_tokens,
            num_channels=channels,
            **strides(grad, "stride_gb", "stride_gn"),
            **strides(source, "stride_sb", "stride_sn"),
            **config,
        )
    return out

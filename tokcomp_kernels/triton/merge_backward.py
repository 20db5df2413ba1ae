"""_merge_backward: the gradient of a group mean, for prune_merge (plain mean) and tome_merge (weighted by size)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
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


@triton.jit(do_not_specialize=["num_tokens", "num_kept", "stride_sb", "stride_wb"])
def _merge_bwd_kernel(
    grad_ptr,
    source_ptr,
    size_ptr,
    out_ptr,
    num_tokens,
    num_kept,
    num_channels,
    stride_gb,
    stride_gm,
    stride_sb,
    stride_sn,
    stride_wb,
    stride_wn,
    HAS_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    grad_ptr += batch * stride_gb
    source_ptr += batch * stride_sb
    if HAS_SIZE:
        size_ptr += batch * stride_wb
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < num_tokens
    source = tl.load(source_ptr + offs_n * stride_sn, mask=mask_n, other=-1)  # [BLOCK_N]
    present = (source >= 0) & (source < num_kept)

    shared = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    for start in range(0, num_tokens, BLOCK_J):
        offs_j = (start + tl.arange(0, BLOCK_J)).to(tl.int64)
        mask_j = offs_j < num_tokens
        source_j = tl.load(source_ptr + offs_j * stride_sn, mask=mask_j, other=-1)  # [BLOCK_J]
        weight_j = tl.full([BLOCK_J], 1.0, tl.float32)
        if HAS_SIZE:
            weight_j = effective_size(tl.load(size_ptr + offs_j * stride_wn, mask=mask_j, other=1.0))
        same = (source[:, None] == source_j[None, :]) & mask_j[None, :]
        shared += tl.where(same, weight_j[None, :], 0.0)  # [BLOCK_N, BLOCK_J]
    total = tl.sum(shared, axis=1)
    weight = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_SIZE:
        weight = effective_size(tl.load(size_ptr + offs_n * stride_wn, mask=mask_n, other=1.0))
    share = tl.where(present, tl.div_rn(weight, tl.where(present, total, 1.0)), 0.0)  # [BLOCK_N]

    slot = tl.maximum(source, 0)  # where nothing is present, masked
    for start_c in range(0, num_channels, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_channels
        grad = tl.load(
            grad_ptr + slot[:, None] * stride_gm + offs_c[None, :], mask=present[:, None] & mask_c[None, :], other=0.0
        ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        tl.store(
            out_ptr + (batch * num_tokens + offs_n)[:, None] * num_channels + offs_c[None, :],
            narrow(grad * share[:, None], out_ptr.dtype.element_ty),
            mask=mask_n[:, None] & mask_c[None, :],
        )


@checked
def merge_backward_triton(grad: Tensor, source: Tensor, size: Tensor | None = None) -> Tensor:
    """``tokcomp::_merge_backward`` by Triton: grad [B, M, C], source [B, N], size [B, N] -> [B, N, C]."""
    require_supported("_merge_backward", "grad", grad)
    grad = inner_contiguous(grad)
    batch, num_kept, channels = grad.shape
    num_tokens = source.shape[1]
    out = torch.empty((batch, num_tokens, channels), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    config = launch_config("merge_backward", "backward", grad.device, C=channels)
    with device_guard(grad):
        _merge_bwd_kernel[(batch, cdiv(num_tokens, config["BLOCK_N"]))](
            grad_ptr=grad,
            source_ptr=source,
            size_ptr=size,
            out_ptr=out,
            num_tokens=num_tokens,
            num_kept=num_kept,
            num_channels=channels,
            **strides(grad, "stride_gb", "stride_gm"),
            **strides(source, "stride_sb", "stride_sn"),
            **strides(size, "stride_wb", "stride_wn"),
            HAS_SIZE=size is not None,
            **config,
        )
    return out

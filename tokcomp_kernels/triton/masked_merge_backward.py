"""_masked_merge_backward: each token's own share of its gradient, and a source's share of its destination's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._common import cdiv, device_guard, inner_contiguous, narrow, require_supported, strides
from tokcomp_kernels.triton._configs import launch_config


@triton.jit(do_not_specialize=["num_tokens", "stride_db"])
def _masked_merge_bwd_kernel(
    grad_ptr,
    destination_ptr,
    out_ptr,
    num_tokens,
    num_channels,
    stride_gb,
    stride_gn,
    stride_db,
    stride_dn,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    grad_ptr += batch * stride_gb
    destination_ptr += batch * stride_db
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < num_tokens
    target = tl.load(destination_ptr + offs_n * stride_dn, mask=mask_n, other=-1)  # [BLOCK_N]
    merges = (target >= 0) & (target < num_tokens) & (target != offs_n)
    target = tl.where(merges, target, offs_n)

    into_own = tl.zeros([BLOCK_N, BLOCK_J], tl.int32)
    into_target = tl.zeros([BLOCK_N, BLOCK_J], tl.int32)
    for start in range(0, num_tokens, BLOCK_J):
        offs_j = (start + tl.arange(0, BLOCK_J)).to(tl.int64)
        target_j = tl.load(destination_ptr + offs_j * stride_dn, mask=offs_j < num_tokens, other=-1)  # [BLOCK_J]
        target_j = tl.where(target_j == offs_j, -1, target_j)
        into_own += (target_j[None, :] == offs_n[:, None]).to(tl.int32)  # [BLOCK_N, BLOCK_J]
        into_target += (target_j[None, :] == target[:, None]).to(tl.int32)
    share_own = tl.div_rn(1.0, (1 + tl.sum(into_own, axis=1)).to(tl.float32))  # [BLOCK_N]
    share_target = tl.div_rn(1.0, (1 + tl.sum(into_target, axis=1)).to(tl.float32))

    for start_c in range(0, num_channels, BLOCK_C):
        offs_c = start_c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < num_channels
        grad_own = tl.load(
            grad_ptr + offs_n[:, None] * stride_gn + offs_c[None, :], mask=mask_n[:, None] & mask_c[None, :], other=0.0
        ).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        grad_target = tl.load(
            grad_ptr + target[:, None] * stride_gn + offs_c[None, :], mask=merges[:, None] & mask_c[None, :], other=0.0
        ).to(tl.float32)
        tl.store(
            out_ptr + (batch * num_tokens + offs_n)[:, None] * num_channels + offs_c[None, :],
            narrow(grad_own * share_own[:, None] + grad_target * share_target[:, None], out_ptr.dtype.element_ty),
            mask=mask_n[:, None] & mask_c[None, :],
        )


@checked
def masked_merge_backward_triton(grad: Tensor, destination: Tensor) -> Tensor:
    """``tokcomp::_masked_merge_backward`` by Triton: grad [B, N, C], destination [B, N] -> [B, N, C]."""
    require_supported("_masked_merge_backward", "grad", grad)
    grad = inner_contiguous(grad)
    batch, num_tokens, channels = grad.shape
    out = torch.empty((batch, num_tokens, channels), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    config = launch_config("masked_merge_backward", "backward", grad.device, C=channels)
    with device_guard(grad):
        _masked_merge_bwd_kernel[(batch, cdiv(num_tokens, config["BLOCK_N"]))](
            grad_ptr=grad,
            destination_ptr=destination,
            out_ptr=out,
            num_tokens=num_tokens,
            num_channels=channels,
            **strides(grad, "stride_gb", "stride_gn"),
            **strides(destination, "stride_db", "stride_dn"),
            **config,
        )
    return out

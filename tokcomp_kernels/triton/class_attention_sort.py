"""class_attention_sort in three kernels: the class token's scores per head, the mean of their softmax, the ranks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference._common import descending_order
from tokcomp_kernels.triton._attention import finite_max, load_bias, load_rows
from tokcomp_kernels.triton._common import (
    LOG2_E,
    cdiv,
    device_guard,
    inner_contiguous,
    next_power_of_2,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import ENABLE_FP_FUSION, ORDER_BLOCK, launch_config
from tokcomp_kernels.triton._order import MAX_COUNTED, count_before
from tokcomp_kernels.triton._reduce import reduce_groups


@triton.jit(do_not_specialize=["H", "N", "stride_sb"])
def _class_attention_scores_kernel(
    q_ptr,
    k_ptr,
    size_ptr,
    scores_ptr,
    stats_ptr,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_sb,
    stride_sn,
    H,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SIZE: tl.constexpr,
):
    """One program per (image, head): base-2 scores [B, H, N], and their maximum and sum of powers [B, H, 2]."""
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    h = bh % H
    k_ptr += b * stride_kb + h * stride_kh
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    # A maximum and a sum in every lane; lanes come together once, at the end.
    lane_max = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    lane_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        k = load_rows(k_ptr, offs_n, stride_kn, N, D, BLOCK_D).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        scores = tl.sum(k * q[None, :], 1) * (scale * LOG2_E)  # [BLOCK_N]
        if HAS_SIZE:
            scores += load_bias(size_ptr + b * stride_sb, offs_n, stride_sn, N)
        tl.store(scores_ptr + bh * N + offs_n, scores, mask=mask_n)
        scores = tl.where(mask_n, scores, float("-inf"))
        new_max = tl.maximum(lane_max, scores)
        subtract = finite_max(new_max)
        lane_sum = lane_sum * tl.exp2(lane_max - subtract) + tl.exp2(scores - subtract)
        lane_max = new_max
    row_max = finite_max(tl.max(lane_max, 0))
    tl.store(stats_ptr + 2 * bh, row_max)
    tl.store(stats_ptr + 2 * bh + 1, tl.sum(lane_sum * tl.exp2(finite_max(lane_max) - row_max), 0))


@triton.jit(do_not_specialize=["N", "num_prefix_tokens"])
def _token_order_kernel(
    cls_ptr,
    order_ptr,
    N,
    num_prefix_tokens,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_I)
    pid = tl.program_id(0)
    b = (pid // num_blocks).to(tl.int64)
    offs_i = (pid % num_blocks) * BLOCK_I + tl.arange(0, BLOCK_I)
    before = count_before(cls_ptr + b * N, offs_i, num_prefix_tokens, N, 1, BLOCK_J)
    rank = tl.where(offs_i < num_prefix_tokens, offs_i, num_prefix_tokens + before)  # [BLOCK_I]
    tl.store(order_ptr + b * N + rank, offs_i.to(tl.int64), mask=offs_i < N)


def token_order(cls_attn: Tensor, num_prefix_tokens: int) -> Tensor:
    """[B, N] -> [B, N] int64: the prefix as it stands, then descending values, ties by lower index, NaN last."""
    batch, num_tokens = cls_attn.shape
    if num_tokens > MAX_COUNTED:
        return descending_order(cls_attn, num_prefix_tokens)
    order = torch.empty(batch, num_tokens, dtype=torch.int64, device=cls_attn.device)
    if order.numel() > 0:
        with device_guard(cls_attn):
            _token_order_kernel[(batch * cdiv(num_tokens, ORDER_BLOCK),)](
                cls_ptr=cls_attn,
                order_ptr=order,
                N=num_tokens,
                num_prefix_tokens=num_prefix_tokens,
                BLOCK_I=ORDER_BLOCK,
                BLOCK_J=ORDER_BLOCK,
                num_warps=4,
                enable_fp_fusion=ENABLE_FP_FUSION,
            )
    return order


@checked
def class_attention_sort_triton(
    q_cls: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """``tokcomp::class_attention_sort`` in Triton, for float16, bfloat16 and float32."""
    require_supported("class_attention_sort", "k", k)
    batch, heads, num_tokens, width = k.shape
    q_cls, k = inner_contiguous(q_cls), inner_contiguous(k)
    scores = torch.empty(batch, heads, num_tokens, dtype=torch.float32, device=k.device)
    stats = torch.empty(batch, heads, 2, dtype=torch.float32, device=k.device)
    if scores.numel() > 0:
        config = launch_config("class_attention_sort", "scores", k.device, D=width, itemsize=k.element_size())
        with device_guard(k):
            _class_attention_scores_kernel[(batch * heads,)](
                q_ptr=q_cls,
                k_ptr=k,
                size_ptr=size,
                scores_ptr=scores,
                stats_ptr=stats,
                **strides(q_cls, "stride_qb", "stride_qh"),
                **strides(k, "stride_kb", "stride_kh", "stride_kn"),
                **strides(size, "stride_sb", "stride_sn"),
                H=heads,
                N=num_tokens,
                scale=width**-0.5 if scale is None else float(scale),
                D=width,
                BLOCK_D=next_power_of_2(width),
                HAS_SIZE=size is not None,
                **config,
            )
    cls_attn = reduce_groups(scores, stats=stats, mean=True, dtype=torch.float32)
    return cls_attn, token_order(cls_attn, num_prefix_tokens)

"""Sums over the heads of an image in a fixed order: one thread owns a token and adds its values one after another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels.triton._common import begin_grid, cdiv, dependent_launch, device_guard
from tokcomp_kernels.triton._configs import ENABLE_FP_FUSION, REDUCE_BLOCK


@triton.jit(do_not_specialize=["N", "G"])
def _reduce_kernel(
    values_ptr,
    stats_ptr,
    out_ptr,
    G,
    N,
    FROM_LOGITS: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin_grid(DEPENDENT)
    num_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    b = (pid // num_blocks).to(tl.int64)
    offs_n = (pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for g in range(0, G):
        row = b * G + g
        value = tl.load(values_ptr + row * N + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
        if FROM_LOGITS:
            row_max = tl.load(stats_ptr + 2 * row)
            row_sum = tl.load(stats_ptr + 2 * row + 1)
            value = tl.exp2(value - row_max) / row_sum
        total += value
    if MEAN:
        total = total / G
    tl.store(out_ptr + b * N + offs_n, total, mask=mask_n)


def reduce_groups(values: Tensor, *, stats: Tensor | None = None, mean: bool, dtype: torch.dtype) -> Tensor:
    """Sum or mean of ``values`` [B, G, N] (float32) over its groups, in their order: [B, N] of ``dtype``.

    With ``stats`` [B, G, 2] the values are base-2 logits, and stats a row's maximum and its sum of powers of two: what
    is added up is then the softmax of that row.
    """
    batch, groups, num_tokens = values.shape
    out = torch.empty(batch, num_tokens, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    with device_guard(values):
        _reduce_kernel[(batch * cdiv(num_tokens, REDUCE_BLOCK),)](
            values_ptr=values,
            stats_ptr=stats,
            out_ptr=out,
            G=groups,
            N=num_tokens,
            FROM_LOGITS=stats is not None,
            MEAN=mean,
            BLOCK_N=REDUCE_BLOCK,
            num_warps=4,
            enable_fp_fusion=ENABLE_FP_FUSION,
            **dependent_launch(values),
        )
    return out

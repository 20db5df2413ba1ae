"""Attention backward, with or without a token mask: every row's softmax is computed again, nothing else was kept.

A row kernel finds each row's maximum, sum and mean gradient, and from them dQ; a column kernel reads those three and
adds up dK, dV and the mask's gradient over the rows, in their order. No atomics: the same bits every time.

With e = exp(S - max), A = e * M, Z = sum A + eps and P = (A + eps/N) / Z (M = 1 and eps = 0 without a mask):
dA = (dO V^T - sum_k P dO V^T) / Z, dS = dA * A, and the mask's gradient is the sum of e * dA off the diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._attention import (
    UNSPECIALIZED,
    apply_mask,
    finite_max,
    key_scores,
    launch_options,
    load_bias,
    load_mask,
    load_rows,
    store_rows,
)
from tokcomp_kernels.triton._common import (
    LOG2_E,
    cdiv,
    device_guard,
    dot,
    inner_contiguous,
    narrow,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._reduce import reduce_groups


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_rows_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    size_ptr,
    mask_ptr,
    dq_ptr,
    stats_ptr,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_sb,
    stride_sn,
    stride_mb,
    stride_mn,
    H,
    N,
    scale,
    eps,
    eps_over_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SINGLE_TILE: tl.constexpr,
):
    """dq_ptr [B, H, N, D]; stats_ptr [B, H, 3, N]: each row's maximum, 1 / Z and mean gradient."""
    num_blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    do_ptr += b * stride_gb + h * stride_gh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    dq_ptr += bh * N * D
    stats_ptr += bh * 3 * N
    if HAS_SIZE:
        size_ptr += b * stride_sb
    if HAS_MASK:
        mask_ptr += b * stride_mb
    offs_m = (pid % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_tile = tl.arange(0, BLOCK_N)
    q = load_rows(q_ptr, offs_m, stride_qn, N, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = load_rows(do_ptr, offs_m, stride_gn, N, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    if SINGLE_TILE:
        k = load_rows(k_ptr, offs_tile, stride_kn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        scores = key_scores(q, k, size_ptr, offs_tile, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
        row_max = finite_max(tl.max(scores, 1))  # [BLOCK_M]
        powers = tl.exp2(scores - row_max[:, None])
        v = load_rows(v_ptr, offs_tile, stride_vn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))  # [BLOCK_M, BLOCK_N]
        if HAS_MASK:
            powers = apply_mask(powers, load_mask(mask_ptr, offs_tile, stride_mn, N)[None, :], offs_m, offs_tile)
            row_sum = tl.sum(powers, 1) + eps
            mean = tl.div_rn(tl.sum((powers + eps_over_n) * dp, 1), row_sum)
        else:
            row_sum = tl.sum(powers, 1)
            mean = tl.div_rn(tl.sum(powers * dp, 1), row_sum)
        inverse = 1.0 / row_sum
        ds = powers * ((dp - mean[:, None]) * inverse[:, None])
        dq = dot(narrow(ds, k.dtype), k, tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32))  # [BLOCK_M, BLOCK_D]
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        mean = tl.zeros([BLOCK_M], dtype=tl.float32)
        plain_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            k = load_rows(k_ptr, offs_n, stride_kn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            scores = key_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            subtract = finite_max(new_max)
            decay = tl.exp2(row_max - subtract)
            powers = tl.exp2(scores - subtract[:, None])
            v = load_rows(v_ptr, offs_n, stride_vn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))  # [BLOCK_M, BLOCK_N]
            if HAS_MASK:
                powers = apply_mask(powers, load_mask(mask_ptr, offs_n, stride_mn, N)[None, :], offs_m, offs_n)
                plain_sum += tl.sum(dp, 1)
            row_sum = row_sum * decay + tl.sum(powers, 1)
            mean = mean * decay + tl.sum(powers * dp, 1)
            row_max = new_max
        row_max = finite_max(row_max)
        if HAS_MASK:
            row_sum += eps
            mean += eps_over_n * plain_sum
        inverse = 1.0 / row_sum
        mean = tl.div_rn(mean, row_sum)
        dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            k = load_rows(k_ptr, offs_n, stride_kn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            scores = key_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
            powers = tl.exp2(scores - row_max[:, None])
            if HAS_MASK:
                powers = apply_mask(powers, load_mask(mask_ptr, offs_n, stride_mn, N)[None, :], offs_m, offs_n)
            v = load_rows(v_ptr, offs_n, stride_vn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            dp = dot(do, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32))  # [BLOCK_M, BLOCK_N]
            ds = powers * ((dp - mean[:, None]) * inverse[:, None])
            dq = dot(narrow(ds, k.dtype), k, dq)

    store_rows(dq_ptr, offs_m, D, N, dq * scale, D, BLOCK_D)
    mask_m = offs_m < N
    tl.store(stats_ptr + offs_m, row_max, mask=mask_m)
    tl.store(stats_ptr + N + offs_m, inverse, mask=mask_m)
    tl.store(stats_ptr + 2 * N + offs_m, mean, mask=mask_m)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_columns_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    size_ptr,
    mask_ptr,
    stats_ptr,
    dk_ptr,
    dv_ptr,
    dm_ptr,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_sb,
    stride_sn,
    stride_mb,
    stride_mn,
    H,
    N,
    scale,
    eps_over_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """dk_ptr, dv_ptr [B, H, N, D]; dm_ptr [B, H, N], the mask's gradient from each head. Tiles are keys by queries."""
    num_blocks = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    do_ptr += b * stride_gb + h * stride_gh
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    stats_ptr += bh * 3 * N
    offs_n = (pid % num_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr, offs_n, stride_kn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptr, offs_n, stride_vn, N, D, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    if HAS_SIZE:
        bias = load_bias(size_ptr + b * stride_sb, offs_n, stride_sn, N)  # [BLOCK_N]
    if HAS_MASK:
        token_mask = load_mask(mask_ptr + b * stride_mb, offs_n, stride_mn, N)  # [BLOCK_N]
        dm = tl.zeros([BLOCK_N], dtype=tl.float32)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start_m in range(0, N, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < N
        q = load_rows(q_ptr, offs_m, stride_qn, N, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        row_max = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
        inverse = tl.load(stats_ptr + N + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
        mean = tl.load(stats_ptr + 2 * N + offs_m, mask=mask_m, other=0.0)  # [BLOCK_M]
        scores = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)) * (scale * LOG2_E)
        if HAS_SIZE:
            scores += bias[:, None]
        # Rows beyond N must add nothing, not even NaN from an infinite key or size.
        powers = tl.where(mask_m[None, :], tl.exp2(scores - row_max[None, :]), 0.0)
        do = load_rows(do_ptr, offs_m, stride_gn, N, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        dp = dot(v, tl.trans(do), tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32))  # [BLOCK_N, BLOCK_M]
        da = tl.where(mask_m[None, :], (dp - mean[None, :]) * inverse[None, :], 0.0)
        if HAS_MASK:
            dm += tl.sum(tl.where(offs_n[:, None] == offs_m[None, :], 0.0, powers * da), 1)
            powers = apply_mask(powers, token_mask[:, None], offs_m, offs_n, TRANSPOSED=True)
            probs = (powers + eps_over_n) * inverse[None, :]
        else:
            probs = powers * inverse[None, :]
        dv = dot(narrow(probs, do.dtype), do, dv)  # [BLOCK_N, BLOCK_D]
        dk = dot(narrow(powers * da, q.dtype), q, dk)  # [BLOCK_N, BLOCK_D]
    store_rows(dk_ptr + bh * N * D, offs_n, D, N, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + bh * N * D, offs_n, D, N, dv, D, BLOCK_D)
    if HAS_MASK:
        tl.store(dm_ptr + bh * N + offs_n, dm, mask=offs_n < N)


def attention_backward(
    op: str,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None,
    scale: float | None,
    token_mask: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Launch the backward kernels on checked arguments: dQ, dK, dV [B, H, N, D] and the mask's gradient [B, N]."""
    require_supported("_" + op + "_backward", "q", q)
    batch, heads, num_tokens, width = q.shape
    grad_out, q, k, v = (inner_contiguous(tensor) for tensor in (grad_out, q, k, v))
    grad_q, grad_k, grad_v = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    stats = torch.empty(batch, heads, 3, num_tokens, dtype=torch.float32, device=q.device)
    grad_mask = None
    if token_mask is not None:
        grad_mask = torch.empty(batch, heads, num_tokens, dtype=torch.float32, device=q.device)
    if stats.numel() > 0:
        rows = launch_options(op, "backward_rows", q.device, num_tokens, width, q.element_size())
        columns = launch_options(op, "backward_columns", q.device, num_tokens, width, q.element_size())
        del columns["SINGLE_TILE"]
        inputs = {"do_ptr": grad_out, "q_ptr": q, "k_ptr": k, "v_ptr": v, "size_ptr": size, "mask_ptr": token_mask}
        shape: dict[str, Any] = {
            **strides(grad_out, "stride_gb", "stride_gh", "stride_gn"),
            **strides(q, "stride_qb", "stride_qh", "stride_qn"),
            **strides(k, "stride_kb", "stride_kh", "stride_kn"),
            **strides(v, "stride_vb", "stride_vh", "stride_vn"),
            **strides(size, "stride_sb", "stride_sn"),
            **strides(token_mask, "stride_mb", "stride_mn"),
            "H": heads,
            "N": num_tokens,
            "scale": width**-0.5 if scale is None else float(scale),
        }
        flags = {"HAS_SIZE": size is not None, "HAS_MASK": token_mask is not None}
        with device_guard(q):
            _attention_bwd_rows_kernel[(batch * heads * cdiv(num_tokens, rows["BLOCK_M"]),)](
                **inputs,
                dq_ptr=grad_q,
                stats_ptr=stats,
                **shape,
                eps=float(eps),
                eps_over_n=eps / num_tokens,
                **flags,
                **rows,
            )
            _attention_bwd_columns_kernel[(batch * heads * cdiv(num_tokens, columns["BLOCK_N"]),)](
                **inputs,
                stats_ptr=stats,
                dk_ptr=grad_k,
                dv_ptr=grad_v,
                dm_ptr=grad_mask,
                **shape,
                eps_over_n=eps / num_tokens,
                **flags,
                **columns,
            )
    if grad_mask is not None and token_mask is not None:
        grad_mask = reduce_groups(grad_mask, mean=False, dtype=token_mask.dtype)
    return grad_q, grad_k, grad_v, grad_mask


@checked
def attention_backward_triton(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``tokcomp::_attention_backward`` in Triton, for float16, bfloat16 and float32."""
    grad_q, grad_k, grad_v, _ = attention_backward("attention", grad_out, q, k, v, size=size, scale=scale)
    return grad_q, grad_k, grad_v

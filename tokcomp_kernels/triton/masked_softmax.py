"""masked_softmax, forward and backward: a program owns a block of rows of one (image, head).

With e = exp(S - max), A = e * M and Z = sum A + eps, P = (A + eps/N) / Z. Rows of up to BLOCK_N columns stay in
registers and are read once; longer ones are read twice. The mask's gradient is a sum over heads and rows: each program
stores the sum over its own rows, and these are added up in their order, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._attention import apply_mask, finite_max, load_mask
from tokcomp_kernels.triton._common import (
    LOG2_E,
    cdiv,
    device_guard,
    inner_contiguous,
    narrow,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._reduce import reduce_groups


@triton.jit
def _tile_offsets(offs_m, offs_n, stride_m):
    return offs_m.to(tl.int64)[:, None] * stride_m + offs_n[None, :]  # [BLOCK_M, BLOCK_N]


@triton.jit
def _load_tile(ptr, offs_m, offs_n, stride_m, N, other):
    mask = (offs_m < N)[:, None] & (offs_n < N)[None, :]
    return tl.load(ptr + _tile_offsets(offs_m, offs_n, stride_m), mask=mask, other=other).to(tl.float32)


@triton.jit
def _store_tile(ptr, offs_m, offs_n, N, tile):
    mask = (offs_m < N)[:, None] & (offs_n < N)[None, :]
    tl.store(ptr + _tile_offsets(offs_m, offs_n, N), narrow(tile, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit(do_not_specialize=["H", "N", "stride_mb"])
def _masked_softmax_fwd_kernel(
    scores_ptr,
    mask_ptr,
    out_ptr,
    stride_sb,
    stride_sh,
    stride_sm,
    stride_mb,
    stride_mn,
    H,
    N,
    eps,
    eps_over_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINGLE_TILE: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    scores_ptr += b * stride_sb + h * stride_sh
    mask_ptr += b * stride_mb
    out_ptr += bh * N * N
    offs_m = (pid % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_tile = tl.arange(0, BLOCK_N)
    if SINGLE_TILE:
        scores = _load_tile(scores_ptr, offs_m, offs_tile, stride_sm, N, float("-inf"))  # [BLOCK_M, BLOCK_N]
        row_max = finite_max(tl.max(scores, 1))  # [BLOCK_M]
        token_mask = load_mask(mask_ptr, offs_tile, stride_mn, N)  # [BLOCK_N]
        powers = apply_mask(_exp(scores - row_max[:, None]), token_mask[None, :], offs_m, offs_tile)
        row_sum = tl.sum(powers, 1) + eps
        _store_tile(out_ptr, offs_m, offs_tile, N, (powers + eps_over_n) / row_sum[:, None])
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            scores = _load_tile(scores_ptr, offs_m, offs_n, stride_sm, N, float("-inf"))  # [BLOCK_M, BLOCK_N]
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            subtract = finite_max(new_max)
            token_mask = load_mask(mask_ptr, offs_n, stride_mn, N)  # [BLOCK_N]
            powers = apply_mask(_exp(scores - subtract[:, None]), token_mask[None, :], offs_m, offs_n)
            row_sum = row_sum * _exp(row_max - subtract) + tl.sum(powers, 1)
            row_max = new_max
        row_max = finite_max(row_max)
        row_sum += eps
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            scores = _load_tile(scores_ptr, offs_m, offs_n, stride_sm, N, float("-inf"))  # [BLOCK_M, BLOCK_N]
            token_mask = load_mask(mask_ptr, offs_n, stride_mn, N)  # [BLOCK_N]
            powers = apply_mask(_exp(scores - row_max[:, None]), token_mask[None, :], offs_m, offs_n)
            _store_tile(out_ptr, offs_m, offs_n, N, (powers + eps_over_n) / row_sum[:, None])


@triton.jit
def _store_gradients(ds_ptr, dm_ptr, powers, grad, mean, inverse, token_mask, offs_m, offs_n, N):
    """One tile of dS, and the sum over its rows of the mask's gradient."""
    da = (grad - mean[:, None]) * inverse[:, None]  # [BLOCK_M, BLOCK_N]
    _store_tile(ds_ptr, offs_m, offs_n, N, apply_mask(powers, token_mask[None, :], offs_m, offs_n) * da)
    dm = tl.sum(tl.where(offs_m[:, None] == offs_n[None, :], 0.0, powers * da), 0)  # [BLOCK_N]
    tl.store(dm_ptr + offs_n, dm, mask=offs_n < N)


@triton.jit(do_not_specialize=["H", "N", "stride_mb"])
def _masked_softmax_bwd_kernel(
    grad_ptr,
    scores_ptr,
    mask_ptr,
    ds_ptr,
    dm_ptr,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_sb,
    stride_sh,
    stride_sm,
    stride_mb,
    stride_mn,
    H,
    N,
    eps,
    eps_over_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SINGLE_TILE: tl.constexpr,
):
    """ds_ptr [B, H, N, N]; dm_ptr [B, H * row blocks, N]. Rows beyond N have no powers, and so add nothing."""
    num_blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    grad_ptr += b * stride_gb + h * stride_gh
    scores_ptr += b * stride_sb + h * stride_sh
    mask_ptr += b * stride_mb
    ds_ptr += bh * N * N
    dm_ptr += pid.to(tl.int64) * N
    offs_m = (pid % num_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_tile = tl.arange(0, BLOCK_N)
    if SINGLE_TILE:
        scores = _load_tile(scores_ptr, offs_m, offs_tile, stride_sm, N, float("-inf"))  # [BLOCK_M, BLOCK_N]
        powers = _exp(scores - finite_max(tl.max(scores, 1))[:, None])
        grad = _load_tile(grad_ptr, offs_m, offs_tile, stride_gm, N, 0.0)  # [BLOCK_M, BLOCK_N]
        token_mask = load_mask(mask_ptr, offs_tile, stride_mn, N)  # [BLOCK_N]
        masked = apply_mask(powers, token_mask[None, :], offs_m, offs_tile)
        row_sum = tl.sum(masked, 1) + eps  # [BLOCK_M]
        weights = tl.where((offs_tile < N)[None, :], masked + eps_over_n, 0.0)
        grad -= tl.div_rn(tl.sum(weights * grad, 1), row_sum)[:, None]
        # What rounding left of the mean: where one key has all the weight, its gradient is the mean, and cancels.
        mean = tl.div_rn(tl.sum(weights * grad, 1), row_sum)
        _store_gradients(ds_ptr, dm_ptr, powers, grad, mean, 1.0 / row_sum, token_mask, offs_m, offs_tile, N)
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        mean = tl.zeros([BLOCK_M], dtype=tl.float32)
        plain_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            scores = _load_tile(scores_ptr, offs_m, offs_n, stride_sm, N, float("-inf"))  # [BLOCK_M, BLOCK_N]
            grad = _load_tile(grad_ptr, offs_m, offs_n, stride_gm, N, 0.0)  # [BLOCK_M, BLOCK_N]
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            subtract = finite_max(new_max)
            decay = _exp(row_max - subtract)
            token_mask = load_mask(mask_ptr, offs_n, stride_mn, N)  # [BLOCK_N]
            masked = apply_mask(_exp(scores - subtract[:, None]), token_mask[None, :], offs_m, offs_n)
            row_sum = row_sum * decay + tl.sum(masked, 1)
            mean = mean * decay + tl.sum(masked * grad, 1)
            plain_sum += tl.sum(grad, 1)
            row_max = new_max
        row_max = finite_max(row_max)
        row_sum += eps
        mean = tl.div_rn(mean + eps_over_n * plain_sum, row_sum)
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            scores = _load_tile(scores_ptr, offs_m, offs_n, stride_sm, N, float("-inf"))  # [BLOCK_M, BLOCK_N]
            grad = _load_tile(grad_ptr, offs_m, offs_n, stride_gm, N, 0.0)  # [BLOCK_M, BLOCK_N]
            powers = _exp(scores - row_max[:, None])
            token_mask = load_mask(mask_ptr, offs_n, stride_mn, N)  # [BLOCK_N]
            _store_gradients(ds_ptr, dm_ptr, powers, grad, mean, 1.0 / row_sum, token_mask, offs_m, offs_n, N)


def _launch_options(kernel: str, device: torch.device | str, num_tokens: int) -> dict[str, Any]:
    config = launch_config("masked_softmax", kernel, device, N=num_tokens)
    return {"SINGLE_TILE": num_tokens <= config["BLOCK_N"], **config}


@checked
def masked_softmax_triton(scores: Tensor, token_mask: Tensor, eps: float = 1e-6) -> Tensor:
    """``tokcomp::masked_softmax`` in Triton, for float16, bfloat16 and float32; see ``ops/masked_softmax.py``."""
    require_supported("masked_softmax", "scores", scores)
    batch, heads, num_tokens, _ = scores.shape
    out = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    if out.numel() > 0:
        scores = inner_contiguous(scores)
        options = _launch_options("forward", scores.device, num_tokens)
        with device_guard(scores):
            _masked_softmax_fwd_kernel[(batch * heads * cdiv(num_tokens, options["BLOCK_M"]),)](
                scores_ptr=scores,
                mask_ptr=token_mask,
                out_ptr=out,
                **strides(scores, "stride_sb", "stride_sh", "stride_sm"),
                **strides(token_mask, "stride_mb", "stride_mn"),
                H=heads,
                N=num_tokens,
                eps=float(eps),
                eps_over_n=eps / num_tokens,
                **options,
            )
    return out


@checked
def masked_softmax_backward_triton(
    grad: Tensor, scores: Tensor, token_mask: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``tokcomp::_masked_softmax_backward`` in Triton, for float16, bfloat16 and float32."""
    require_supported("_masked_softmax_backward", "scores", scores)
    batch, heads, num_tokens, _ = scores.shape
    grad_scores = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    options = _launch_options("backward", scores.device, num_tokens)
    num_blocks = cdiv(num_tokens, options["BLOCK_M"])
    partial_sums = torch.empty(batch, heads * num_blocks, num_tokens, dtype=torch.float32, device=scores.device)
    if grad_scores.numel() > 0:
        grad, scores = inner_contiguous(grad), inner_contiguous(scores)
        with device_guard(scores):
            _masked_softmax_bwd_kernel[(batch * heads * num_blocks,)](
                grad_ptr=grad,
                scores_ptr=scores,
                mask_ptr=token_mask,
                ds_ptr=grad_scores,
                dm_ptr=partial_sums,
                **strides(grad, "stride_gb", "stride_gh", "stride_gm"),
                **strides(scores, "stride_sb", "stride_sh", "stride_sm"),
                **strides(token_mask, "stride_mb", "stride_mn"),
                H=heads,
                N=num_tokens,
                eps=float(eps),
                eps_over_n=eps / num_tokens,
                **options,
            )
    return grad_scores, reduce_groups(partial_sums, mean=False, dtype=token_mask.dtype)

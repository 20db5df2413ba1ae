"""Attention forward: proportional attention with or without a token mask, and the class token's row beside it.

A program owns one (image, head, block of rows). Where BLOCK_N says that all keys fit, the softmax is a single pass over
a tuple of tiles that cover them: all scores, one maximum, one power each, one sum, nothing rescaled. More keys come in
tiles of BLOCK_N: with an online softmax, or in two passes where there is a mask, because masked keys count in the
maximum, so the visible powers may be far below 1 and only probabilities are rounded to half precision. A head's width
is a tuple of tiles too: 80 is 64 and 16, not 128.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._attention import (
    UNSPECIALIZED,
    add_values,
    apply_mask,
    class_scores,
    divide_parts,
    finite_max,
    first_of,
    forward_options,
    key_tiles,
    load_mask,
    load_parts,
    part_scores,
    scale_parts,
    store_class_row,
    store_first_row,
    store_long_class_row,
    store_parts,
    width_tiles,
    zero_parts,
)
from tokcomp_kernels.triton._common import (
    begin_grid,
    cdiv,
    dependent_launch,
    device_guard,
    inner_contiguous,
    narrow,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._reduce import reduce_groups


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    size_ptr,
    mask_ptr,
    out_ptr,
    cls_ptr,
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
    stride_ob,
    stride_oh,
    stride_on,
    H,
    N,
    scale,
    eps,
    eps_over_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """cls_ptr [B, H, N] takes row 0 of each head's softmax."""
    begin_grid(DEPENDENT)
    num_blocks = tl.cdiv(N, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % num_blocks
    bh = (pid // num_blocks).to(tl.int64)
    b = bh // H
    h = bh % H
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    out_ptr += b * stride_ob + h * stride_oh
    cls_ptr += bh * N
    if HAS_SIZE:
        size_ptr += b * stride_sb
    if HAS_MASK:
        mask_ptr += b * stride_mb
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    WIDTHS: tl.constexpr = width_tiles(D)
    q = load_parts(q_ptr, offs_m, stride_qn, N, D, WIDTHS)  # [BLOCK_M, WIDTHS]: tiles

    if KEYS > 0:
        TILES: tl.constexpr = key_tiles(KEYS)
        scores = ()  # [BLOCK_M, TILES]
        first_row = ()  # [TILES], for the program whose rows begin with it
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        for i in tl.static_range(len(TILES)):
            offs_n = first_of(TILES, i) + tl.arange(0, TILES[i])
            k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS, i + 1 < len(TILES))  # [TILES[i], WIDTHS]
            tile = part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE, i + 1 < len(TILES))
            if not HAS_MASK:
                first = tl.full([TILES[i]], float("-inf"), tl.float32)
                if pid_m == 0:
                    first = class_scores(q_ptr, k, size_ptr, offs_n, stride_sn, N, scale, D, WIDTHS, HAS_SIZE)
                first_row = first_row + (first,)  # type: ignore[assignment]  # noqa: RUF005
            row_max = tl.maximum(row_max, tl.max(tile, 1))
            scores = scores + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
        row_max = finite_max(row_max)
        powers = ()  # [BLOCK_M, TILES]
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        out = zero_parts(BLOCK_M, WIDTHS)  # [BLOCK_M, WIDTHS]
        for i in tl.static_range(len(TILES)):
            offs_n = first_of(TILES, i) + tl.arange(0, TILES[i])
            tile = tl.exp2(scores[i] - row_max[:, None])
            if HAS_MASK:
                tile = apply_mask(tile, load_mask(mask_ptr, offs_n, stride_mn, N)[None, :], offs_m, offs_n)
                powers = powers + (tile,)  # type: ignore[assignment]  # noqa: RUF005
            else:
                v = load_parts(v_ptr, offs_n, stride_vn, N, D, WIDTHS, i + 1 < len(TILES))  # [TILES[i], WIDTHS]
                out = add_values(out, narrow(tile, v_ptr.dtype.element_ty), v)
            row_sum += tl.sum(tile, 1)
        if HAS_MASK:
            row_sum += eps
            for i in tl.static_range(len(TILES)):
                offs_n = first_of(TILES, i) + tl.arange(0, TILES[i])
                probs = (powers[i] + eps_over_n) * (1.0 / row_sum)[:, None]
                if pid_m == 0:
                    store_first_row(cls_ptr, probs, offs_m, offs_n, N)
                v = load_parts(v_ptr, offs_n, stride_vn, N, D, WIDTHS, i + 1 < len(TILES))  # [TILES[i], WIDTHS]
                out = add_values(out, narrow(probs, v_ptr.dtype.element_ty), v)
        elif pid_m == 0:
            store_class_row(cls_ptr, first_row, N, TILES)
    else:
        offs_tile = tl.arange(0, BLOCK_N)
        row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        out = zero_parts(BLOCK_M, WIDTHS)  # [BLOCK_M, WIDTHS]
        for start_n in range(0, N, BLOCK_N):
            offs_n = start_n + offs_tile
            k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS)  # [BLOCK_N, WIDTHS]
            scores = part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            subtract = finite_max(new_max)
            decay = tl.exp2(row_max - subtract)
            powers = tl.exp2(scores - subtract[:, None])
            if HAS_MASK:
                powers = apply_mask(powers, load_mask(mask_ptr, offs_n, stride_mn, N)[None, :], offs_m, offs_n)
            else:
                v = load_parts(v_ptr, offs_n, stride_vn, N, D, WIDTHS)  # [BLOCK_N, WIDTHS]
                out = add_values(scale_parts(out, decay), narrow(powers, v_ptr.dtype.element_ty), v)
            row_sum = row_sum * decay + tl.sum(powers, 1)
            row_max = new_max
        row_max = finite_max(row_max)
        if HAS_MASK:
            row_sum += eps
            for start_n in range(0, N, BLOCK_N):
                offs_n = start_n + offs_tile
                k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS)  # [BLOCK_N, WIDTHS]
                scores = part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)  # [BLOCK_M, BLOCK_N]
                powers = tl.exp2(scores - row_max[:, None])
                powers = apply_mask(powers, load_mask(mask_ptr, offs_n, stride_mn, N)[None, :], offs_m, offs_n)
                probs = (powers + eps_over_n) * (1.0 / row_sum)[:, None]
                if pid_m == 0:
                    store_first_row(cls_ptr, probs, offs_m, offs_n, N)
                v = load_parts(v_ptr, offs_n, stride_vn, N, D, WIDTHS)  # [BLOCK_N, WIDTHS]
                out = add_values(out, narrow(probs, v_ptr.dtype.element_ty), v)
        elif pid_m == 0:
            store_long_class_row(
                cls_ptr, q_ptr, k_ptr, size_ptr, stride_kn, stride_sn, N, scale, D, WIDTHS, BLOCK_N, HAS_SIZE
            )

    if not HAS_MASK:
        out = divide_parts(out, row_sum)
    store_parts(out_ptr, offs_m, stride_on, N, out, D, WIDTHS)


def attention_forward(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None,
    scale: float | None,
    token_mask: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on checked arguments: out [B, H, N, D], stored as [B, N, H, D]; cls_attn [B, H, N]."""
    require_supported(op, "q", q)
    batch, heads, num_tokens, width = q.shape
    q, k, v = (inner_contiguous(tensor) for tensor in (q, k, v))
    out = torch.empty(batch, num_tokens, heads, width, dtype=q.dtype, device=q.device).transpose(1, 2)
    cls_rows = torch.empty(batch, heads, num_tokens, dtype=torch.float32, device=q.device)
    if cls_rows.numel() > 0:
        options = forward_options(op, q.device, num_tokens, width, q.element_size())
        with device_guard(q):
            _attention_fwd_kernel[(batch * heads * cdiv(num_tokens, options["BLOCK_M"]),)](
                q_ptr=q,
                k_ptr=k,
                v_ptr=v,
                size_ptr=size,
                mask_ptr=token_mask,
                out_ptr=out,
                cls_ptr=cls_rows,
                **strides(q, "stride_qb", "stride_qh", "stride_qn"),
                **strides(k, "stride_kb", "stride_kh", "stride_kn"),
                **strides(v, "stride_vb", "stride_vh", "stride_vn"),
                **strides(size, "stride_sb", "stride_sn"),
                **strides(token_mask, "stride_mb", "stride_mn"),
                **strides(out, "stride_ob", "stride_oh", "stride_on"),
                H=heads,
                N=num_tokens,
                scale=width**-0.5 if scale is None else float(scale),
                eps=float(eps),
                eps_over_n=eps / num_tokens,
                HAS_SIZE=size is not None,
                HAS_MASK=token_mask is not None,
                **options,
                **dependent_launch(q),
            )
    return out, cls_rows


def mean_of_heads(cls_rows: Tensor) -> Tensor:
    """cls_attn [B, N] of its heads', [B, H, N]."""
    return reduce_groups(cls_rows, mean=True, dtype=torch.float32)


@checked
def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """``tokcomp::attention`` in Triton, for float16, bfloat16 and float32; see ``ops/attention.py``."""
    out, cls_rows = attention_forward("attention", q, k, v, size=size, scale=scale)
    return out, mean_of_heads(cls_rows)


@checked
def attention_heads_triton(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """``tokcomp::_attention_heads`` in Triton: as attention, without the mean over heads."""
    return attention_forward("attention", q, k, v, size=size, scale=scale)

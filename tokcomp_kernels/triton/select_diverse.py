"""select_diverse in two kernels: the cosines of all patches with one another, then the choice, one program per image.

A step of the choice reads one row of cosines, where it would otherwise read every patch: the cosines of a batch, whose
products are a matrix product, are computed once. The prefix takes no part; indices below are those of patches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.reference.select_diverse import select_diverse_reference
from tokcomp_kernels.triton._common import (
    cdiv,
    device_guard,
    dot,
    inner_contiguous,
    next_power_of_2,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._similarity import inverse_norm, row_squares

#: More patches than a program holds a number of each are chosen from by the reference. An image's cosines fit 32 bits.
MAX_PATCHES = 4096
#: Cosines that are held at a time: images take turns where a batch has more.
MAX_COSINES = 2**28


@triton.jit(do_not_specialize=["num_patches", "stride_fb"])
def _select_diverse_cosine_kernel(
    features_ptr,
    cosine_ptr,
    nearest_ptr,
    squares_ptr,
    num_patches,
    num_channels,
    stride_fb,
    stride_fn,
    NEAREST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """cosine_ptr [B, P, P], symmetric: a tile below the diagonal is written on both sides of it.

    With NEAREST also nearest_ptr [B, blocks + 1, P], each patch's largest cosine with another of each block, -1 for
    none (its own block's come in two parts); without, squares_ptr [B, P], the sum of squares of each patch.
    """
    batch = tl.program_id(0).to(tl.int64)
    row_block, column_block = tl.program_id(1), tl.program_id(2)
    if column_block <= row_block:
        features_ptr += batch * stride_fb
        cosine_ptr += batch * num_patches * num_patches
        rows = row_block * BLOCK_P + tl.arange(0, BLOCK_P)
        columns = column_block * BLOCK_P + tl.arange(0, BLOCK_P)
        mask_r, mask_c = rows < num_patches, columns < num_patches
        row_ptrs = features_ptr + rows.to(tl.int64) * stride_fn
        column_ptrs = features_ptr + columns.to(tl.int64) * stride_fn
        dots = tl.zeros([BLOCK_P, BLOCK_P], tl.float32)
        for start in range(0, num_channels, BLOCK_C):
            offs_k = start + tl.arange(0, BLOCK_C)
            mask_k = offs_k < num_channels
            a = tl.load(row_ptrs[:, None] + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
            b = tl.load(column_ptrs[None, :] + offs_k[:, None], mask=mask_c[None, :] & mask_k[:, None], other=0.0)
            dots = dot(a, b, dots)  # [BLOCK_P, BLOCK_C] x [BLOCK_C, BLOCK_P]
        # Equal rows have equal cosines wherever they lie: norms are summed alike, and their order does not matter.
        row_sums = row_squares(row_ptrs, mask_r, num_channels, BLOCK_C)
        inv_row = inverse_norm(row_sums)[:, None]
        inv_column = inverse_norm(row_squares(column_ptrs, mask_c, num_channels, BLOCK_C))[None, :]
        cosine = dots * tl.minimum(inv_row, inv_column) * tl.maximum(inv_row, inv_column)  # [BLOCK_P, BLOCK_P]
        cosine = tl.where(cosine == cosine, cosine, 0.0)
        mask = mask_r[:, None] & (columns[None, :] <= rows[:, None])
        tl.store(cosine_ptr + rows[:, None] * num_patches + columns[None, :], cosine, mask=mask)
        tl.store(cosine_ptr + columns[:, None] * num_patches + rows[None, :], tl.trans(cosine), mask=tl.trans(mask))
        if NEAREST:
            nearest_ptr += batch * (tl.num_programs(1) + 1) * num_patches
            others = tl.where(mask_r[:, None] & (columns[None, :] < rows[:, None]), cosine, -1.0)
            tl.store(nearest_ptr + column_block * num_patches + rows, tl.max(others, axis=1), mask=mask_r)
            tl.store(nearest_ptr + (row_block + 1) * num_patches + columns, tl.max(others, axis=0), mask=mask_c)
        elif column_block == row_block:
            tl.store(squares_ptr + batch * num_patches + rows, row_sums, mask=mask_r)


@triton.jit
def _start(out_ptr, num_prefix_tokens, BLOCK_P: tl.constexpr):
    """Writes the prefix."""
    for start in range(0, num_prefix_tokens, BLOCK_P):
        offs = start + tl.arange(0, BLOCK_P)
        tl.store(out_ptr + offs, offs.to(tl.int64), mask=offs < num_prefix_tokens)


@triton.jit(do_not_specialize=["num_patches", "num_chosen", "num_prefix_tokens", "num_parts"])
def _select_diverse_farthest_kernel(
    cosine_ptr,
    nearest_ptr,
    out_ptr,
    num_patches,
    num_chosen,
    num_prefix_tokens,
    num_parts,
    BLOCK_P: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    cosine_ptr += batch * num_patches * num_patches
    nearest_ptr += batch * num_parts * num_patches
    out_ptr += batch * (num_prefix_tokens + num_chosen)
    _start(out_ptr, num_prefix_tokens, BLOCK_P)
    offs = tl.arange(0, BLOCK_P)
    left = offs < num_patches  # [BLOCK_P]
    nearest = tl.full([BLOCK_P], -1.0, tl.float32)  # the largest cosine with another, then with a chosen one
    for part in range(num_parts):
        nearest = tl.maximum(nearest, tl.load(nearest_ptr + part * num_patches + offs, mask=left, other=-1.0))
    for step in range(num_chosen):
        token = tl.argmin(tl.where(left, nearest, float("inf")), axis=0)  # the lowest where several are
        tl.store(out_ptr + num_prefix_tokens + step, (num_prefix_tokens + token).to(tl.int64))
        left = left & (offs != token)
        cosine = tl.load(cosine_ptr + token.to(tl.int64) * num_patches + offs, mask=left, other=0.0)
        nearest = tl.where(step == 0, cosine, tl.maximum(nearest, cosine))


@triton.jit
def _relevance(relevance_ptr, squares_ptr, offs, inside, stride_rn, HAS_RELEVANCE: tl.constexpr):
    """Of patches; 0 for what is not above 0 and finite, and for rows without a direction."""
    squares = tl.load(squares_ptr + offs, mask=inside, other=0.0)
    there = (squares > 0.0) & (squares < float("inf"))
    if HAS_RELEVANCE:
        values = tl.load(relevance_ptr + offs.to(tl.int64) * stride_rn, mask=inside, other=0.0).to(tl.float32)
        there = there & (values > 0.0) & (values < float("inf"))
        values = tl.where(there, values, 0.0)
    else:
        values = tl.where(there, 1.0, 0.0)
    return values


@triton.jit(do_not_specialize=["num_patches", "num_chosen", "num_prefix_tokens", "stride_rb"])
def _select_diverse_dpp_kernel(
    cosine_ptr,
    squares_ptr,
    relevance_ptr,
    factor_ptr,
    out_ptr,
    num_patches,
    num_chosen,
    num_prefix_tokens,
    stride_rb,
    stride_rn,
    HAS_RELEVANCE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The greedy maximum of det(L_S), L = diag(r) cos diag(r): factor_ptr [B, S, P] gets a Cholesky row for each step.

    Launched without fused multiply-adds: a square is rounded before it is subtracted, so that a patch equal to the
    chosen one is left with just 0.
    """
    batch = tl.program_id(0).to(tl.int64)
    cosine_ptr += batch * num_patches * num_patches
    squares_ptr += batch * num_patches
    factor_ptr += batch * num_chosen * num_patches
    out_ptr += batch * (num_prefix_tokens + num_chosen)
    if HAS_RELEVANCE:
        relevance_ptr += batch * stride_rb
    _start(out_ptr, num_prefix_tokens, BLOCK_P)
    offs = tl.arange(0, BLOCK_P)
    inside = offs < num_patches
    relevance = _relevance(relevance_ptr, squares_ptr, offs, inside, stride_rn, HAS_RELEVANCE)  # [BLOCK_P]
    # The largest becomes 1, which changes no choice.
    largest = tl.max(relevance, axis=0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    relevance = tl.div_rn(relevance, tl.broadcast_to(largest, [BLOCK_P]))
    gain = relevance * relevance  # by which factor each patch would multiply the determinant
    left = inside
    next_ptr = factor_ptr
    for step in range(num_chosen):
        pivot, token = tl.max(tl.where(left, gain, float("-inf")), axis=0, return_indices=True)  # the lowest on ties
        tl.store(out_ptr + num_prefix_tokens + step, (num_prefix_tokens + token).to(tl.int64))
        left = left & (offs != token)
        own = _relevance(relevance_ptr, squares_ptr, token, token < num_patches, stride_rn, HAS_RELEVANCE)
        cosine = tl.load(cosine_ptr + token.to(tl.int64) * num_patches + offs, mask=inside, other=0.0)
        row = relevance * tl.div_rn(own, largest) * cosine  # [BLOCK_P]
        for start in range(0, step, BLOCK_E):
            earlier = start + tl.arange(0, BLOCK_E)
            mask_e = earlier < step
            row_ptrs = factor_ptr + earlier.to(tl.int64) * num_patches  # [BLOCK_E]
            at_token = tl.load(row_ptrs + token, mask=mask_e, other=0.0)
            rows = tl.load(row_ptrs[:, None] + offs[None, :], mask=mask_e[:, None] & inside[None, :], other=0.0)
            row -= tl.sum(rows * at_token[:, None], axis=0)  # [BLOCK_E, BLOCK_P]
        root = tl.sqrt_rn(tl.where(pivot > 0.0, pivot, 1.0))
        row = tl.where(pivot > 0.0, tl.div_rn(row, tl.broadcast_to(root, [BLOCK_P])), 0.0)
        tl.store(next_ptr + offs, row, mask=inside)
        next_ptr += num_patches
        # Other threads of this program read the row in the steps that follow.
        tl.debug_barrier()
        gain = tl.maximum(gain - row * row, 0.0)


@checked
def select_diverse_triton(
    features: Tensor,
    num_kept: int,
    *,
    relevance: Tensor | None = None,
    num_prefix_tokens: int = 1,
    rule: str = "farthest",
) -> Tensor:
    """``tokcomp::select_diverse`` by Triton: features [B, N, K], relevance [B, N] -> [B, num_kept] int64."""
    require_supported("select_diverse", "features", features)
    batch, num_tokens, _ = features.shape
    num_patches, num_chosen = num_tokens - num_prefix_tokens, num_kept - num_prefix_tokens
    if num_chosen == 0 or batch == 0:
        return torch.arange(num_kept, device=features.device).repeat(batch, 1)
    if num_patches > MAX_PATCHES:
        return select_diverse_reference(
            features, num_kept, relevance=relevance, num_prefix_tokens=num_prefix_tokens, rule=rule
        )
    patches = inner_contiguous(features[:, num_prefix_tokens:])
    wanted = None if relevance is None else relevance[:, num_prefix_tokens:]
    out = torch.empty((batch, num_kept), dtype=torch.int64, device=features.device)
    images = max(1, MAX_COSINES // num_patches**2)
    with device_guard(features):
        for first in range(0, batch, images):
            some = slice(first, first + images)
            part = None if wanted is None else wanted[some]
            _choose(patches[some], part, out[some], num_chosen, rule)
    return out


def _choose(patches: Tensor, relevance: Tensor | None, out: Tensor, num_chosen: int, rule: str) -> None:
    """Fill ``out`` [B, num_kept] for patches [B, P, K] and their relevance [B, P]."""
    batch, num_patches, channels = patches.shape
    config = launch_config("select_diverse", "cosine", patches.device, K=channels, itemsize=patches.itemsize)
    blocks = cdiv(num_patches, config["BLOCK_P"])

    def empty(*shape: int) -> Tensor:
        return torch.empty((batch, *shape, num_patches), dtype=torch.float32, device=patches.device)

    cosine = empty(num_patches)
    nearest, squares = (empty(blocks + 1), None) if rule == "farthest" else (None, empty())
    _select_diverse_cosine_kernel[(batch, blocks, blocks)](
        features_ptr=patches,
        cosine_ptr=cosine,
        nearest_ptr=nearest,
        squares_ptr=squares,
        num_patches=num_patches,
        num_channels=channels,
        **strides(patches, "stride_fb", "stride_fn"),
        NEAREST=nearest is not None,
        **config,
    )
    counts = {
        "num_patches": num_patches,
        "num_chosen": num_chosen,
        "num_prefix_tokens": out.shape[1] - num_chosen,
        "BLOCK_P": max(32, next_power_of_2(num_patches)),
    }
    config = launch_config("select_diverse", rule, patches.device, P=num_patches)
    if nearest is not None:
        _select_diverse_farthest_kernel[(batch,)](
            cosine_ptr=cosine, nearest_ptr=nearest, out_ptr=out, num_parts=blocks + 1, **counts, **config
        )
        return
    _select_diverse_dpp_kernel[(batch,)](
        cosine_ptr=cosine,
        squares_ptr=squares,
        relevance_ptr=relevance,
        factor_ptr=empty(num_chosen),
        out_ptr=out,
        **strides(relevance, "stride_rb", "stride_rn"),
        HAS_RELEVANCE=relevance is not None,
        **counts,
        **{**config, "enable_fp_fusion": False},
    )

"""Device functions that the forward and backward kernels of attention and masked_attention share.

Scores are in base 2: log2(e) is folded into the scale, so that a softmax is exp2 and the size bias is log2(size).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tokcomp_kernels.triton._common import LOG2_E, dot, effective_size, narrow, next_power_of_2
from tokcomp_kernels.triton._configs import ONE_TILE, launch_config

#: One kernel serves all their values: strides from image to image of [B, N] tensors, which vary with N alone.
UNSPECIALIZED = ["H", "N", "stride_sb", "stride_mb"]


def launch_options(
    op: str, kernel: str, device: torch.device | str, num_tokens: int, width: int, itemsize: int
) -> dict[str, Any]:
    """Constants and launch options of one kernel of ``op``. They do not depend on the batch, nor do an image's bits."""
    config = launch_config(op, kernel, device, N=num_tokens, D=width, itemsize=itemsize)
    single_tile = num_tokens <= config["BLOCK_N"]
    return {"D": width, "BLOCK_D": max(16, next_power_of_2(width)), "SINGLE_TILE": single_tile, **config}


@triton.constexpr_function
def tiles_of(count, largest):
    """Sizes of tiles that hold ``count`` and at most 15 more: powers of two from ``largest`` to 16, large ones first.

    All but the last are full.
    """
    full, rest = divmod(max(16, -(-count // 16) * 16), largest)
    return (largest,) * full + tuple(size for size in (64, 32, 16) if rest & size)


@triton.constexpr_function
def key_tiles(keys):
    """Tiles of the KEYS of a single pass. Of 64 and less, a row of 256 scores stays in registers on sm_80."""
    return (keys,) if keys <= ONE_TILE else tiles_of(keys, 64)


@triton.constexpr_function
def width_tiles(width):
    """Tiles of a head's width: 80 is 64 and 16. One where it is so large that several would spill."""
    return tiles_of(width, ONE_TILE) if width <= ONE_TILE else (triton.next_power_of_2(width),)


@triton.constexpr_function
def first_of(tiles, index):
    """Where one of several tiles begins that lie one after the other."""
    return sum(tiles[:index])


def forward_options(op: str, device: torch.device | str, num_tokens: int, width: int, itemsize: int) -> dict[str, Any]:
    """As ``launch_options``, for the forward kernel: KEYS is what the tiles of a single pass hold, 0 where it loops.

    Beyond one tile that is N rounded up to 16s, so that few kernels are compiled.
    """
    options = launch_options(op, "forward", device, num_tokens, width, itemsize)
    single_pass = options.pop("SINGLE_TILE")
    del options["BLOCK_D"]
    keys = options["BLOCK_N"] if options["BLOCK_N"] <= ONE_TILE else -(-num_tokens // 16) * 16
    return {**options, "KEYS": keys if single_pass else 0}


@triton.jit
def load_rows(ptr, offs_n, stride_n, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``offs_n`` of one head, zero beyond N and D."""  # [BLOCK_N, BLOCK_D]
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, offs_n, stride_n, N, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    rounded = narrow(tile, ptr.dtype.element_ty)
    tl.store(ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :], rounded, mask=mask)


@triton.jit
def load_mask(mask_ptr, offs_n, stride_n, N):
    return tl.load(mask_ptr + offs_n.to(tl.int64) * stride_n, mask=offs_n < N, other=0.0).to(tl.float32)  # [BLOCK_N]


@triton.jit
def load_bias(size_ptr, offs_n, stride_n, N):
    """log2 of the effective sizes; log2(1) beyond N."""  # [BLOCK_N]
    size = tl.load(size_ptr + offs_n.to(tl.int64) * stride_n, mask=offs_n < N, other=1.0)
    return tl.log2(effective_size(size))


@triton.jit
def key_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE: tl.constexpr):
    """Base-2 scores of a tile of queries with a tile of keys; -inf for keys beyond N."""  # [BLOCK_M, BLOCK_N]
    products = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32))
    return scores_of(products, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE)


@triton.jit
def scores_of(products, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE: tl.constexpr, FULL: tl.constexpr = False):
    """Base-2 scores from products of queries with keys ``offs_n``; -inf for keys beyond N."""  # [BLOCK_M, BLOCK_N]
    scores = products * (scale * LOG2_E)
    if HAS_SIZE:
        scores += load_bias(size_ptr, offs_n, stride_sn, N)[None, :]
    return scores if FULL else tl.where((offs_n < N)[None, :], scores, float("-inf"))


@triton.jit
def within(offs, count, ALL: tl.constexpr = False):
    """Which offsets are below ``count``: with ALL a constant, for a tile that is known to be full."""
    return tl.full(offs.shape, 1, tl.int1) if ALL else offs < count


@triton.jit
def load_parts(ptr, offs_n, stride_n, N, D: tl.constexpr, WIDTHS: tl.constexpr, FULL: tl.constexpr = False):
    """Rows ``offs_n`` of one head as a tuple of tiles, zero beyond N (with FULL there are none) and D."""
    parts = ()  # [BLOCK_N, WIDTHS]
    for i in tl.static_range(len(WIDTHS)):
        offs_d = first_of(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        mask = within(offs_n, N, FULL)[:, None] & within(offs_d, D, i + 1 < len(WIDTHS))[None, :]
        part = tl.load(ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :], mask=mask, other=0.0)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
    return parts


@triton.jit
def store_parts(ptr, offs_n, stride_n, N, parts, D: tl.constexpr, WIDTHS: tl.constexpr):
    for i in tl.static_range(len(WIDTHS)):
        offs_d = first_of(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        mask = (offs_n < N)[:, None] & within(offs_d, D, i + 1 < len(WIDTHS))[None, :]
        rounded = narrow(parts[i], ptr.dtype.element_ty)
        tl.store(ptr + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :], rounded, mask=mask)


@triton.jit
def part_scores(q, k, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE: tl.constexpr, FULL: tl.constexpr = False):
    """``key_scores`` where queries and keys are tuples of parts of a head's width."""  # [BLOCK_M, BLOCK_N]
    products = tl.zeros([q[0].shape[0], k[0].shape[0]], dtype=tl.float32)
    for i in tl.static_range(len(q)):
        products = dot(q[i], tl.trans(k[i]), products)
    return scores_of(products, size_ptr, offs_n, stride_sn, N, scale, HAS_SIZE, FULL)


@triton.jit
def zero_parts(BLOCK_M: tl.constexpr, WIDTHS: tl.constexpr):
    parts = ()  # [BLOCK_M, WIDTHS]
    for i in tl.static_range(len(WIDTHS)):
        parts = parts + (tl.full([BLOCK_M, WIDTHS[i]], 0.0, tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def scale_parts(parts, factors):
    """Parts of rows times a factor [BLOCK_M] of each row."""
    scaled = ()
    for i in tl.static_range(len(parts)):
        scaled = scaled + (parts[i] * factors[:, None],)  # type: ignore[assignment]  # noqa: RUF005
    return scaled


@triton.jit
def divide_parts(parts, divisors):
    divided = ()
    for i in tl.static_range(len(parts)):
        divided = divided + (parts[i] / divisors[:, None],)  # type: ignore[assignment]  # noqa: RUF005
    return divided


@triton.jit
def add_values(out, weights, v):
    """``out + weights @ v``, by parts of a head's width."""
    added = ()
    for i in tl.static_range(len(v)):
        added = added + (dot(weights, v[i], out[i]),)  # type: ignore[assignment]  # noqa: RUF005
    return added


@triton.jit
def finite_max(row_max):
    """The maximum to subtract: 0 where a whole row is -inf, whose powers are then 0 and not NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def apply_mask(powers, token_mask, offs_m, offs_n, TRANSPOSED: tl.constexpr = False):
    """Powers of the scores times M: the key's mask (broadcast), and 1 where a token looks at itself."""
    own = offs_n[:, None] == offs_m[None, :] if TRANSPOSED else offs_m[:, None] == offs_n[None, :]
    return tl.where(own, powers, powers * token_mask)


@triton.jit
def store_first_row(ptr, tile, offs_m, offs_n, N):
    """Row 0 of a tile, for the program whose rows ``offs_m`` begin with it."""
    row = tl.sum(tl.where((offs_m == 0)[:, None], tile, 0.0), 0)  # [BLOCK_N]
    tl.store(ptr + offs_n, row, mask=offs_n < N)


@triton.jit
def class_scores(q_ptr, k, size_ptr, offs_n, stride_sn, N, scale, D: tl.constexpr, WIDTHS: tl.constexpr, HAS_SIZE):
    """Base-2 scores of query 0, at ``q_ptr``, with a tile of keys; -inf for keys beyond N.

    From the keys as they were loaded, whose few threads of a row add up its products: taking row 0 out of a tile of
    scores is a sum over all its rows.
    """  # [BLOCK_N]
    products = tl.zeros([k[0].shape[0]], tl.float32)
    for i in tl.static_range(len(WIDTHS)):
        offs_d = first_of(WIDTHS, i) + tl.arange(0, WIDTHS[i])
        q = tl.load(q_ptr + offs_d, mask=within(offs_d, D, i + 1 < len(WIDTHS)), other=0.0).to(tl.float32)
        products += tl.sum(k[i].to(tl.float32) * q[None, :], 1)
    scores = products * (scale * LOG2_E)
    if HAS_SIZE:
        scores += load_bias(size_ptr, offs_n, stride_sn, N)
    return tl.where(offs_n < N, scores, float("-inf"))


@triton.jit
def store_class_row(ptr, scores, N, TILES: tl.constexpr):
    """The softmax of a row whose ``scores`` are tiles."""
    top = tl.max(scores[0], 0)
    for i in tl.static_range(1, len(TILES)):
        top = tl.maximum(top, tl.max(scores[i], 0))
    top = finite_max(top)
    total = 0.0
    for i in tl.static_range(len(TILES)):
        total += tl.sum(tl.exp2(scores[i] - top), 0)
    for i in tl.static_range(len(TILES)):
        offs_n = first_of(TILES, i) + tl.arange(0, TILES[i])
        tl.store(ptr + offs_n, tl.exp2(scores[i] - top) / total, mask=offs_n < N)


@triton.jit
def store_long_class_row(
    ptr,
    q_ptr,
    k_ptr,
    size_ptr,
    stride_kn,
    stride_sn,
    N,
    scale,
    D: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SIZE: tl.constexpr,
):
    """The softmax of query 0's scores with keys that come in tiles of BLOCK_N: read for the sum, and read again."""
    top = tl.full([BLOCK_N], float("-inf"), tl.float32)  # of every lane
    total = tl.zeros([BLOCK_N], tl.float32)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS)
        scores = class_scores(q_ptr, k, size_ptr, offs_n, stride_sn, N, scale, D, WIDTHS, HAS_SIZE)
        new_top = tl.maximum(top, scores)
        subtract = finite_max(new_top)
        total = total * tl.exp2(top - subtract) + tl.exp2(scores - subtract)
        top = new_top
    row_top = finite_max(tl.max(top, 0))
    row_total = tl.sum(total * tl.exp2(top - row_top), 0)
    for start_n in range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_parts(k_ptr, offs_n, stride_kn, N, D, WIDTHS)
        scores = class_scores(q_ptr, k, size_ptr, offs_n, stride_sn, N, scale, D, WIDTHS, HAS_SIZE)
        tl.store(ptr + offs_n, tl.exp2(scores - row_top) / row_total, mask=offs_n < N)

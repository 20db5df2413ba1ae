"""Rows of x + branch, held in registers as tiles of channels, and their LayerNorm."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels.triton._common import cdiv, narrow


@triton.jit
def load_sum(x_ptrs, branch_ptrs, mask, HAS_BRANCH: tl.constexpr):
    """x + branch rounded to their dtype, or x as it is; 0 where masked."""
    x = tl.load(x_ptrs, mask=mask, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_ptrs, mask=mask, other=0.0)
        x = narrow(x.to(tl.float32) + branch.to(tl.float32), x.dtype)
        # Already so; but a matrix product would else have the compiler bring x and branch to its operands' layout, and
        # add them there once more, in every warp.
        x = tl.where(mask, x, tl.zeros_like(x))
    return x


@triton.jit
def channels_of(chunk: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Offsets of a chunk's channels, and a mask of those there are: a constant where the chunk is full."""
    offs_c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = tl.zeros([BLOCK_C], tl.int32) == 0 if (chunk + 1) * BLOCK_C <= CHANNELS else offs_c < CHANNELS
    return offs_c, mask_c


@triton.jit
def load_tiles(
    x_rows,
    branch_rows,
    mask_rows,
    HAS_BRANCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Whole rows, whose first elements ``x_rows`` and ``branch_rows`` [R] point at, as CHUNKS tiles [R, BLOCK_C].

    Zero beyond the channels and in masked rows. A row of 384 channels is three tiles of 128, not one of 512.
    """
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        offs_c, mask_c = channels_of(chunk, CHANNELS, BLOCK_C)
        mask = mask_rows[:, None] & mask_c[None, :]
        tile = load_sum(x_rows[:, None] + offs_c[None, :], branch_rows[:, None] + offs_c[None, :], mask, HAS_BRANCH)
        tiles = tiles + (tile,)  # type: ignore[assignment]  # noqa: RUF005 (Triton unpacks no tuples)
    return tiles


@triton.jit
def store_tiles(tiles, out_rows, mask_rows, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr):
    """Tiles that have the dtype of ``out_rows`` [R], pointers to the first element of each row."""
    for chunk in tl.static_range(CHUNKS):
        offs_c, mask_c = channels_of(chunk, CHANNELS, BLOCK_C)
        mask = mask_rows[:, None] & mask_c[None, :]
        tl.store(out_rows[:, None] + offs_c[None, :], tiles[chunk], mask=mask)


@triton.jit
def _load_vector(ptr, offs_c, mask_c, mask, PER_ROW: tl.constexpr):
    """A vector's chunk in float32, [1, BLOCK_C], or as a tile of equal rows, [R, BLOCK_C]."""
    if PER_ROW:
        values = tl.load(ptr + tl.broadcast_to(offs_c[None, :], mask.shape), mask=mask, other=0.0).to(tl.float32)
    else:
        values = tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def store_normalized(
    tiles,
    out_rows,
    mask_rows,
    weight_ptr,
    bias_ptr,
    norm_eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
    PER_ROW: tl.constexpr = False,
):
    """LayerNorm of rows held in tiles: the mean, then the variance about it, both in float32, one rounding at the end.

    Tiles are added up before the one sum across threads that each of the two takes. PER_ROW is for tiles of which a
    thread holds one row: it then loads weight and bias for that row, which takes as many loads, and no exchange through
    shared memory of a vector that each thread had loaded its own part of.
    """
    partial = tl.zeros(tiles[0].shape, tl.float32)  # [R, BLOCK_C]
    for chunk in tl.static_range(CHUNKS):
        partial += tiles[chunk].to(tl.float32)
    mean = (tl.sum(partial, axis=1) / CHANNELS)[:, None]  # [R, 1]
    partial = tl.zeros(tiles[0].shape, tl.float32)
    for chunk in tl.static_range(CHUNKS):
        offs_c, mask_c = channels_of(chunk, CHANNELS, BLOCK_C)
        centered = tl.where(mask_c[None, :], tiles[chunk].to(tl.float32) - mean, 0.0)
        partial += centered * centered
    variance = tl.sum(partial, axis=1) / CHANNELS
    inv_std = tl.rsqrt(variance + norm_eps)[:, None]  # [R, 1]
    for chunk in tl.static_range(CHUNKS):
        offs_c, mask_c = channels_of(chunk, CHANNELS, BLOCK_C)
        values = (tiles[chunk].to(tl.float32) - mean) * inv_std
        mask = mask_rows[:, None] & mask_c[None, :]
        if HAS_WEIGHT:
            values *= _load_vector(weight_ptr, offs_c, mask_c, mask, PER_ROW)
        if HAS_BIAS:
            values += _load_vector(bias_ptr, offs_c, mask_c, mask, PER_ROW)
        tl.store(out_rows[:, None] + offs_c[None, :], narrow(values, out_rows.dtype.element_ty), mask=mask)


def compact(vector: Tensor | None) -> Tensor | None:
    """A vector whose elements lie side by side, as kernels read weights and biases."""
    return None if vector is None else vector.contiguous()


def chunks(channels: int, config: dict[str, int]) -> int:
    """Tiles that a row takes."""
    return max(1, cdiv(channels, config["BLOCK_C"]))

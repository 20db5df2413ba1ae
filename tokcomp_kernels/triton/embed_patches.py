"""_embed_patches: a matrix product that reads images in place of unfolded patches, and adds what else makes a token.

Bytes: images are read once from memory, and once more from the L2 for each tile of channels after the first; x is
written once, and read once to be normalised. Steps apart would write and read the unfolded patches, their product, and
the product behind the prefix tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._common import (
    begin_grid,
    cdiv,
    dependent_launch,
    device_guard,
    dot,
    narrow,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._norm import chunks, compact, load_tiles, store_normalized


@triton.jit(do_not_specialize=["num_rows"])
def _embed_patches_kernel(
    images_ptr,
    weight_ptr,
    bias_ptr,
    position_ptr,
    prefix_ptr,
    x_ptr,
    num_rows,
    num_tokens,
    num_columns,
    stride_ib,
    stride_ia,
    stride_ih,
    stride_iw,
    NUM_PREFIX: tl.constexpr,
    PATCH_ROWS: tl.constexpr,
    PATCH_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin_grid(DEPENDENT)
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)  # the tiles of a block of rows side by side, so that they share its images in the L2
    rows = (pid // BLOCKS_C).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c, offs_k = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    mask_rows, mask_c = rows < num_rows, offs_c < CHANNELS
    image, token = rows // num_tokens, (rows % num_tokens).to(tl.int32)
    patch = token - NUM_PREFIX
    is_patch = mask_rows & (patch >= 0)
    corner = patch // num_columns * PATCH_ROWS * stride_ih + patch % num_columns * PATCH_COLUMNS * stride_iw
    patches = images_ptr + image * stride_ib + corner  # [BLOCK_R], at each patch's first number
    AREA: tl.constexpr = PATCH_ROWS * PATCH_COLUMNS
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + offs_k
        within = k // AREA * stride_ia + k % AREA // PATCH_COLUMNS * stride_ih + k % PATCH_COLUMNS * stride_iw
        mask_k = k < WIDTH
        pixels = tl.load(patches[:, None] + within[None, :], mask=is_patch[:, None] & mask_k[None, :], other=0.0)
        weight_ptrs = weight_ptr + offs_c[None, :] * WIDTH + k[:, None]
        weight = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_c[None, :], other=0.0)  # [BLOCK_K, BLOCK_C]
        total = dot(pixels, weight, total)
    mask = mask_rows[:, None] & mask_c[None, :]
    places = token[:, None] * CHANNELS + offs_c[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if NUM_PREFIX:
        first = tl.load(prefix_ptr + places, mask=mask & (patch < 0)[:, None], other=0.0).to(tl.float32)
        total = tl.where(is_patch[:, None], total, first)
    total += tl.load(position_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_ptr + rows[:, None] * CHANNELS + offs_c[None, :], narrow(total, x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr,
    normalized_ptr,
    weight_ptr,
    bias_ptr,
    num_rows,
    norm_eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin_grid(DEPENDENT)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask, place = rows < num_rows, rows * CHANNELS
    tiles = load_tiles(x_ptr + place, x_ptr + place, mask, False, CHANNELS, BLOCK_C, CHUNKS)
    store_normalized(
        tiles,
        normalized_ptr + place,
        mask,
        weight_ptr,
        bias_ptr,
        norm_eps,
        HAS_WEIGHT,
        HAS_BIAS,
        CHANNELS,
        BLOCK_C,
        CHUNKS,
        True,
    )


@checked
def embed_patches_triton(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    prefix: Tensor | None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """``tokcomp::_embed_patches`` by Triton: images [B, A, H, W], weight [C, A, P, Q], position [N, C], prefix
    [T, C] -> tokens [B, N, C] and their LayerNorm."""
    require_supported("_embed_patches", "images", images)
    num_tokens, channels = position.shape
    x, normalized = (images.new_empty((len(images), num_tokens, channels)) for _ in range(2))
    if x.numel() == 0:
        return x, normalized
    num_rows, itemsize = len(images) * num_tokens, images.itemsize
    config = launch_config("embed_patches", "product", images.device, C=channels, itemsize=itemsize)
    norm_config = launch_config("add_layer_norm", "rows", images.device, C=channels, itemsize=itemsize)
    blocks = cdiv(num_rows, config["BLOCK_R"]) * cdiv(channels, config["BLOCK_C"])
    with device_guard(images):
        _embed_patches_kernel[(blocks,)](
            images_ptr=images,
            weight_ptr=weight.contiguous(),
            bias_ptr=compact(bias),
            position_ptr=position.contiguous(),
            prefix_ptr=compact(prefix),
            x_ptr=x,
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_columns=images.shape[3] // weight.shape[3],
            **strides(images, "stride_ib", "stride_ia", "stride_ih", "stride_iw"),
            NUM_PREFIX=0 if prefix is None else len(prefix),
            PATCH_ROWS=weight.shape[2],
            PATCH_COLUMNS=weight.shape[3],
            HAS_BIAS=bias is not None,
            WIDTH=weight[0].numel(),
            CHANNELS=channels,
            **config,
            **dependent_launch(images),
        )
        _norm_kernel[(cdiv(num_rows, norm_config["BLOCK_R"]),)](
            x_ptr=x,
            normalized_ptr=normalized,
            weight_ptr=compact(norm_weight),
            bias_ptr=compact(norm_bias),
            num_rows=num_rows,
            norm_eps=float(norm_eps),
            HAS_WEIGHT=norm_weight is not None,
            HAS_BIAS=norm_bias is not None,
            CHANNELS=channels,
            CHUNKS=chunks(channels, norm_config),
            **norm_config,
            **dependent_launch(images),
        )
    return x, normalized

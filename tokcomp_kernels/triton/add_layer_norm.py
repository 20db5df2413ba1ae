"""add_layer_norm: the residual sum and its LayerNorm in one pass, each row in registers from its load to its stores.

Bytes: x and branch are read once, both outputs written once; nothing else.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels.triton._common import (
    begin_grid,
    cdiv,
    dependent_launch,
    device_guard,
    inner_contiguous,
    require_supported,
    strides,
)
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._norm import chunks, compact, load_tiles, store_normalized, store_tiles


@triton.jit(do_not_specialize=["num_rows", "rows_per_group"])
def _add_layer_norm_kernel(
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    x_out_ptr,
    normalized_ptr,
    num_rows,
    rows_per_group,
    norm_eps,
    stride_xg,
    stride_xr,
    stride_bg,
    stride_br,
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
    mask = rows < num_rows
    group, row = rows // rows_per_group, rows % rows_per_group
    x_rows = x_ptr + group * stride_xg + row * stride_xr
    branch_rows = branch_ptr + group * stride_bg + row * stride_br
    tiles = load_tiles(x_rows, branch_rows, mask, True, CHANNELS, BLOCK_C, CHUNKS)  # CHUNKS x [BLOCK_R, BLOCK_C]
    store_tiles(tiles, x_out_ptr + rows * CHANNELS, mask, CHANNELS, BLOCK_C, CHUNKS)
    store_normalized(
        tiles,
        normalized_ptr + rows * CHANNELS,
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
def add_layer_norm_triton(
    x: Tensor, branch: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``tokcomp::add_layer_norm`` by Triton: x, branch [..., C] -> x + branch and its LayerNorm, [..., C] both."""
    require_supported("add_layer_norm", "x", x)
    x_out, normalized = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x_out.numel() == 0:
        return x_out, normalized
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    groups, rows_per_group = _groups(x, branch)
    x, branch = (inner_contiguous(t.reshape(groups, rows_per_group, channels)) for t in (x, branch))
    config = launch_config("add_layer_norm", "rows", x.device, C=channels, itemsize=x.itemsize)
    with device_guard(x):
        _add_layer_norm_kernel[(cdiv(num_rows, config["BLOCK_R"]),)](
            x_ptr=x,
            branch_ptr=branch,
            weight_ptr=compact(weight),
            bias_ptr=compact(bias),
            x_out_ptr=x_out,
            normalized_ptr=normalized,
            num_rows=num_rows,
            rows_per_group=rows_per_group,
            norm_eps=float(norm_eps),
            **strides(x, "stride_xg", "stride_xr"),
            **strides(branch, "stride_bg", "stride_br"),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            CHANNELS=channels,
            CHUNKS=chunks(channels, config),
            **config,
            **dependent_launch(x),
        )
    return x_out, normalized


def _groups(x: Tensor, branch: Tensor) -> tuple[int, int]:
    """How the leading dimensions become groups of rows: [B, N, C] is read with its own strides, whatever they are."""
    if x.dim() < 2:
        return 1, 1
    return math.prod(x.shape[:-2]), x.shape[-2]

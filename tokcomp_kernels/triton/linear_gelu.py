"""linear_gelu: a matrix product whose tiles get their bias and their GELU while they are still in registers.

The tiles of GROUP_M rows of blocks are computed side by side, so that the weight's and the input's blocks they share
come from the L2. Bytes: x and weight are read once and out is written once, as by the product alone; a GELU of its own
would read and write all of out again.
"""

from __future__ import annotations

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
    dot,
    inner_contiguous,
    narrow,
    require_supported,
)
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._gelu import gelu


@triton.jit(do_not_specialize=["num_rows"])
def _linear_gelu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    width,
    stride_xr,
    stride_wf,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    begin_grid(DEPENDENT)
    blocks_m, blocks_f = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_features, BLOCK_F)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * blocks_f)
    rows_in_group = tl.minimum(blocks_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * blocks_f)
    pid_m, pid_f = group * GROUP_M + within % rows_in_group, within // rows_in_group
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_f = pid_f * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows beyond the last one are read from the start again instead of being masked, and not written.
    x_ptrs = x_ptr + (offs_m % num_rows)[:, None] * stride_xr + offs_k[None, :]
    weight_ptrs = weight_ptr + (offs_f % num_features).to(tl.int64)[None, :] * stride_wf + offs_k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_F]
        else:
            x = tl.load(x_ptrs, mask=(start + offs_k < width)[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=(start + offs_k < width)[:, None], other=0.0)
        total = dot(x, weight, total)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs_f, mask=offs_f < num_features, other=0.0).to(tl.float32)[None, :]
    out = gelu(total, out_ptr.dtype.element_ty.primitive_bitwidth == 16)
    mask = (offs_m < num_rows)[:, None] & (offs_f < num_features)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * num_features + offs_f[None, :], narrow(out, out_ptr.dtype.element_ty), mask=mask
    )


@checked
def linear_gelu_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``tokcomp::linear_gelu`` by Triton: x [..., K], weight [F, K], bias [F] -> [..., F]."""
    require_supported("linear_gelu", "x", x)
    features, width = weight.shape
    out = torch.empty((*x.shape[:-1], features), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = inner_contiguous(x.reshape(out.numel() // features, width))
    weight = inner_contiguous(weight)
    config = launch_config("linear_gelu", "forward", x.device, F=features, K=width, itemsize=x.itemsize)
    blocks = cdiv(rows.shape[0], config["BLOCK_M"]) * cdiv(features, config["BLOCK_F"])
    with device_guard(x):
        _linear_gelu_kernel[(blocks,)](
            x_ptr=rows,
            weight_ptr=weight,
            bias_ptr=None if bias is None else bias.contiguous(),
            out_ptr=out,
            num_rows=rows.shape[0],
            num_features=features,
            width=width,
            stride_xr=rows.stride(0),
            stride_wf=weight.stride(0),
            HAS_BIAS=bias is not None,
            EVEN_K=width % config["BLOCK_K"] == 0,
            **config,
            **dependent_launch(x),
        )
    return out

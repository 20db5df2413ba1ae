"""Device functions that the forward and backward kernels of attention and masked_attention share.

Scores are in base 2: log2(e) is folded into the scale, so that a softmax is exp2 and the size bias is log2(size).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels.triton._common import LOG2_E, dot, effective_size, narrow
from tokcomp_kernels.triton._configs import launch_config

#: Shapes for which the kernels are compiled without a GPU: dtype, N, D. They meet each entry of the default tables.
CASE_SHAPES = (
    ("float16", 32, 64),
    ("float16", 64, 64),
    ("float16", 128, 64),
    ("float16", 197, 64),
    ("bfloat16", 577, 64),
    ("float16", 128, 128),
    ("float16", 257, 80),
    ("float16", 197, 160),
    ("float32", 197, 64),
    ("float32", 257, 80),
    ("float32", 197, 160),
)


def launch_options(
    op: str, kernel: str, device: torch.device | str, num_tokens: int, width: int, itemsize: int
) -> dict[str, Any]:
    """Constants and launch options of one kernel of ``op``. They do not depend on the batch, nor do an image's bits."""
    config = launch_config(op, kernel, device, N=num_tokens, D=width, itemsize=itemsize)
    single_tile = num_tokens <= config["BLOCK_N"]
    return {"D": width, "BLOCK_D": max(16, triton.next_power_of_2(width)), "SINGLE_TILE": single_tile, **config}


def per_token_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a [B, N] tensor, or of one that is not there."""
    return tensor.stride() if tensor is not None else (0, 0)


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
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)) * (scale * LOG2_E)
    if HAS_SIZE:
        scores += load_bias(size_ptr, offs_n, stride_sn, N)[None, :]
    return tl.where((offs_n < N)[None, :], scores, float("-inf"))


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

"""Launches the kernels of ``_merge_kernels`` for prune_merge and prune_merge_norm, once the order is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
from torch import Tensor
from torch.nn.functional import layer_norm

from tokcomp_kernels.triton._compile import POINTER_TYPES, CompileCase
from tokcomp_kernels.triton._configs import launch_config, load
from tokcomp_kernels.triton._merge_kernels import merge_join_kernel, merge_kept_kernel
from tokcomp_kernels.triton._norm import chunks, compact

#: The table of tile sizes that both operators read.
TABLE = "prune_merge"
#: Rows of more bytes are matched and merged in passes over their channels instead.
MAX_RESIDENT = 3072
#: Rows for which the kernels are compiled without a GPU.
_CASE_ROWS = (
    ("float16", 64),
    ("float16", 192),
    ("float16", 384),
    ("bfloat16", 768),
    ("float16", 1024),
    ("float16", 1280),
    ("float16", MAX_RESIDENT // 2),
    ("float32", 64),
    ("float32", 384),
    ("float32", MAX_RESIDENT // 4),
)
_ROW_STRIDES = ("stride_xb", "stride_xn", "stride_bb", "stride_bn")


@dataclass(frozen=True)
class Norm:
    """The LayerNorm after the merge: weight and bias [C] or None, and eps."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def of(self, rows: Tensor) -> Tensor:
        """By PyTorch, for rows too wide to be held in registers."""
        weight, bias = (None if t is None else t.float() for t in (self.weight, self.bias))
        return layer_norm(rows.float(), rows.shape[-1:], weight, bias, self.eps).to(rows.dtype)


def merge_ranked(
    x: Tensor,
    branch: Tensor | None,
    order: Tensor,
    source: Tensor,
    num_slots: int,
    *,
    size: Tensor | None,
    num_prefix_tokens: int,
    similarity_weighted_size: bool,
    norm: Norm | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Write the rows and sizes of the slots, and fill in where each source went.

    Args:
        x: [B, N, C], C elements taking at most MAX_RESIDENT bytes, rows contiguous.
        branch: [B, N, C] to be added to x first, rows contiguous, or None.
        order: [B, M + S] int32: the token of each slot, then the sources, by rank.
        source: [B, N] int64; the entries of sources are written here.
        num_slots: M.
        size: [B, N], or None for ones.
        num_prefix_tokens: Slots that nothing joins.
        similarity_weighted_size: Whether a source adds its size times its cosine.
        norm: LayerNorm of the rows, if wanted.

    Returns:
        x_out [B, M, C], normalized [B, M, C] or None, size_out [B, M] float32.
    """
    batch, num_tokens, channels = x.shape
    num_sources = order.shape[1] - num_slots
    x_out = torch.empty((batch, num_slots, channels), dtype=x.dtype, device=x.device)
    normalized = torch.empty_like(x_out) if norm is not None else None
    size_out = torch.empty((batch, num_slots), dtype=torch.float32, device=x.device)
    if size_out.numel() == 0:
        return x_out, normalized, size_out
    kept = launch_config(TABLE, "kept", x.device, C=channels, S=num_sources, itemsize=x.itemsize)
    num_blocks = triton.cdiv(num_slots, kept["BLOCK_M"])
    best = torch.empty((batch, num_blocks, num_sources), dtype=torch.float32, device=x.device)
    best_slot = torch.empty((batch, num_blocks, num_sources), dtype=torch.int32, device=x.device)
    inv_src = torch.empty((batch, num_sources), dtype=torch.float32, device=x.device)
    weight, bias = (None, None) if norm is None else (compact(norm.weight), compact(norm.bias))
    strides = {
        "stride_xb": x.stride(0),
        "stride_xn": x.stride(1),
        "stride_bb": 0 if branch is None else branch.stride(0),
        "stride_bn": 0 if branch is None else branch.stride(1),
        "stride_sb": 0 if size is None else size.stride(0),
        "stride_sn": 0 if size is None else size.stride(1),
    }
    flags = {
        "HAS_BRANCH": branch is not None,
        "HAS_NORM": norm is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SIZE": size is not None,
    }
    norm_eps = 0.0 if norm is None else float(norm.eps)
    # A tensor that is not there is never read: x stands in for branch, whose pointer takes part in arithmetic.
    rows = (x, x if branch is None else branch, weight, bias, size, order)
    num_parts = max(1, triton.cdiv(num_sources, kept["BLOCK_S"]))
    merge_kept_kernel[(batch * num_blocks * num_parts,)](
        *rows,
        x_out,
        normalized,
        size_out,
        best,
        best_slot,
        inv_src,
        num_slots,
        num_sources,
        num_prefix_tokens,
        norm_eps,
        **strides,
        **flags,
        HAS_SOURCES=num_sources > 0,
        CHANNELS=channels,
        CHUNKS=chunks(channels, kept),
        **kept,
    )
    if num_sources > 0:
        join = launch_config(TABLE, "join", x.device, C=channels)
        merge_join_kernel[(batch * triton.cdiv(num_sources, join["BLOCK_R"]),)](
            *rows,
            best,
            best_slot,
            inv_src,
            x_out,
            normalized,
            size_out,
            source,
            num_tokens,
            num_slots,
            num_sources,
            num_prefix_tokens,
            num_blocks,
            norm_eps,
            **strides,
            **flags,
            WEIGHTED_SIZE=similarity_weighted_size,
            CHANNELS=channels,
            BLOCK_C=max(16, triton.next_power_of_2(channels)),
            **join,
        )
    return x_out, normalized, size_out


def merge_ranked_cases(*, fused: bool) -> list[CompileCase]:
    """The kernels as the table launches them at widths that meet each of its entries."""
    cases = []
    for gpu, (dtype, channels) in product(load(TABLE), _CASE_ROWS):
        itemsize = 4 if dtype == "float32" else 2
        element = POINTER_TYPES[dtype]
        flags = {"HAS_BRANCH": fused, "HAS_NORM": fused, "HAS_WEIGHT": fused, "HAS_BIAS": fused, "HAS_SIZE": True}
        types = dict.fromkeys(("x_ptr", "branch_ptr", "weight_ptr", "bias_ptr", "x_out_ptr", "normalized_ptr"), element)
        types |= {"size_ptr": "*fp32", "size_out_ptr": "*fp32", "order_ptr": "*i32", "norm_eps": "fp32"}
        types |= {"best_ptr": "*fp32", "best_slot_ptr": "*i32", "inv_src_ptr": "*fp32"}
        kept = launch_config(TABLE, "kept", gpu, C=channels, S=12, itemsize=itemsize)
        join = launch_config(TABLE, "join", gpu, C=channels)
        for name, kernel, config, extra in (
            (
                "kept",
                merge_kept_kernel,
                kept,
                {"CHUNKS": chunks(channels, kept), "HAS_SOURCES": True, "CHANNELS": channels},
            ),
            (
                "join",
                merge_join_kernel,
                join,
                {"WEIGHTED_SIZE": True, "CHANNELS": channels, "BLOCK_C": triton.next_power_of_2(channels)},
            ),
        ):
            own = types | ({"source_ptr": "*i64"} if name == "join" else {})
            case = CompileCase.launched(f"{name}-{dtype}-C{channels}-{gpu}", kernel, own, config, **flags, **extra)
            divisible = [n for n in kernel.arg_names if n.endswith("_ptr") or n in _ROW_STRIDES]
            cases.append(replace(case, divisible=divisible))
    return cases

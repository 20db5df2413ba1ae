"""Launches the kernels of ``_merge_kernels`` for prune_merge and prune_merge_norm, once the order is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from tokcomp_kernels.triton._common import cdiv, dependent_launch, next_power_of_2, strides
from tokcomp_kernels.triton._configs import launch_config
from tokcomp_kernels.triton._merge_kernels import merge_join_kernel, merge_kept_kernel
from tokcomp_kernels.triton._norm import chunks, compact

#: The table of tile sizes that both operators read.
TABLE = "prune_merge"


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
    num_kept: int,
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
        num_kept: M.
        size: [B, N], or None for ones.
        num_prefix_tokens: Slots that nothing joins.
        similarity_weighted_size: Whether a source adds its size times its cosine.
        norm: LayerNorm of the rows, if wanted.

    Returns:
        x_out [B, M, C], normalized [B, M, C] or None, size_out [B, M] float32.
    """
    batch, num_tokens, channels = x.shape
    num_merged = order.shape[1] - num_kept
    x_out = torch.empty((batch, num_kept, channels), dtype=x.dtype, device=x.device)
    normalized = torch.empty_like(x_out) if norm is not None else None
    size_out = torch.empty((batch, num_kept), dtype=torch.float32, device=x.device)
    if size_out.numel() == 0:
        return x_out, normalized, size_out
    kept = launch_config(TABLE, "kept", x.device, C=channels, S=num_merged, itemsize=x.itemsize)
    num_blocks = cdiv(num_kept, kept["BLOCK_M"])
    best = torch.empty((batch, num_blocks, num_merged), dtype=torch.float32, device=x.device)
    best_slot = torch.empty((batch, num_blocks, num_merged), dtype=torch.int32, device=x.device)
    inv_src = torch.empty((batch, num_merged), dtype=torch.float32, device=x.device)
    weight, bias = (None, None) if norm is None else (compact(norm.weight), compact(norm.bias))
    layout = {
        **strides(x, "stride_xb", "stride_xn"),
        **strides(branch, "stride_bb", "stride_bn"),
        **strides(size, "stride_sb", "stride_sn"),
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
    rows = {
        "x_ptr": x,
        "branch_ptr": x if branch is None else branch,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "size_ptr": size,
        "order_ptr": order,
    }
    num_parts = max(1, cdiv(num_merged, kept["BLOCK_S"]))
    merge_kept_kernel[(batch * num_blocks * num_parts,)](
        **rows,
        x_out_ptr=x_out,
        normalized_ptr=normalized,
        size_out_ptr=size_out,
        best_ptr=best,
        best_slot_ptr=best_slot,
        inv_src_ptr=inv_src,
        num_kept=num_kept,
        num_merged=num_merged,
        num_prefix_tokens=num_prefix_tokens,
        norm_eps=norm_eps,
        **layout,
        **flags,
        MERGES=num_merged > 0,
        CHANNELS=channels,
        CHUNKS=chunks(channels, kept),
        **kept,
        **dependent_launch(x),
    )
    if num_merged > 0:
        join = launch_config(TABLE, "join", x.device, C=channels)
        merge_join_kernel[(batch * cdiv(num_merged, join["BLOCK_R"]),)](
            **rows,
            best_ptr=best,
            best_slot_ptr=best_slot,
            inv_src_ptr=inv_src,
            x_out_ptr=x_out,
            normalized_ptr=normalized,
            size_out_ptr=size_out,
            source_ptr=source,
            num_tokens=num_tokens,
            num_kept=num_kept,
            num_merged=num_merged,
            num_prefix_tokens=num_prefix_tokens,
            num_blocks=num_blocks,
            norm_eps=norm_eps,
            **layout,
            **flags,
            WEIGHTED_SIZE=similarity_weighted_size,
            CHANNELS=channels,
            BLOCK_C=max(16, next_power_of_2(channels)),
            **join,
            **dependent_launch(x),
        )
    return x_out, normalized, size_out

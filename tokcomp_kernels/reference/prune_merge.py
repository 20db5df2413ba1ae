"""Prune by importance, then merge by similarity (DiffRate, section 3; the published inference)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import (
    cosine,
    descending_order,
    effective_size,
    gather_rows,
    head_mean,
    scatter_add_rows,
    size_or_ones,
)


@checked
def prune_merge_reference(
    x: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, _ = x.shape
    num_alive = min(num_tokens, num_prune_kept)  # P: left by pruning
    num_kept = min(num_alive, num_merge_kept)  # M: left by merging
    dtype = accumulate_dtype(x)

    order = descending_order(head_mean(importance), num_prefix_tokens)
    kept_index, src_index = order[:, :num_kept], order[:, num_kept:num_alive]
    kept, src = gather_rows(x, kept_index).to(dtype), gather_rows(x, src_index).to(dtype)  # [B, M, C], [B, P - M, C]
    token_size = size_or_ones(size, x)
    kept_size, src_size = token_size.gather(1, kept_index), token_size.gather(1, src_index)
    source = torch.full((batch, num_tokens), -1, dtype=torch.int64, device=x.device)
    slots = torch.arange(num_kept, device=x.device).expand(batch, -1)
    source = source.scatter(1, kept_index, slots)

    if num_kept < num_alive:
        similarity = cosine(src.detach(), kept[:, num_prefix_tokens:].detach())  # [B, P - M, M - prefix]
        best = similarity.argmax(dim=2)
        dst = best + num_prefix_tokens
        if similarity_weighted_size:
            src_size = src_size * similarity.gather(2, best[:, :, None]).squeeze(2)
        count = torch.ones_like(kept_size).scatter_add(1, dst, torch.ones_like(src_size))
        kept = scatter_add_rows(kept, dst, src) / count[:, :, None]
        kept_size = kept_size.scatter_add(1, dst, src_size)
        source = source.scatter(1, src_index, dst)
    return kept.to(x.dtype), effective_size(kept_size, dtype), source

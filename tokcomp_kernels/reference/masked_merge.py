"""Merging in place under a token mask, as the DiffRate search does: nothing is dropped, no count leaves the device."""

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
    scatter_add_rows,
    size_or_ones,
)


@checked
def masked_merge_reference(
    x: Tensor,
    importance: Tensor,
    token_mask: Tensor,
    counts: Tensor,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    min_weighted_size: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_tokens, _ = x.shape
    dtype = accumulate_dtype(x)
    token_size = size_or_ones(size, x)
    ranks = torch.arange(num_tokens, device=x.device)
    if num_tokens == 0:
        empty = torch.empty(batch, 0, dtype=torch.int64, device=x.device)
        return x.clone(memory_format=torch.contiguous_format), token_size.contiguous(), empty, empty.clone()

    alive = (token_mask.to(dtype) > 0) | (ranks < num_prefix_tokens)  # [B, N]
    order = live_order(importance, alive, num_prefix_tokens)
    rank = torch.empty_like(order).scatter(1, order, ranks.expand(batch, -1))
    num_before, num_kept = counts[0], counts[1]
    num_before = torch.minimum(alive.sum(1, keepdim=True), num_before)  # [B, 1]: P
    merges = (num_kept > num_prefix_tokens) & (num_kept < num_before)  # [B, 1]
    is_source = merges & (ranks >= num_kept) & (ranks < num_before)  # [B, N], by rank as all below
    is_destination = (ranks >= num_prefix_tokens) & (ranks < num_kept)  # [N]

    rows, row_size = gather_rows(x, order).to(dtype), token_size.gather(1, order)
    similarity = cosine(rows.detach(), rows.detach()).masked_fill(~is_destination, float("-inf"))  # [B, N, N]
    best = similarity.argmax(dim=2)
    destination = torch.where(is_source, best, ranks)
    weight = row_size
    if similarity_weighted_size:
        weight = weight * similarity.gather(2, best[:, :, None]).squeeze(2)
    if min_weighted_size is not None:
        # As published: what a source adds is its own size from now on, and all that take part are bounded alike.
        takes_part = merges & (ranks < num_before)  # [B, N]
        bounded = torch.where(is_source, weight, row_size)
        bounded = torch.where(bounded > min_weighted_size, bounded, min_weighted_size)
        row_size = weight = torch.where(takes_part, bounded, row_size)
    size_out = row_size.scatter_add(1, destination, torch.where(is_source, weight, 0.0))
    count = torch.ones_like(row_size).scatter_add(1, destination, is_source.to(dtype))
    total = scatter_add_rows(rows, destination, torch.where(is_source[:, :, None], rows, 0.0))
    # A token that nothing joined is copied, the sources themselves included.
    merged = torch.where((count > 1)[:, :, None], total / count[:, :, None], rows)
    return (
        gather_rows(merged, rank).to(x.dtype),
        effective_size(size_out, dtype).gather(1, rank),
        rank,
        order.gather(1, destination).gather(1, rank),
    )


def live_order(importance: Tensor, alive: Tensor, num_prefix_tokens: int) -> Tensor:
    """[B, N], [B, N] -> [B, N]: the prefix, the live tokens by descending importance, the dead ones by index."""
    order = descending_order(importance.masked_fill(~alive, float("nan")), num_prefix_tokens)
    # NaN comes last and by index, so dead tokens and live ones of importance NaN are now mixed.
    is_dead = (~alive).gather(1, order).to(torch.int32)
    return order.gather(1, is_dead.sort(dim=1, stable=True).indices)

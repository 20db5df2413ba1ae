"""The operators as other runtimes have them: sorts, gathers and matrix products, for the ONNX export.

Each form takes and returns what its operator does, in the reference's order, and is held to the reference by the tests.
What it leaves out is what runtimes lack or disagree on: scatters, above all those that add, and custom operators.

- A merge is a product with a matrix of zeros and ones, which says where each token goes.
- A row is fetched by one plain gather from the batch's rows laid end to end, not by an index for each of its channels.
- A stable sort counts how many come before each and sorts these counts, of which no two are equal: ONNX gives ties in
  TopK to the lower index, but OpenVINO does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import cosine, effective_size, head_mean, size_or_ones
from tokcomp_kernels.reference.attention import probabilities_of


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    probabilities = _probabilities(q, k, size, scale)  # [B, H, N, N]
    out = (probabilities @ v.to(probabilities.dtype)).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), probabilities[:, :, 0].mean(1)


def attention_received(
    q: Tensor, k: Tensor, *, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 0
) -> Tensor:
    # attention's own product and softmax once more, which runtimes compute once for both.
    return _probabilities(q, k, size, scale).mean(dim=(1, 2))


def prune_merge(
    x: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = x.shape[1]
    alive = min(num_tokens, num_prune_kept)  # P
    kept = min(alive, num_merge_kept)  # M
    order = _descending_order(head_mean(importance), num_prefix_tokens)  # [B, N]
    rows = _gather_rows(x, order[:, :alive]).to(accumulate_dtype(x))  # [B, P, C], the merged ones last
    sizes = size_or_ones(size, x).gather(1, order[:, :alive])
    rank = order.sort(dim=1).indices  # [B, N], the permutation's inverse
    if kept == alive:
        source = torch.where(rank < kept, rank, -1)
        return rows.to(x.dtype), effective_size(sizes, sizes.dtype), source

    merged, merged_size = rows[:, kept:], sizes[:, kept:]  # [B, S, C], [B, S]
    similarity = cosine(merged, rows[:, num_prefix_tokens:kept])  # [B, S, M - prefix]
    best, best_similarity = _first_best(similarity)
    if similarity_weighted_size:
        merged_size = merged_size * best_similarity
    goes = _goes(best + num_prefix_tokens, kept, rows.dtype)  # [B, S, M]
    x_out = (rows[:, :kept] + goes.mT @ merged) / (1 + goes.sum(1))[:, :, None]
    size_out = sizes[:, :kept] + (merged_size[:, None] @ goes).squeeze(1)
    slots = torch.cat((rank.new_zeros(rank.shape[0], kept), best + num_prefix_tokens), dim=1)  # [B, P], by rank
    joined = torch.where(rank < kept, rank, slots.gather(1, rank.clamp(max=alive - 1)))
    return x_out.to(x.dtype), effective_size(size_out, size_out.dtype), torch.where(rank < alive, joined, -1)


def tome_merge(
    x: Tensor, metric: Tensor, r: int, *, size: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, _ = x.shape
    token_size = size_or_ones(size, x)
    positions = torch.arange(num_tokens, device=x.device)
    r = min(r, (num_tokens - num_prefix_tokens) // 2)
    if r == 0:
        return x.clone(), token_size, positions.expand(batch, -1).clone()

    first_a = num_prefix_tokens + num_prefix_tokens % 2  # unprotected even positions, then the odd ones
    first_b = num_prefix_tokens + 1 - num_prefix_tokens % 2
    features = metric.to(accumulate_dtype(metric))
    similarity = cosine(features[:, first_a::2], features[:, first_b::2])  # [B, A, B]
    best, best_similarity = _first_best(similarity)  # [B, A]
    edges = best_similarity.sort(dim=1, descending=True, stable=True).indices
    by_place = edges[:, r:].sort(dim=1).values  # [B, A - r]
    from_a = torch.cat((edges[:, :r], by_place), dim=1)  # those that merge, then those that stay
    rest = positions[first_b::2].expand(batch, -1)
    prefix = positions[:num_prefix_tokens].expand(batch, -1)
    order = torch.cat((from_a[:, :r] * 2 + first_a, prefix, by_place * 2 + first_a, rest), dim=1)  # [B, N]
    stay = num_tokens - r - rest.shape[1]  # slots before the odd tokens'

    rows = _gather_rows(x, order).to(accumulate_dtype(x))
    sizes = token_size.gather(1, order)
    dst = best.gather(1, edges[:, :r]) + stay  # [B, r]
    goes = _goes(dst, num_tokens - r, rows.dtype)  # [B, r, M]
    size_out = sizes[:, r:] + (sizes[:, None, :r] @ goes).squeeze(1)
    weighted = rows * sizes[:, :, None]
    mean = (weighted[:, r:] + goes.mT @ weighted[:, :r]) / size_out[:, :, None]
    # A token that took part in no merge is copied, not multiplied and divided.
    x_out = torch.where((goes.sum(1) > 0)[:, :, None], mean, rows[:, r:])
    rank = order.sort(dim=1).indices
    source = torch.where(rank < r, dst.gather(1, rank.clamp(max=r - 1)), rank - r)
    return x_out.to(x.dtype), effective_size(size_out, size_out.dtype), source


def unmerge(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> Tensor:
    if x.shape[1] == 0:
        return x.new_zeros(*source.shape, x.shape[2]) if pruned_fill is None else pruned_fill.clone()
    alive = ((source >= 0) & (source < x.shape[1]))[:, :, None]
    rows = _gather_rows(x, source.clamp(0, x.shape[1] - 1))
    return torch.where(alive, rows, torch.zeros_like(rows) if pruned_fill is None else pruned_fill)


def _stable_sort(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """x [B, N], sorted along N by counting, which needs no rule for ties."""
    if x.ndim != 2 or dim % 2 != 1:
        return NotImplemented
    one, other = x[:, :, None], x[:, None, :]
    place = torch.arange(x.shape[1], device=x.device)
    before = other > one if descending else other < one
    before = before | ((other == one) & (place < place[:, None]))  # [B, N, N]
    indices = before.to(torch.int32).sum(2).sort(dim=1).indices
    return x.gather(1, indices), indices


def _scatter(x: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """x [B, M] with src [B, S] written at index [B, S], as ToMe finds where its tokens' places are."""
    if x.ndim != 2 or dim % 2 != 1:
        return NotImplemented  # another scatter, which stays one
    goes = index[:, :, None] == torch.arange(x.shape[1], device=x.device)  # [B, S, M]
    return torch.where(goes.any(1), src.gather(1, goes.to(torch.int32).argmax(1)), x)


#: What ``run_decompositions`` replaces: the operators that a compressed model calls in inference, and what ToMe's and
#: DiffRate's ways of finding tokens' places are made of.
FORMS: dict[Any, Callable[..., Any]] = {
    getattr(torch.ops.tokcomp, form.__name__).default: form
    for form in (attention, attention_received, prune_merge, tome_merge, unmerge)
} | {torch.ops.aten.sort.stable: _stable_sort, torch.ops.aten.scatter.src: _scatter}


def _probabilities(q: Tensor, k: Tensor, size: Tensor | None, scale: float | None) -> Tensor:
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return probabilities_of(q.to(dtype), k.to(dtype), size, scale)


def _descending_order(importance: Tensor, num_prefix_tokens: int) -> Tensor:
    """[B, N]: the prefix as it stands, then descending, ties by lower index; NaN counts as minus infinity."""
    patches = importance[:, num_prefix_tokens:]
    by_score = torch.where(patches.isnan(), float("-inf"), patches).sort(dim=1, descending=True, stable=True).indices
    prefix = torch.arange(num_prefix_tokens, device=importance.device).expand(importance.shape[0], -1)
    return torch.cat((prefix, by_score + num_prefix_tokens), dim=1)


def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C], index [B, M] -> [B, M, C]."""
    batch, num_tokens, channels = x.shape
    first = torch.arange(batch, device=x.device)[:, None] * num_tokens  # each image's first row
    return x.reshape(-1, channels).index_select(0, (index + first).reshape(-1)).view(batch, index.shape[1], channels)


def _first_best(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """[B, S, M] -> the lowest index of each row's maximum, and that maximum, [B, S].

    Not by comparing with the maximum: a runtime that fuses may compute a value twice, and not to the same bits.
    """
    return similarity.argmax(dim=2), similarity.amax(dim=2)


def _goes(slots: Tensor, num_slots: int, dtype: torch.dtype) -> Tensor:
    """[B, S] slots -> [B, S, num_slots]: one where a token goes, zero elsewhere."""
    return (slots[:, :, None] == torch.arange(num_slots, device=slots.device)).to(dtype)

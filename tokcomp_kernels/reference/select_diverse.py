"""Greedy choices of tokens that are unlike each other, for all images at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import cosine, gather_rows, inverse_norm

#: Rows of the similarity that are held at a time.
CHUNK = 256


@checked
def select_diverse_reference(
    features: Tensor,
    num_kept: int,
    *,
    relevance: Tensor | None = None,
    num_prefix_tokens: int = 1,
    rule: str = "farthest",
) -> Tensor:
    batch = features.shape[0]
    patches = features.detach()[:, num_prefix_tokens:].to(accumulate_dtype(features))  # [B, P, K]
    count = num_kept - num_prefix_tokens
    if rule == "farthest":
        chosen = _farthest(patches, count)
    else:
        chosen = _dpp(patches, count, _usable(relevance, num_prefix_tokens, patches))
    prefix = torch.arange(num_prefix_tokens, device=features.device).expand(batch, -1)
    return torch.cat([prefix, chosen + num_prefix_tokens], dim=1)


def _similarity_to(patches: Tensor, token: Tensor) -> Tensor:
    """Cosines of all tokens [B, P, K] with one of each image [B], [B, P]."""
    return cosine(gather_rows(patches, token[:, None]), patches).squeeze(1)


def _farthest(patches: Tensor, count: int) -> Tensor:
    """[B, count]: first the token whose most similar other is least similar, then what is farthest from the chosen."""
    nearest = patches.new_full(patches.shape[:2], -1.0)  # the largest cosine with another, then with a chosen one
    for start in range(0, patches.shape[1] if count else 0, CHUNK):
        rows = cosine(patches[:, start : start + CHUNK], patches)  # [B, CHUNK, P]
        rows.diagonal(start, 1, 2).fill_(-1.0)
        # Of two tokens that are each other's nearest neither must be ahead by its rounding: both get both values.
        nearest = nearest.maximum(rows.amax(1))
        nearest[:, start : start + CHUNK] = nearest[:, start : start + CHUNK].maximum(rows.amax(2))
    taken = torch.zeros_like(nearest, dtype=torch.bool)
    order = []
    for step in range(count):
        token = nearest.masked_fill(taken, float("inf")).argmin(1)  # the lowest index where several are
        order.append(token)
        taken = taken.scatter(1, token[:, None], True)
        similarity = _similarity_to(patches, token)
        nearest = similarity if step == 0 else nearest.maximum(similarity)
    return _stacked(order, patches)


def _dpp(patches: Tensor, count: int, relevance: Tensor) -> Tensor:
    """[B, count]: the greedy maximum of det(L_S), L = diag(r) cos diag(r), by a Cholesky row for each token chosen."""
    left = relevance.square()  # [B, P]: by which factor each token would multiply the determinant
    rows: list[Tensor] = []  # [B, P] each
    taken = torch.zeros_like(left, dtype=torch.bool)
    order = []
    for _ in range(count):
        token = left.masked_fill(taken, float("-inf")).argmax(1)
        order.append(token)
        taken = taken.scatter(1, token[:, None], True)
        own = token[:, None]
        row = relevance * relevance.gather(1, own) * _similarity_to(patches, token)
        for earlier in rows:
            row = row - earlier * earlier.gather(1, own)
        pivot = left.gather(1, own)
        row = torch.where(pivot > 0, row / pivot.sqrt(), 0.0)
        rows.append(row)
        left = (left - row.square()).clamp_min(0.0)
    return _stacked(order, patches)


def _stacked(order: list[Tensor], patches: Tensor) -> Tensor:
    empty = torch.zeros(patches.shape[0], 0, dtype=torch.int64, device=patches.device)
    return torch.stack(order, 1) if order else empty


def _usable(relevance: Tensor | None, num_prefix_tokens: int, patches: Tensor) -> Tensor:
    """[B, P], the largest being 1, which changes no choice; 0 for what is not above 0 and finite, or no direction."""
    there = (inverse_norm(patches) > 0).to(patches.dtype)
    if relevance is None:
        return there
    values = relevance.detach()[:, num_prefix_tokens:].to(patches.dtype)
    values = torch.where((values > 0) & values.isfinite(), values, 0.0) * there
    largest = values.amax(1, keepdim=True) if values.shape[1] else 1.0
    return torch.where(values > 0, values / largest, 0.0)

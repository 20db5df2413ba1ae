"""Each operator as a chain of PyTorch calls, the way the published code writes it: what a kernel has to beat.

Same arguments as the operator, the outputs that the published code computes (no source maps); masked_merge's are in the
order of rank, for the published search sorts the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tokcomp.bench.published import bipartite_merge as merge_alternating
from tokcomp.bench.published import gather_tokens, merge_by_similarity
from tokcomp.bench.published_search import merge_in_place
from torch import Tensor


def _column(size: Tensor | None, x: Tensor) -> Tensor:
    return (
        torch.ones_like(x[..., :1], dtype=torch.promote_types(x.dtype, torch.float32))
        if size is None
        else size[..., None]
    )


def _scores(q: Tensor, k: Tensor, size: Tensor | None, scale: float | None) -> Tensor:
    scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores if size is None else scores + size.log()[:, None, None]


def _descending(importance: Tensor, num_prefix_tokens: int) -> Tensor:
    order = importance[:, num_prefix_tokens:].argsort(dim=1, descending=True) + num_prefix_tokens
    return torch.cat([torch.arange(num_prefix_tokens, device=order.device).expand(order.shape[0], -1), order], dim=1)


def class_attention_sort(
    q_cls: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    cls_attn = _scores(q_cls.unsqueeze(2), k, size, scale).softmax(dim=-1)[:, :, 0].mean(dim=1)
    return cls_attn, _descending(cls_attn, num_prefix_tokens)


def prune_merge(
    x: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
) -> tuple[Tensor, Tensor]:
    order = _descending(importance, num_prefix_tokens)
    x, column = gather_tokens(x, order), gather_tokens(_column(size, x), order)
    x, column = merge_by_similarity(
        x[:, :num_prune_kept], column[:, :num_prune_kept], num_merge_kept, num_prefix_tokens
    )
    return x, column.squeeze(-1)


def prune_merge_norm(
    x: Tensor,
    branch: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    weight: Tensor,
    bias: Tensor,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    x, kept_size = prune_merge(
        x + branch, importance, num_prune_kept, num_merge_kept, size=size, num_prefix_tokens=num_prefix_tokens
    )
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6), kept_size


def add_layer_norm(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = x + branch
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def masked_softmax(scores: Tensor, token_mask: Tensor, eps: float = 1e-6) -> Tensor:
    num_tokens = scores.shape[-1]
    own = torch.eye(num_tokens, dtype=token_mask.dtype, device=token_mask.device)
    mask = token_mask[:, None, None]
    mask = mask + (1.0 - mask) * own
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores - scores.amax(dim=-1, keepdim=True).detach()).to(accumulate).exp() * mask.to(accumulate)
    return ((weights + eps / num_tokens) / (weights.sum(dim=-1, keepdim=True) + eps)).to(scores.dtype)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    probabilities = masked_softmax(_scores(q, k, size, scale), token_mask, eps)
    return probabilities.to(v.dtype) @ v, probabilities[:, :, 0].mean(dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    probabilities = _scores(q, k, size, scale).softmax(dim=-1)
    return probabilities.to(v.dtype) @ v, probabilities[:, :, 0].mean(dim=1)


def attention_received(
    q: Tensor, k: Tensor, *, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 0
) -> Tensor:
    return _scores(q, k, size, scale).softmax(dim=-1).mean(dim=(1, 2))


def tome_merge(
    x: Tensor, metric: Tensor, r: int, *, size: Tensor | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    merged, column = merge_alternating(x, metric, r, _column(size, x).to(x.dtype), num_prefix_tokens)
    return merged, column.squeeze(-1)


def bipartite_merge(
    x: Tensor, metric: Tensor, role: Tensor, r: int, *, size: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Over a partition that differs from image to image: the similarity of all pairs, masked."""
    metric = F.normalize(metric, dim=-1)
    scores = (metric @ metric.transpose(-2, -1)).masked_fill((role != 2)[:, None], float("-inf"))
    best, target = scores.max(dim=-1)
    leaving = best.masked_fill(role != 1, float("-inf")).argsort(dim=1, descending=True)[:, :r, None]
    joined = target.unsqueeze(-1).gather(1, leaving)
    column = _column(size, x).to(x.dtype)
    total, weighted = column.scatter_add(1, joined, column.gather(1, leaving)), x * column
    wide = (-1, -1, x.shape[-1])
    rows = weighted.scatter_add(1, joined.expand(wide), weighted.gather(1, leaving.expand(wide))) / total
    stays = torch.ones_like(role).scatter(1, leaving.squeeze(-1), 0)
    place = stays.argsort(dim=1, descending=True, stable=True)[:, : x.shape[1] - r, None]
    return rows.gather(1, place.expand(wide)), total.gather(1, place).squeeze(-1)


def select_diverse(features: Tensor, num_kept: int, *, num_prefix_tokens: int = 1) -> Tensor:
    """DivPrune's farthest points, of a batch: distances of all pairs, then a few calls for each choice."""
    patches = F.normalize(features[:, num_prefix_tokens:], dim=-1)
    distance = 1 - patches @ patches.transpose(-2, -1)
    own = torch.eye(patches.shape[1], dtype=torch.bool, device=features.device)
    nearest = distance.masked_fill(own, float("inf")).amin(dim=-1)
    chosen: list[Tensor] = []
    for _ in range(num_kept - num_prefix_tokens):
        chosen.append(nearest.argmax(dim=1, keepdim=True))
        row = distance.gather(1, chosen[-1].unsqueeze(-1).expand(-1, -1, patches.shape[1])).squeeze(1)
        nearest = row if len(chosen) == 1 else torch.minimum(nearest, row)
        nearest = nearest.scatter(1, torch.cat(chosen, dim=1), float("-inf"))
    prefix = torch.arange(num_prefix_tokens, device=features.device).expand(features.shape[0], -1)
    return torch.cat([prefix, *(one + num_prefix_tokens for one in chosen)], dim=1)


def unmerge(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> Tensor:
    index = source.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[-1])
    alive = (source >= 0).unsqueeze(-1)
    return torch.where(alive, x.gather(1, index), 0.0 if pruned_fill is None else pruned_fill)


def masked_merge(
    x: Tensor,
    importance: Tensor,
    token_mask: Tensor,
    counts: Tensor,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
) -> tuple[Tensor, Tensor]:
    order = _descending(importance, num_prefix_tokens)  # the importance of dead tokens is what eps leaves of it
    x, column, _ = gather_tokens(x, order), gather_tokens(_column(size, x), order), token_mask.gather(1, order)
    num_before_merge, num_merge_kept = (int(count) for count in counts)
    x, column = merge_in_place(x, column, num_merge_kept, num_before_merge, num_prefix_tokens)
    return x, column.squeeze(-1)


#: By operator; those that every block runs come first.
EAGER: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        prune_merge_norm,
        attention,
        add_layer_norm,
        linear_gelu,
        prune_merge,
        class_attention_sort,
        attention_received,
        tome_merge,
        bipartite_merge,
        select_diverse,
        masked_softmax,
        masked_attention,
        unmerge,
        masked_merge,
    )
}

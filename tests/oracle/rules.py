"""DiffRate, ToMe, EViT and ToCom on a plain ViT, one image at a time, as the papers put it: tokens as lists of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracle.plain_vit import Attended, PlainViT, attention, classify, embed, mlp

#: Sizes that are not above zero would make log(size) NaN.
LEAST_SIZE = 1e-6


def importance(metric: str, attended: Attended) -> list[float]:
    """Of every token; those of the prefix mean nothing."""
    found = attended.map[:, 0].mean(0)  # Eq. 6: the class token's row
    if metric == "image_attn":
        found = attended.map.mean((0, 1))
    elif metric == "cls_attn_v":
        found = found * attended.values.transpose(0, 1).flatten(1).norm(dim=1)
    return found.tolist()


def by_importance(scores: Sequence[float], num_prefix: int, alive: int | None = None) -> list[int]:
    """Tokens in order: the prefix, the others from the most important one, ties by index."""
    rest = range(num_prefix, len(scores) if alive is None else alive)
    order = [*range(num_prefix), *sorted(rest, key=lambda token: (-scores[token], token))]
    return order + list(range(len(order), len(scores)))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """[M, C], [N, C] -> [M, N], without gradient; 0 where a vector is zero."""

    def unit(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)

    return unit(a.detach()) @ unit(b.detach()).T


def most_similar(x: Tensor, kept: list[int], gone: list[int], num_prefix: int) -> tuple[list[int], list[float]]:
    """For each token of ``gone`` the place in ``kept`` of the most similar one after the prefix, and its cosine."""
    best, where = cosines(x[gone], x[kept[num_prefix:]]).max(dim=1)
    return [int(place) + num_prefix for place in where], best.tolist()


def mean_of_groups(x: Tensor, kept: list[int], gone: list[int], places: list[int]) -> list[Tensor]:
    """Each kept row, or the plain mean of it and all that go to its place."""
    groups = [[token] for token in kept]
    for token, place in zip(gone, places, strict=True):
        groups[place].append(token)
    return [x[group].mean(0) if len(group) > 1 else x[group[0]] for group in groups]


def diffrate(
    vit: PlainViT,
    image: Tensor,
    num_prune_kept: Sequence[int],
    num_merge_kept: Sequence[int],
    *,
    metric: str = "cls_attn",
    pipeline: str = "prune_merge",
) -> Tensor:
    x = embed(vit, image)
    size = torch.ones(len(x), dtype=x.dtype)
    for block, (pruned_to, merged_to) in enumerate(zip(num_prune_kept, num_merge_kept, strict=True)):
        attended = attention(vit, block, x, size)
        x = x + attended.out
        pruned_to = pruned_to if "prune" in pipeline else len(x)
        merged_to = merged_to if "merge" in pipeline else len(x)
        kept = by_importance(importance(metric, attended), vit.num_prefix)
        if pipeline != "merge_prune":
            kept = kept[:pruned_to]
        if merged_to < len(kept):
            kept, gone = kept[:merged_to], kept[merged_to:]
            places, cosine = most_similar(x, kept, gone, vit.num_prefix)
            sizes = size[kept].tolist()
            for token, place, similarity in zip(gone, places, cosine, strict=True):
                sizes[place] += float(size[token]) * similarity
            x = torch.stack(mean_of_groups(x, kept, gone, places))
            size = torch.tensor([max(one, LEAST_SIZE) for one in sizes], dtype=x.dtype)
        else:
            x, size = x[kept], size[kept]
        if pipeline == "merge_prune":
            x, size = x[:pruned_to], size[:pruned_to]
        x = x + mlp(vit, block, x)
    return classify(vit, x, size)


def tome(vit: PlainViT, image: Tensor, rates: Sequence[int], *, proportional: bool = True) -> Tensor:
    x, first = embed(vit, image), vit.num_prefix
    size: Tensor | None = None
    for block, rate in enumerate(rates):
        attended = attention(vit, block, x, size if proportional else None)
        x = x + attended.out
        rate = min(rate, (len(x) - first) // 2)
        if rate > 0:
            size = torch.ones(len(x), dtype=x.dtype) if size is None else size
            metric = attended.keys.mean(0)
            evens, odds = range(first + first % 2, len(x), 2), range(first + 1 - first % 2, len(x), 2)
            cosine = cosines(metric[evens], metric[odds]).tolist()
            edges = []
            for token, row in zip(evens, cosine, strict=True):
                edges.append((-max(row), token, odds[row.index(max(row))]))
            groups = {token: [token] for token in range(len(x))}
            for _, token, partner in sorted(edges)[:rate]:
                groups[partner] += groups.pop(token)
            order = [*range(first), *(t for t in evens if t in groups), *odds]
            sizes = torch.stack([size[groups[token]].sum() for token in order])
            x = torch.stack([size[groups[token]] @ x[groups[token]] for token in order]) / sizes[:, None]
            size = sizes
        x = x + mlp(vit, block, x)
    return classify(vit, x, size)


def evit(
    vit: PlainViT,
    image: Tensor,
    *,
    keep_rates: Sequence[float] | None = None,
    num_pruned: int = 0,
    fuse: bool = True,
) -> Tensor:
    """Keep rates, one a block, or a number of tokens that go in every block (one patch token stays)."""
    x, first = embed(vit, image), vit.num_prefix
    for block in range(vit.depth):
        attended = attention(vit, block, x, None)
        x = x + attended.out
        patches = len(x) - first
        stay = max(patches - num_pruned, 1) if keep_rates is None else math.ceil(keep_rates[block] * patches)
        if stay < patches:
            scores = attended.map[:, 0].mean(0).detach()
            order = by_importance(scores.tolist(), first)
            kept, gone = order[: first + stay], order[first + stay :]
            rows = [x[kept]]
            if fuse:
                rows.append((scores[gone] @ x[gone])[None])
            x = torch.cat(rows)
        x = x + mlp(vit, block, x)
    return classify(vit, x)


def with_tocom(
    vit: PlainViT,
    matrices: dict[str, Sequence[Tensor]],  # q_down, q_up, v_down, v_up: one a block
    source: int,
    target: int,
    *,
    scale: float,
    rank: int,
) -> PlainViT:
    """The model whose q and v weights were moved from one degree to another, one step at a time (Eq. 6-7)."""
    weights = dict(vit.weights)
    for block in range(vit.depth):
        name = f"blocks.{block}.attn.qkv.weight"
        q, k, v = weights[name].chunk(3)
        for degree in range(min(source, target) + 1, max(source, target) + 1):  # the step degree - 1 -> degree
            rows = slice(rank * (degree - 1), rank * degree)
            sign = 1 if target > source else -1
            q = q + sign * scale * matrices["q_up"][block][:, rows] @ matrices["q_down"][block][rows]
            v = v + sign * scale * matrices["v_up"][block][:, rows] @ matrices["v_down"][block][rows]
        weights[name] = torch.cat([q, k, v])
    return vit._replace(weights=weights)

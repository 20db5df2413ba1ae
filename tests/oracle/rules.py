"""DiffRate, ToMe, EViT and ToCom on a plain ViT, one image at a time, as the papers put it: tokens as lists of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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


def groups_of(kept: list[int], gone: list[int], places: list[int]) -> list[list[int]]:
    """Each kept token with all that go to its place."""
    groups = [[token] for token in kept]
    for token, place in zip(gone, places, strict=True):
        groups[place].append(token)
    return groups


def mean_of_groups(x: Tensor, groups: list[list[int]]) -> list[Tensor]:
    return [x[group].mean(0) if len(group) > 1 else x[group[0]] for group in groups]


def diffrate_step(
    x: Tensor,
    size: Tensor,
    scores: Sequence[float],
    pruned_to: int,
    merged_to: int,
    *,
    pipeline: str,
    num_prefix: int,
    weighted: bool = True,
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The rows that stay, their sizes, to which a token adds its own by its similarity, and the tokens in each."""
    pruned_to = pruned_to if "prune" in pipeline else len(x)
    merged_to = merged_to if "merge" in pipeline else len(x)
    kept = by_importance(scores, num_prefix)
    if pipeline != "merge_prune":
        kept = kept[:pruned_to]
    kept, gone = kept[:merged_to], kept[merged_to:]
    places, cosine = most_similar(x, kept, gone, num_prefix)
    sizes = size[kept].tolist()
    for token, place, similarity in zip(gone, places, cosine, strict=True):
        sizes[place] += float(size[token]) * (similarity if weighted else 1)
    groups = groups_of(kept, gone, places)
    rows, size = torch.stack(mean_of_groups(x, groups)), torch.tensor(sizes, dtype=x.dtype).clamp_min(LEAST_SIZE)
    stay = pruned_to if pipeline == "merge_prune" else len(rows)
    return rows[:stay], size[:stay], groups[:stay]


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
    for block, counts in enumerate(zip(num_prune_kept, num_merge_kept, strict=True)):
        attended = attention(vit, block, x, size)
        x, scores = x + attended.out, importance(metric, attended)
        x, size, _ = diffrate_step(x, size, scores, *counts, pipeline=pipeline, num_prefix=vit.num_prefix)
        x = x + mlp(vit, block, x)
    return classify(vit, x, size)


#: (block, its tokens after attention, what that saw) -> the groups that stay, each led by the token that receives.
Rule = Callable[[int, Tensor, Attended], list[list[int]]]


def run(vit: PlainViT, image: Tensor, rule: Rule, *, by_size: bool = False, proportional: bool = False) -> Tensor:
    """Each group becomes its plain mean, or its mean by size; sizes add up."""
    x = embed(vit, image)
    size = torch.ones(len(x), dtype=x.dtype)
    for block in range(vit.depth):
        attended = attention(vit, block, x, size if proportional else None)
        x = x + attended.out
        groups = rule(block, x, attended)
        x = means(x, size if by_size else torch.ones_like(size), groups)
        size = torch.stack([size[group].sum() for group in groups])
        x = x + mlp(vit, block, x)
    return classify(vit, x, size)


def means(x: Tensor, weight: Tensor, groups: list[list[int]]) -> Tensor:
    """Of each group of rows, by their weights."""
    return torch.stack([weight[group] @ x[group] / weight[group].sum() for group in groups])


def join(groups: dict[int, list[int]], cosine: Tensor, leaving: Sequence[int], targets: Sequence[int]) -> None:
    """Each leaving token joins the target with the largest cosine."""
    for token in leaving:
        groups[max(targets, key=lambda target: (float(cosine[token, target]), -target))] += groups.pop(token)


def into_odds(cosine: Tensor, first: int, leaves: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """ToMe's step: of the even tokens, those join the odd ones that their largest cosines, in a row, say."""
    evens, odds = range(first + first % 2, len(cosine), 2), range(first + 1 - first % 2, len(cosine), 2)
    groups = {token: [token] for token in range(len(cosine))}
    leaving = leaves(cosine[evens][:, odds].amax(1)).tolist() if odds else [False] * len(evens)
    join(groups, cosine, [token for token, goes in zip(evens, leaving, strict=True) if goes], odds)
    order = [*range(first), *evens, *odds] if any(leaving) else range(len(cosine))
    return [groups[token] for token in order if token in groups]


def highest(rate: int) -> Callable[[Tensor], Tensor]:
    """Which of a row of numbers are the highest ones, the earlier of equal ones first."""
    return lambda row: row.argsort(descending=True, stable=True).argsort() < rate


def tome(vit: PlainViT, image: Tensor, rates: Sequence[int], *, proportional: bool = True) -> Tensor:
    def rule(block: int, x: Tensor, attended: Attended) -> list[list[int]]:
        metric, rate = attended.keys.mean(0), min(rates[block], (len(x) - vit.num_prefix) // 2)
        return into_odds(cosines(metric, metric), vit.num_prefix, highest(rate))

    return run(vit, image, rule, by_size=True, proportional=proportional)


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

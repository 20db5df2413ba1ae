"""Schedules that nobody searched, and the fitting of any schedule to a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokcomp.equal_cost.counts import Counts, Ruler
from tokcomp.methods import DiffRate, Method, scheduled
from tokcomp.schedule import PUBLISHED_MODELS, published_budgets, published_schedule

#: How often a random schedule is drawn anew because its shape does not reach the budget.
_DRAWS = 1000


def _bisect(ruler: Ruler, budget: float, low: float, high: float, at: Callable[[float], Method]) -> Method:
    """The method whose strength between ``low`` (dear) and ``high`` (cheap) costs nearest to the budget."""
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if ruler.cost(at(middle)) > budget else (low, middle)
    return min((at(low), at(high)), key=lambda method: abs(ruler.cost(method) - budget))


def at_cost(
    ruler: Ruler,
    budget: float,
    shares: Sequence[float],
    merged: Sequence[float],
    *,
    tolerance: float = 0.01,
    **settings: Any,
) -> DiffRate:
    """DiffRate with the counts ``shares`` ** power, at the power that costs nearest to ``budget`` multiply-adds.

    Args:
        ruler: of the model.
        shares: of the patches, one per block, falling: what the block keeps.
        merged: of the tokens that a block drops, one per block: how many merge rather than vanish.
        tolerance: as a share of the budget; further off is refused.
        settings: as for :meth:`Ruler.diffrate`.

    Raises:
        ValueError: no power comes that near; the message gives the nearest cost.
    """

    def method(power: float) -> DiffRate:
        # Two patch tokens always stay: one would leave merging nothing to choose from.
        kept = [ruler.prefix + max(2, round(ruler.patches * share**power)) for share in shares]
        before_merge = [
            after + round((there - after) * share)
            for there, after, share in zip(ruler.arriving(kept), kept, merged, strict=True)
        ]
        return ruler.diffrate(Counts(before_merge, kept), **settings)

    found = _bisect(ruler, budget, 0.0, 40.0, method)
    nearest = ruler.cost(found)
    if abs(nearest - budget) > tolerance * budget:
        raise ValueError(
            f"the budget must be reachable, got {budget:.4g} where the nearest is {nearest:.4g} (multiply-adds)"
        )
    return found  # type: ignore[return-value]


def uniform(ruler: Ruler, budget: float, **settings: Any) -> DiffRate:
    """Every block but the first drops the same share of what arrives, half of it by pruning, half by merging.

    The same share rather than the same number: with block 0 whole, a number that suits five blocks of 64 patches costs
    at least 59 % of the uncompressed model.

    Raises:
        ValueError: as :func:`at_cost`.
    """
    # 0.9 is any number below 1: at_cost raises it to the power it needs.
    shares = [0.9**block for block in range(ruler.depth)]
    return at_cost(ruler, budget, shares, [0.5] * ruler.depth, **settings)


def random_schedule(ruler: Ruler, budget: float, generator: torch.Generator, **settings: Any) -> DiffRate:
    """A random schedule of falling counts that costs ``budget`` multiply-adds; block 0 keeps all.

    Raises:
        ValueError: none of 1000 draws comes within 1 % of the budget.
    """
    for _ in range(_DRAWS):
        shares = torch.rand(ruler.depth - 1, generator=generator).sort(descending=True).values.tolist()
        merged = torch.rand(ruler.depth, generator=generator).tolist()
        try:
            return at_cost(ruler, budget, [1.0, *shares], merged, **settings)
        except ValueError:
            continue  # such a shape does not reach the budget at any power
    raise ValueError(f"the budget must be reachable by some schedule, got {budget:.4g} (multiply-adds)")


def fit(ruler: Ruler, found: Method, budget: float) -> Method:
    """A DiffRate, ToMe or EViT at the very budget: every patch count times one factor, each block's split as it was.

    A search ends within some per cent of its target, and comparisons are at equal cost, so the counts are stretched
    or shrunk together until the cost is the nearest possible. A block that keeps every token keeps doing so.
    """
    before_merge, kept = ruler.counts(found)
    split = [
        (middle - after) / max(1, there - after)
        for there, middle, after in zip(ruler.arriving(kept), before_merge, kept, strict=True)
    ]
    settings = ruler.settings_of(found)

    def method(shrinkage: float) -> Method:
        scaled = [
            count
            if count == ruler.num_tokens
            else ruler.prefix + max(2, min(ruler.patches, round((count - ruler.prefix) / shrinkage)))
            for count in kept
        ]
        middle = [
            after + round((there - after) * share)
            for there, after, share in zip(ruler.arriving(scaled), scaled, split, strict=True)
        ]
        return scheduled(ruler.schedule(Counts(middle, scaled), settings))

    return _bisect(ruler, budget, 0.25, 4.0, method)


def nearest_published(ruler: Ruler, name: str, budget: float) -> Method | None:
    """The published schedule whose cost on this model is nearest to a budget, rescaled to its tokens and fitted.

    Of the schedules for the timm model ``name``; if there are none, of those for every model of as many blocks whose
    method suits this one. None if there are none of those either.
    """
    own = [model for model in PUBLISHED_MODELS if name in (model, model.split(".")[0]) or name.split(".")[0] == model]
    candidates = []
    for model in own or PUBLISHED_MODELS:
        for gflops in published_budgets()[model]:
            schedule = published_schedule(model, gflops)
            merges_only = schedule.num_prune_kept is None
            if len(schedule) == ruler.depth and merges_only == ruler.geometry.spreads_tokens:
                candidates.append(schedule.rescaled(ruler.num_tokens, ruler.prefix))
    methods = [ruler.diffrate(ruler.counts(DiffRate(one))) for one in candidates]  # by the metric that suits the model
    if not methods:
        return None
    return fit(ruler, min(methods, key=lambda method: abs(ruler.cost(method) - budget)), budget)

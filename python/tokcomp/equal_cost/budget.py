"""Methods at a given number of multiply-adds: by tokens per block, or by the share that three blocks keep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from tokcomp.adapters import find_adapter
from tokcomp.equal_cost.counts import Ruler
from tokcomp.methods import (
    CDPruner,
    DivPrune,
    DynamicViT,
    EViT,
    EvoViT,
    Method,
    PassageMethod,
    PiToMe,
    SPViT,
    ToMe,
    VisionZip,
)
from tokcomp.methods.learned import stages

MethodT = TypeVar("MethodT", bound=Method)
#: Methods by the names that the command line gives them, made from r per block ...
BY_COUNT: dict[str, Callable[[Sequence[int]], Method]] = {"tome": ToMe, "pitome": PiToMe}
#: ... or from a keep rate and the blocks it applies to.
BY_RATE: dict[str, Callable[[float, Sequence[int]], Method]] = {
    "evit": EViT,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
}


#: ... or from the share that a first stage keeps, and blocks (None: its own), for methods that act between blocks.
BY_PREDICTOR: dict[str, Callable[[float, Sequence[int] | None], PassageMethod]] = {
    "dynamicvit": DynamicViT,
    "spvit": SPViT,
    "evovit": EvoViT,
}


def _last_at_least(holds: Callable[[int], bool], end: int) -> int:
    """The last index in 0 .. end at which a predicate that is true up to some point holds."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _nearest(model: nn.Module, ruler: Ruler, budget: float, candidate: Callable[[int], MethodT], end: int) -> MethodT:
    """Of candidates 0 .. end, in order of falling cost, the one whose cost is nearest to the budget."""
    adapter = find_adapter(model)
    adapter.validate(model, candidate(end))
    candidate(end).validate(ruler.geometry)
    above = _last_at_least(lambda index: ruler.cost(candidate(index)) >= budget, end)
    choices = [candidate(index) for index in range(above, min(above + 1, end) + 1)]
    best = min(choices, key=lambda method: abs(ruler.cost(method) - budget))
    if abs(ruler.cost(best) - budget) > 0.05 * budget:
        raise ValueError(
            f"the budget must lie between {ruler.cost(candidate(end)) / 1e9:.4g} and "
            f"{ruler.cost(candidate(0)) / 1e9:.4g} GFLOPs for {type(best).__name__}, got {budget / 1e9:.4g}"
        )
    return best


def count_for_budget(
    model: nn.Module, budget: float, make: Callable[[Sequence[int]], MethodT], *, ruler: Ruler | None = None
) -> MethodT:
    """A method with r + 1 in the first blocks and r in the others, at the cost nearest to ``budget`` multiply-adds.

    Args:
        model: plain (not compressed), and left so.
        budget: in multiply-adds.
        make: the method of so many tokens merged away in each block: :class:`ToMe`, say.
        ruler: of another cost than multiply-adds.

    Raises:
        ValueError: no r comes within 5 % of the budget; the message gives the range.
    """
    ruler = ruler or Ruler(model)
    depth = ruler.depth

    def candidate(index: int) -> MethodT:
        r, more = divmod(index, depth)
        return make([r + 1] * more + [r] * (depth - more))

    return _nearest(model, ruler, budget, candidate, depth * ruler.patches // 2)


def rate_for_budget(
    model: nn.Module, budget: float, make: Callable[[float, Sequence[int]], MethodT], *, ruler: Ruler | None = None
) -> MethodT:
    """A method in three blocks, spread as EViT's (4, 7 and 10 of 12), at the cost nearest to ``budget`` multiply-adds.

    Args:
        make: the method that keeps such a share of the patch tokens in such blocks: :class:`EViT`, say.

    The other arguments and the error as for :func:`count_for_budget`.
    """
    ruler = ruler or Ruler(model)
    blocks = evit_blocks(ruler.depth)
    steps = 200

    def candidate(index: int) -> MethodT:
        return make(1.0 - index / steps, blocks)

    return _nearest(model, ruler, budget, candidate, steps - 1)


def predictor_for_budget(
    model: nn.Module,
    budget: float,
    make: Callable[[float, Sequence[int] | None], PassageMethod],
    *,
    ruler: Ruler | None = None,
) -> PassageMethod:
    """A method that acts between its own blocks, at the cost nearest to ``budget`` multiply-adds.

    Args:
        make: the method of such a keep rate: :class:`DynamicViT`, say.

    The other arguments and the error as for :func:`count_for_budget`.
    """
    ruler = ruler or Ruler(model)
    steps = 200

    def candidate(index: int) -> PassageMethod:
        return make(1.0 - index / steps, None)

    return _nearest(model, ruler, budget, candidate, steps - 1)


def evit_blocks(depth: int) -> list[int]:
    """Three blocks (from 0), spread as published: 3, 6 and 9 of 12."""
    return list(stages(depth))


def tome_for_budget(model: nn.Module, budget: float, *, ruler: Ruler | None = None) -> ToMe:
    """ToMe at the cost nearest to ``budget`` multiply-adds: see :func:`count_for_budget`."""
    return count_for_budget(model, budget, ToMe, ruler=ruler)


def evit_for_budget(model: nn.Module, budget: float, *, fuse: bool = True, ruler: Ruler | None = None) -> EViT:
    """EViT at the cost nearest to ``budget`` multiply-adds: see :func:`rate_for_budget`."""
    return rate_for_budget(model, budget, functools.partial(EViT, fuse=fuse), ruler=ruler)

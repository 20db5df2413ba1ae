"""ToMe and EViT at a given number of multiply-adds."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tokcomp.adapters import find_adapter
from tokcomp.equal_cost.counts import Ruler
from tokcomp.methods import EViT, Method, ToMe


def _last_at_least(holds: Callable[[int], bool], end: int) -> int:
    """The last index in 0 .. end at which a predicate that is true up to some point holds."""
    low, high = 0, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def _nearest(model: nn.Module, ruler: Ruler, budget: float, candidate: Callable[[int], Method], end: int) -> Method:
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


def tome_for_budget(model: nn.Module, budget: float, *, ruler: Ruler | None = None) -> ToMe:
    """ToMe with r + 1 in the first blocks and r in the others, at the cost nearest to ``budget`` multiply-adds.

    ``model`` must be plain (not compressed) and is left so. Another cost than multiply-adds takes a ``ruler`` for it.

    Raises:
        ValueError: no r comes within 5 % of the budget; the message gives the range.
    """
    ruler = ruler or Ruler(model)
    depth = ruler.depth

    def candidate(index: int) -> ToMe:
        r, more = divmod(index, depth)
        return ToMe([r + 1] * more + [r] * (depth - more))

    return _nearest(model, ruler, budget, candidate, depth * ruler.patches // 2)  # type: ignore[return-value]


def evit_blocks(depth: int) -> list[int]:
    """Three blocks (from 0), spread as published: 3, 6 and 9 of 12."""
    return sorted({max(1, depth * k // 4) for k in (1, 2, 3)})


def evit_for_budget(model: nn.Module, budget: float, *, fuse: bool = True, ruler: Ruler | None = None) -> EViT:
    """EViT in three blocks, spread as published (4, 7 and 10 of 12), at the cost nearest to ``budget`` multiply-adds.

    Same terms as :func:`tome_for_budget`.
    """
    ruler = ruler or Ruler(model)
    blocks = evit_blocks(ruler.depth)
    steps = 200

    def candidate(index: int) -> EViT:
        return EViT(1.0 - index / steps, blocks=blocks, fuse=fuse)

    return _nearest(model, ruler, budget, candidate, steps - 1)  # type: ignore[return-value]

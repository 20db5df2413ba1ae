"""What a refinement starts from, and so is never worse than."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from tokcomp.equal_cost import Ruler, evit_for_budget, nearest_published, tome_for_budget, uniform
from tokcomp.methods import Method


def starts_for(
    model: nn.Module, name: str, ruler: Ruler, budget: float, searched: Mapping[str, Method] | None = None
) -> dict[str, Method]:
    """The starts at a cost of ``budget``, by name: those of ToMe, EViT, uniform and published schedules that reach it.

    Args:
        model: plain.
        name: timm's name for it, under which schedules may have been published.
        ruler: of the model; ``budget`` is of its cost.
        searched: further starts, such as the gradient's schedule; they come first.
    """
    found = dict(searched or {})
    makers = {
        "tome": lambda: tome_for_budget(model, budget, ruler=ruler),
        "evit": lambda: evit_for_budget(model, budget, ruler=ruler),
        "uniform": lambda: uniform(ruler, budget),
        "published": lambda: nearest_published(ruler, name, budget),
    }
    for label, make in makers.items():
        with suppress(ValueError):  # a method whose steps do not come near this budget
            method = make()
            if method is not None:
                found[label] = method
    return found

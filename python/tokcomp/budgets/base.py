"""What a budget is: a differentiable cost of a model's token counts, and a target for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.cost import TokenCounts, counts_of


class Budget(ABC):
    """One term of the search's loss: ``weight * loss(counts)`` pulls ``cost(counts)`` towards ``target``."""

    #: The limited quantity, as in log columns: ``flops``, ``latency``.
    name: str
    #: Unit of the cost and of the target: ``GFLOPs``, ``ms``.
    unit: str
    target: float
    weight: float

    @abstractmethod
    def cost(self, counts: TokenCounts) -> Tensor:
        """The cost of these counts in ``unit``: 0-dim, differentiable in both tensors of ``counts``."""

    @abstractmethod
    def loss(self, counts: TokenCounts) -> Tensor:
        """How far the cost is from the target: 0-dim, at least 0, before ``weight`` is applied."""

    def step(self, counts: TokenCounts, step: int) -> None:
        """Learn, if the budget has something to learn: called after step ``step`` with its counts.

        It must depend only on its state, ``counts`` and ``step``, so that a search can be resumed exactly.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`step` has learnt, as tensors and JSON data, for a checkpoint; empty if it learns nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: it is not the state of such a budget; nothing is changed.
        """
        if state:
            raise ValueError(f"the state of a {self.name} budget must be empty, got {', '.join(map(str, state))}")

    def describe(self) -> dict[str, Any]:
        """A description of this budget, as JSON data for a schedule's provenance."""
        return {"budget": self.name, "target": self.target, "unit": self.unit, "weight": self.weight}


class TargetError(ValueError):
    """A target that no schedule of the model can meet, or that the uncompressed model already meets."""


def check_number(name: str, value: float, *, positive: bool = False) -> float:
    """``value`` as a finite float that is not negative (or positive).

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of range; the message names the argument, the rule and what arrived.
    """
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise ValueError(f"{name} must be a finite number {'above' if positive else 'not below'} 0, got {value!r}")
    return number


def check_target(name: str, target: float, unit: str, *, smallest: float, uncompressed: float) -> float:
    """``target`` if a schedule can have that cost.

    Args:
        name: the argument, for the message.
        target: the target, in ``unit``.
        unit: unit of the three numbers, for the message.
        smallest: value for the smallest schedule that the search can reach.
        uncompressed: value for the uncompressed model; above ``smallest`` for a cost, below it for a rate.

    Raises:
        TargetError: the target is not between the two; the message gives both.
    """
    target = check_number(name, target, positive=True)
    if not min(smallest, uncompressed) <= target <= max(smallest, uncompressed):
        raise TargetError(
            f"{name} must lie between {uncompressed:.4g} (uncompressed) and {smallest:.4g} (the smallest schedule that "
            f"the search can reach) {unit}, got {target:g}"
        )
    return target


def least_counts(model: nn.Module, granularity: int = 1) -> TokenCounts:
    """The smallest token counts [L] (float64, CPU) that a search of this granularity can reach.

    Block 0 keeps all its tokens, and the last block of a model whose head reads patch tokens keeps all that it
    receives. Every other block may keep as few as the smallest candidate, ``P - granularity * (ceil(P / granularity) -
    1)`` of P patches, and the prefix tokens.
    """
    adapter = find_adapter(model)
    prefix = adapter.geometry(model).num_prefix_tokens
    num_in, num_out = (counts.clone() for counts in counts_of(model))
    patches = int(num_in[0]) - prefix
    fewest = prefix + patches - granularity * (math.ceil(patches / granularity) - 1)
    free = len(num_out) - 1 if adapter.reads_patches(model) else len(num_out)
    if free > 1:
        num_out[1:] = fewest
        num_in[2:] = fewest
    return TokenCounts(num_in, num_out)

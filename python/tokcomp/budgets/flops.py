"""Multiply-adds as a budget (DiffRate, Eq. 13 and Alg. 2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.budgets.base import Budget, check_number, check_target, least_counts
from tokcomp.cost import TokenCounts, counts_of, flops_of


class FlopsBudget(Budget):
    """(F - T)^2 with F and T in 1e9 multiply-adds per image.

    Args:
        model: the timm model, compressed or not.
        target_gflops: T.
        weight: lambda_f of Eq. 13.
        granularity: the search's granularity, which determines the smallest reachable cost.

    Raises:
        TargetError: the target is above the uncompressed model's cost or below the reachable minimum.
    """

    name = "flops"
    unit = "GFLOPs"

    def __init__(self, model: nn.Module, target_gflops: float, weight: float = 5.0, granularity: int = 1) -> None:
        adapter = find_adapter(model)
        self._cost, self._num_tokens = adapter.cost(model), adapter.num_tokens(model)
        least, most = self.cost(least_counts(model, granularity)), self.cost(counts_of(model))
        self.uncompressed = most.item()
        self.target = check_target(
            "target_gflops", target_gflops, self.unit, smallest=least.item(), uncompressed=self.uncompressed
        )
        self.weight = check_number("weight", weight)

    def cost(self, counts: TokenCounts) -> Tensor:
        return flops_of(self._cost, counts, self._num_tokens) / 1e9

    def loss(self, counts: TokenCounts) -> Tensor:
        return (self.cost(counts) - self.target).square()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "uncompressed": self.uncompressed}

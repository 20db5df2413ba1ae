"""Multiply-adds as a budget (DiffRate, Eq. 13 and Alg. 2)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.adapters.base import Cost
from tokcomp.budgets.base import Budget, TokenCounts, check_number, check_target, counts_of, least_counts


def flops_of(cost: Cost, counts: TokenCounts, num_tokens: int) -> Tensor:
    """Multiply-adds of one image (Alg. 2, patch embedding and head included): 0-dim float64, differentiable.

    Args:
        cost: of the model, from its adapter.
        counts: [L] tokens of each block, any floating type. Integers give the exact integer.
        num_tokens: tokens that the patch embedding makes, prefix included.

    Raises:
        ValueError: the counts are not one per block.
    """
    num_in, num_out = counts.num_in.double(), counts.num_out.double()
    shape = (len(cost.blocks),)
    if num_in.shape != shape or num_out.shape != shape:
        raise ValueError(
            f"counts must have one entry per block, {shape[0]}, got shapes {tuple(num_in.shape)} and "
            f"{tuple(num_out.shape)}"
        )
    projections, attention, mlp = _coefficients(cost, num_in.device)
    blocks = (projections + attention * num_in) * num_in + mlp * num_out
    return blocks.sum() + cost.head_per_token * num_out[-1] + (cost.embed * num_tokens + cost.head)


@lru_cache(maxsize=64)
def _coefficients(cost: Cost, device: torch.device) -> tuple[Tensor, ...]:
    """Multiply-adds per token in, per token in squared and per token out, each [L]; copied to a device but once."""
    rows = [[block.projections, 2 * block.width, block.mlp] for block in cost.blocks]
    with torch.inference_mode(False):  # the copy serves later calls too, which may want gradients
        return torch.tensor(rows, dtype=torch.float64).T.to(device).unbind(0)


class FlopsBudget(Budget):
    """(F - T)^2 with F and T in 1e9 multiply-adds per image.

    Args:
        model: the timm model, compressed or not.
        target_gflops: T.
        weight: lambda_f of Eq. 13.
        granularity: of the search, from which the smallest reachable cost follows.

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

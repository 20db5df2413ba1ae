"""The library's schedules at equal cost, on models of the run; and ToMe that leaves block 0 whole."""

from __future__ import annotations

from collections.abc import Sequence

import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from tokcomp import equal_cost
from tokcomp.equal_cost import Counts, Ruler
from tokcomp.methods import Method
from torch import nn


def cost(model: nn.Module, method: Method | None) -> int:
    """Multiply-adds of one image."""
    return Ruler(model).flops(method)


def counts(model: nn.Module, method: Method) -> Counts:
    """Tokens between the steps of each block, and tokens left."""
    return Ruler(model).counts(method)


def from_counts(model: nn.Module, kept: Sequence[int], pipeline: str) -> tokcomp.DiffRate:
    """DiffRate that leaves ``kept`` tokens in each block, under ``prune`` or ``merge``."""
    return Ruler(model).diffrate(Counts(list(kept), list(kept)), pipeline=pipeline)


def like(model: nn.Module, method: Method, pipeline: str) -> tokcomp.DiffRate:
    """DiffRate that leaves as many tokens in each block as another method does, under ``prune`` or ``merge``."""
    return Ruler(model).like(method, pipeline=pipeline)


def uniform(model: nn.Module, budget: float) -> tokcomp.DiffRate:
    return equal_cost.uniform(Ruler(model), budget)


def random_method(
    model: nn.Module, budget: float, generator: torch.Generator, *, pipeline: str = "prune_merge"
) -> tokcomp.DiffRate:
    return equal_cost.random_schedule(Ruler(model), budget, generator, pipeline=pipeline)


def fit(model: nn.Module, found: Method, budget: float) -> Method:
    return equal_cost.fit(Ruler(model), found, budget)


def tome_from_block_1(model: VisionTransformer, budget: float) -> tokcomp.ToMe:
    """ToMe that merges nothing in block 0, which DiffRate's search leaves whole too, at the cost nearest to a budget.

    Raises:
        ValueError: merging at most half of the tokens in each block, it does not come within 2 % of the budget.
    """
    ruler = Ruler(model)
    rest = ruler.depth - 1

    def candidate(index: int) -> tokcomp.ToMe:
        r, more = divmod(index, rest)
        return tokcomp.ToMe([0] + [r + 1] * more + [r] * (rest - more))

    candidates = [candidate(index) for index in range(rest * ruler.patches // 2 + 1)]
    found = min(candidates, key=lambda method: abs(ruler.flops(method) - budget))
    if abs(ruler.flops(found) - budget) > 0.02 * budget:
        raise ValueError(f"budget must be at least {ruler.flops(candidates[-1]) / 1e6:.2f} M, got {budget / 1e6:.2f} M")
    return found

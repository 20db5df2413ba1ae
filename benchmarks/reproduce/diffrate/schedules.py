"""Schedules that nobody searched, and the fitting of any schedule to a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from tokcomp.methods import Method
from torch import nn


def cost(model: nn.Module, method: Method | None) -> int:
    """Multiply-adds of one image; leaves the model plain."""
    try:
        return tokcomp.flops(model if method is None else tokcomp.compress(model, method))
    finally:
        tokcomp.restore(model)


def lists_for(pipeline: str, before_merge: Sequence[int], kept: Sequence[int]) -> tuple[list[int], list[int]]:
    """(num_prune_kept, num_merge_kept) under which ``pipeline`` leaves ``kept`` tokens in each block.

    ``before_merge`` are the counts between the two steps, as ``prune_merge`` has them: what arrives there minus what it
    prunes. ``merge_prune`` prunes as many tokens as ``prune_merge`` would, after merging. ``prune`` and ``merge`` read
    one list.
    """
    if pipeline != "merge_prune":
        return list(before_merge), list(kept)
    arriving = [before_merge[0], *kept[:-1]]
    merged = [after + there - middle for there, middle, after in zip(arriving, before_merge, kept, strict=True)]
    return list(kept), merged


def diffrate(
    before_merge: Sequence[int], kept: Sequence[int], *, pipeline: str, metric: str = "cls_attn", seed: int = 0
) -> tokcomp.DiffRate:
    """DiffRate that leaves ``kept`` tokens in each block, whatever the pipeline."""
    pruned, merged = lists_for(pipeline, before_merge, kept)
    if pipeline == "prune":
        pruned = list(kept)
    return tokcomp.DiffRate(tokcomp.CompressionSchedule(pruned, merged), metric, pipeline, seed)


def effective_counts(method: Method, num_tokens: int, depth: int) -> tuple[list[int], list[int]]:
    """What a method's counts amount to in each block: tokens before merging, and tokens left (class token included)."""
    before_merge, kept = [], []
    for block in range(depth):
        assignment = method.assign(block, num_tokens, 1)
        if assignment is None:
            before_merge.append(num_tokens)
        else:
            left = assignment.num_tokens_out
            merged = max(0, assignment.num_prune_kept - assignment.num_merge_kept)
            if getattr(method, "pipeline", "") == "merge_prune":
                merged = num_tokens - assignment.num_merge_kept
            before_merge.append(left + merged)
            num_tokens = left
        kept.append(num_tokens)
    return before_merge, kept


def from_counts(method: Method, num_tokens: int, depth: int, pipeline: str) -> tokcomp.DiffRate:
    """DiffRate that leaves as many tokens in each block as another method does, under ``prune`` or ``merge``."""
    _, kept = effective_counts(method, num_tokens, depth)
    return diffrate(kept, kept, pipeline=pipeline)


def _bisect(model: nn.Module, budget: float, low: float, high: float, at: Callable[[float], Method]) -> float:
    """The strength between ``low`` (dear) and ``high`` (cheap) at which a method costs nearest to the budget."""
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(model, at(middle)) > budget else (low, middle)
    return min((low, high), key=lambda strength: abs(cost(model, at(strength)) - budget))


def at_cost(
    model: VisionTransformer,
    budget: float,
    shares: Sequence[float],
    merged: Sequence[float],
    *,
    pipeline: str = "prune_merge",
    tolerance: float = 0.01,
) -> tokcomp.DiffRate:
    """DiffRate with the counts ``shares`` ** power, at the power that costs nearest to ``budget`` multiply-adds.

    Args:
        model: plain, and left so.
        shares: of the patches, one per block, falling: what the block keeps.
        merged: of the tokens that a block drops, one per block: how many merge rather than vanish.
        tolerance: as a share of the budget; further off is refused.

    Raises:
        ValueError: no power comes that near; the message gives the nearest cost.
    """
    patches = model.patch_embed.num_patches

    def method(power: float) -> tokcomp.DiffRate:
        # Two patch tokens always stay: one would leave merging nothing to choose from.
        kept = [1 + max(2, round(patches * share**power)) for share in shares]
        arriving = [1 + patches, *kept[:-1]]
        before_merge = [
            after + round((there - after) * share) for there, after, share in zip(arriving, kept, merged, strict=True)
        ]
        return diffrate(before_merge, kept, pipeline=pipeline)

    found = method(_bisect(model, budget, 0.0, 40.0, method))
    nearest = cost(model, found)
    if abs(nearest - budget) > tolerance * budget:
        raise ValueError(f"budget must be reachable, got {budget / 1e6:.2f} M where the nearest is {nearest / 1e6:.2f}")
    return found


def uniform(model: VisionTransformer, budget: float) -> tokcomp.DiffRate:
    """Every block but the first drops the same share of what arrives, half of it by pruning, half by merging.

    The same share rather than the same number: with block 0 whole, a number that suits five blocks of 64 patches costs
    at least 59 % of the uncompressed model.
    """
    depth = len(model.blocks)
    # 0.9 is any number below 1: at_cost raises it to the power it needs.
    return at_cost(model, budget, [0.9**block for block in range(depth)], [0.5] * depth)


def tome_from_block_1(model: VisionTransformer, budget: float) -> tokcomp.ToMe:
    """ToMe that merges nothing in block 0, which DiffRate's search leaves whole too, at the cost nearest to a budget.

    Raises:
        ValueError: merging at most half of the tokens in each block, it does not come within 2 % of the budget.
    """
    rest = len(model.blocks) - 1

    def candidate(index: int) -> tokcomp.ToMe:
        r, more = divmod(index, rest)
        return tokcomp.ToMe([0] + [r + 1] * more + [r] * (rest - more))

    candidates = [candidate(index) for index in range(rest * model.patch_embed.num_patches // 2 + 1)]
    found = min(candidates, key=lambda method: abs(cost(model, method) - budget))
    if abs(cost(model, found) - budget) > 0.02 * budget:
        raise ValueError(f"budget must be at least {cost(model, candidates[-1]) / 1e6:.2f} M, got {budget / 1e6:.2f} M")
    return found


def random_method(
    model: VisionTransformer, budget: float, generator: torch.Generator, *, pipeline: str = "prune_merge"
) -> tokcomp.DiffRate:
    """A random schedule of falling counts that costs ``budget`` multiply-adds; block 0 keeps all."""
    depth = len(model.blocks)
    while True:
        shares = torch.rand(depth - 1, generator=generator).sort(descending=True).values.tolist()
        merged = torch.rand(depth, generator=generator).tolist()
        try:
            return at_cost(model, budget, [1.0, *shares], merged, pipeline=pipeline)
        except ValueError:
            continue  # such a shape does not reach the budget at any power


def fit(model: VisionTransformer, found: tokcomp.DiffRate, budget: float) -> tokcomp.DiffRate:
    """A searched method at the very budget: every patch count times one factor, and each block's split as it was.

    A search ends within some per cent of its target, and comparisons are at equal cost, so the counts are stretched
    or shrunk together until the cost is the nearest possible.
    """
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    before_merge, kept = effective_counts(found, 1 + patches, depth)
    arriving = [1 + patches, *kept[:-1]]
    split = [
        (middle - after) / max(1, there - after)
        for there, middle, after in zip(arriving, before_merge, kept, strict=True)
    ]

    def method(shrinkage: float) -> tokcomp.DiffRate:
        scaled = [
            1 + patches if count == 1 + patches else 1 + max(2, min(patches, round((count - 1) / shrinkage)))
            for count in kept
        ]
        there = [1 + patches, *scaled[:-1]]
        middle = [after + round((n - after) * share) for n, after, share in zip(there, scaled, split, strict=True)]
        return diffrate(middle, scaled, pipeline=found.pipeline, metric=found.metric, seed=found.seed)

    return method(_bisect(model, budget, 0.25, 4.0, method))

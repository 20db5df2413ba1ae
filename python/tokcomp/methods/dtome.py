"""DToMe (DyMU, 2025): ToMe by a threshold, so that simple images keep fewer tokens than busy ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokcomp.methods.base import (
    Assignment,
    Evidence,
    Geometry,
    Reduced,
    flag,
    is_list,
    non_negative,
    number,
    require_depth,
)
from tokcomp.methods.partition import with_rank
from tokcomp.methods.varying import Packed, VaryingMethod, alive_tokens
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import cosine, gather_rows, sum_per_slot


class DToMe(VaryingMethod):
    """ToMe's matching, in which every pair more similar than the block's threshold merges.

    :func:`tokcomp.calibrate` finds thresholds under which images merge a given number of tokens on average.

    Args:
        thresholds: cosines, one per block of the model or one for all; 1 merges nothing.
        prop_attn: proportional attention: add log(size) to the attention scores from the first merge on.
        expected: tokens that each block merges away from the average image, one number per block, for
            :func:`tokcomp.flops`; None: unknown, and counted as none.

    Raises:
        TypeError, ValueError: thresholds that are not numbers in [-1, 1]; expected that are not counts, or not as many.
    """

    needs = frozenset({"keys"})

    def __init__(
        self, thresholds: float | Sequence[float], prop_attn: bool = True, expected: Sequence[int] | None = None
    ) -> None:
        self.thresholds: float | tuple[float, ...]
        self.thresholds = tuple(map(_cosine, thresholds)) if is_list(thresholds) else _cosine(thresholds)  # type: ignore[arg-type]
        self.proportional_attention = self.prop_attn = flag("prop_attn", prop_attn)
        self.expected = None if expected is None else tuple(non_negative("expected", one) for one in expected)
        if self.expected is not None and (
            not isinstance(self.thresholds, tuple) or len(self.expected) != len(self.thresholds)
        ):
            raise ValueError(f"expected must have one entry per threshold, got {len(self.expected)}")

    def __repr__(self) -> str:
        thresholds = self.thresholds
        if isinstance(thresholds, tuple):
            shown = f"({', '.join(f'{one:.4g}' for one in thresholds)})"
        else:
            shown = f"{thresholds:.4g}"
        return f"DToMe(thresholds={shown}, prop_attn={self.prop_attn}, expected={self.expected})"

    def validate(self, geometry: Geometry) -> None:
        super().validate(geometry)
        if isinstance(self.thresholds, tuple):
            require_depth("thresholds", len(self.thresholds), geometry)

    def threshold(self, block: int) -> float:
        """The block's own."""
        return self.thresholds[block] if isinstance(self.thresholds, tuple) else self.thresholds

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        """What the average image is expected to keep."""
        if self.threshold(block) >= 1:
            return None
        merged = min(self.expected[block] if self.expected else 0, (num_tokens - num_prefix_tokens) // 2)
        return Assignment(num_tokens, num_tokens - merged, num_tokens - merged)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        keys = evidence.require("keys").detach()
        keys = keys.to(accumulate_dtype(keys)).mean(1)  # [B, N, D]
        return with_rank(keys, torch.full_like(keys[..., 0], self.threshold(block)))

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        alive = alive_tokens(x, size)
        similarity, partner = matched(score[..., :-1], alive, num_prefix_tokens)
        merges = similarity > score[..., -1]
        return merge_pairs(x, size, alive, merges, partner, num_prefix_tokens)


def split(num_tokens: int, num_prefix_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ToMe's two sets, as positions: patch tokens at even places, and at odd ones."""
    first, odd = num_prefix_tokens, num_prefix_tokens % 2
    positions = torch.arange(num_tokens, device=device)
    return positions[first + odd :: 2], positions[first + 1 - odd :: 2]


def matched(features: Tensor, alive: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Of every token [B, N] the largest cosine with an odd one, and that one; -inf where it may not merge."""
    batch, num_tokens, _ = features.shape
    evens, odds = split(num_tokens, num_prefix_tokens, features.device)
    similarity = features.new_full((batch, num_tokens), float("-inf"))
    partner = torch.zeros_like(similarity, dtype=torch.int64)
    if len(odds) == 0:
        return similarity, partner
    for rows in evens.split(256):
        found = cosine(features[:, rows], features[:, odds]).masked_fill(~alive[:, None, odds], float("-inf")).max(2)
        similarity[:, rows] = found.values
        partner[:, rows] = odds[found.indices]
    return similarity.masked_fill(~alive, float("-inf")), partner


def merge_pairs(
    x: Tensor, size: Tensor | None, alive: Tensor, merges: Tensor, partner: Tensor, num_prefix_tokens: int
) -> Reduced:
    """Merge the tokens for which ``merges`` [B, N] holds into their partners [B, N], as means by size.

    The tokens of an image in which any merge come in ToMe's order: the prefix, the others of even place, those of odd.
    """
    num_tokens = x.shape[1]
    every = torch.arange(num_tokens, device=x.device)
    order = torch.cat((every[:num_prefix_tokens], *split(num_tokens, num_prefix_tokens, x.device)))
    order = torch.where(merges.any(1, keepdim=True), order, every)  # [B, N]
    packed = Packed.of((alive & ~merges).gather(1, order))
    slot = torch.empty_like(packed.slot).scatter(1, order, packed.slot)
    slot = torch.where(merges, slot.gather(1, partner), slot).masked_fill(~alive, -1)
    kept = order.gather(1, packed.kept)
    num_slots = kept.shape[1]
    dtype = accumulate_dtype(x)
    weight = torch.ones_like(slot, dtype=dtype) if size is None else size.to(dtype)
    total = sum_per_slot(weight, slot, num_slots)
    mean = sum_per_slot(x.to(dtype) * weight[:, :, None], slot, num_slots) / total.clamp_min(1e-30)[:, :, None]
    joined = sum_per_slot(merges.int(), slot, num_slots) > 0
    x_out = torch.where(joined[:, :, None], mean.to(x.dtype), gather_rows(x, kept))
    return Reduced(x_out * packed.alive[:, :, None], total * packed.alive, slot)


def _cosine(threshold: float) -> float:
    value = number("thresholds", threshold, "be numbers")
    if not -1 <= value <= 1:
        raise ValueError(f"thresholds must be in [-1, 1], as cosines are, got {value}")
    return value

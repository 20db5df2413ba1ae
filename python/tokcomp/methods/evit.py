"""EViT (ICLR 2022): keep the tokens that the class token attends to, or all do, and fuse the others into one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokcomp.methods.base import (
    Assignment,
    Evidence,
    Geometry,
    Method,
    Reduced,
    is_list,
    most_important,
    non_negative,
    require_depth,
)


class EViT(Method):
    """Keep the most attended patch tokens and fuse the dropped ones into their attention-weighted sum.

    The fused token comes last, counts among the patch tokens of the next block and competes like any other. There are
    no sizes and no proportional attention. The weights of the sum carry no gradient. Attention is the class token's, or
    the mean of all tokens' if the model has no class token.

    Args:
        keep_rate: share of the patch tokens to keep, rounded up, in each of ``blocks``; or one per block of the model
            (1 = keep all), in which case ``blocks`` is ignored.
        blocks: indices (from 0) of the blocks in which a single ``keep_rate`` applies.
        fuse: keep the weighted sum of the dropped tokens as one more token.
        num_pruned: instead of a keep rate: tokens to drop in every block; at least one patch token is kept.

    Raises:
        TypeError, ValueError: neither or both of keep_rate and num_pruned, or values outside (0, 1] and 0, 1, ...
    """

    needs = frozenset({"cls_attn"})

    def __init__(
        self,
        keep_rate: float | Sequence[float] | None = None,
        blocks: Sequence[int] = (3, 6, 9),
        fuse: bool = True,
        num_pruned: int | None = None,
    ) -> None:
        if (keep_rate is None) == (num_pruned is None):
            raise TypeError(f"EViT needs keep_rate or num_pruned, got {'neither' if keep_rate is None else 'both'}")
        self.keep_rate: float | tuple[float, ...] | None = None
        if keep_rate is not None:
            self.keep_rate = tuple(map(_rate, keep_rate)) if is_list(keep_rate) else _rate(keep_rate)  # type: ignore[arg-type]
        self.num_pruned = None if num_pruned is None else non_negative("num_pruned", num_pruned, "be an integer")
        if not is_list(blocks):
            raise TypeError(f"blocks must be a list of block numbers, got {blocks!r}")
        self.blocks = tuple(non_negative("blocks", block, "be integers") for block in blocks)
        self.fuse = bool(fuse)

    def __repr__(self) -> str:
        if self.num_pruned is not None:
            return f"EViT(num_pruned={self.num_pruned}, fuse={self.fuse})"
        blocks = "" if isinstance(self.keep_rate, tuple) else f", blocks={self.blocks}"
        return f"EViT(keep_rate={self.keep_rate}{blocks}, fuse={self.fuse})"

    def validate(self, geometry: Geometry) -> None:
        if isinstance(self.keep_rate, tuple):
            require_depth("keep_rate", len(self.keep_rate), geometry)
        elif self.keep_rate is not None and any(block >= geometry.depth for block in self.blocks):
            raise ValueError(f"blocks must be below the model's depth {geometry.depth}, got {self.blocks}")

    def fitted(self, geometry: Geometry) -> EViT:
        if geometry.has_class_token or self.needs != EViT.needs:
            return self
        fitted = copy.copy(self)
        fitted.needs = frozenset({"image_attn"})
        return fitted

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        patches = num_tokens - num_prefix_tokens
        if self.num_pruned is not None:
            kept = max(patches - self.num_pruned, min(patches, 1))
        else:
            rate = 1.0
            if isinstance(self.keep_rate, tuple):
                rate = self.keep_rate[block]
            elif self.keep_rate is not None and block in self.blocks:
                rate = self.keep_rate
            kept = math.ceil(rate * patches)
        if kept >= patches:
            return None
        kept += num_prefix_tokens
        return Assignment(kept, kept, kept + self.fuse)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return evidence.require("cls_attn" if "cls_attn" in self.needs else "image_attn")

    def kept_places(self, score: Tensor, source: Tensor, num_tokens_out: int, num_prefix_tokens: int) -> Tensor:
        """A fused token has the place of the most attended one in it."""
        return most_important(score, num_tokens_out, num_prefix_tokens)

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        kept = assignment.num_prune_kept
        x_kept, _, source = torch.ops.tokcomp.prune_merge(x, score, kept, kept, num_prefix_tokens=num_prefix_tokens)
        if not self.fuse:
            return Reduced(x_kept, None, source)
        dropped = source < 0  # [B, N]
        weights = score.masked_fill(~dropped, 0).to(x.dtype)
        fused = weights.unsqueeze(1) @ x  # [B, 1, C]
        return Reduced(torch.cat((x_kept, fused), dim=1), None, source.masked_fill(dropped, kept))


def _rate(rate: float) -> float:
    try:
        value = float(rate)
    except (TypeError, ValueError):
        raise TypeError(f"keep_rate must be a number or one per block, got {rate!r}") from None
    if not 0 < value <= 1:
        raise ValueError(f"keep_rate must be in (0, 1], got {value}")
    return value

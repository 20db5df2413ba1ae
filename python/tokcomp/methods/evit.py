"""EViT (ICLR 2022): keep the tokens that the class token attends to, or all do, and fuse the others into one."""

from __future__ import annotations

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
    attention_of,
    fitted_to_class_token,
    flag,
    most_important,
    non_negative,
    require_tokens,
)
from tokcomp.methods.keeping import parse_blocks, parse_keep_rate, rate_in, require_blocks


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
        self.keep_rate = None if keep_rate is None else parse_keep_rate(keep_rate)
        self.num_pruned = None if num_pruned is None else non_negative("num_pruned", num_pruned, "be an integer")
        self.blocks = parse_blocks(blocks)
        self.fuse = flag("fuse", fuse)

    def __repr__(self) -> str:
        if self.num_pruned is not None:
            return f"EViT(num_pruned={self.num_pruned}, fuse={self.fuse})"
        blocks = "" if isinstance(self.keep_rate, tuple) else f", blocks={self.blocks}"
        return f"EViT(keep_rate={self.keep_rate}{blocks}, fuse={self.fuse})"

    def validate(self, geometry: Geometry) -> None:
        if self.keep_rate is not None:
            require_blocks(self.keep_rate, self.blocks, geometry)
        if geometry.num_tokens is not None:
            require_tokens(self.made_for, geometry.num_tokens, geometry.num_prefix_tokens)

    def fitted(self, geometry: Geometry) -> EViT:
        return fitted_to_class_token(self, geometry)

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        patches = num_tokens - num_prefix_tokens
        if self.num_pruned is not None:
            kept = max(patches - self.num_pruned, min(patches, 1))
        else:
            kept = math.ceil(rate_in(block, self.keep_rate, self.blocks) * patches)
        if kept >= patches:
            return None
        kept += num_prefix_tokens
        return Assignment(kept, kept, kept + self.fuse)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return attention_of(evidence)

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

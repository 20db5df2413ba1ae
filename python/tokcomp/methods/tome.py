"""ToMe (ICLR 2023): merge the r most similar pairs of tokens in every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokcomp.methods.base import (
    Assignment,
    Evidence,
    Geometry,
    Method,
    Reduced,
    flag,
    is_list,
    non_negative,
    require_depth,
    require_tokens,
)


class ToMe(Method):
    """Bipartite soft matching on the keys, averaged over heads; merged tokens are size-weighted means.

    Args:
        r: tokens merged away in each block, or one number per block; at most half of a block's patch tokens merge.
        prop_attn: proportional attention: add log(size) to the attention scores from the first merge on.

    Raises:
        TypeError, ValueError: r is neither a non-negative integer nor a list of them.
    """

    needs = frozenset({"keys"})

    def __init__(self, r: int | Sequence[int], prop_attn: bool = True) -> None:
        self.r: int | tuple[int, ...]
        self.r = tuple(non_negative("r", one) for one in r) if is_list(r) else non_negative("r", r)  # type: ignore[union-attr]
        self.proportional_attention = self.prop_attn = flag("prop_attn", prop_attn)

    def __repr__(self) -> str:
        return f"ToMe(r={self.r}, prop_attn={self.prop_attn})"

    def validate(self, geometry: Geometry) -> None:
        if isinstance(self.r, tuple):
            require_depth("r", len(self.r), geometry)
        if geometry.num_tokens is not None:
            require_tokens(self.made_for, geometry.num_tokens, geometry.num_prefix_tokens)

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        r = self.r[block] if isinstance(self.r, tuple) else self.r
        r = min(r, (num_tokens - num_prefix_tokens) // 2)
        return Assignment(num_tokens, num_tokens - r, num_tokens - r) if r > 0 else None

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return evidence.require("keys").detach().mean(1)  # [B, N, D]

    def kept_places(self, score: Tensor, source: Tensor, num_tokens_out: int, num_prefix_tokens: int) -> Tensor:
        """A destination, which is one of the odd tokens, keeps its place."""
        every = torch.arange(source.shape[1], device=source.device).expand_as(source)
        kept = source.new_zeros(source.shape[0], num_tokens_out)
        kept = kept.scatter(1, source[:, 0::2], every[:, 0::2])
        return kept.scatter(1, source[:, 1::2], every[:, 1::2])

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        r = assignment.num_prune_kept - assignment.num_merge_kept
        return Reduced(*torch.ops.tokcomp.tome_merge(x, score, r, size=size, num_prefix_tokens=num_prefix_tokens))

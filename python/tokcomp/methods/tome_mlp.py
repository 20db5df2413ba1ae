"""ToMe around the MLP only, for dense prediction (ToCom, Table 11): merge before it, unmerge after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokcomp.methods.base import Assignment, Evidence, Geometry, Method, Reduced, flag
from tokcomp.methods.tome import ToMe


class ToMeMLP(Method):
    """In each block, merge the r most similar pairs of tokens, run the MLP on what is left, and unmerge.

    Every block sees all N tokens and the output has one per position, as segmentation and feature maps need. This saves
    up to half of the MLPs' cost and none of attention's. Pairs are ToMe's: by the keys, averaged over heads.

    Args:
        r: tokens merged away for each MLP, or one number per block; at most half of the patch tokens.
        merge_residual: what a position has after the block. False: its own token plus the MLP's output for its group,
            so that merged positions stay distinct. True: its group's token, mean and MLP together.

    Raises:
        TypeError, ValueError: r is neither a non-negative integer nor a list of them.
    """

    name = "tome_mlp"
    needs = frozenset({"keys"})
    unmerges = True

    def __init__(self, r: int | Sequence[int], merge_residual: bool = False) -> None:
        self._matching = ToMe(r, prop_attn=False)
        self.merge_residual = flag("merge_residual", merge_residual)

    @property
    def r(self) -> int | tuple[int, ...]:
        return self._matching.r

    def __repr__(self) -> str:
        return f"ToMeMLP(r={self.r}, merge_residual={self.merge_residual})"

    def validate(self, geometry: Geometry) -> None:
        if geometry.spreads_tokens:
            raise ValueError("ToMeMLP needs a plain vision transformer, got a hierarchical model; use ToMe or DiffRate")
        self._matching.validate(geometry)
        highest = max(self.r, default=0) if isinstance(self.r, tuple) else self.r
        if geometry.num_tokens is not None:
            most = (geometry.num_tokens - geometry.num_prefix_tokens) // 2
            if highest > most:
                raise ValueError(f"r must be at most half of the model's patch tokens, {most}, got {highest}")

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        return self._matching.assign(block, num_tokens, num_prefix_tokens)

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return self._matching.score(evidence, block, x)

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        return self._matching.reduce(x, score, assignment, size=size, num_prefix_tokens=num_prefix_tokens)

    def spread(self, x: Tensor, merged: Tensor, branch: Tensor, source: Tensor) -> Tensor:
        if self.merge_residual:
            return torch.ops.tokcomp.unmerge(merged + branch, source)
        return super().spread(x, merged, branch, source)

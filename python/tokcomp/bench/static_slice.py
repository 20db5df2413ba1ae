"""Dropping tokens for nothing: the yardstick of what compression itself costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.methods.base import Assignment, Evidence, Geometry, Method, Norm, Reduced, require_depth


class StaticSlice(Method):
    """Keeps the first tokens of each block, whatever they show: no importance, no order, no merging, no sizes.

    A model under it does the same matrix products as one under a real method with the same counts, in the same stack,
    and nothing else; the time a method takes above it is the method's tax. Its logits are worth nothing.

    Args:
        num_kept: tokens left by each block, prefix included.
    """

    def __init__(self, num_kept: Sequence[int]) -> None:
        self.num_kept = tuple(num_kept)

    def __repr__(self) -> str:
        return f"StaticSlice({list(self.num_kept)})"

    @classmethod
    def like(cls, method: Method, model: nn.Module) -> StaticSlice:
        """The slice that leaves as many tokens in every block of ``model`` as ``method`` does."""
        adapter = find_adapter(model)
        geometry = adapter.geometry(model)
        method.validate(geometry)
        alive, counts = adapter.num_tokens(model), []
        for block in range(geometry.depth):
            assignment = method.assign(block, alive, geometry.num_prefix_tokens)
            alive = alive if assignment is None else assignment.num_tokens_out
            counts.append(alive)
        return cls(counts)

    def validate(self, geometry: Geometry) -> None:
        require_depth("num_kept", len(self.num_kept), geometry)
        if min(self.num_kept) < max(1, geometry.num_prefix_tokens):
            raise ValueError(
                f"num_kept must keep the {geometry.num_prefix_tokens} prefix tokens, got {min(self.num_kept)}"
            )

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        left = self.num_kept[block]
        return Assignment(left, left, left) if left < num_tokens else None

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        return x

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        left = assignment.num_tokens_out
        return Reduced(x[:, :left], size, _source(x.shape[1], left, x.device).expand(x.shape[0], -1))

    def reduce_norm(
        self,
        x: Tensor,
        branch: Tensor,
        score: Tensor,
        assignment: Assignment,
        *,
        size: Tensor | None,
        num_prefix_tokens: int,
        norm: Norm,
    ) -> tuple[Reduced, Tensor]:
        left = assignment.num_tokens_out
        source = _source(x.shape[1], left, x.device).expand(x.shape[0], -1)
        x, normalized = torch.ops.tokcomp.add_layer_norm(x[:, :left], branch[:, :left], *norm)
        return Reduced(x, size, source), normalized


@functools.cache
def _source(num_tokens: int, left: int, device: torch.device) -> Tensor:
    """[1, N], made once: two launches a block would be a tax of the yardstick's own."""
    with torch.inference_mode(False):
        position = torch.arange(num_tokens, device=device)
        return position.masked_fill(position >= left, -1).unsqueeze(0)

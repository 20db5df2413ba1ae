"""Methods whose predictors keep a share of the patch tokens before some blocks, trained by distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.methods.base import Geometry, number
from tokcomp.methods.keeping import parse_blocks, parse_keep_rate
from tokcomp.methods.learned import Answers, LearnedMethod, powers, require_blocks_below, stages
from tokcomp_kernels._numbers import accumulate_dtype


class Deciding(Protocol):
    """A passage in training."""

    decisions: list[Tensor]  # [B, P] of each stage: 1 for the patch tokens that are left, 0 for others, with a gradient


class StagedMethod(LearnedMethod):
    """How many tokens are left at which block, and the losses; how they are chosen, a subclass says.

    Args:
        keep_rate: r: after the stages, r, r^2, ... of all the patch tokens are left, rounded down, at least one; or the
            share of all that is left after each of ``blocks``.
        blocks: indices (from 0) of the blocks before which tokens leave; None: a quarter, half and three quarters of
            the way through the model.
        ratio_weight, distill_weight: of the losses.

    Raises:
        TypeError, ValueError: rates outside (0, 1], or that rise; not one for each of blocks; blocks that are no block
            numbers in rising order; weights that are no finite numbers, 0 or more.
    """

    has_teacher = True

    def __init__(
        self,
        keep_rate: float | Sequence[float] = 0.7,
        blocks: Sequence[int] | None = None,
        ratio_weight: float = 2.0,
        distill_weight: float = 0.5,
    ) -> None:
        self.keep_rate = parse_keep_rate(keep_rate)
        self.blocks = None if blocks is None else parse_blocks(blocks)
        self.ratio_weight, self.distill_weight = _weights(ratio_weight=ratio_weight, distill_weight=distill_weight)
        if self.blocks is not None and list(self.blocks) != sorted(set(self.blocks)):
            raise ValueError(f"blocks must rise, got {blocks}")
        if isinstance(self.keep_rate, tuple) and list(self.keep_rate) != sorted(self.keep_rate, reverse=True):
            raise ValueError(f"keep_rate must not rise from stage to stage, got {keep_rate}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(keep_rate={self.keep_rate}, blocks={self.blocks})"

    def validate(self, geometry: Geometry) -> None:
        super().validate(geometry)
        require_blocks_below(self.blocks, geometry)
        blocks = self.at(geometry.depth)
        if len(self.rates(len(blocks))) != len(blocks):
            raise ValueError(f"keep_rate must be one number, or one for each of {blocks}, got {self.keep_rate}")

    def at(self, depth: int) -> tuple[int, ...]:
        """The blocks before which tokens leave."""
        return stages(depth) if self.blocks is None else self.blocks

    def rates(self, number: int) -> tuple[float, ...]:
        """The share of all patch tokens that is left after each of ``number`` stages."""
        return powers(self.keep_rate, number)

    def kept(self, blocks: Sequence[int], patches: int) -> dict[int, int]:
        """Patch tokens, of so many, that go into each of the blocks before which some leave."""
        rates = zip(blocks, self.rates(len(blocks)), strict=True)
        return {block: max(int(patches * rate), min(patches, 1)) for block, rate in rates}

    def share(self, decision: Tensor) -> Tensor:
        """What is compared with a stage's rate: of a decision [B, P] the share that each image keeps, [B]."""
        return decision.mean(1)

    def penalties(self, passage: Deciding, answers: Answers, taught: Answers | None) -> dict[str, Tensor]:
        """Squared error of the share kept, KL divergence of the logits, squared error of the tokens kept (Eq. 9-12)."""
        decisions = passage.decisions
        errors = [
            (self.share(decision) - rate).square().mean()
            for decision, rate in zip(decisions, self.rates(len(decisions)), strict=True)
        ]
        found = {"ratio": self.ratio_weight * torch.stack(errors).mean()}
        if taught is not None:
            found["logits"] = self.distill_weight * divergence(answers.logits, taught.logits)
            kept = decisions[-1]
            prefix = taught.tokens.shape[1] - kept.shape[1]
            ours, theirs = (one.tokens[:, prefix : prefix + kept.shape[1]] for one in (answers, taught))
            found["tokens"] = self.distill_weight * token_error(ours, theirs, kept)
        return found


def decided(odds: Tensor) -> Tensor:
    """Keep or drop at random, [B, P] of 1 and 0, by log-probabilities [B, P, 2]; the gradient goes straight through."""
    soft = F.gumbel_softmax(odds.to(accumulate_dtype(odds)))
    hard = (soft[..., 0] >= soft[..., 1]).to(soft.dtype)
    return hard + (soft[..., 0] - soft[..., 0].detach())  # in this order: the sum is 1 or 0 without rounding


def divergence(logits: Tensor, taught: Tensor) -> Tensor:
    """KL divergence of the answers [B, classes] from those taught, mean over the batch: 0-dim, float32 or better."""
    ours, theirs = (one.to(accumulate_dtype(one)).log_softmax(-1) for one in (logits, taught))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def token_error(tokens: Tensor, taught: Tensor, kept: Tensor) -> Tensor:
    """Mean squared error of the tokens [B, P, C] that are kept, [B, P] of 1 and 0; 0 if none is."""
    kept = kept.detach()
    dtype = accumulate_dtype(tokens)
    error = (tokens.to(dtype) - taught.to(dtype)).square().mean(2)
    return (error * kept).sum() / kept.sum().clamp(min=1)


def _weights(**given: Any) -> tuple[float, ...]:
    for name, value in given.items():
        if not 0 <= number(name, value) < math.inf:
            raise ValueError(f"{name} must be 0 or more and finite, got {value}")
    return tuple(float(value) for value in given.values())

"""A-ViT (CVPR 2022): a token halts once the halting probabilities that it has given add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.methods.base import Evidence, Geometry, TokenShape, integer, number
from tokcomp.methods.learned import Answers, LearnedMethod, Passage, loaded, pick
from tokcomp.methods.varying import Packed
from tokcomp_kernels._numbers import accumulate_dtype


class Halting(nn.Module):
    """The probability [B, N] that each of the tokens x [B, N, C] halts: sigmoid(scale x_0 + shift), from channel 0.

    Scale and shift are constants of the training, and kept with the weights that are trained with them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        first = x[..., 0].to(accumulate_dtype(x))
        return (first * self.scale.to(first.dtype) + self.shift.to(first.dtype)).sigmoid()


class AViT(LearnedMethod):
    """Each token halts on its own: it gives a probability after every block, and leaves once their sum is enough.

    The class token's answer is the mean of what it was after each block, weighed by its halting probabilities and, at
    its last block, by what is missing to 1. Tokens really leave, in training too, so images of a batch keep different
    numbers of them. There are no trained weights besides the model's own: channel 0 of the tokens learns to halt them,
    under a loss for the blocks that tokens go through and one for how halting is spread over the blocks.

    Args:
        threshold: sum of the probabilities at which a token halts.
        scale, shift: of new parts: what channel 0 is multiplied by, and what is added, before the sigmoid; as published
            for DeiT-Ti. For DeiT-S: 10 and -75.
        ponder_weight, prior_weight: of the two losses, as published.
        prior_depth: block (from 0) around which halting is to be spread, with a standard deviation of 1; None: two
            thirds of the way through the model, 8 of 12 as published.

    Raises:
        TypeError, ValueError: a threshold outside (0, 1); values that are no finite numbers, or weights below 0.
    """

    varies = True

    def __init__(
        self,
        threshold: float = 0.99,
        scale: float = 10.0,
        shift: float = -30.0,
        ponder_weight: float = 5e-4,
        prior_weight: float = 1e-3,
        prior_depth: int | None = None,
    ) -> None:
        numbers = {"threshold": threshold, "scale": scale, "shift": shift}
        for name, value in {**numbers, "ponder_weight": ponder_weight, "prior_weight": prior_weight}.items():
            if not math.isfinite(number(name, value)):
                raise ValueError(f"{name} must be finite, got {value}")
            if name.endswith("weight") and value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        self.threshold, self.scale, self.shift = float(threshold), float(scale), float(shift)
        self.ponder_weight, self.prior_weight = float(ponder_weight), float(prior_weight)
        self.prior_depth = None if prior_depth is None else integer("prior_depth", prior_depth)

    def __repr__(self) -> str:
        return f"AViT(threshold={self.threshold})"

    def validate(self, geometry: Geometry) -> None:
        super().validate(geometry)
        if self.prior_depth is not None and not 0 < self.prior_depth < geometry.depth:
            raise ValueError(
                f"prior_depth must be a block from 1 to {geometry.depth - 1} of the model, got {self.prior_depth}"
            )

    def prior(self, depth: int) -> list[float]:
        """What share of the tokens is to halt after each block; those before ``prior_depth`` add up to 0.98."""
        centre = max(depth * 2 // 3, 1) if self.prior_depth is None else self.prior_depth
        shares = [math.exp(-((block - centre) ** 2) / 2) for block in range(depth)]
        total = sum(shares[:centre]) / 0.98
        return [share / total for share in shares]

    def counts(self, depth: int, num_tokens: int, num_prefix_tokens: int) -> list[tuple[int, int]]:
        """Of a token that halts as the prior has it: what is to be expected, as only the images say."""
        found, total = [], 0.0
        for share in self.prior(depth):
            inside = num_tokens if total <= self.threshold else num_prefix_tokens
            found.append((inside, inside))
            total += share
        return found

    def make_parts(self, shape: TokenShape, depth: int) -> nn.Module:
        return Halting(self.scale, self.shift)

    @classmethod
    def parts_like(cls, tensors: Mapping[str, Tensor]) -> nn.Module:
        return loaded(lambda: Halting(1.0, 0.0), tensors, cls.name)

    def check_parts(self, parts: nn.Module, shape: TokenShape, depth: int) -> None:
        """Any will do."""

    def begin(self, x: Tensor, parts: nn.Module | None, num_prefix_tokens: int, depth: int, training: bool) -> Passage:
        return _Halted(self.threshold, parts, x, num_prefix_tokens, depth)

    def penalties(self, passage: _Halted, answers: Answers, taught: Answers | None) -> dict[str, Tensor]:
        """The mean number of blocks and remainder of a token, and the KL divergence of halting from its prior."""
        found = {"ponder": self.ponder_weight * passage.ponder.mean()}
        shares = torch.stack(passage.halting)
        shares = (shares / shares.sum()).clamp(0.01, 0.99)
        prior = shares.new_tensor(self.prior(len(shares)))
        # As published, a mean over the blocks; the prior adds up to more than 1, so that this may fall below 0.
        divergence = torch.xlogy(prior, prior / shares).mean()
        found["prior"] = self.prior_weight * divergence.clamp(min=0)
        return found


class _Halted(Passage):
    """Tokens leave before the block after the one in which they halted; prefix tokens stay, without being attended to.

    Args:
        threshold: as of :class:`AViT`.
        parts: the model's.
        x: [B, N, C] tokens that enter block 0.
        num_prefix_tokens: tokens in front.
        depth: blocks.
    """

    def __init__(self, threshold: float, parts: Any, x: Tensor, num_prefix_tokens: int, depth: int) -> None:
        super().__init__()
        self._threshold, self._parts, self._prefix, self._depth = threshold, parts, num_prefix_tokens, depth
        dtype = accumulate_dtype(x)
        batch, self._num_tokens, _ = x.shape
        self._alive = x.new_ones(batch, self._num_tokens, dtype=torch.bool)
        self._total = x.new_zeros(batch, self._num_tokens, dtype=dtype)  # of the halting probabilities so far
        self._answer: Tensor | None = None  # [B, prefix, C]
        #: Blocks that a token of each image goes through and its remainder, [B], mean over the tokens.
        self.ponder = x.new_zeros(batch, dtype=dtype)
        #: After each block the mean halting probability of a token, 0-dim; one that has halted counts 0.
        self.halting: list[Tensor] = []

    def enter(self, block: int, x: Tensor) -> Tensor:
        self.source = None
        if bool(self._alive.all()):
            return x
        stay = self._alive.clone()
        stay[:, : self._prefix] = True
        packed = Packed.of(stay)
        self.source = packed.slot.masked_fill(~stay, -1)
        self.origin = packed.kept if self.origin is None else self.origin.gather(1, packed.kept)
        self._total = self._total.gather(1, packed.kept)
        self._alive = self._alive.gather(1, packed.kept) & packed.alive
        self.filled = packed.alive
        self.size = self._alive.to(self._total.dtype)
        return pick(x, packed.kept) * packed.alive[:, :, None]

    def leave(self, block: int, x: Tensor, evidence: Evidence) -> Tensor:
        alive = self._alive
        chance = self._parts(x)
        self.halting.append((chance * alive).sum() / max(len(x) * self._num_tokens, 1))
        if block + 1 == self._depth:
            chance = torch.ones_like(chance)
        total = self._total + chance
        halts = alive & (total > self._threshold)
        remainder = 1 - self._total
        weight = torch.where(halts, remainder, chance) * alive  # [B, N] what this block counts for in the answer
        self.ponder = self.ponder + (alive.to(total.dtype) + remainder * halts).sum(1) / self._num_tokens
        share = weight[:, : self._prefix, None] * x[:, : self._prefix]
        self._answer = share if self._answer is None else self._answer + share
        self._total, self._alive = total, alive & ~halts
        return x

    def finish(self, x: Tensor) -> Tensor:
        assert self._answer is not None
        if self.size is not None and self.filled is not None:
            self.size = self.filled.to(self.size.dtype)  # a prefix token that has halted is a token all the same
        return torch.cat((self._answer.to(x.dtype), x[:, self._prefix :]), 1)

"""DynamicViT (NeurIPS 2021): predictors at three stages say which tokens go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.methods.base import TokenShape, most_important
from tokcomp.methods.learned import Passage, count_of, length_of, loaded, pick, slots_of
from tokcomp.methods.staged import StagedMethod, decided


class Predictor(nn.Module):
    """Log-probabilities [B, P, 2] that each of the patch tokens x [B, P, C] is kept or dropped (Eq. 2-5).

    Half of a token's features describe itself, the other half become their mean over the tokens that are left.

    Args:
        width: C, even.

    Raises:
        ValueError: it is odd.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width must be even, for features in two halves, got {width}")
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Linear(width, width)
        self.hidden1 = nn.Linear(width, width // 2)
        self.hidden2 = nn.Linear(width // 2, width // 4)
        self.out = nn.Linear(width // 4, 2)
        for layer in (self.embed, self.hidden1, self.hidden2, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, alive: Tensor | None = None) -> Tensor:
        """``alive``: [B, P, 1], 1 for tokens that are left and 0 for others; None: all are."""
        x = F.gelu(self.embed(self.norm(x.to(self.norm.weight.dtype))))
        local, shared = x.chunk(2, dim=2)
        if alive is None:
            mean = shared.mean(1, keepdim=True)
        else:
            mean = (shared * alive.to(x.dtype)).sum(1, keepdim=True) / alive.to(x.dtype).sum(1, keepdim=True).clamp(
                min=1
            )
        x = torch.cat((local, mean.expand_as(local)), dim=2)
        x = F.gelu(self.hidden2(F.gelu(self.hidden1(x))))
        return self.out(x).log_softmax(-1)

    @staticmethod
    def cost(width: int) -> int:
        """Multiply-adds per token."""
        return width * width + width * (width // 2) + (width // 2) * (width // 4) + 2 * (width // 4)


class DynamicViT(StagedMethod):
    """Before three blocks a predictor scores the patch tokens; those of the highest scores go on, the others leave.

    In training no token leaves: each is kept or dropped at random by the predictor's probabilities (Gumbel-softmax,
    straight through), and nobody but itself attends to a dropped one. The losses ask for the keep rates (squared error
    of each image's share) and for the uncompressed model's logits and tokens.

    Args:
        keep_rate, blocks: as for :class:`StagedMethod`.
        ratio_weight, distill_weight: of the losses, as published.

    Raises:
        TypeError, ValueError: as :class:`StagedMethod`.
    """

    def counts(self, depth: int, num_tokens: int, num_prefix_tokens: int) -> list[tuple[int, int]]:
        kept, found = self.kept(self.at(depth), num_tokens - num_prefix_tokens), []
        for block in range(depth):
            num_tokens = kept[block] + num_prefix_tokens if block in kept else num_tokens
            found.append((num_tokens, num_tokens))
        return found

    def added_cost(self, shape: TokenShape, arriving: Sequence[float]) -> float:
        return Predictor.cost(shape.width) * sum(arriving[block] for block in self.at(len(arriving)))

    def make_parts(self, shape: TokenShape, depth: int) -> nn.Module:
        return nn.ModuleList(Predictor(shape.width) for _ in self.at(depth))

    @classmethod
    def parts_like(cls, tensors: Mapping[str, Tensor]) -> nn.Module:
        number, width = count_of(tensors), length_of(tensors, "0.norm.weight", cls.name)
        return loaded(lambda: nn.ModuleList(Predictor(width) for _ in range(number)), tensors, cls.name)

    def check_parts(self, parts: nn.Module, shape: TokenShape, depth: int) -> None:
        own: list[Any] = list(parts.children())
        found = [one.norm.weight.shape[0] for one in own]
        if found != [shape.width] * len(self.at(depth)):
            raise ValueError(
                f"the model's predictors must be {len(self.at(depth))} of width {shape.width}, got {len(found)} of "
                f"{' and '.join(map(str, dict.fromkeys(found)))}; attach or load those that are for these blocks"
            )

    def begin(self, x: Tensor, parts: nn.Module | None, num_prefix_tokens: int, depth: int, training: bool) -> Passage:
        assert parts is not None
        blocks = self.at(depth)
        predictors: list[Any] = list(parts.children())
        patches = x.shape[1] - num_prefix_tokens
        if training:
            return _Masked(dict(zip(blocks, predictors, strict=True)), num_prefix_tokens)
        steps = zip(blocks, zip(predictors, self.kept(blocks, patches).values(), strict=True), strict=True)
        return _Dropped(dict(steps), num_prefix_tokens)


class _Dropped(Passage):
    """Tokens really leave.

    Args:
        steps: the predictor of each block before which tokens leave, and how many patch tokens go on.
        num_prefix_tokens: tokens that always stay.
    """

    def __init__(self, steps: Mapping[int, tuple[Predictor, int]], num_prefix_tokens: int) -> None:
        super().__init__()
        self._steps, self._prefix = steps, num_prefix_tokens

    def enter(self, block: int, x: Tensor) -> Tensor:
        self.source = None
        if block not in self._steps:
            return x
        predictor, kept = self._steps[block]
        if kept >= x.shape[1] - self._prefix:
            return x
        score = predictor(x[:, self._prefix :])[..., 0]
        index = most_important(F.pad(score, (self._prefix, 0)), self._prefix + kept, self._prefix)
        self.source = slots_of(index, x.shape[1])
        self.origin = index if self.origin is None else self.origin.gather(1, index)
        return pick(x, index)


class _Masked(Passage):
    """Every token stays, and the mask says which count; :attr:`decisions` collects those of each stage, [B, P]."""

    def __init__(self, predictors: Mapping[int, Predictor], num_prefix_tokens: int) -> None:
        super().__init__()
        self._predictors, self._prefix = predictors, num_prefix_tokens
        self.decisions: list[Tensor] = []

    def enter(self, block: int, x: Tensor) -> Tensor:
        if block in self._predictors:
            alive = self.decisions[-1] if self.decisions else x.new_ones(x.shape[0], x.shape[1] - self._prefix)
            odds = self._predictors[block](x[:, self._prefix :], alive.unsqueeze(2))
            alive = decided(odds) * alive
            self.decisions.append(alive)
            self.mask = F.pad(alive, (self._prefix, 0), value=1.0)
        return x

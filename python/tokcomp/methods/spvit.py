"""SPViT (ECCV 2022): selectors that look at every head; what leaves at a stage goes on as one package token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.methods.base import TokenShape, most_important
from tokcomp.methods.learned import Passage, count_of, length_of, loaded, pick
from tokcomp.methods.staged import StagedMethod, decided
from tokcomp_kernels._numbers import accumulate_dtype

#: Weights of a mean that are all below this are none.
LEAST_WEIGHT = 1e-30


class Selector(nn.Module):
    """Scores of patch tokens x [B, P, C] by their heads, weighed by which heads matter for each token.

    One network, for every head alike, scores a head's channels of a token: half of its features describe themselves,
    the other half become their mean over the tokens that are left. Another, from the mean channel of each head, says
    what each head's score counts for.

    Args:
        width: C.
        num_heads: H, which divides C into an even number of channels.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % (2 * num_heads):
            raise ValueError(f"width must be an even number of channels for each of {num_heads} heads, got {width}")
        inner = width // num_heads
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(inner)
        self.embed = nn.Linear(inner, inner)
        self.hidden1 = nn.Linear(inner, inner // 2)
        self.hidden2 = nn.Linear(inner // 2, max(inner // 4, 1))
        self.out = nn.Linear(max(inner // 4, 1), 2)
        self.squeeze = nn.Linear(num_heads, max(num_heads // 2, 1))
        self.excite = nn.Linear(max(num_heads // 2, 1), num_heads)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-scores and probabilities that each token is kept or dropped, [B, P, 2] both, averaged over heads.

        ``alive``: [B, P], 1 for tokens that are left and 0 for others; None: all are.
        """
        heads = x.to(self.norm.weight.dtype).unflatten(2, (self.num_heads, -1))  # [B, P, H, D]
        weight = self.excite(F.gelu(self.squeeze(heads.mean(3)))).sigmoid()  # [B, P, H]
        weight = (weight / weight.sum(2, keepdim=True)).unsqueeze(3)
        local, shared = F.gelu(self.embed(self.norm(heads))).chunk(2, dim=3)
        if alive is None:
            mean = shared.mean(1, keepdim=True)
        else:
            alive = alive.to(x.dtype)[:, :, None, None]
            mean = (shared * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
        features = torch.cat((local, mean.expand_as(local)), dim=3)
        features = self.out(F.gelu(self.hidden2(F.gelu(self.hidden1(features)))))  # [B, P, H, 2]
        return (features.log_softmax(-1) * weight).sum(2), (features.softmax(-1) * weight).sum(2)

    @staticmethod
    def cost(shape: TokenShape) -> int:
        """Multiply-adds per token."""
        inner, heads = shape.width // shape.num_heads, shape.num_heads
        quarter, half = max(inner // 4, 1), max(heads // 2, 1)
        return heads * (inner * inner + inner * (inner // 2) + (inner // 2) * quarter + 2 * quarter) + 2 * heads * half


class SPViT(StagedMethod):
    """Before three blocks a selector scores the patch tokens; those that leave go on as one package token.

    The package is their mean, weighed by the probabilities that they should have been kept. It stays to the end, so
    that three stages leave three packages. In training no token leaves: each is kept or dropped at random by its scores
    (Gumbel-softmax, straight through) and nobody but itself attends to a dropped one. The losses ask for the keep rates
    (squared error of the batch's mean share) and for the uncompressed model's logits and tokens.

    Args:
        keep_rate, blocks: as for :class:`StagedMethod`; packages come on top.
        ratio_weight, distill_weight: of the losses, as published.

    Raises:
        TypeError, ValueError: as :class:`StagedMethod`.
    """

    def counts(self, depth: int, num_tokens: int, num_prefix_tokens: int) -> list[tuple[int, int]]:
        patches, packages, found = num_tokens - num_prefix_tokens, 0, []
        kept = self.kept(self.at(depth), patches)
        for block in range(depth):
            if kept.get(block, patches) < patches:
                patches, packages = kept[block], packages + 1
            num_tokens = num_prefix_tokens + patches + packages
            found.append((num_tokens, num_tokens))
        return found

    def added_cost(self, shape: TokenShape, arriving: Sequence[float]) -> float:
        return Selector.cost(shape) * sum(arriving[block] for block in self.at(len(arriving)))

    def make_parts(self, shape: TokenShape, depth: int) -> nn.Module:
        return nn.ModuleList(Selector(*shape) for _ in self.at(depth))

    @classmethod
    def parts_like(cls, tensors: Mapping[str, Tensor]) -> nn.Module:
        number, heads = count_of(tensors), length_of(tensors, "0.excite.bias", cls.name)
        width = heads * length_of(tensors, "0.norm.weight", cls.name)
        return loaded(lambda: nn.ModuleList(Selector(width, heads) for _ in range(number)), tensors, cls.name)

    def check_parts(self, parts: nn.Module, shape: TokenShape, depth: int) -> None:
        own: list[Any] = list(parts.children())
        found = [TokenShape(one.num_heads * one.norm.weight.shape[0], one.num_heads) for one in own]
        if found != [shape] * len(self.at(depth)):
            kinds = " and ".join(f"{width} and {heads}" for width, heads in dict.fromkeys(found))
            raise ValueError(
                f"the model's selectors must be {len(self.at(depth))} of width {shape.width} and {shape.num_heads} "
                f"heads, got {len(found)} of {kinds}; attach or load those that are for these blocks"
            )

    def share(self, decision: Tensor) -> Tensor:
        return decision.mean()

    def begin(self, x: Tensor, parts: nn.Module | None, num_prefix_tokens: int, depth: int, training: bool) -> Passage:
        assert parts is not None
        blocks = self.at(depth)
        selectors: list[Any] = list(parts.children())
        patches = x.shape[1] - num_prefix_tokens
        if training:
            return _Masked(dict(zip(blocks, selectors, strict=True)), num_prefix_tokens, patches)
        steps = zip(blocks, zip(selectors, self.kept(blocks, patches).values(), strict=True), strict=True)
        return _Packed(dict(steps), num_prefix_tokens, patches)


class _Packed(Passage):
    """Tokens really leave; prefix, patches and packages follow each other.

    Args:
        steps: the selector of each block before which tokens leave, and how many patch tokens go on.
        num_prefix_tokens: tokens that always stay.
        patches: patch tokens at first.
    """

    def __init__(self, steps: Mapping[int, tuple[Selector, int]], num_prefix_tokens: int, patches: int) -> None:
        super().__init__()
        self._steps, self._prefix, self._patches = steps, num_prefix_tokens, patches

    def enter(self, block: int, x: Tensor) -> Tensor:
        self.source = None
        if block not in self._steps or self._steps[block][1] >= self._patches:
            return x
        selector, kept = self._steps[block]
        prefix, patches = self._prefix, self._patches
        score, probability = (one[:, :patches, 0] for one in selector(x[:, prefix:]))
        order = most_important(F.pad(score, (prefix, 0)), prefix + patches, prefix)
        index, leaving = order[:, : prefix + kept], order[:, prefix + kept :]
        package = packed(pick(x, leaving), probability.gather(1, leaving - prefix))
        old = torch.arange(prefix + patches, x.shape[1], device=x.device).expand(x.shape[0], -1)  # packages stay
        index = torch.cat((index, old), 1)
        slots = torch.arange(index.shape[1] + 1, device=x.device).expand(x.shape[0], -1)
        self.source = torch.full_like(slots[:, :1], index.shape[1]).expand(-1, x.shape[1])
        self.source = self.source.scatter(1, index, slots[:, :-1])
        place = torch.cat((index, leaving[:, :1]), 1)  # a package has the place of the best of its tokens
        self.origin = place if self.origin is None else self.origin.gather(1, place)
        self._patches = kept
        return torch.cat((pick(x, index), package), 1)


class _Masked(Passage):
    """Every token stays, and the mask says which count; :attr:`decisions` collects those of each stage, [B, P]."""

    def __init__(self, selectors: Mapping[int, Selector], num_prefix_tokens: int, patches: int) -> None:
        super().__init__()
        self._selectors, self._prefix, self._patches = selectors, num_prefix_tokens, patches
        self.decisions: list[Tensor] = []
        self._packages: Tensor | None = None  # [B, packages] 1 for those that hold something

    def enter(self, block: int, x: Tensor) -> Tensor:
        self.source = None
        if block not in self._selectors:
            return x
        before = self.decisions[-1] if self.decisions else x.new_ones(x.shape[0], self._patches)
        packages = before[:, :0] if self._packages is None else self._packages
        odds, probability = self._selectors[block](x[:, self._prefix :], torch.cat((before, packages), 1))
        alive = decided(odds)[:, : self._patches] * before
        leaving = before - alive
        patches = x[:, self._prefix : self._prefix + self._patches]
        package = packed(patches, probability[:, : self._patches, 0] * leaving)
        packages = torch.cat((packages, (leaving.detach().sum(1, keepdim=True) > 0).to(alive.dtype)), 1)
        self.decisions.append(alive)
        self._packages = packages
        self.mask = torch.cat((F.pad(alive, (self._prefix, 0), value=1.0), packages), 1)
        every = torch.arange(x.shape[1] + 1, device=x.device).expand(x.shape[0], -1)
        place = torch.cat((every[:, :-1], every[:, self._prefix : self._prefix + 1]), 1)
        self.origin = place if self.origin is None else self.origin.gather(1, place)
        return torch.cat((x, package.to(x.dtype)), 1)


def packed(x: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean [B, 1, C] of tokens x [B, N, C]; zero, and without gradient, where every weight [B, N] is."""
    weight = weight.to(accumulate_dtype(weight))
    # By the largest first: a sum of next to nothing has a gradient that is no number in float32.
    largest = weight.detach().amax(1, keepdim=True)
    weight = weight / largest.clamp(min=LEAST_WEIGHT)
    share = torch.where(largest > LEAST_WEIGHT, weight / weight.sum(1, keepdim=True).clamp(min=1), 0)
    return share.to(x.dtype).unsqueeze(1) @ x

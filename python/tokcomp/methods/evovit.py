"""Evo-ViT (AAAI 2022): informative tokens go the slow path; one that represents the others says how these change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokcomp.methods.base import Evidence, Geometry, flag, most_important, number
from tokcomp.methods.keeping import parse_blocks
from tokcomp.methods.learned import Passage, PassageMethod, pick, require_blocks_below


class EvoViT(PassageMethod):
    """From a third of the model on, half of the patch tokens go through the blocks; the others are only moved along.

    Tokens are ranked by their global class attention: what the class token attends to in a block, from the first
    selection on averaged with what it was before. The best are informative. The others, the placeholders, are summed
    up, by that rank's weights, into one representative token that goes through the blocks with the informative ones;
    what these add to it is added to each placeholder. At the next selection, and after the last block, all tokens are
    there again.

    It has no trained parts, so that any model with a class token can run it; it is made to be trained, by the answer's
    loss, with the tokens it runs with.

    Args:
        keep_rate: share of the patch tokens that is informative, rounded down, at least one.
        blocks: indices (from 0) of the blocks before which tokens are selected anew; the last selection holds to the
            end. None: a third and two thirds of the way through the model, as published for inference. All blocks from
            a third on: as published for most of the training.
        momentum: weight of a block's own class attention in the average.
        representative: False leaves the placeholders as they are, as the published code for DeiT does.
        layerwise: share of a training, from its start, in which tokens are selected anew before every block from the
            first selection on (2/3 as published: 200 of 300 epochs). Evaluation is by ``blocks`` meanwhile too.
        second_weight: of the loss of a second classifier, on the class token, in the training of a model that averages
            its patches (0.5 as published); that of the model's own counts for the rest.

    Raises:
        TypeError, ValueError: a rate outside (0, 1], or one per block; a momentum outside (0, 1]; blocks that are no
            block numbers above 0 in rising order; a share of a training outside [0, 1]; a weight outside [0, 1).
    """

    keeps_all = True
    maps_positions = True

    def __init__(
        self,
        keep_rate: float = 0.5,
        blocks: Sequence[int] | None = None,
        momentum: float = 0.5,
        representative: bool = True,
        layerwise: float = 0.0,
        second_weight: float = 0.0,
    ) -> None:
        self.keep_rate, self.momentum = _share("keep_rate", keep_rate, "(0, 1]"), _share("momentum", momentum, "(0, 1]")
        self.layerwise = _share("layerwise", layerwise, "[0, 1]")
        self.second_weight = _share("second_weight", second_weight, "[0, 1)")
        self.representative = flag("representative", representative)
        self.blocks = None if blocks is None else parse_blocks(blocks)
        if self.blocks is not None and (list(self.blocks) != sorted(set(self.blocks)) or 0 in self.blocks):
            raise ValueError(f"blocks must rise and start above 0, before which nothing attends, got {blocks}")

    def __repr__(self) -> str:
        training = "".join(
            f", {name}={value}" for name in ("layerwise", "second_weight") if (value := getattr(self, name))
        )
        return (
            f"EvoViT(keep_rate={self.keep_rate}, blocks={self.blocks}, momentum={self.momentum}, "
            f"representative={self.representative}{training})"
        )

    def validate(self, geometry: Geometry) -> None:
        super().validate(geometry)
        require_blocks_below(self.blocks, geometry)

    def at(self, depth: int) -> tuple[int, ...]:
        """The blocks before which tokens are selected."""
        if self.blocks is not None:
            return self.blocks
        return tuple(sorted({block for block in (depth // 3, depth * 2 // 3) if 0 < block < depth}))

    def kept(self, patches: int) -> int:
        """Informative tokens of so many patch tokens."""
        return max(int(patches * self.keep_rate), min(patches, 1))

    def counts(self, depth: int, num_tokens: int, num_prefix_tokens: int) -> list[tuple[int, int]]:
        patches, start = num_tokens - num_prefix_tokens, min(self.at(depth), default=depth)
        kept = self.kept(patches)
        inside = num_tokens if kept == patches else num_prefix_tokens + kept + self.representative
        return [(num_tokens, num_tokens) if block < start else (inside, inside) for block in range(depth)]

    def begin(self, x: Tensor, parts: nn.Module | None, num_prefix_tokens: int, depth: int, training: bool) -> Passage:
        return _SlowAndFast(self, self.at(depth), num_prefix_tokens, self.kept(x.shape[1] - num_prefix_tokens))

    def phases(self) -> Sequence[tuple[float, PassageMethod]]:
        if not self.layerwise:
            return super().phases()
        first = _Layerwise(self.keep_rate, self.blocks, self.momentum, self.representative)
        return (0.0, first), (self.layerwise, self)


class _Layerwise(EvoViT):
    """In training tokens are selected anew before every block from the first selection on."""

    name = EvoViT.name

    def begin(self, x: Tensor, parts: nn.Module | None, num_prefix_tokens: int, depth: int, training: bool) -> Passage:
        blocks = range(min(self.at(depth), default=depth), depth) if training else self.at(depth)
        return _SlowAndFast(self, blocks, num_prefix_tokens, self.kept(x.shape[1] - num_prefix_tokens))


class _SlowAndFast(Passage):
    """The passage: what is in the slow path, and what stands aside.

    Args:
        method: its settings.
        blocks: before which tokens are selected.
        num_prefix_tokens: tokens that are always in the slow path.
        kept: patch tokens that a selection puts there.
    """

    needs = frozenset({"cls_attn"})

    def __init__(self, method: EvoViT, blocks: Sequence[int], num_prefix_tokens: int, kept: int) -> None:
        super().__init__()
        self._method, self._blocks, self._prefix, self._kept = method, blocks, num_prefix_tokens, kept
        self._attention: Tensor | None = None  # [B, N] global class attention of every position
        self._aside: Tensor | None = None  # [B, N - M, C] placeholders as they were at the selection
        self._summary: Tensor | None = None  # [B, 1, C] their representative then
        self._order: Tensor | None = None  # [B, N] positions: the M of the slow path, then the placeholders

    def enter(self, block: int, x: Tensor) -> Tensor:
        self.source = None
        if block not in self._blocks or self._attention is None:
            return x
        x = self.positions(x)
        inside = self._prefix + self._kept
        if inside == x.shape[1]:
            return x
        order = most_important(self._attention, x.shape[1], self._prefix)
        self._order, index, others = order, order[:, :inside], order[:, inside:]
        self._aside, slow = pick(x, others), pick(x, index)
        slots = torch.arange(x.shape[1], device=x.device).expand_as(order)
        self.origin = index
        if not self._method.representative:
            self.source = torch.zeros_like(order).scatter(1, order, slots.masked_fill(slots >= inside, -1))
            return slow
        weight = self._attention.gather(1, others)
        weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        self._summary = weight.to(x.dtype).unsqueeze(1) @ self._aside
        self.source = torch.zeros_like(order).scatter(1, order, slots.clamp(max=inside))
        self.origin = torch.cat((index, others[:, :1]), 1)  # the representative has the place of the best placeholder
        return torch.cat((slow, self._summary), 1)

    def leave(self, block: int, x: Tensor, evidence: Evidence) -> Tensor:
        seen = evidence.require("cls_attn")
        if self._attention is None or self._order is None:
            self._attention = seen
            return x
        index = self._order[:, : self._prefix + self._kept]
        share, before = self._method.momentum, self._attention.gather(1, index)
        self._attention = self._attention.scatter(1, index, before + share * (seen[:, : index.shape[1]] - before))
        return x

    def finish(self, x: Tensor) -> Tensor:
        return self.positions(x)

    def positions(self, x: Tensor) -> Tensor:
        if self._order is None or self._aside is None:
            return x
        inside = self._prefix + self._kept
        aside = self._aside
        if self._summary is not None:
            aside = aside + (x[:, inside:] - self._summary)  # what the blocks have added to the representative
        return pick(torch.cat((x[:, :inside], aside), 1), self._order.argsort(1))


def _share(name: str, value: float, interval: str) -> float:
    value = number(name, value)
    low, high = interval[0] == "[", interval[-1] == "]"
    if not (0 < value < 1 or (low and value == 0) or (high and value == 1)):
        raise ValueError(f"{name} must be in {interval}, got {value}")
    return value

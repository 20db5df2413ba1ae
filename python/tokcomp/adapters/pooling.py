"""Pooling over tokens that stand for several patches each, or that a search has masked."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Weight of a masked token in map pooling: nothing in the result, but the mask's gradient flows.
_MASKED_WEIGHT = 1e-20


class Weights(NamedTuple):
    """What each token x [B, M, C] counts for."""

    size: Tensor  # [B, M] patches per token
    mask: Tensor | None = None  # [B, M] 0 or 1 with a gradient, in a search

    def without(self, num_tokens: int) -> Weights:
        """The weights of the tokens after the first ``num_tokens``."""
        return Weights(*(None if one is None else one[:, num_tokens:] for one in self))  # type: ignore[arg-type]

    def mean(self, x: Tensor) -> Tensor:
        """The weighted mean [B, C]; the search's divisor carries no gradient."""
        weight = self.size if self.mask is None else self.size * self.mask
        total = weight.sum(1, keepdim=True)
        weight = (weight / (total if self.mask is None else total.detach())).to(x.dtype)
        return (x * weight.unsqueeze(-1)).sum(1)

    def max(self, x: Tensor) -> Tensor:
        """The largest value of each channel, [B, C], among the tokens that are alive."""
        if self.mask is not None:
            x = x.masked_fill((self.mask.detach() <= 0).unsqueeze(-1), float("-inf"))
        return x.amax(1)

    def log(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, M]: what attention pooling adds to its scores, so that a token counts by its weight."""
        bias = self.size.log()
        if self.mask is not None:
            bias = bias + (self.mask + _MASKED_WEIGHT).log()
        return bias.to(dtype)[:, None, None]

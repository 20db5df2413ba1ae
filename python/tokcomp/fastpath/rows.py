"""Where a padded batch holds tokens, for linear layers over those alone: packed side by side, and padded again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Share of padding from which on it is left out, as moving the rows takes 6 % of DeiT-S's time on one core.
LEAST_PADDING = 1 / 16


class Rows(NamedTuple):
    """The rows of a batch [B, N] that hold tokens.

    Attributes:
        taken: [T] int64, among B * N.
        counts: tokens of each image, which come before its padding.
        num_tokens: N.
    """

    taken: Tensor
    counts: list[int]
    num_tokens: int

    @classmethod
    def of(cls, size: Tensor) -> Rows | None:
        """Of sizes [B, N], 0 (or False) for padding, which comes last.

        None where there is little of it, or the host would wait for a device.
        """
        if size.device.type != "cpu":
            return None
        alive = size > 0
        counts = alive.sum(1).tolist()
        if sum(counts) >= (1 - LEAST_PADDING) * size.numel():
            return None
        return cls(alive.flatten().nonzero()[:, 0], counts, size.shape[1])

    def packed(self, x: Tensor) -> Tensor:
        """The tokens [T, C] of x [B, N, C]."""
        return x.flatten(0, 1).index_select(0, self.taken)

    def padded(self, x: Tensor) -> Tensor:
        """[B, N, C] of the tokens x [T, C], with zeros for padding."""
        whole = torch.zeros(len(self.counts) * self.num_tokens, x.shape[1], dtype=x.dtype, device=x.device)
        return whole.index_copy_(0, self.taken, x).view(len(self.counts), self.num_tokens, -1)

    def packed_heads(self, x: Tensor) -> Tensor:
        """:meth:`packed` by heads: [1, H, T, D] of x [B, H, N, D]."""
        return self.packed(x.transpose(1, 2).flatten(2)).unflatten(1, (x.shape[1], -1)).transpose(0, 1)[None]

    def padded_heads(self, x: Tensor) -> Tensor:
        """:meth:`padded` by heads: [B, H, N, D] of x [1, H, T, D]."""
        return self.padded(x[0].transpose(0, 1).flatten(1)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)

"""Linear layers of a padded batch over the tokens that are there: packed side by side, and padded again."""

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
        batch, num_tokens: B and N.
    """

    taken: Tensor
    batch: int
    num_tokens: int

    @classmethod
    def of(cls, size: Tensor) -> Rows | None:
        """Of sizes [B, N], 0 for padding; None where there is little of it, or the host would wait for a device."""
        if size.device.type != "cpu":
            return None
        taken = (size.flatten() > 0).nonzero()[:, 0]
        return cls(taken, *size.shape) if len(taken) < (1 - LEAST_PADDING) * size.numel() else None

    def packed(self, x: Tensor) -> Tensor:
        """The tokens [T, C] of x [B, N, C]."""
        return x.flatten(0, 1).index_select(0, self.taken)

    def padded(self, x: Tensor) -> Tensor:
        """[B, N, C] of the tokens x [T, C], with zeros for padding."""
        whole = torch.zeros(self.batch * self.num_tokens, x.shape[1], dtype=x.dtype, device=x.device)
        return whole.index_copy_(0, self.taken, x).view(self.batch, self.num_tokens, -1)

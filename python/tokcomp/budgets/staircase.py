"""A cost tabulated by token count: exact values forward, a smoothed slope backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Staircase:
    """A function of a token count, as a table of its values at whole counts 0 .. len - 1.

    Hardware works in units of 8, 16 or 32 tokens, so cost rises in steps. The value at a whole count is the table's own
    (between whole counts: linear). Its derivative would be 0 on a step and huge at the edge, so a search would see
    nothing until it happened to reach an edge. The gradient is therefore the slope of the least-squares line through
    the table within ``reach`` counts on either side: wider than a step, it sees the next edge coming. Negative slopes,
    which only noise or a kernel's change of plan can cause, count as 0: adding tokens is never rewarded.

    Args:
        values: [..., T] the cost at counts 0 .. T - 1; leading dimensions are functions side by side.
        reach: counts on either side in the smoothing window. 16: two steps of 16 tokens.
    """

    def __init__(self, values: Tensor | Sequence[float], reach: int = 16) -> None:
        table = torch.as_tensor(values, dtype=torch.float64)
        with torch.inference_mode(False):  # the tables also serve calls that need gradients, wherever they were made
            self.values = table.detach().clone()
            self.slopes = _local_slopes(self.values, reach).clamp(min=0)

    def to(self, device: torch.device) -> Staircase:
        """The same function with its tables on a device; itself if they are already there."""
        if self.values.device == device:
            return self
        moved = object.__new__(Staircase)
        with torch.inference_mode(False):
            moved.values, moved.slopes = self.values.to(device), self.slopes.to(device)
        return moved

    def __call__(self, counts: Tensor) -> Tensor:
        """Cost [..., *counts.shape] in float64 at counts of any shape and floating type; gradients reach ``counts``.

        Counts outside the table take the value at its nearest end.
        """
        exact, slope = (_interpolate(table, counts.detach().double()) for table in (self.values, self.slopes))
        return exact + slope * (counts.double() - counts.detach().double())


def _interpolate(table: Tensor, counts: Tensor) -> Tensor:
    counts = counts.clamp(0, table.shape[-1] - 1)
    below = counts.floor().long()
    above = (below + 1).clamp(max=table.shape[-1] - 1)
    # Written so that a whole count gives the table's entry, bit for bit.
    return table[..., below] + (table[..., above] - table[..., below]) * (counts - below)


def _local_slopes(values: Tensor, reach: int) -> Tensor:
    """Slope of the least-squares line through each entry's neighbours, as many as there are within ``reach``."""
    length = values.shape[-1]
    position = torch.arange(length, dtype=values.dtype, device=values.device)
    near = ((position[:, None] - position).abs() <= max(reach, 1)).to(values.dtype)  # [T, T]
    centre = near @ position / near.sum(1)
    offset = near * (position - centre[:, None])
    weights = offset / offset.square().sum(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return values @ weights.T

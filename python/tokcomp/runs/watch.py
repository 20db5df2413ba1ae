"""Whether a run goes well: its losses are finite, and nobody asks it to stop."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

from tokcomp.runs.distributed import World
from tokcomp.runs.steps import DivergedError


class LossWatch:
    """The losses of steps under way, averaged over the processes, which also agree here on when to stop.

    On a GPU a loss is looked at when the next step is on its way, so that nobody waits for the device.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._lag = world, 1 if device.type == "cuda" else 0
        self._under_way: deque[tuple[int, Tensor]] = deque()
        self.stop_wanted = False

    def add(self, step: int, loss: Tensor, stop_wanted: bool) -> None:
        report = torch.stack([loss.float(), torch.full_like(loss, float(stop_wanted), dtype=torch.float32)])
        self._under_way.append((step, self._world.mean_(report)))

    def settle(self, *, wait: bool) -> list[float]:
        """The losses that are known by now, or of all steps.

        Raises:
            DivergedError: one of them is not a finite number.
        """
        losses = []
        while len(self._under_way) > (0 if wait else self._lag):
            step, report = self._under_way.popleft()
            loss, stop = report.tolist()
            if not math.isfinite(loss):
                raise DivergedError(advice(f"the loss of step {step} is {loss}"), step)
            losses.append(loss)
            self.stop_wanted |= stop > 0
        return losses


def advice(what: str) -> str:
    """A message for :class:`DivergedError`: what happened, what is kept, what to try."""
    return f"{what}; the checkpoint before it is kept; lower --lr, set --clip-grad, or train without --amp"

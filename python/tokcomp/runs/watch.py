"""The losses of steps in flight, and whether any process wants to stop."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from tokcomp.runs.distributed import World


class LossWatch:
    """The losses of steps in flight, averaged over the processes, which also agree here on when to stop.

    On a GPU a report is read once the next step has been queued, so that the device never waits for the host.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        self._world, self._device, self._lag = world, device, 1 if device.type == "cuda" else 0
        self._under_way: deque[tuple[int, Tensor, Any]] = deque()
        self.stop_wanted = False

    def add(self, step: int, losses: Tensor, stop_wanted: bool) -> None:
        """Note the losses of a step, one or several on the run's device, and whether this process wants to stop."""
        wanted = losses.new_full((1,), float(stop_wanted), dtype=torch.float64)
        report = self._world.mean_(torch.cat([losses.detach().double().flatten(), wanted]))
        event = None
        if self._lag:
            # Copied now, among this step's own work: a copy asked for later would wait for the next step.
            report = torch.empty(report.shape, dtype=report.dtype, pin_memory=True).copy_(report, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))  # which may not be the current device's
        self._under_way.append((step, report, event))

    def settle(self, *, wait: bool) -> list[tuple[int, list[float]]]:
        """(step, losses) of the steps that have become known since the last call; of all steps with ``wait``."""
        settled = []
        while len(self._under_way) > (0 if wait else self._lag):
            step, report, event = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            *losses, stop = report.tolist()
            self.stop_wanted |= stop > 0
            settled.append((step, losses))
        return settled

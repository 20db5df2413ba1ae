from __future__ import annotations

import socket

import pytest
from tokcomp.runs.training import TrainingRun


class StopAfter:
    """A wish to stop that comes while a certain step runs."""

    def __init__(self, run: TrainingRun, step: int | None = None) -> None:
        self.run, self.step = run, step

    @property
    def wanted(self) -> bool:
        return self.step is not None and self.run.trainee.step_number >= self.step


@pytest.fixture
def free_port() -> int:
    """A port of this host for processes to meet at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

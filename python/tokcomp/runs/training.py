"""A run that trains something: its losses, its log, its summary, and the resulting weights."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch

from tokcomp.files import write_whole
from tokcomp.runs.batches import Batches
from tokcomp.runs.distributed import World
from tokcomp.runs.loop import LOG, SUMMARY, Run


class Trainee(Protocol):
    """What is trained, with its optimizer."""

    device: torch.device
    world: World
    step_number: int
    learning_rate: float  # of the last step

    def is_finite(self) -> bool: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


T = TypeVar("T", bound=Trainee)


class TrainingRun(Run, Generic[T]):
    """A run over one trainee. A row of its log holds the mean loss of the steps since the previous row.

    Args:
        trainee: what is trained.
        batches: the images.
        output: folder for everything that the run writes.
        settings: JSON data that must be the same when the run is resumed.
        facts: JSON data for ``summary.json`` and the weights' metadata.
        steps: ``total_steps``, ``checkpoint_steps``, ``log_steps`` and ``evaluate_steps`` of :class:`Run`.
    """

    #: Columns of the log.
    fields: ClassVar[tuple[str, ...]]
    #: The trainee's name in a checkpoint.
    trainee_name: ClassVar[str]

    def __init__(
        self,
        trainee: T,
        batches: Batches,
        output: Path,
        *,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        **steps: Any,
    ) -> None:
        super().__init__(batches, output, settings=settings, device=trainee.device, world=trainee.world, **steps)
        self.folder, self.facts = output, dict(facts)
        self.last_loss: float | None = None  # of the log's last row
        self.trainee = trainee
        self._losses: list[float] = []  # since the log's last row

    @abstractmethod
    def row(self, step: int, loss: float, evaluates: bool) -> dict[str, float | None]:
        """A row of the log without the loss and learning rate; shows the progress, and evaluates if asked."""

    @abstractmethod
    def outcome(self) -> dict[str, Any]:
        """The summary's entries for this kind of run."""

    @abstractmethod
    def write_weights(self) -> None:
        """Write the resulting weights."""

    def summary(self) -> dict[str, Any]:
        """The contents of ``summary.json``."""
        steps = {"settings": self.settings, "steps": self.step_number}
        return {**self.facts, **steps, **self.outcome(), "images_per_second": self.images_per_second}

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step_number / self.batches.steps_per_epoch

    # ---- the hooks of Run

    @property
    def step_number(self) -> int:
        return self.trainee.step_number

    def is_finite(self) -> bool:
        return self.trainee.is_finite()

    def note(self, step: int, losses: Sequence[float]) -> None:
        self._losses += losses

    def rows(self, step: int, evaluates: bool) -> list[dict[str, float | None]]:
        loss = self.last_loss = math.fsum(self._losses) / max(len(self._losses), 1)
        self._losses = []
        return [{"loss": loss, "lr": self.trainee.learning_rate, **self.row(step, loss, evaluates)}]

    def log_files(self) -> list[tuple[Path, Sequence[str], Path]]:
        return [(self.folder / LOG, self.fields, self.folder / "tensorboard")]

    def state(self) -> dict[str, Any]:
        return {self.trainee_name: self.trainee.state(), "losses": self._losses, "last_loss": self.last_loss}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.trainee.load_state(state[self.trainee_name])
        self._losses, self.last_loss = list(state["losses"]), state["last_loss"]

    def finish(self) -> None:
        self.write_weights()
        write_whole(self.folder / SUMMARY, json.dumps(self.summary(), indent=2) + "\n")

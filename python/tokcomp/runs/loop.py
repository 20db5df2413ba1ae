"""The loop of every run: steps, logs, checkpoints, resuming, stopping, divergence, progress. Hooks do the rest."""

from __future__ import annotations

import math
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokcomp.files import remove_drafts, sole_writer
from tokcomp.runs.batches import Batches
from tokcomp.runs.checkpoint import CheckpointError, check_same_settings, load_checkpoint, save_checkpoint
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.log import RunLog
from tokcomp.runs.steps import DivergedError, Progress, StopRequest
from tokcomp.runs.watch import LossWatch

#: What a run writes into its folder besides its result.
CHECKPOINT, LOG, SUMMARY = "checkpoint.pt", "log.csv", "summary.json"


class Run(ABC):
    """Takes steps until the last one or until it is asked to stop; a stopped run can be resumed exactly.

    A folder has one run at a time. A checkpoint is written before the first step, every ``checkpoint_steps``, with each
    evaluation, at the end, and when the run is stopped. It never holds values that are not finite.

    A subclass defines a step, a row of its log, its state and its result.

    Args:
        batches: the images and labels.
        output: folder for everything that the run writes; None writes nothing.
        settings: JSON data that must be the same when the run is resumed.
        device: the device that runs the steps.
        world: this process among those of the run; the main one writes.
        total_steps: steps of the whole run.
        checkpoint_steps: steps between checkpoints, and so the most that a killed run can lose.
        log_steps: steps between rows of the log; there is also one at each evaluation and at the last step.
        evaluate_steps: steps between evaluations; there is also one at the last step. 0: only that one; None: none.
        show_progress: whether to show a progress line on stderr.
    """

    #: The kind of run, as noted in the checkpoint.
    kind: ClassVar[str]
    #: Comes first on the progress line.
    label: ClassVar[str] = ""
    #: Patterns of files that mark a folder as holding a run.
    traces: ClassVar[tuple[str, ...]] = (CHECKPOINT, SUMMARY)

    def __init__(
        self,
        batches: Batches,
        output: Path | None,
        *,
        settings: Mapping[str, Any],
        device: torch.device,
        world: World = ALONE,
        total_steps: int,
        checkpoint_steps: int,
        log_steps: int,
        evaluate_steps: int | None = None,
        show_progress: bool = True,
    ) -> None:
        self.batches, self.output, self.settings = batches, output, dict(settings)
        self.device, self.world, self.total_steps = device, world, total_steps
        self.checkpoint_steps, self.log_steps, self.evaluate_steps = checkpoint_steps, log_steps, evaluate_steps
        self.progress: Progress  # while it runs
        self._show = show_progress and world.is_main
        self._seconds, self._images = 0.0, 0

    # ---- what a run is

    @property
    @abstractmethod
    def step_number(self) -> int:
        """Steps done."""

    @abstractmethod
    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take a step and return its losses on the device, one or several, for this process's share or for all."""

    @abstractmethod
    def rows(self, step: int, evaluates: bool) -> Sequence[Mapping[str, float | None]]:
        """One row for each log, with or without an evaluation."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the settings."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state` returned."""

    def log_files(self) -> Sequence[tuple[Path, Sequence[str], Path]]:
        """Each log: its CSV file, its columns, and its folder for TensorBoard."""
        return []

    def running(self) -> AbstractContextManager[Any]:
        """Entered while steps are taken."""
        return nullcontext()

    def begin(self) -> Sequence[Mapping[str, float | None]]:
        """Called before the first step of a new run: returns the rows for step 0, one for each log, or none."""
        return []

    def note(self, step: int, losses: Sequence[float]) -> None:
        """Called with a step's losses once they are known; by default they are ignored."""
        return

    def is_finite(self) -> bool:
        """Whether everything that is being learned is finite; waits for the device."""
        return True

    def diverged(self, step: int, number: int, loss: float) -> DivergedError:
        """What to raise if the loss of that number is not finite."""
        return DivergedError(advice(f"the loss of step {step} is {loss}"), step)

    def saved(self, evaluated: bool) -> None:
        """Called in the main process after a checkpoint; does nothing by default."""
        return

    @abstractmethod
    def finish(self) -> None:
        """Called in the main process after the last step: write the result."""

    # ---- resuming

    def resume(self) -> None:
        """Restore the run whose checkpoint is in the output folder.

        Raises:
            CheckpointError: (a ValueError) there is none, or its settings differ.
        """
        state = self.read()
        if state is not None:
            self._take_up(state)

    def read(self) -> dict[str, Any] | None:
        """The checkpoint of this run; None to start anew.

        Raises:
            CheckpointError: there is none, or its settings differ.
        """
        state = load_checkpoint(self._folder / CHECKPOINT, self.kind)
        check_same_settings(state["settings"], self.settings, where=str(self.output))
        return state

    def _take_up(self, state: Mapping[str, Any]) -> None:
        try:
            self.load_state(state)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # parts that are missing, or of other shapes and types
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{self._folder / CHECKPOINT}: does not fit this run ({reason})") from error

    # ---- the loop

    def train(self, stop: StopRequest, *, resumed: bool = False) -> bool:
        """Run until the end or until asked to stop; returns whether the last step was reached. Leaves a checkpoint.

        Args:
            stop: once its ``wanted`` is true, the run ends after the current step.
            resumed: continue from the checkpoint in the output folder.

        Raises:
            CheckpointError: (a ValueError) the folder holds a run that is not to be resumed, or none that can be.
            OSError: the folder cannot be written, or another run is writing into it.
            DivergedError: a loss or a learned value is no longer finite; the checkpoint from before that is kept.
        """
        with ExitStack() as held:
            state = self.world.from_main(lambda: self._open(held, resumed))
            if state is not None:
                self._take_up(state)
            return self._run(stop, held, resumed=state is not None)

    def _open(self, held: ExitStack, resumed: bool) -> dict[str, Any] | None:
        """Lock the folder against other runs, check that it can be written, and read the state to continue from."""
        if self.output is None:
            return None
        held.enter_context(sole_writer(self.output))
        if not resumed:
            check_free(self.output, self.traces)
        state = self.read() if resumed else None
        remove_drafts(self.output)
        with tempfile.TemporaryFile(dir=self.output) as probe:
            probe.write(b"\0")
        return state

    def _run(self, stop: StopRequest, held: ExitStack, *, resumed: bool) -> bool:
        start = self.step_number
        self.progress = Progress(self.total_steps, start, label=self.label, show=self._show)
        held.callback(self.progress.close)
        logs = self.open_logs(start if resumed else None) if self.world.is_main else []
        for log in logs:
            held.callback(log.close)
        if not resumed:
            self._write(logs, 0, self.begin())
            self._save(evaluated=False)
        with self.running():
            self._take_steps(start, stop, logs)
        finished = self.step_number == self.total_steps
        if finished and self.world.is_main:
            self.finish()
        self.world.barrier()
        return finished

    def open_logs(self, resume_step: int | None) -> list[RunLog]:
        """The logs, in the main process; rows after ``resume_step`` are dropped, or all rows if it is None."""
        if self.output is None:
            return []
        return [
            RunLog(path, fields, resume_step=resume_step, tensorboard=board) for path, fields, board in self.log_files()
        ]

    def _take_steps(self, start: int, stop: StopRequest, logs: Sequence[RunLog]) -> None:
        watch = LossWatch(self.world, self.device)
        begun = time.perf_counter()
        for images, labels in self.batches.iterate(start, self.total_steps):
            losses = self.step(images, labels)
            done = self.step_number
            watch.add(done, losses, stop.wanted)
            self._images += len(labels) * self.world.size
            last = done == self.total_steps
            evaluates = self._is_due(self.evaluate_steps, done, last)
            saves = evaluates or last or done % self.checkpoint_steps == 0
            writes = evaluates or last or done % self.log_steps == 0
            self._settle(watch, wait=saves or writes)
            if watch.stop_wanted:
                saves = True
                self._settle(watch, wait=True)
            self.progress.advance()
            if not (saves or writes):
                continue
            self._seconds += time.perf_counter() - begun
            if saves and not self.is_finite():
                raise DivergedError(advice(f"the weights are not finite numbers after step {done}"), done)
            if writes:
                self._write(logs, done, self.rows(done, evaluates))
            if saves:
                self._save(evaluated=evaluates)
            if watch.stop_wanted:
                return
            begun = time.perf_counter()

    @staticmethod
    def _is_due(interval: int | None, step: int, last: bool) -> bool:
        return interval is not None and (last or (interval > 0 and step % interval == 0))

    def _settle(self, watch: LossWatch, *, wait: bool) -> None:
        for step, losses in watch.settle(wait=wait):
            for number, loss in enumerate(losses):
                if not math.isfinite(loss):
                    raise self.diverged(step, number, loss)
            self.note(step, losses)

    def _write(self, logs: Sequence[RunLog], step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        for log, row in zip(logs, rows, strict=False):  # before the first step there may be no rows
            log.write(step, row)

    def _save(self, *, evaluated: bool) -> None:
        if self.output is not None and self.world.is_main:
            save_checkpoint(self.output / CHECKPOINT, self.kind, {"settings": self.settings, **self.state()})
            self.saved(evaluated)

    @property
    def images_per_second(self) -> float | None:
        """Images per second over the steps taken; time for writing and evaluating is not counted."""
        return round(self._images / self._seconds, 2) if self._seconds else None

    @property
    def _folder(self) -> Path:
        if self.output is None:
            raise CheckpointError("a resumed run must have an output folder, got none; name one")
        return self.output


def check_free(folder: Path, traces: Sequence[str] = Run.traces) -> None:
    """Refuse a folder that holds a run, recognised by files that match one of ``traces``.

    Raises:
        CheckpointError: (a ValueError) it holds one.
    """
    if folder.is_dir() and any(any(folder.glob(pattern)) for pattern in traces):
        raise CheckpointError(
            f"the output folder must not hold another run, got '{folder}'; continue that run with --resume, or choose "
            "another folder"
        )


def advice(what: str) -> str:
    """A message for :class:`DivergedError`: what happened, what was kept, and what to try."""
    return f"{what}; the checkpoint before it is kept; lower --lr, set --clip-grad, or train without --amp"

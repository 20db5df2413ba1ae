"""A plugin's training run: steps, log, checkpoints, and the plugin that comes out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tokcomp.files import sole_writer, write_whole
from tokcomp.runs.batches import Batches
from tokcomp.runs.checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from tokcomp.runs.log import RunLog
from tokcomp.runs.steps import DivergedError, Progress, StopRequest
from tokcomp.runs.watch import LossWatch
from tokcomp.tocom.distill import Distiller

KIND = "tocom"
#: What a run writes into its folder.
CHECKPOINT, LOG, SUMMARY, PLUGIN = "checkpoint.pt", "log.csv", "summary.json", "tocom.safetensors"
FIELDS = ("epoch", "loss", "lr")


class TocomRun:
    """Trains until the last step or until it is asked to stop; either way it can be gone on with exactly.

    Args:
        distiller: what is trained.
        batches: where its images come from.
        output: folder for everything that the run writes.
        settings: JSON data that a resumed run has to share.
        facts: JSON data about model and method, for ``summary.json`` and the plugin's provenance.
        total_steps: of the whole run.
        checkpoint_steps: steps between checkpoints, and so the most that a killed run loses.
        log_steps: steps between rows of the log, each with the mean loss since the last.
    """

    def __init__(
        self,
        distiller: Distiller,
        batches: Batches,
        output: Path,
        *,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        total_steps: int,
        checkpoint_steps: int,
        log_steps: int,
    ) -> None:
        self.distiller, self.batches, self.output = distiller, batches, output
        self.settings, self.facts = dict(settings), dict(facts)
        self.total_steps, self.checkpoint_steps, self.log_steps = total_steps, checkpoint_steps, log_steps
        self._losses: list[float] = []  # since the log's last row
        self._last_loss: float | None = None
        self._seconds, self._images = 0.0, 0

    @property
    def step_number(self) -> int:
        """Steps done."""
        return self.distiller.step_number

    def resume(self) -> None:
        """Take up the run whose checkpoint is in the output folder.

        Raises:
            ValueError: there is none, or it is of other settings.
        """
        state = load_checkpoint(self.output / CHECKPOINT, KIND)
        check_same_settings(state["settings"], self.settings, where=str(self.output))
        self.distiller.load_state(state["distiller"])
        self._losses, self._last_loss = list(state["losses"]), state["last_loss"]

    def train(self, stop: StopRequest, *, resumed: bool = False) -> bool:
        """Train; returns whether the last step was reached. A stopped run leaves a checkpoint.

        Raises:
            OSError: the folder cannot be written, or another run is writing into it.
            DivergedError: the loss or the plugin stopped being finite; the checkpoint before that is kept.
        """
        with sole_writer(self.output) if self.distiller.world.is_main else nullcontext():
            return self._train(stop, resumed)

    def _train(self, stop: StopRequest, resumed: bool) -> bool:
        distiller, world = self.distiller, self.distiller.world
        start = distiller.step_number
        log = None
        if world.is_main:
            board = self.output / "tensorboard"
            log = RunLog(self.output / LOG, FIELDS, resume_step=start if resumed else None, tensorboard=board)
        progress = Progress(self.total_steps, start, label="tocom", show=world.is_main)
        watch = LossWatch(world, distiller.device)
        begun = time.perf_counter()
        try:
            for images, _ in self.batches.iterate(start, self.total_steps):
                loss = distiller.step(images)
                done = distiller.step_number
                watch.add(done, loss, stop.wanted)
                self._images += len(images) * world.size
                last = done == self.total_steps
                must_save, must_log = last or done % self.checkpoint_steps == 0, last or done % self.log_steps == 0
                self._losses += watch.settle(wait=must_save or must_log)
                progress.advance()
                if must_log:
                    self._log(log, progress)
                if must_save or watch.stop_wanted:
                    self._losses += watch.settle(wait=True)
                    self._save()
                if watch.stop_wanted:
                    break
        finally:
            self._seconds += time.perf_counter() - begun
            progress.close()
            if log is not None:
                log.close()
        finished = distiller.step_number == self.total_steps
        if finished and world.is_main:
            distiller.plugin.provenance = {"source": "ToCom training", **self.facts, "settings": self.settings}
            distiller.plugin.save(self.output / PLUGIN)
            write_whole(self.output / SUMMARY, json.dumps(self.summary(), indent=2) + "\n")
        world.barrier()
        return finished

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        return {
            **self.facts,
            "settings": self.settings,
            "steps": self.distiller.step_number,
            "loss": self._last_loss,
            "images_per_second": round(self._images / self._seconds, 2) if self._seconds else None,
        }

    def _log(self, log: RunLog | None, progress: Progress) -> None:
        done = self.distiller.step_number
        self._last_loss = math.fsum(self._losses) / max(len(self._losses), 1)
        self._losses = []
        epoch = done / self.batches.steps_per_epoch
        if log is not None:
            log.write(done, {"epoch": epoch, "loss": self._last_loss, "lr": self.distiller.learning_rate})
        progress.status(f"epoch {epoch:.2f} loss {self._last_loss:.4g}")
        progress.note(done, f"epoch {epoch:.4g}: loss {self._last_loss:.4g}")

    def _save(self) -> None:
        if not self.distiller.is_finite():
            raise DivergedError(
                f"the plugin holds numbers that are not finite after step {self.distiller.step_number}; the checkpoint "
                "before it is kept; lower --lr, set --clip-grad, or train without --amp",
                self.distiller.step_number,
            )
        if self.distiller.world.is_main:
            state = {
                "settings": self.settings,
                "distiller": self.distiller.state(),
                "losses": self._losses,
                "last_loss": self._last_loss,
            }
            save_checkpoint(self.output / CHECKPOINT, KIND, state)

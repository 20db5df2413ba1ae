"""A training run: steps, accuracy after each epoch, log, checkpoints, curves, and the weights that come out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from tokcomp import adaptformer
from tokcomp.files import replacing, sole_writer, write_whole
from tokcomp.finetune.tuner import FineTuner
from tokcomp.measure.evaluate import Evaluation
from tokcomp.runs.batches import Batches
from tokcomp.runs.checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from tokcomp.runs.log import RunLog, read_log
from tokcomp.runs.steps import DivergedError, Progress, StopRequest
from tokcomp.runs.watch import LossWatch, advice

KIND = "finetune"
#: What a run writes into its folder.
CHECKPOINT, LOG, SUMMARY, CURVES = "checkpoint.pt", "log.csv", "summary.json", "curves.png"
BEST, LAST, LAST_EMA = "best.safetensors", "last.safetensors", "last_ema.safetensors"
FIELDS = ("epoch", "loss", "lr", "top1", "top5", "ema_top1", "ema_top5")


class FineTuneRun:
    """Trains until the last step or until it is asked to stop; either way it can be gone on with exactly.

    The weights that come out are the whole model's or, where it has AdaptFormer branches, those and its classifier.

    Args:
        tuner: what is trained.
        batches: where its images come from.
        validate: accuracy of a model on the validation images, over all processes.
        output: folder for everything that the run writes.
        settings: JSON data that a resumed run has to share.
        facts: JSON data about the model for ``summary.json`` and the weights' metadata.
        total_steps: of the whole run.
        checkpoint_steps: steps between checkpoints, and so the most that a killed run loses; one comes after every
            epoch as well.
        log_steps: steps between rows of the log; one comes after every epoch as well.
    """

    def __init__(
        self,
        tuner: FineTuner,
        batches: Batches,
        validate: Callable[[nn.Module], Evaluation],
        output: Path,
        *,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        total_steps: int,
        checkpoint_steps: int,
        log_steps: int,
    ) -> None:
        self.tuner, self.batches, self.validate, self.output = tuner, batches, validate, output
        self.settings, self.facts = dict(settings), dict(facts)
        self.total_steps, self.checkpoint_steps, self.log_steps = total_steps, checkpoint_steps, log_steps
        self._epoch_steps = batches.steps_per_epoch
        self._losses = (0.0, 0)  # sum and number since the log's last row
        self._before: dict[str, float] | None = None
        self._last: dict[str, float] = {}
        self._best: dict[str, Any] | None = None
        self._seconds, self._images = 0.0, 0

    @property
    def step_number(self) -> int:
        """Steps done."""
        return self.tuner.step_number

    def resume(self) -> None:
        """Take up the run whose checkpoint is in the output folder.

        Raises:
            ValueError: there is none, or it is of other settings.
        """
        path = self.output / CHECKPOINT
        state = load_checkpoint(path, KIND)
        check_same_settings(state["settings"], self.settings, where=str(self.output))
        self.tuner.load_state(state["tuner"])
        self._losses = (state["losses"][0], state["losses"][1])
        self._before, self._last, self._best = state["before"], state["last"], state["best"]

    def train(self, stop: StopRequest, *, resumed: bool = False) -> bool:
        """Train; returns whether the last step was reached. A stopped run leaves a checkpoint.

        Raises:
            OSError: the folder cannot be written, or another run is writing into it.
            DivergedError: the loss or the weights stopped being finite; the checkpoint before that is kept.
        """
        with sole_writer(self.output) if self.tuner.world.is_main else nullcontext():
            return self._train(stop, resumed)

    def _train(self, stop: StopRequest, resumed: bool) -> bool:
        tuner, world = self.tuner, self.tuner.world
        start = tuner.step_number
        log = None
        if world.is_main:
            log = RunLog(
                self.output / LOG,
                FIELDS,
                resume_step=start if resumed else None,
                tensorboard=self.output / "tensorboard",
            )
        progress = Progress(self.total_steps, start, show=world.is_main)
        watch = LossWatch(world, tuner.device)
        try:
            if start == 0:
                self._before = self._accuracy()
                self._write(log, {"epoch": 0, **self._before})
                progress.note(0, f"before training: {_accuracies(self._before)}")
            begun = time.perf_counter()
            for images, labels in self.batches.iterate(start, self.total_steps):
                loss = tuner.step(images, labels)
                watch.add(tuner.step_number, loss, stop.wanted)
                self._images += len(labels) * world.size
                done = tuner.step_number
                ends_epoch = done % self._epoch_steps == 0 or done == self.total_steps
                must_save = ends_epoch or done % self.checkpoint_steps == 0
                must_log = ends_epoch or done % self.log_steps == 0
                self._note_losses(watch.settle(wait=must_save or must_log))
                progress.advance()
                if must_log:
                    row = self._row(done)
                    progress.status(f"epoch {row['epoch']:.2f} loss {row['loss']:.4f}")
                    if ends_epoch:
                        self._seconds += time.perf_counter() - begun
                        self._check_weights(done)
                        self._last = self._accuracy()
                        self._keep_best(row["epoch"])
                        row |= self._last
                        text = f"loss {row['loss']:.4f}, {_accuracies(self._last)}"
                        progress.note(done, f"epoch {row['epoch']:g}: {text}")
                        begun = time.perf_counter()
                    self._write(log, row)
                if must_save or watch.stop_wanted:
                    self._note_losses(watch.settle(wait=True))
                    self._save()
                    if ends_epoch:
                        self._draw()
                if watch.stop_wanted:
                    break
            self._seconds += time.perf_counter() - begun
        finally:
            progress.close()
            if log is not None:
                log.close()
        finished = tuner.step_number == self.total_steps
        if finished and world.is_main:
            self._save_weights(LAST, tuner.model, self._last.get("top1"))
            if tuner.ema is not None:
                self._save_weights(LAST_EMA, tuner.ema.module, self._last.get("ema_top1"))
            write_whole(self.output / SUMMARY, json.dumps(self.summary(), indent=2) + "\n")
        world.barrier()
        return finished

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds."""
        return {
            **self.facts,
            "settings": self.settings,
            "steps": self.tuner.step_number,
            "epochs": self.tuner.step_number / self._epoch_steps,
            "before": self._before,
            "last": self._last,
            "best": self._best,
            "images_per_second": round(self._images / self._seconds, 2) if self._seconds else None,
        }

    def _row(self, done: int) -> dict[str, float]:
        total, count = self._losses
        self._losses = (0.0, 0)
        return {"epoch": done / self._epoch_steps, "loss": total / max(count, 1), "lr": self.tuner.learning_rate}

    def _note_losses(self, losses: list[float]) -> None:
        self._losses = (self._losses[0] + math.fsum(losses), self._losses[1] + len(losses))

    def _write(self, log: RunLog | None, row: Mapping[str, float]) -> None:
        if log is not None:
            log.write(self.tuner.step_number, row)

    def _accuracy(self) -> dict[str, float]:
        found = self.validate(self.tuner.model.eval())
        self.tuner.model.train()
        accuracy = {"top1": found.top1, "top5": found.top5}
        if self.tuner.ema is not None:
            averaged = self.validate(self.tuner.ema.module)
            accuracy |= {"ema_top1": averaged.top1, "ema_top5": averaged.top5}
        return accuracy

    def _keep_best(self, epoch: float) -> None:
        candidates = [("weights", "top1", self.tuner.model)]
        if self.tuner.ema is not None:
            candidates.append(("moving average", "ema_top1", self.tuner.ema.module))
        for kind, name, model in candidates:
            if self._best is None or self._last[name] > self._best["top1"]:
                self._best = {"top1": self._last[name], "of": kind, "epoch": epoch, "step": self.tuner.step_number}
                if self.tuner.world.is_main:
                    self._save_weights(BEST, model, self._last[name])

    def _check_weights(self, step: int) -> None:
        if not self.tuner.is_finite():
            raise DivergedError(advice(f"the weights are not finite numbers after step {step}"), step)

    def _save(self) -> None:
        self._check_weights(self.tuner.step_number)
        if self.tuner.world.is_main:
            state = {
                "settings": self.settings,
                "tuner": self.tuner.state(),
                "losses": list(self._losses),
                "before": self._before,
                "last": self._last,
                "best": self._best,
            }
            save_checkpoint(self.output / CHECKPOINT, KIND, state)

    def _save_weights(self, name: str, model: nn.Module, top1: float | None) -> None:
        from safetensors.torch import save

        facts = {**self.facts, "step": self.tuner.step_number, "top1": top1}
        if adaptformer.is_attached(model):
            adaptformer.save(model, self.output / name, facts=facts)
            return
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        with replacing(self.output / name) as file:
            file.write(save(tensors, metadata={"tokcomp": json.dumps(facts)}))

    def _draw(self) -> None:
        if self.tuner.world.is_main:
            draw_curves(read_log(self.output / LOG), self.output / CURVES)


def _accuracies(found: Mapping[str, float]) -> str:
    text = f"top-1 {found['top1']:.2f} %"
    return f"{text}, of the moving average {found['ema_top1']:.2f} %" if "ema_top1" in found else text


def draw_curves(rows: list[dict[str, Any]], path: Path) -> bool:
    """Loss and accuracy over the epochs as a picture; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [row for row in rows if "loss" in row]
    left.plot([row["epoch"] for row in losses], [row["loss"] for row in losses], color="#0072b2")
    left.set(xlabel="epoch", ylabel="training loss")
    for name, label, colour in (("top1", "weights", "#0072b2"), ("ema_top1", "moving average", "#c2570c")):
        found = [row for row in rows if name in row]
        if found:
            points = [row["epoch"] for row in found], [row[name] for row in found]
            right.plot(*points, marker="o", markersize=3, label=label, color=colour)
    right.set(xlabel="epoch", ylabel="validation top-1, %")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True

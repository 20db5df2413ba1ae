"""Training a segmenter: steps, log, checkpoints, and the weights that come out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.dense.data import IGNORE
from tokcomp.dense.files import SegmenterSettings, save_segmenter
from tokcomp.dense.metrics import Scores
from tokcomp.dense.segmenter import Segmenter
from tokcomp.files import sole_writer, write_whole
from tokcomp.finetune.tuner import FineTuner
from tokcomp.runs.batches import Batches
from tokcomp.runs.checkpoint import check_same_settings, load_checkpoint, save_checkpoint
from tokcomp.runs.log import RunLog
from tokcomp.runs.recipe import Recipe
from tokcomp.runs.steps import DivergedError, Progress, StopRequest
from tokcomp.runs.watch import LossWatch

KIND = "dense"
#: What a run writes into its folder.
CHECKPOINT, LOG, SUMMARY, WEIGHTS = "checkpoint.pt", "log.csv", "summary.json", "segmenter.safetensors"
FIELDS = ("loss", "lr", "mean_iou", "pixel_accuracy")

#: AdamW from scratch; nothing is mixed, and masks are augmented with their images.
DENSE_RECIPE = Recipe(
    lr=2e-3,
    min_lr=1e-5,
    weight_decay=0.05,
    epochs=1,
    batch_size=16,
    clip_grad=1.0,
    aa=None,
    smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    drop_path=0.0,
)


class SegmenterTuner(FineTuner):
    """:class:`FineTuner` for masks: the mean cross entropy of all pixels that have a label."""

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [b, K, H, W], targets [b, H, W] int64 with 255 for no label."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORE)


class DenseRun:
    """Trains until the last step or until it is asked to stop; either way it can be gone on with exactly.

    Args:
        tuner: what is trained; its model is a :class:`Segmenter`.
        batches: where its images and masks come from.
        validate: scores of the segmenter on the held-out images.
        output: folder for everything that the run writes.
        build: how the segmenter is built, for the file that comes out.
        settings: JSON data that a resumed run has to share.
        facts: JSON data for ``summary.json`` and the weights' metadata.
        total_steps: of the whole run.
        checkpoint_steps: steps between checkpoints.
        log_steps: steps between rows of the log.
        validate_steps: steps between validations; the last step has one as well.
    """

    def __init__(
        self,
        tuner: SegmenterTuner,
        batches: Batches,
        validate: Callable[[Segmenter], Scores],
        output: Path,
        *,
        build: SegmenterSettings,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        total_steps: int,
        checkpoint_steps: int,
        log_steps: int,
        validate_steps: int,
    ) -> None:
        self.tuner, self.batches, self.validate, self.output = tuner, batches, validate, output
        self.build, self.settings, self.facts = build, dict(settings), dict(facts)
        self.total_steps, self.checkpoint_steps = total_steps, checkpoint_steps
        self.log_steps, self.validate_steps = log_steps, validate_steps
        self.scores: Scores | None = None
        self._losses: list[float] = []  # since the log's last row
        self._last_loss: float | None = None
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
        state = load_checkpoint(self.output / CHECKPOINT, KIND)
        check_same_settings(state["settings"], self.settings, where=str(self.output))
        self.tuner.load_state(state["tuner"])
        self._losses, self._last_loss = list(state["losses"]), state["last_loss"]
        scores = state["scores"]
        self.scores = None if scores is None else Scores(**{**scores, "iou": tuple(scores["iou"])})

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
        log = RunLog(self.output / LOG, FIELDS, resume_step=start if resumed else None) if world.is_main else None
        progress = Progress(self.total_steps, start, label="dense", show=world.is_main)
        watch = LossWatch(world, tuner.device)
        try:
            for images, masks in self.batches.iterate(start, self.total_steps):
                begun = time.perf_counter()
                loss = tuner.step(images, masks)
                done = tuner.step_number
                watch.add(done, loss, stop.wanted)
                last = done == self.total_steps
                validates = last or done % self.validate_steps == 0
                logs, saves = validates or done % self.log_steps == 0, last or done % self.checkpoint_steps == 0
                self._losses += watch.settle(wait=logs or saves)
                self._seconds += time.perf_counter() - begun
                self._images += len(images) * world.size
                progress.advance()
                if logs:
                    self._log(log, progress, validates)
                if saves or watch.stop_wanted:
                    self._losses += watch.settle(wait=True)
                    self._save()
                if watch.stop_wanted:
                    break
        finally:
            progress.close()
            if log is not None:
                log.close()
        finished = tuner.step_number == self.total_steps
        if finished and world.is_main:
            model: Any = tuner.model
            save_segmenter(self.output / WEIGHTS, model, self.build, self.summary())
            write_whole(self.output / SUMMARY, json.dumps(self.summary(), indent=2) + "\n")
        world.barrier()
        return finished

    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` holds. A class with no IoU has null there."""
        scores = self.scores
        return {
            **self.facts,
            "settings": self.settings,
            "steps": self.step_number,
            "loss": self._last_loss,
            "mean_iou": None if scores is None else scores.mean_iou,
            "pixel_accuracy": None if scores is None else scores.pixel_accuracy,
            "iou": None if scores is None else {name: value for name, value in self._named(scores)},
            "images_per_second": round(self._images / self._seconds, 2) if self._seconds else None,
        }

    def _named(self, scores: Scores) -> list[tuple[str, float | None]]:
        values = [None if math.isnan(value) else value for value in scores.iou]
        return list(zip(self.build.classes, values, strict=True))

    def _log(self, log: RunLog | None, progress: Progress, validates: bool) -> None:
        self._last_loss = math.fsum(self._losses) / max(len(self._losses), 1)
        self._losses = []
        row = {"loss": self._last_loss, "lr": self.tuner.learning_rate}
        text = f"loss {self._last_loss:.4g}"
        if validates:
            model: Any = self.tuner.model
            self.scores = self.validate(model.eval())
            model.train()
            row |= {"mean_iou": self.scores.mean_iou, "pixel_accuracy": self.scores.pixel_accuracy}
            text += f", mIoU {self.scores.mean_iou:.2f} %"
        if log is not None:
            log.write(self.step_number, row)
        progress.status(text)
        progress.note(self.step_number, text)

    def _save(self) -> None:
        if not self.tuner.is_finite():
            raise DivergedError(
                f"the weights are not finite numbers after step {self.step_number}; the checkpoint before it is kept; "
                "lower --lr, set --clip-grad, or train without --amp",
                self.step_number,
            )
        if self.tuner.world.is_main:
            scores = self.scores
            state = {
                "settings": self.settings,
                "tuner": self.tuner.state(),
                "losses": self._losses,
                "last_loss": self._last_loss,
                "scores": None if scores is None else {**vars(scores), "iou": list(scores.iou)},
            }
            save_checkpoint(self.output / CHECKPOINT, KIND, state)

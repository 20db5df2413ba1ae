"""Training a segmenter: its loss, the scores of its run, and the resulting weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.dense.data import IGNORE
from tokcomp.dense.files import SegmenterSettings, save_segmenter
from tokcomp.dense.metrics import Scores
from tokcomp.dense.segmenter import Segmenter
from tokcomp.finetune.tuner import FineTuner
from tokcomp.runs.batches import Batches
from tokcomp.runs.training import TrainingRun

WEIGHTS = "segmenter.safetensors"


class SegmenterTuner(FineTuner):
    """:class:`FineTuner` for masks: the mean cross entropy of all pixels that have a label."""

    def mix(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [b, K, H, W], targets [b, H, W] int64 with 255 for no label."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORE)


class DenseRun(TrainingRun[SegmenterTuner]):
    """Trains a segmenter, and scores it every ``validate_steps``.

    Args:
        tuner: the training; its model is a :class:`Segmenter`.
        batches: the images and masks.
        validate: returns the segmenter's scores on the held-out images.
        output: folder for everything that the run writes.
        build: how the segmenter is built, for the resulting file.
        validate_steps: steps between validations; there is also one at the last step.
        run: the other arguments of :class:`TrainingRun`.
    """

    kind = label = "dense"
    fields = ("loss", "lr", "mean_iou", "pixel_accuracy")
    trainee_name = "tuner"

    def __init__(
        self,
        tuner: SegmenterTuner,
        batches: Batches,
        validate: Callable[[Segmenter], Scores],
        output: Path,
        *,
        build: SegmenterSettings,
        validate_steps: int,
        **run: Any,
    ) -> None:
        super().__init__(tuner, batches, output, evaluate_steps=validate_steps, **run)
        self.validate, self.build = validate, build
        self.scores: Scores | None = None

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.trainee.step(images, labels)

    def row(self, step: int, loss: float, evaluates: bool) -> dict[str, float | None]:
        text, found = f"loss {loss:.4g}", {}
        if evaluates:
            model: Any = self.trainee.model
            self.scores = self.validate(model.eval())
            model.train()
            found = {"mean_iou": self.scores.mean_iou, "pixel_accuracy": self.scores.pixel_accuracy}
            text += f", mIoU {self.scores.mean_iou:.2f} %"
        self.progress.status(text)
        self.progress.note(step, text)
        return {**found}

    def outcome(self) -> dict[str, Any]:
        """The scores; null for a class without an IoU."""
        scores = self.scores
        if scores is None:
            return {"loss": self.last_loss, "mean_iou": None, "pixel_accuracy": None, "iou": None}
        iou = [None if math.isnan(value) else value for value in scores.iou]
        return {
            "loss": self.last_loss,
            "mean_iou": scores.mean_iou,
            "pixel_accuracy": scores.pixel_accuracy,
            "iou": dict(zip(self.build.classes, iou, strict=True)),
        }

    def state(self) -> dict[str, Any]:
        scores = None if self.scores is None else {**vars(self.scores), "iou": list(self.scores.iou)}
        return {**super().state(), "scores": scores}

    def load_state(self, state: Mapping[str, Any]) -> None:
        super().load_state(state)
        scores = state["scores"]
        self.scores = None if scores is None else Scores(**{**scores, "iou": tuple(scores["iou"])})

    def write_weights(self) -> None:
        model: Any = self.trainee.model
        save_segmenter(self.folder / WEIGHTS, model, self.build, self.summary())

"""A training run: steps, accuracy after each epoch, log, checkpoints, curves, and the resulting weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokcomp import adaptformer
from tokcomp.files import write_whole
from tokcomp.finetune import second_classifier
from tokcomp.finetune.plot import draw_curves
from tokcomp.finetune.tuner import FineTuner
from tokcomp.measure.evaluate import Evaluation
from tokcomp.reading import tensors_to_bytes
from tokcomp.runs.batches import Batches
from tokcomp.runs.log import read_log
from tokcomp.runs.loop import LOG
from tokcomp.runs.training import TrainingRun

#: What a run writes into its folder besides log, checkpoint and summary.
CURVES = "curves.png"
BEST, LAST, LAST_EMA = "best.safetensors", "last.safetensors", "last_ema.safetensors"


class FineTuneRun(TrainingRun[FineTuner]):
    """Trains a model, compressed or not, and validates it before the first step and after each epoch.

    The resulting weights are the whole model's or, if it has AdaptFormer branches, the branches and the classifier.

    Args:
        tuner: the training.
        batches: the images.
        validate: accuracy of a model on the validation images, over all processes.
        output: folder for everything that the run writes.
        run: the other arguments of :class:`TrainingRun`, without ``evaluate_steps``; there are also a checkpoint and a
            row of the log after every epoch.
    """

    kind = "finetune"
    fields = ("epoch", "loss", "lr", "top1", "top5", "ema_top1", "ema_top5")
    trainee_name = "tuner"

    def __init__(
        self,
        tuner: FineTuner,
        batches: Batches,
        validate: Callable[[nn.Module], Evaluation],
        output: Path,
        **run: Any,
    ) -> None:
        super().__init__(tuner, batches, output, evaluate_steps=batches.steps_per_epoch, **run)
        self.validate = validate
        self._before: dict[str, float] | None = None
        self._last: dict[str, float] = {}
        self._best: dict[str, Any] | None = None

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.trainee.step(images, labels)

    def begin(self) -> Sequence[Mapping[str, float]]:
        self._before = self._accuracy()
        self.progress.note(0, f"before training: {_accuracies(self._before)}")
        return [{"epoch": 0, **self._before}]

    def row(self, step: int, loss: float, evaluates: bool) -> dict[str, float | None]:
        self.progress.status(f"epoch {self.epoch:.2f} loss {loss:.4f}")
        if not evaluates:
            return {"epoch": self.epoch}
        self._last = self._accuracy()
        self._keep_best()
        self.progress.note(step, f"epoch {self.epoch:g}: loss {loss:.4f}, {_accuracies(self._last)}")
        return {"epoch": self.epoch, **self._last}

    def saved(self, evaluated: bool) -> None:
        if evaluated:
            draw_curves(read_log(self.folder / LOG), self.folder / CURVES)

    def outcome(self) -> dict[str, Any]:
        return {"epochs": self.epoch, "before": self._before, "last": self._last, "best": self._best}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "before": self._before, "last": self._last, "best": self._best}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if "last_loss" not in state:  # from a version that kept losses as their sum and number
            total, number = state["losses"]
            state = {**state, "losses": [total, *[0.0] * number][:number], "last_loss": None}
        super().load_state(state)
        self._before, self._last, self._best = state["before"], state["last"], state["best"]

    def write_weights(self) -> None:
        self._save_weights(LAST, self.trainee.model, self._last.get("top1"))
        if self.trainee.ema is not None:
            self._save_weights(LAST_EMA, self.trainee.ema.module, self._last.get("ema_top1"))

    def _accuracy(self) -> dict[str, float]:
        found = self.validate(self.trainee.model.eval())
        self.trainee.model.train()
        accuracy = {"top1": found.top1, "top5": found.top5}
        if self.trainee.ema is not None:
            averaged = self.validate(self.trainee.ema.module)
            accuracy |= {"ema_top1": averaged.top1, "ema_top5": averaged.top5}
        return accuracy

    def _keep_best(self) -> None:
        candidates = [("weights", "top1", self.trainee.model)]
        if self.trainee.ema is not None:
            candidates.append(("moving average", "ema_top1", self.trainee.ema.module))
        for kind, name, model in candidates:
            if self._best is None or self._last[name] > self._best["top1"]:
                self._best = {"top1": self._last[name], "of": kind, "epoch": self.epoch, "step": self.step_number}
                if self.trainee.world.is_main:
                    self._save_weights(BEST, model, self._last[name])

    def _save_weights(self, name: str, model: nn.Module, top1: float | None) -> None:
        facts = {**self.facts, "step": self.step_number, "top1": top1}
        if adaptformer.is_attached(model):
            adaptformer.save(model, self.folder / name, facts=facts)
            return
        about = {"tokcomp": json.dumps(facts)}
        weights = second_classifier.without(model.state_dict())
        write_whole(self.folder / name, tensors_to_bytes(weights, about))


def _accuracies(found: Mapping[str, float]) -> str:
    text = f"top-1 {found['top1']:.2f} %"
    return f"{text}, of the moving average {found['ema_top1']:.2f} %" if "ema_top1" in found else text

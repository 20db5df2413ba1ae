"""A plugin's training run: what it logs, and the resulting plugin."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tokcomp.runs.batches import Batches
from tokcomp.runs.training import TrainingRun
from tokcomp.tocom.distill import Distiller

PLUGIN = "tocom.safetensors"


class TocomRun(TrainingRun):
    """Trains a plugin. It uses only the images of each batch.

    Args:
        distiller: the plugin in training.
        batches: the images.
        output: folder for everything that the run writes.
        settings, facts: as for :class:`TrainingRun`; together they are the plugin's provenance.
        total_steps: steps of the whole run.
        checkpoint_steps: steps between checkpoints, and so the most that a killed run can lose.
        log_steps: steps between rows of the log.
    """

    kind = label = "tocom"
    fields = ("epoch", "loss", "lr")
    trainee_name = "distiller"

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
        super().__init__(
            distiller,
            batches,
            output,
            settings=settings,
            facts=facts,
            total_steps=total_steps,
            checkpoint_steps=checkpoint_steps,
            log_steps=log_steps,
        )
        self.distiller = distiller

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.distiller.step(images)

    def row(self, step: int, loss: float, evaluates: bool) -> dict[str, float | None]:
        self.progress.status(f"epoch {self.epoch:.2f} loss {loss:.4g}")
        self.progress.note(step, f"epoch {self.epoch:.4g}: loss {loss:.4g}")
        return {"epoch": self.epoch}

    def outcome(self) -> dict[str, Any]:
        return {"loss": self.last_loss}

    def write_weights(self) -> None:
        plugin = self.distiller.plugin
        plugin.provenance = {"source": "ToCom training", **self.facts, "settings": self.settings}
        plugin.save(self.folder / PLUGIN)

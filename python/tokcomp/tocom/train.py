"""A plugin's training run: what it logs, and the resulting plugin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokcomp.runs.training import TrainingRun
from tokcomp.tocom.distill import Distiller

PLUGIN = "tocom.safetensors"


class TocomRun(TrainingRun[Distiller]):
    """Trains a plugin. Settings and facts are the plugin's provenance."""

    kind = label = "tocom"
    fields = ("epoch", "loss", "lr")
    trainee_name = "distiller"

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.trainee.step(images, labels)

    def row(self, step: int, loss: float, evaluates: bool) -> dict[str, float | None]:
        self.progress.status(f"epoch {self.epoch:.2f} loss {loss:.4g}")
        self.progress.note(step, f"epoch {self.epoch:.4g}: loss {loss:.4g}")
        return {"epoch": self.epoch}

    def outcome(self) -> dict[str, Any]:
        return {"loss": self.last_loss}

    def write_weights(self) -> None:
        plugin = self.trainee.plugin
        plugin.provenance = {"source": "ToCom training", **self.facts, "settings": self.settings}
        plugin.save(self.folder / PLUGIN)

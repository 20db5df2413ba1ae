"""Accuracy, and what else a model's answers tell, by degree and with a plugin."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import tokcomp
import torch
import torch.nn.functional as F
from tokcomp import ToCom
from tokcomp.methods import Method
from torch import Tensor, nn

_BATCH = 90


@dataclass(frozen=True)
class Measured:
    """One model at one degree. ``top1`` in per cent; ``divergence``, KL(at the source degree || here), in nats."""

    top1: float
    cross_entropy: float
    divergence: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 6) for name, value in asdict(self).items()}


@torch.inference_mode()
def logits_of(model: nn.Module, method: Method, images: Tensor) -> Tensor:
    """Logits in float64 of a plain model under a method; leaves it plain."""
    tokcomp.compress(model, method)
    try:
        return torch.cat([model(part) for part in images.split(_BATCH)]).double()
    finally:
        tokcomp.restore(model)


def compensated_logits(
    model: nn.Module, method: Method, images: Tensor, plugin: ToCom, source: int, target: int, scale: float
) -> Tensor:
    """The same with the plugin folded in."""
    plugin.fold(model, source, target, scale)
    try:
        return logits_of(model, method, images)
    finally:
        plugin.unfold(model)


def measured(logits: Tensor, labels: Tensor, at_source: Tensor) -> Measured:
    """Of logits [n, classes] at a target degree; ``at_source`` are those at the degree it was trained at."""
    divergence = F.kl_div(logits.log_softmax(-1), at_source.log_softmax(-1), reduction="batchmean", log_target=True)
    return Measured(
        top1=100 * float((logits.argmax(-1) == labels).double().mean()),
        cross_entropy=float(F.cross_entropy(logits, labels)),
        divergence=float(divergence),
    )

"""Pictures, accuracy, and what else a model's answers tell."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import tokcomp
import torch
import torch.nn.functional as F
from tokcomp.data import digits_split, render_digits
from tokcomp.methods import Method
from torch import Tensor, nn

from benchmarks.reproduce.diffrate.schedules import cost
from tools.assets.train_digits import normalize

_HELD_OUT_SEED = 1000
_TRAINING_SEED = 2000
_BATCH = 90


@dataclass(frozen=True)
class Measured:
    """One method on one model. ``top1`` and ``same`` (answers equal to the uncompressed model's) in per cent."""

    mflops: float
    top1: float
    cross_entropy: float
    same: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@lru_cache(maxsize=2)
def held_out_pictures(count: int) -> tuple[Tensor, Tensor]:
    """``count`` pictures of the 360 held-out digits, each drawn in turn at other places and in other colours.

    Accuracy is reported on these, and nothing is chosen by them.
    """
    _, (ink, labels) = digits_split()
    generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
    rounds = math.ceil(count / len(labels))
    images = torch.cat([render_digits(ink, generator) for _ in range(rounds)])[:count]
    return normalize(images), labels.repeat(rounds)[:count]


@lru_cache(maxsize=2)
def training_pictures(count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` training digits, drawn once: choices are made on these."""
    (ink, labels), _ = digits_split()
    generator = torch.Generator().manual_seed(_TRAINING_SEED)
    return normalize(render_digits(ink[:count], generator)), labels[:count]


@torch.inference_mode()
def logits_of(model: nn.Module, method: Method | None, images: Tensor) -> Tensor:
    """Logits of the model under a method (None: uncompressed); leaves it plain."""
    if method is not None:
        tokcomp.compress(model, method)
    try:
        return torch.cat([model(part) for part in images.split(_BATCH)])
    finally:
        tokcomp.restore(model)


def measure(
    model: nn.Module, method: Method | None, pictures: tuple[Tensor, Tensor], dense: Tensor | None = None
) -> Measured:
    """Accuracy and cost of a plain model under a method; ``dense`` are the uncompressed model's logits."""
    images, labels = pictures
    logits = logits_of(model, method, images)
    answers = logits.argmax(-1)
    expected = answers if dense is None else dense.argmax(-1)
    return Measured(
        mflops=cost(model, method) / 1e6,
        top1=100 * float((answers == labels).double().mean()),
        cross_entropy=float(F.cross_entropy(logits.double(), labels)),
        same=100 * float((answers == expected).double().mean()),
    )

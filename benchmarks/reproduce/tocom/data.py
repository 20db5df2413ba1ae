"""Digits of one half of the classes, and pictures of them."""

from __future__ import annotations

import math

import torch
from tokcomp.data import digits_split, render_digits
from torch import Tensor

from benchmarks.reproduce.tocom.plan import HALVES
from tools.assets.train_digits import normalize

_HELD_OUT_SEED = 1000
_VALIDATION_SEED = 2000
_TASK_SEED = 3000


def digits_of(half: str, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Ink [n, 1, 8, 8] and labels [n] in 0..4 of one half's classes."""
    ink, labels = digits_split()[held_out]
    classes = HALVES[half]
    mine = torch.isin(labels, torch.tensor(classes))
    return ink[mine], labels[mine] - classes[0]


def task_split(half: str, count: int, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``count`` training digits to fine-tune on, as many of each class, and the rest of them to choose by."""
    ink, labels = digits_of(half)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_TASK_SEED + seed))
    each = count // len(HALVES[half])
    used = torch.cat([order[labels[order] == label][:each] for label in range(len(HALVES[half]))])
    rest = order[~torch.isin(order, used)]
    return (ink[used], labels[used]), (ink[rest], labels[rest])


class Drawing:
    """Draws digits for training: turned, sheared, scaled, up to ``spread`` (0..1) off the centre."""

    def __init__(self, spread: float = 1.0) -> None:
        self.spread = spread

    def __call__(self, ink: Tensor, generator: torch.Generator) -> Tensor:
        return normalize(render_digits(ink, generator, augment=True, spread=self.spread))


def held_out_pictures(half: str, count: int) -> tuple[Tensor, Tensor]:
    """``count`` pictures of a half's held-out digits, each drawn in turn at other places and in other colours.

    Accuracy is reported on these, and nothing is chosen by them.
    """
    ink, labels = digits_of(half, held_out=True)
    generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
    rounds = math.ceil(count / len(labels))
    images = torch.cat([render_digits(ink, generator) for _ in range(rounds)])[:count]
    return normalize(images), labels.repeat(rounds)[:count]


def validation_pictures(half: str, digits: int, seed: int, count: int) -> tuple[Tensor, Tensor]:
    """``count`` (or as many as there are) of the task's training digits that were not fine-tuned on, drawn once."""
    _, (ink, labels) = task_split(half, digits, seed)
    generator = torch.Generator().manual_seed(_VALIDATION_SEED)
    return normalize(render_digits(ink[:count], generator)), labels[:count]

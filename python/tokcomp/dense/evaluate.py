"""Segmentation quality and speed of a segmenter on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokcomp.dense.data import IGNORE
from tokcomp.dense.metrics import ConfusionMatrix, Scores
from tokcomp.dense.segmenter import Segmenter
from tokcomp.dense.windows import classes_at, sliding_logits
from tokcomp.measure.timing import now


@dataclass(frozen=True)
class DenseEvaluation:
    """What :func:`evaluate_segmenter` found. The speed includes upsampling but not loading."""

    scores: Scores
    num_images: int
    images_per_second: float


class Windows(NamedTuple):
    """What slides over an image at full resolution."""

    size: tuple[int, int]
    stride: tuple[int, int]
    at_once: int = 8


@torch.inference_mode()
def evaluate_segmenter(
    segmenter: Segmenter,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    windows: Windows | None = None,
) -> DenseEvaluation:
    """Segment every batch: images [B, 3, H, W], normalised, and masks [B, H', W'] with 255 for no label.

    The first batch is a warm-up: its time counts only if it is the only one. Masks are of the images' size, or, with
    ``windows``, of any: windows then slide over the image, and their answer is resized to the mask.

    Raises:
        ValueError: there is no batch, or a label for which the segmenter has no class.
    """
    counts = ConfusionMatrix(segmenter.num_classes, IGNORE)
    seen = timed = 0
    seconds = first_seconds = 0.0
    for images, masks in batches:
        images = images.to(device)
        start = now(device)
        if windows is None:
            predicted = segmenter.predict(images)
        else:
            predicted = classes_at(sliding_logits(segmenter, images, *windows), (masks.shape[-2], masks.shape[-1]))
        elapsed = now(device) - start
        counts.update(predicted.cpu(), masks)
        if seen == 0:
            first_seconds = elapsed
        else:
            seconds, timed = seconds + elapsed, timed + len(images)
        seen += len(images)
    if not seen:
        raise ValueError("batches must hold at least one image, got none")
    return DenseEvaluation(counts.scores(), seen, timed / seconds if timed else seen / first_seconds)

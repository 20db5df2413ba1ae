"""Segmentation quality and speed of a segmenter on a data set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcomp.dense.data import IGNORE
from tokcomp.dense.metrics import ConfusionMatrix, Scores
from tokcomp.dense.segmenter import Segmenter
from tokcomp.measure.timing import now


@dataclass(frozen=True)
class DenseEvaluation:
    """What :func:`evaluate_segmenter` found. The speed includes upsampling but not loading."""

    scores: Scores
    num_images: int
    images_per_second: float


@torch.inference_mode()
def evaluate_segmenter(
    segmenter: Segmenter, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device
) -> DenseEvaluation:
    """Segment every batch: images [B, 3, H, W], normalised, and masks [B, H, W] with 255 for no label.

    The first batch is a warm-up: its time counts only if it is the only one.

    Raises:
        ValueError: there is no batch, or a label for which the segmenter has no class.
    """
    counts = ConfusionMatrix(segmenter.num_classes, IGNORE)
    seen = timed = 0
    seconds = first_seconds = 0.0
    for images, masks in batches:
        images = images.to(device)
        start = now(device)
        predicted = segmenter.predict(images)
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

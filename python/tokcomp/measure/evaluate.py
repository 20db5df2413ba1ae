"""Accuracy and speed of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokcomp.measure.timing import now
from tokcomp.runs.distributed import ALONE, World
from tokcomp_kernels.product_types import autocast


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. Accuracies are per cent; speed is the model's alone, without loading."""

    top1: float
    top5: float
    num_images: int
    images_per_second: float


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    amp_dtype: torch.dtype | None = None,
    on_batch: Callable[[int, float], None] | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Classify every batch.

    Args:
        model: in evaluation mode, on ``device``; returns logits [B, classes].
        batches: images [B, 3, H, W], normalized, and labels [B].
        device: where the model is.
        dtype: type that the images are converted to.
        amp_dtype: run under autocast with this type.
        on_batch: called after each batch with the number of images so far and the top-1 accuracy so far.
        world: where several processes have a share of the images each, all of them find what one would have found; the
            speed is the sum of theirs.

    Returns:
        Top-5 counts the first min(5, classes) answers. The first batch warms up: its time counts where it is alone.

    Raises:
        ValueError: no batch, or a label that the model has no class for.
    """
    right1 = right5 = seen = timed = 0
    seconds = first_seconds = 0.0
    for images, labels in batches:
        images, labels = images.to(device, dtype), labels.to(device)
        start = now(device)
        with autocast(device.type, amp_dtype):
            logits = model(images)
        elapsed = now(device) - start
        if int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"labels must be below the model's {logits.shape[-1]} classes, got {int(labels.max())}")
        answers = logits.float().topk(min(5, logits.shape[-1]), dim=-1).indices  # [B, 5]
        hits = answers == labels.unsqueeze(-1)
        right1 += int(hits[:, 0].sum())
        right5 += int(hits.any(-1).sum())
        if seen == 0:
            first_seconds = elapsed
        else:
            seconds += elapsed
            timed += len(labels)
        seen += len(labels)
        if on_batch is not None:
            on_batch(seen, 100.0 * right1 / seen)
    speed = timed / seconds if timed else seen / first_seconds if seen else 0.0
    totals = world.sum_(torch.tensor([right1, right5, seen, speed], dtype=torch.float64, device=device)).tolist()
    if totals[2] == 0:
        raise ValueError("batches must hold at least one image, got none")
    return Evaluation(100.0 * totals[0] / totals[2], 100.0 * totals[1] / totals[2], int(totals[2]), totals[3])

"""Accuracy and speed of a model on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokcomp.data import unreadable_indices
from tokcomp.measure.timing import now
from tokcomp.runs.distributed import ALONE, World
from tokcomp_kernels.product_types import autocast


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. Accuracies are in per cent; the speed is the model's own, without loading.

    Attributes:
        num_images: images that were classified.
        unreadable: this process's images, by number in the data set, that could not be read and are not counted.
        num_unreadable: how many images could not be read, over all processes.
        num_not_finite: images whose logits are not all finite; they count as wrong.
    """

    top1: float
    top5: float
    num_images: int
    images_per_second: float
    unreadable: tuple[int, ...] = ()
    num_unreadable: int = 0
    num_not_finite: int = 0


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
        batches: images [B, 3, H, W], normalized, and labels [B]; :class:`tokcomp.data.ReadableImages` marks unreadable
            images by their labels.
        device: the model's device.
        dtype: type to which the images are converted.
        amp_dtype: run under autocast with this type.
        on_batch: called after each batch with the number of images so far and the top-1 accuracy so far.
        world: if several processes each have a share of the images, all of them return what one process would have
            found; the speed is the sum of theirs.

    Returns:
        Top-5 counts the first min(5, classes) answers. The first batch is a warm-up: its time counts only if it is the
        only one.

    Raises:
        ValueError: there is no batch, or a label for which the model has no class.
    """
    right1 = right5 = seen = timed = not_finite = 0
    unreadable: list[int] = []
    seconds = first_seconds = 0.0
    for images, labels in batches:
        gone = unreadable_indices(labels)
        if gone:
            unreadable += gone
            readable = labels >= -1
            if not readable.any():
                continue
            images, labels = images[readable], labels[readable]
        images, labels = images.to(device, dtype), labels.to(device)
        start = now(device)
        with autocast(device.type, amp_dtype):
            logits = model(images)
        elapsed = now(device) - start
        if int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"labels must be below the model's {logits.shape[-1]} classes, got {int(labels.max())}")
        answers = logits.float().topk(min(5, logits.shape[-1]), dim=-1).indices  # [B, 5]
        finite = logits.isfinite().all(-1, keepdim=True)  # NaN ranks first, and is no answer
        not_finite += int((~finite).sum())
        hits = (answers == labels.unsqueeze(-1)) & finite
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
    totals = world.sum_(
        torch.tensor([right1, right5, seen, speed, len(unreadable), not_finite], dtype=torch.float64, device=device)
    ).tolist()
    if totals[2] == 0:
        got = f"{int(totals[4])} that cannot be read" if totals[4] else "none"
        raise ValueError(f"batches must hold at least one image, got {got}")
    share1, share5 = (100.0 * right / totals[2] for right in totals[:2])
    return Evaluation(share1, share5, int(totals[2]), totals[3], tuple(unreadable), int(totals[4]), int(totals[5]))

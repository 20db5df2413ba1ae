"""What a model says of every image, so that methods can be compared image by image."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.measure.timing import interleave, stopwatch
from tokcomp.runs.distributed import ALONE, World
from tokcomp_kernels.product_types import autocast

#: Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959964


class Stopped(Exception):
    """The comparison was asked to stop; what was finished is kept."""


@dataclass(frozen=True)
class Answers:
    """Per image of the data set, in its order.

    Attributes:
        labels: [n] int64; -1 for an image without a label, below that for one that could not be read.
        classes: [n] int64, the model's answers; -1 where its logits are not all finite.
        losses: [n] float64, cross entropy in nats.
    """

    labels: Tensor
    classes: Tensor
    losses: Tensor

    @property
    def counted(self) -> Tensor:
        """[n] bool: images that have a label and could be read."""
        return self.labels >= 0

    @property
    def right(self) -> Tensor:
        """[n] bool."""
        return (self.classes == self.labels) & self.counted

    def share(self, hits: Tensor) -> float:
        """Images of ``hits`` [n] bool among those that count, in per cent."""
        return 100.0 * int(hits[self.counted].sum()) / int(self.counted.sum())

    @property
    def top1(self) -> float:
        return self.share(self.right)

    @property
    def cross_entropy(self) -> float | None:
        """Mean over the images; None if it is not finite."""
        mean = float(self.losses[self.counted].mean())
        return mean if math.isfinite(mean) else None


@torch.inference_mode()
def answer(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    amp_dtype: torch.dtype | None = None,
    world: World = ALONE,
    on_batch: Callable[[int], None] | None = None,
) -> Answers:
    """Run a model over this process's share of a data set, and gather what all processes found.

    Args:
        model: in evaluation mode, on ``device``; returns logits [B, classes].
        batches: this process's images [B, 3, H, W], every world.size-th of the set, and labels [B].
        num_images: of the whole set.
        device, dtype, amp_dtype: where, and in which type.
        world: the processes that share the set.
        on_batch: called after each batch with the images seen so far by this process; what it raises ends the run.

    Raises:
        ValueError: no image has a label, or there is a label for which the model has no class.
    """
    # One row each for labels, classes and losses, zero where another process has the image.
    table = torch.zeros(3, num_images, dtype=torch.float64, device=device)
    place, seen = world.rank, 0
    for images, labels in batches:
        with autocast(device.type, amp_dtype):
            logits = model(images.to(device, dtype))
        labels = labels.to(device)
        logits = logits.double()
        if int(labels.max()) >= logits.shape[-1]:
            raise ValueError(f"labels must be below the model's {logits.shape[-1]} classes, got {int(labels.max())}")
        classes = logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), -1)
        losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        places = place + world.size * torch.arange(len(labels), device=device)
        table[:, places] = torch.stack([labels.double(), classes.double(), losses])
        place, seen = int(places[-1]) + world.size, seen + len(labels)
        if on_batch is not None:
            on_batch(seen)
    labels, classes, losses = world.sum_(table).cpu().unbind(0)
    found = Answers(labels.long(), classes.long(), losses)
    if not found.counted.any():
        raise ValueError("the images must have labels, got none that has one and can be read")
    return found


def paired(hits: Tensor, baseline: Tensor) -> tuple[float, float]:
    """Mean difference of two rows of hits [n] bool over the same images, and the half width of its 95 % interval.

    In percentage points, by the normal approximation of the differences' mean; of a single image, nothing is known.
    """
    difference = 100.0 * (hits.double() - baseline.double())
    count = len(difference)
    if count < 2:
        return float(difference.mean()), 100.0
    return float(difference.mean()), _Z95 * float(difference.std()) / math.sqrt(count)


def packed(classes: Tensor) -> str:
    """Answers [n] as text for JSON."""
    return base64.b64encode(zlib.compress(classes.numpy().astype("<i4").tobytes(), 9)).decode("ascii")


def unpacked(text: str) -> Tensor:
    """What :func:`packed` packed."""
    return torch.from_numpy(np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4").astype(np.int64))


@torch.inference_mode()
def images_per_second(
    model: nn.Module,
    plain: nn.Module,
    images: Tensor,
    *,
    amp_dtype: torch.dtype | None = None,
    rounds: int = 5,
) -> tuple[float, float, float]:
    """Speed of a compressed model and of its uncompressed twin, in turns, and the median of the turns' ratios.

    Args:
        model, plain: on the device of ``images``.
        images: [B, 3, H, W], a batch as the model takes it.
        rounds: turns of each.
    """
    device = images.device

    def call(one: nn.Module) -> Callable[[], Tensor]:
        def forward() -> Tensor:
            with autocast(device.type, amp_dtype):
                return one(images)

        return forward

    calls = {"compressed": call(model), "plain": call(plain)}
    samples = interleave(calls, stopwatch(device), rounds=rounds)
    ratio = samples["compressed"].speedup_over(samples["plain"])[0]
    return len(images) / samples["compressed"].median, len(images) / samples["plain"].median, ratio

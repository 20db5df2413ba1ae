"""Training steps as the benchmarks time them: who trains, the step itself, the gate before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tokcomp
import torch
import torch.nn.functional as F
from tokcomp.bench.entries import autocast
from tokcomp.bench.models import NotMeasured
from tokcomp.bench.published import PublishedPipeline
from tokcomp.finetune.tuner import FineTuner
from tokcomp.measure.timing import Samples, rotating
from tokcomp.methods import Method
from tokcomp.runs.recipe import FINETUNE_RECIPE
from torch import Tensor, nn

PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
GATE_IMAGES = 5
HEAD = ["model", "entry", "GFLOPs", "batch", "precision", "img/s"]
HEAD += ["over timm", "least", "most", "over ours", "FLOPs", "paper"]


@dataclass(frozen=True)
class Trainee:
    """Who trains, and how it compresses."""

    method: Method | None = None
    published: bool = False
    compiled: bool = False

    def model(self, plain: nn.Module) -> nn.Module:
        model = copy.deepcopy(plain)
        if self.method is None:
            return model
        return PublishedPipeline(model, self.method) if self.published else tokcomp.compress(model, self.method)


def step(
    trainee: Trainee, plain: Any, pairs: list[tuple[Tensor, Tensor]], precision: str, device: torch.device
) -> Callable[[], Tensor]:
    """A whole step of the fine-tuning recipe, as a call that gives the loss: mixup, forward, backward, AdamW."""
    tuner = FineTuner(
        trainee.model(plain),
        FINETUNE_RECIPE,
        num_classes=plain.num_classes,
        total_steps=10_000,
        steps_per_epoch=1000,
        device=device,
        amp_dtype=None if precision == "float32" else getattr(torch, precision),
        compiled=trainee.compiled,
        fast_linear=trainee.method is not None and not trainee.published,
    )
    return rotating(lambda images, labels: tuner.step(images.clone(), labels), pairs)


def compare_training(
    plain: Any,
    trainees: Mapping[str, Trainee],
    batch: int,
    precision: str,
    timed: Any,
    results: Any,
    *,
    suite: str,
    table: str,
    name: str,
    shown: str,
    uncompressed: str,
    paper: Mapping[str, float],
) -> None:
    """Time everyone's steps in turns, the gradients checked first, and record them.

    Args:
        plain: the model to train.
        trainees: by name; "timm" and ``uncompressed`` (ours) are those whom ratios are quoted over.
        batch: images of a step.
        precision: by autocast.
        timed: the fixture.
        results: the fixture.
        suite: what the records are called.
        table: title of the table.
        name: of the model.
        shown: the trainee whom pytest-benchmark lists.
        uncompressed: our own without compression.
        paper: trainee -> how many times faster than uncompressed the paper trains.
    """
    device = results.device
    generator = torch.Generator().manual_seed(0)
    size = plain.patch_embed.img_size
    pairs = [
        (
            torch.randn(batch, 3, *size, generator=generator).to(device),
            torch.arange(batch, device=device) % plain.num_classes,
        )
        for _ in range(2)
    ]
    calls: dict[str, Callable[[], Any]] = {}
    for trainee, settings in trainees.items():
        try:
            call = step(settings, plain, pairs, precision, device)
            assert call().isfinite(), f"{trainee}: the loss is not finite"
        except Exception as error:
            if not (settings.compiled or isinstance(error, torch.OutOfMemoryError)):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            results.add_not_measured(suite, name, NotMeasured(trainee, batch, precision, reason))
        else:
            calls[trainee] = call

    def gate() -> None:
        for method in {one.method: None for one in trainees.values() if one.method is not None}:
            check_gradients(plain, method, precision, device)

    samples = timed(calls, gate=gate, shown=shown, turn_seconds=1.0)
    dense = tokcomp.flops(plain)
    for trainee, one in samples.items():
        method = trainees[trainee].method
        cost = dense if method is None else tokcomp.flops(tokcomp.compress(copy.deepcopy(plain), method))
        over_timm, over_ours = (_over(one, samples.get(base)) for base in ("timm", uncompressed))
        results.add(
            {
                "suite": suite,
                "model": name,
                "entry": trainee,
                "batch": batch,
                "precision": precision,
                "gflops": cost / 1e9,
                "images_per_second": batch / one.median,
                "speedup_over_timm": over_timm,
                "speedup_over_uncompressed": over_ours,
                "paper_speedup": paper.get(trainee),
                "seconds": one.seconds,
            },
            table,
            HEAD,
            [
                name,
                trainee,
                f"{cost / 1e9:.2f}",
                str(batch),
                precision,
                f"{batch / one.median:.1f}",
                *(f"{ratio:.2f}x" for ratio in over_timm or ()),
                *([] if over_timm else [""] * 3),
                f"{over_ours[0]:.2f}x" if over_ours else "",
                f"{dense / cost:.2f}x",
                f"{paper[trainee]}x" if trainee in paper else "",
            ],
        )


def _over(one: Samples, other: Samples | None) -> tuple[float, float, float] | None:
    return None if other is None else one.speedup_over(other)


def check_gradients(plain: Any, method: Method, precision: str, device: torch.device) -> None:
    """The compressed model's gradients on fresh random images are those of the published pipeline.

    In float64, where there is a kernel, those of all weights agree to rounding. In ``precision``, each image's gradient
    to its own pixels is no further from float64 than twice the published pipeline's: of the median image, since a
    rounding that swaps two nearly equal tokens changes an image's gradient in either.
    """
    images = torch.randn(GATE_IMAGES, 3, *plain.patch_embed.img_size, device=device)
    labels = torch.randint(plain.num_classes, (GATE_IMAGES,), device=device)
    ours = tokcomp.compress(copy.deepcopy(plain), method)
    published = PublishedPipeline(copy.deepcopy(plain), method)
    exact_pixels, exact_weights = _gradients(copy.deepcopy(published).double(), images.double(), labels, None)
    if device.type == "cpu":
        _, weights = _gradients(copy.deepcopy(ours).double(), images.double(), labels, None)
        for have, want in zip(weights, exact_weights, strict=True):
            # float64 sums of some 1e5 terms in two orders, through 12 blocks.
            assert (have - want).abs().max() <= 1e-9 * max(want.abs().max().item(), 1e-6), "gradients differ in float64"
    dtype = None if precision == "float32" else getattr(torch, precision)
    errors = [
        ((_gradients(model, images, labels, dtype)[0] - exact_pixels).flatten(1).norm(dim=1).median()).item()
        for model in (ours, published)
    ]
    scale = exact_pixels.flatten(1).norm(dim=1).median().item()
    epsilon = torch.finfo(dtype or torch.float32).eps
    assert errors[0] <= 2 * errors[1] + epsilon * scale, f"gradients are {errors[0]:.3g} off, published {errors[1]:.3g}"


def _gradients(
    model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor]]:
    images = images.clone().requires_grad_()
    with autocast(dtype or torch.float32, images.device):
        logits = model(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
    pixels, *weights = torch.autograd.grad(loss, [images, *model.parameters()])
    return pixels.double(), [weight.double() for weight in weights]

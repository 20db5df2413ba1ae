"""Training steps of DeiT-S, compressed against uncompressed: what the paper's Table 11 says of an A100.

"timm" and "published" are PyTorch's own steps; the others are tokcomp's, with oneDNN's linear layers in float32 on CPU.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from tokcomp.bench.models import create_model, keep_everything
from tokcomp.bench.provenance import find_device
from tokcomp.bench.published import PublishedPipeline
from tokcomp.bench.timing import rotating
from tokcomp.methods import Method
from tokcomp.train.finetune import FineTuner
from tokcomp.train.recipe import FINETUNE_RECIPE
from torch import Tensor, nn

MODEL = "deit_small_patch16_224"
#: DiffRate's budget -> how many times faster than uncompressed its Table 11 trains (A100).
PAPER = {2.3: 1.8, 2.9: 1.4}
BATCH = {"cpu": 16, "cuda": 256}
PRECISIONS = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float16")}
GATE_IMAGES = 5
TABLE = "training steps of DeiT-S: images per second; speed over uncompressed timm and over our own uncompressed"
HEAD = ["entry", "GFLOPs", "batch", "precision", "img/s", "over timm", "least", "most", "over ours", "FLOPs", "paper"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = find_device(metafunc.config.getoption("--device")).type
    metafunc.parametrize("precision", PRECISIONS[kind])


@dataclass(frozen=True)
class Entry:
    """Who trains, and how it compresses."""

    method: Method | None = None
    published: bool = False
    compiled: bool = False

    def model(self, plain: nn.Module) -> nn.Module:
        model = copy.deepcopy(plain)
        if self.method is None:
            return model
        return PublishedPipeline(model, self.method) if self.published else tokcomp.compress(model, self.method)


def test_training_step(
    precision: str, device: torch.device, timed: Any, results: Any, request: pytest.FixtureRequest
) -> None:
    """A whole step of the fine-tuning recipe: mixup, forward, backward, AdamW; precision by autocast."""
    plain = create_model(MODEL, device=device).train()
    entries = {"timm": Entry(), "tokcomp-uncompressed": Entry(keep_everything(plain))}
    for budget in PAPER:
        entries[f"tokcomp-{budget}G"] = Entry(tokcomp.DiffRate.published(MODEL, budget))
    entries["published-2.3G"] = Entry(tokcomp.DiffRate.published(MODEL, 2.3), published=True)
    if request.config.getoption("--torchcompile"):
        entries["timm-compiled"] = Entry(compiled=True)
        entries["tokcomp-2.3G-compiled"] = Entry(entries["tokcomp-2.3G"].method, compiled=True)
    batch = BATCH[device.type]
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(batch, 3, 224, 224, generator=generator).to(device), torch.arange(batch, device=device) % 1000)
        for _ in range(2)
    ]
    calls = {name: _step(entry, plain, batches, precision, device) for name, entry in entries.items()}

    def gate() -> None:
        for budget in PAPER:
            check_gradients(plain, entries[f"tokcomp-{budget}G"].method, precision, device)
        for call in calls.values():
            assert call().isfinite()

    samples = timed(calls, gate=gate, shown="tokcomp-2.3G", turn_seconds=1.0)
    if not samples:
        return
    dense = tokcomp.flops(plain)
    for name, entry in entries.items():
        cost = dense if entry.method is None else tokcomp.flops(tokcomp.compress(copy.deepcopy(plain), entry.method))
        one = samples[name]
        over_timm, over_ours = (one.speedup_over(samples[base]) for base in ("timm", "tokcomp-uncompressed"))
        paper = next((ratio for budget, ratio in PAPER.items() if f"{budget}G" in name), None)
        results.add(
            {
                "model": MODEL,
                "entry": name,
                "batch": batch,
                "precision": precision,
                "gflops": cost / 1e9,
                "images_per_second": batch / one.median,
                "speedup_over_timm": over_timm,
                "speedup_over_uncompressed": over_ours,
                "paper_speedup": paper,
                "seconds": one.seconds,
            },
            TABLE,
            HEAD,
            [
                name,
                f"{cost / 1e9:.2f}",
                str(batch),
                precision,
                f"{batch / one.median:.1f}",
                *(f"{ratio:.2f}x" for ratio in over_timm),
                f"{over_ours[0]:.2f}x",
                f"{dense / cost:.2f}x",
                "" if paper is None else f"{paper}x",
            ],
        )


def _step(
    entry: Entry, plain: nn.Module, batches: list[tuple[Tensor, Tensor]], precision: str, device: torch.device
) -> Any:
    tuner = FineTuner(
        entry.model(plain),
        FINETUNE_RECIPE,
        num_classes=1000,
        total_steps=10_000,
        steps_per_epoch=1000,
        device=device,
        amp_dtype=None if precision == "float32" else getattr(torch, precision),
        compiled=entry.compiled,
        fast_linear=entry.method is not None and not entry.published,
    )
    return rotating(lambda images, labels: tuner.step(images.clone(), labels), batches)


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
    autocast: AbstractContextManager[Any] = (
        nullcontext() if dtype is None else torch.autocast(images.device.type, dtype)
    )
    with autocast:
        logits = model(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")
    pixels, *weights = torch.autograd.grad(loss, [images, *model.parameters()])
    return pixels.double(), [weight.double() for weight in weights]

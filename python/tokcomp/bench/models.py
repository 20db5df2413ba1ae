"""Whole models side by side: the published pipeline, timm, timm compiled, and ours; gated, then timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tokcomp
from tokcomp.bench.published import PublishedPipeline
from tokcomp.bench.timing import MIN_ROUNDS, Samples, interleave, rotating, stopwatch
from tokcomp.methods import Method

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Competitors in the order of tables. The published pipeline is what speed-ups are quoted against.
COMPETITORS = ("published", "timm", "timm-compiled", "tokcomp-uncompressed", "tokcomp", "tokcomp-compiled")
#: Images that the correctness gate looks at.
GATE_IMAGES = 9


@dataclass(frozen=True)
class Row:
    """One competitor at one batch size. ``speedup``: over the published pipeline; median, least, most of the rounds."""

    competitor: str
    batch: int
    precision: str
    gflops: float
    images_per_second: float
    least_images_per_second: float
    most_images_per_second: float
    speedup: tuple[float, float, float] | None
    seconds: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class DisagreementError(RuntimeError):
    """The compressed model and the published pipeline differ by more than rounding: no speed is reported."""


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's model in float32 for inference, with random weights (seed 0) unless pretrained: speed is the same."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=pretrained, **options).eval()


def compare_models(
    model: nn.Module,
    method: Method,
    *,
    batch_sizes: Sequence[int],
    precision: str,
    device: torch.device,
    competitors: Sequence[str] = ("published", "timm", "tokcomp"),
    rounds: int = MIN_ROUNDS,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time a model's competitors on random images, batch size by batch size.

    Args:
        model: a plain timm VisionTransformer in float32; it is copied and stays as it is.
        method: how the compressed competitors compress.
        batch_sizes: images per call.
        precision: a name in :data:`PRECISIONS`. The published pipeline runs half precision under autocast, as
            published; the others hold their weights in it.
        device: where to run.
        competitors: names from :data:`COMPETITORS`.
        rounds: turns that each competitor takes per batch size.
        report: called with a line of progress now and then.

    Raises:
        DisagreementError: the gate failed.
    """
    unknown = [name for name in competitors if name not in COMPETITORS]
    if unknown:
        raise ValueError(f"competitors must be among {', '.join(COMPETITORS)}, got {unknown[0]}")
    dtype = PRECISIONS[precision]
    model = copy.deepcopy(model).to(device).eval()
    shape = _image_shape(model)
    with torch.inference_mode():
        report("checking the compressed model against the published pipeline")
        check_agreement(model, method, precision, shape, device)
        runners = {name: _runner(name, model, method, dtype, device) for name in competitors}
        cost = {name: _gflops(name, model, method) for name in competitors}
        rows = []
        for batch in batch_sizes:
            report(f"batch {batch}: warming up {len(runners)} competitors")
            images = [torch.randn(batch, *shape, device=device) for _ in range(2)]
            lowered = [(one.to(dtype),) for one in images]
            calls = {
                name: rotating(runner, [(one,) for one in images] if name == "published" else lowered)
                for name, runner in runners.items()
            }
            for call in calls.values():
                call()
            report(f"batch {batch}: {rounds} rounds")
            samples = interleave(calls, stopwatch(device), rounds=rounds)
            baseline = samples.get("published")
            rows += [_row(name, batch, precision, cost[name], samples[name], baseline) for name in runners]
    return rows


def check_agreement(
    model: nn.Module, method: Method, precision: str, shape: Sequence[int], device: torch.device
) -> dict[str, float]:
    """Compare logits on fresh random images, and two runs bit for bit; raises DisagreementError.

    The oracle is the published pipeline in float64. The median image's relative error must be within twice that of the
    published pipeline run in ``precision`` plus one rounding: the median, since a rounding that swaps two nearly equal
    tokens changes an image's logits in either.
    """
    dtype = PRECISIONS[precision]
    images = torch.randn(GATE_IMAGES, *shape, device=device)
    oracle = PublishedPipeline(copy.deepcopy(model).double(), method)(images.to(dtype).double())
    published = _runner("published", model, method, dtype, device)(images.to(dtype).float())
    ours = _runner("tokcomp", model, method, dtype, device)
    have = ours(images.to(dtype))
    if not torch.equal(have, ours(images.to(dtype))):
        raise DisagreementError("two runs of the compressed model on the same images differ")
    errors = {"tokcomp": _median_error(have, oracle), "published": _median_error(published, oracle)}
    bound = 2 * errors["published"] + torch.finfo(dtype).eps
    if not errors["tokcomp"] <= bound:
        raise DisagreementError(
            f"the compressed model's logits are {errors['tokcomp']:.3g} off in {precision}, the published pipeline's "
            f"{errors['published']:.3g}: more than twice as far from float64"
        )
    return errors


def _median_error(logits: Tensor, oracle: Tensor) -> float:
    difference = (logits.double() - oracle).norm(dim=1) / oracle.norm(dim=1)
    return difference.median().item()


def _runner(
    name: str, model: nn.Module, method: Method, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    if name == "published":
        pipeline = PublishedPipeline(model, method)

        def run(images: Tensor) -> Tensor:
            with _autocast(dtype, device):
                return pipeline(images)

        return run
    own: Any = copy.deepcopy(model).to(dtype)
    if name == "tokcomp-uncompressed":
        nothing = [own.patch_embed.num_patches + own.num_prefix_tokens] * len(own.blocks)
        tokcomp.compress(own, tokcomp.DiffRate(tokcomp.CompressionSchedule(nothing, nothing)))
    elif name.startswith("tokcomp"):
        tokcomp.compress(own, method)
    if not name.endswith("-compiled"):
        return own
    # Freezing lays weights out for oneDNN; without it Inductor is no faster than eager on CPU.
    return torch.compile(own, options={"freezing": True} if device.type == "cpu" else None)


def _autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _gflops(name: str, model: nn.Module, method: Method) -> float:
    if name.startswith("timm") or name == "tokcomp-uncompressed":
        return tokcomp.flops(model) / 1e9
    return tokcomp.flops(tokcomp.compress(copy.deepcopy(model), method)) / 1e9


def _image_shape(model: Any) -> tuple[int, int, int]:
    patch_embed = model.patch_embed
    return (patch_embed.proj.in_channels, *patch_embed.img_size)


def _row(name: str, batch: int, precision: str, gflops: float, samples: Samples, baseline: Samples | None) -> Row:
    return Row(
        competitor=name,
        batch=batch,
        precision=precision,
        gflops=gflops,
        images_per_second=batch / samples.median,
        least_images_per_second=batch / samples.most,
        most_images_per_second=batch / samples.least,
        speedup=None if baseline is None else samples.speedup_over(baseline),
        seconds=samples.seconds,
    )

"""Whole models side by side: the published pipeline, timm, timm compiled, and ours; gated, then timed in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
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
#: Who may run a model, in the order of tables.
COMPETITORS = ("published", "timm", "timm-compiled", "tokcomp", "tokcomp-compiled")
#: Images that the correctness gate looks at.
GATE_IMAGES = 9


@dataclass(frozen=True)
class Entry:
    """Who runs the model (one of :data:`COMPETITORS`), how it compresses (timm takes no method), and in what precision
    where that is not the comparison's."""

    competitor: str
    method: Method | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if self.competitor not in COMPETITORS:
            raise ValueError(f"competitor must be one of {', '.join(COMPETITORS)}, got {self.competitor!r}")
        if (self.method is None) != self.competitor.startswith("timm"):
            raise ValueError(f"a method must be given for all but timm, got {self.method!r} for {self.competitor}")


@dataclass(frozen=True)
class Row:
    """One entry at one batch size. ``speedup``: over the baseline entry; median, least and most of the rounds."""

    name: str
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


def create_model(
    name: str, *, pretrained: bool = False, device: torch.device | None = None, **options: Any
) -> nn.Module:
    """timm's model in float32 for inference, with random weights (seed 0) unless pretrained: speed is the same."""
    torch.manual_seed(0)
    with device or nullcontext():
        return timm.create_model(name, pretrained=pretrained, **options).eval()


def keep_everything(model: Any) -> Method:
    """A method that drops no token: our own uncompressed model."""
    counts = [int(model.patch_embed.num_patches) + int(model.num_prefix_tokens)] * len(model.blocks)
    return tokcomp.DiffRate(tokcomp.CompressionSchedule(counts, counts))


def compare_models(
    model: nn.Module,
    entries: Mapping[str, Entry],
    *,
    batch_sizes: Sequence[int],
    precision: str,
    device: torch.device,
    baseline: str = "published",
    rounds: int = MIN_ROUNDS,
    measure: Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Samples]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time a model's entries on random images in turns, batch size by batch size.

    Args:
        model: a plain timm VisionTransformer in float32; it is copied and stays as it is.
        entries: name -> who runs it and how.
        batch_sizes: images per call.
        precision: a name in :data:`PRECISIONS`. The published pipeline runs half precision under autocast, as
            published; the others hold their weights in it.
        device: where to run.
        baseline: name of the entry that speed-ups are quoted against, where there is one.
        rounds: turns that each entry takes per batch size.
        measure: times named calls in turns, in place of :func:`interleave`; what it leaves out gets no row.
        report: called with a line of progress now and then.

    Raises:
        DisagreementError: the gate failed.
    """
    dtype = PRECISIONS[precision]
    model = copy.deepcopy(model).to(device).eval()
    shape = _image_shape(model)
    with torch.inference_mode():
        runners = {
            name: build_runner(entry, model, PRECISIONS[entry.precision or precision], device)
            for name, entry in entries.items()
        }
        for name, entry in entries.items():
            if entry.method is not None and entry.competitor != "published":
                report(f"checking {name} against the published pipeline")
                check_agreement(runners[name], model, entry.method, precision, device)
        cost = {name: _gflops(entry, model) for name, entry in entries.items()}
        rows = []
        for batch in batch_sizes:
            report(f"batch {batch}: warming up {len(runners)} entries")
            images = [torch.randn(batch, *shape, device=device) for _ in range(2)]
            lowered = [(one.to(dtype),) for one in images]
            calls = {
                name: rotating(
                    runner, [(one,) for one in images] if entries[name].competitor == "published" else lowered
                )
                for name, runner in runners.items()
            }
            for call in calls.values():
                call()
            report(f"batch {batch}: {rounds} rounds")
            samples = measure(calls) if measure else interleave(calls, stopwatch(device), rounds=rounds)
            against = samples.get(baseline)
            rows += [
                _row(name, batch, entries[name].precision or precision, cost[name], samples[name], against)
                for name in runners
                if name in samples
            ]
    return rows


def check_agreement(
    run: Callable[[Tensor], Tensor], model: nn.Module, method: Method, precision: str, device: torch.device
) -> dict[str, float]:
    """Compare logits on fresh random images, and two runs bit for bit; raises DisagreementError.

    The oracle is the published pipeline in float64. The median image's relative error must be within twice that of the
    published pipeline run in ``precision`` plus one rounding: the median, since a rounding that swaps two nearly equal
    tokens changes an image's logits in either.
    """
    dtype = PRECISIONS[precision]
    images = torch.randn(GATE_IMAGES, *_image_shape(model), device=device).to(dtype)
    oracle = PublishedPipeline(copy.deepcopy(model).double(), method)(images.double())
    published = build_runner(Entry("published", method), model, dtype, device)(images.float())
    have = run(images).clone()
    if not torch.equal(have, run(images)):
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


def build_runner(
    entry: Entry, model: nn.Module, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """What maps images to logits: in ``dtype``, or float32 images for the published pipeline, which uses autocast."""
    if entry.competitor == "published":
        assert entry.method is not None
        pipeline = PublishedPipeline(model, entry.method)

        def run(images: Tensor) -> Tensor:
            with _autocast(dtype, device):
                return pipeline(images)

        return run
    own: Any = copy.deepcopy(model).to(dtype)
    if entry.method is not None:
        tokcomp.compress(own, entry.method)
    if not entry.competitor.endswith("-compiled"):
        return own
    # Freezing lays weights out for oneDNN; without it Inductor is no faster than eager on CPU.
    return torch.compile(own, dynamic=False, options={"freezing": True} if device.type == "cpu" else None)


def _autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _gflops(entry: Entry, model: nn.Module) -> float:
    if entry.method is None:
        return tokcomp.flops(model) / 1e9
    return tokcomp.flops(tokcomp.compress(copy.deepcopy(model), entry.method)) / 1e9


def _image_shape(model: Any) -> tuple[int, int, int]:
    patch_embed = model.patch_embed
    return (patch_embed.proj.in_channels, *patch_embed.img_size)


def _row(name: str, batch: int, precision: str, gflops: float, samples: Samples, baseline: Samples | None) -> Row:
    return Row(
        name=name,
        batch=batch,
        precision=precision,
        gflops=gflops,
        images_per_second=batch / samples.median,
        least_images_per_second=batch / samples.most,
        most_images_per_second=batch / samples.least,
        speedup=None if baseline is None else samples.speedup_over(baseline),
        seconds=samples.seconds,
    )

"""Whole models side by side: published code, timm, ours, each eager and compiled; gated, then timed in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import tokcomp
from tokcomp.adapters.timm_vit.embedding import image_shape
from tokcomp.bench.entries import COMPETITORS, PRECISIONS, Entry, build_runner, compiling
from tokcomp.bench.gate import DisagreementError, Gate, check_agreement
from tokcomp.measure.timing import MIN_ROUNDS, Samples, interleave, rotating, stopwatch
from tokcomp.methods import Method

__all__ = [
    "COMPETITORS",
    "PRECISIONS",
    "Comparison",
    "DisagreementError",
    "Entry",
    "NotMeasured",
    "Row",
    "build_runner",
    "check_agreement",
    "compare_models",
    "create_model",
    "keep_everything",
]

#: Characters of a reason that tables and records keep.
_REASON = 300


@dataclass(frozen=True)
class Row:
    """One entry at one batch size. ``speedup``: over the baseline entry; median, least and most of the rounds.
    ``precision``: "int8" where the products are in it. ``ready_seconds``: from a plain model to the first checked
    logits, compiling included. ``same_answers``: of int8, the share of the gate's images that keep their class."""

    name: str
    batch: int
    precision: str
    gflops: float
    images_per_second: float
    least_images_per_second: float
    most_images_per_second: float
    speedup: tuple[float, float, float] | None
    seconds: tuple[float, ...]
    ready_seconds: float = 0.0
    same_answers: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def speed_over(self, other: Row) -> tuple[float, float, float]:
        """How many times faster than ``other`` of the same run: median, least and most of the rounds' own ratios."""
        return Samples(self.seconds).speedup_over(Samples(other.seconds))

    def efficiency(self, uncompressed: Row) -> tuple[float, float, float]:
        """The speed-up over our own uncompressed model as a share of the FLOPs ratio: median, least, most."""
        median, least, most = (ratio * self.gflops / uncompressed.gflops for ratio in self.speed_over(uncompressed))
        return median, least, most

    def tax(self, sliced: Row) -> tuple[float, float, float]:
        """Time above a static slice to the same token counts in the same stack, as a share: median, least, most."""
        shares = [ours / theirs - 1 for ours, theirs in zip(self.seconds, sliced.seconds, strict=True)]
        return statistics.median(shares), min(shares), max(shares)

    def share_of(self, ideal_seconds: float) -> float:
        """The ideal's time as a share of this entry's median."""
        return ideal_seconds / statistics.median(self.seconds)


@dataclass(frozen=True)
class NotMeasured:
    """An entry without a figure, and why: it did not compile, did not fit, does not run here."""

    name: str
    batch: int
    precision: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Comparison(NamedTuple):
    """What :func:`compare_models` found, in the order of batch sizes and entries."""

    rows: list[Row]
    not_measured: list[NotMeasured]


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
) -> Comparison:
    """Time a model's entries on random images in turns, batch size by batch size.

    Every entry but the references is checked in the very batch that is timed. One that runs out of memory gets a reason
    in place of a figure, and so does one that compiles, or is not ours, and is not installed or fails in any way.

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
        DisagreementError: ours computes something else than the published pipeline.
    """
    model = copy.deepcopy(model).to(device).eval()
    rows: list[Row] = []
    not_measured: list[NotMeasured] = []
    with torch.inference_mode(), compiling():
        gates = {
            name: Gate(model, name, device) for name in {entry.precision or precision for entry in entries.values()}
        }
        cost = {name: _gflops(entry, model) for name, entry in entries.items()}
        for batch in batch_sizes:
            images = [torch.randn(batch, *image_shape(model), device=device) for _ in range(2)]
            calls: dict[str, Callable[[], Any]] = {}
            ready: dict[str, float] = {}
            same: dict[str, float | None] = {}
            for name, entry in entries.items():
                own = entry.precision or precision
                report(f"batch {batch}: {name}")
                begin = time.perf_counter()
                try:
                    calls[name], same[name] = _prepare(entry, model, gates[own], images, batch)
                except Exception as error:
                    wrong = isinstance(error, DisagreementError) and entry.is_ours
                    if wrong or not (entry.may_fail or isinstance(error, torch.OutOfMemoryError)):
                        raise
                    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_REASON]
                    report(f"batch {batch}: {name} is not measured: {reason}")
                    not_measured.append(NotMeasured(name, batch, _shown(entry, precision), reason))
                    _free(device)
                ready[name] = time.perf_counter() - begin
            report(f"batch {batch}: {rounds} rounds of {len(calls)} entries")
            samples = measure(calls) if measure else interleave(calls, stopwatch(device), rounds=rounds)
            against = samples.get(baseline)
            for name, one in samples.items():
                shown, over = _shown(entries[name], precision), None if against is None else one.speedup_over(against)
                rows.append(_row(name, batch, shown, cost[name], one, over, ready[name], same[name]))
            calls.clear()
            _free(device)
    return Comparison(rows, not_measured)


def _shown(entry: Entry, precision: str) -> str:
    """What a row says of its precision."""
    return "int8" if entry.in_int8 else entry.precision or precision


def _prepare(
    entry: Entry, model: nn.Module, gate: Gate, images: list[torch.Tensor], batch: int
) -> tuple[Callable[[], Any], float | None]:
    """The call to time, made ready, checked and warm; of int8 the share of images with the same answer."""
    dtype = PRECISIONS[gate.precision]
    with torch.inference_mode(False), torch.no_grad():  # its weights are to be what a user's are
        run = build_runner(entry, model, dtype, gate.device, batch)
    call = rotating(run, [(one if entry.autocasts else one.to(dtype),) for one in images])
    call()
    if entry.competitor in ("published", "timm"):  # the references that the gate measures by
        return call, None
    found = gate.check(run, entry.method, batch=batch, entry=entry)
    return call, found["same_answers"] if entry.in_int8 else None


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _gflops(entry: Entry, model: nn.Module) -> float:
    if entry.method is None:
        return tokcomp.flops(model) / 1e9
    return tokcomp.flops(tokcomp.compress(copy.deepcopy(model), entry.method)) / 1e9


def _row(
    name: str,
    batch: int,
    precision: str,
    gflops: float,
    samples: Samples,
    speedup: tuple[float, float, float] | None,
    ready_seconds: float,
    same_answers: float | None,
) -> Row:
    return Row(
        name=name,
        batch=batch,
        precision=precision,
        gflops=gflops,
        images_per_second=batch / samples.median,
        least_images_per_second=batch / samples.most,
        most_images_per_second=batch / samples.least,
        speedup=speedup,
        seconds=samples.seconds,
        ready_seconds=round(ready_seconds, 2),
        same_answers=same_answers,
    )

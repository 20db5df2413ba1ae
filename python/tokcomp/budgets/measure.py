"""Measuring a latency table: every part at every count in turn, over several rounds; medians."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokcomp.budgets.latency import LatencyTable
from tokcomp.budgets.vit_parts import PARTS, VitParts, uniform_blocks
from tokcomp.cost import counts_of
from tokcomp.measure.provenance import provenance
from tokcomp.measure.timing import MIN_ROUNDS, stopwatch
from tokcomp.methods import DiffRate, Method
from tokcomp.schedule import CompressionSchedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Minimum length of a turn: many launches of a short call, one of a long one.
TURN_SECONDS = 0.01
#: Default distance between the pairs of counts that are measured: the token tile of CPU and GPU kernels.
SPACING = 8


class MeasurementStopped(RuntimeError):
    """The caller asked to stop before the table was complete; nothing was written."""


def counts_to_measure(num_tokens: int, num_prefix_tokens: int, spacing: int = SPACING) -> list[int]:
    """Token counts either side of every edge: multiples of ``spacing``, one above each, and both ends of the range.

    Kernels work in tiles of tokens, so the cost jumps between ``k * spacing`` and ``k * spacing + 1`` and is nearly
    linear in between. ``spacing = 1`` gives every count.
    """
    if spacing < 1:
        raise ValueError(f"spacing must be at least 1, got {spacing}")
    least = min(num_prefix_tokens + 1, num_tokens)
    edges = {count for k in range(0, num_tokens + 1, spacing) for count in (k, k + 1)}
    return sorted(count for count in {least, num_tokens, *edges} if least <= count <= num_tokens)


@torch.inference_mode()
def measure_latency(
    model: nn.Module,
    *,
    batch_size: int,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    spacing: int = SPACING,
    rounds: int = MIN_ROUNDS,
    report: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] = lambda: False,
    check: Mapping[str, Method] | None = None,
    watch: Callable[[Callable[[], Any], int], float] | None = None,
) -> LatencyTable:
    """Time the parts of a compressed model against token count, as it would be served.

    Every part at every count takes its turn in every round; an entry is the median of its rounds. The table is left as
    measured, even where more tokens take less time (another tile plan, or noise). Whole models take turns among the
    parts; the table's prediction and the measured time of each are recorded in its provenance under ``check``, and the
    largest difference is reported.

    Args:
        model: a timm VisionTransformer; it is copied and not changed.
        batch_size: images per batch: the times are for the whole batch.
        dtype: type of weights and images: float32, bfloat16 or float16.
        device: the device on which the model will run.
        spacing: see :func:`counts_to_measure`; 1 measures every count and takes four times as long as 8.
        rounds: turns of each entry.
        report: called now and then with a line of progress.
        stop: called before every turn; True ends the measurement.
        check: name -> the method of a whole model to check the table against; by default the uncompressed model and one
            that drops tokens in every block but the first.
        watch: seconds per call of (call, launches), instead of the device's stopwatch.

    Raises:
        MeasurementStopped: ``stop`` returned True.
        TypeError: (UnsupportedModelError) the model is not understood, or its blocks differ in shape.
        ValueError: an argument is out of range; the message names it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    device = torch.device(device)
    parts = VitParts(model, batch_size, DTYPES[dtype], device)
    counts = counts_to_measure(parts.num_tokens, parts.num_prefix_tokens, spacing)
    check = _usual_schedules(parts) if check is None else check
    calls: dict[tuple[str, Any], Callable[[], Any]] = {("whole", name): parts.whole(check[name]) for name in check}
    calls |= {(part, count): partial(getattr(parts, part), count) for count in counts for part in PARTS}
    calls["embed", None] = parts.embed
    seconds = _take_turns(calls, watch or stopwatch(device), rounds, report, stop)
    median_ms = {key: 1e3 * statistics.median(times) for key, times in seconds.items()}
    table = LatencyTable(
        depth=parts.depth,
        num_tokens=parts.num_tokens,
        num_prefix_tokens=parts.num_prefix_tokens,
        block=uniform_blocks(model)._asdict(),
        batch_size=batch_size,
        dtype=dtype,
        embed_ms=median_ms["embed", None],
        counts=counts,
        attention_ms=[median_ms["attention", count] for count in counts],
        reduce_ms=[median_ms["reduce", count] for count in counts],
        mlp_ms=[median_ms["mlp", count] for count in counts],
        head_ms=[median_ms["head", count] for count in counts],
    )
    compared = {
        name: {"table_ms": table.milliseconds(counts_of(model, method)), "measured_ms": median_ms["whole", name]}
        for name, method in check.items()
    }
    if compared:
        worst = max(abs(row["table_ms"] / row["measured_ms"] - 1) for row in compared.values())
        report(f"the latency table is within {100 * worst:.1f} % of {len(compared)} whole models")
    spreads = [(max(times) - min(times)) / statistics.median(times) for times in seconds.values()]
    table.provenance.update(
        {
            **provenance(device),
            "model": getattr(model, "pretrained_cfg", {}).get("architecture"),
            "metric": parts.metric,
            "rounds": rounds,
            # Range over an entry's rounds, relative to its median: the median over the entries.
            "spread": statistics.median(spreads),
            "check": compared,
        }
    )
    return table


def _usual_schedules(parts: VitParts) -> dict[str, Method]:
    """The uncompressed model, and one whose tokens decrease in equal steps to a quarter."""
    patches = parts.num_tokens - parts.num_prefix_tokens
    left = [
        parts.num_prefix_tokens + max(1, round(patches * (1 - 0.75 * block / max(parts.depth - 1, 1))))
        for block in range(parts.depth)
    ]
    dense = [parts.num_tokens] * parts.depth
    return {
        "uncompressed": DiffRate(CompressionSchedule(dense, dense), metric=parts.metric),
        "falling to a quarter": DiffRate(CompressionSchedule(left, left), metric=parts.metric),
    }


def _take_turns(
    calls: Mapping[tuple[str, Any], Callable[[], Any]],
    watch: Callable[[Callable[[], Any], int], float],
    rounds: int,
    report: Callable[[str], None],
    stop: Callable[[], bool],
) -> dict[tuple[str, Any], list[float]]:
    """Seconds per call, one figure per round; like :func:`tokcomp.measure.timing.interleave`, but it can be stopped."""
    launches: dict[tuple[str, Any], int] = {}
    seconds: dict[tuple[str, Any], list[float]] = {key: [] for key in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + 1):  # turn 0 warms up and shows how long a call takes
            for position, (key, call) in enumerate(calls.items()):
                if position % 32 == 0:
                    done = (turn + position / len(calls)) / (rounds + 1)
                    report(f"measuring latency: {100 * done:.0f} %, round {turn} of {rounds}")
                if stop():
                    raise MeasurementStopped("stopped before the latency table was complete; nothing was written")
                if turn == 0:
                    watch(call, 1)
                    launches[key] = max(1, math.ceil(TURN_SECONDS / max(watch(call, 1), 1e-7)))
                else:
                    seconds[key].append(watch(call, launches[key]))
    finally:
        if collecting:
            gc.enable()
    return seconds


def find_latency_table(
    model: nn.Module,
    path: Path | None = None,
    *,
    batch_size: int | None = None,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> LatencyTable:
    """The table at ``path`` if that file exists; otherwise one measured now, and saved there if a path is given.

    Args:
        model: a timm VisionTransformer.
        path: the table's file, or None.
        batch_size, dtype: what to measure (1, float32 by default); an existing table must have been measured with the
            same.
        device: the device to measure on. An existing table may come from another machine: the one that will serve the
            model.
        options: options of :func:`measure_latency`.

    Raises:
        ValueError: the file is not a latency table, or is for another model, batch size or type.
        OSError: the table cannot be read, or could not be written (found before anything is measured).
    """
    if path is not None and path.exists():
        table = LatencyTable.load(path)
        table.check_model(model)
        for name, value in (("batch_size", batch_size), ("dtype", dtype)):
            if value is not None and getattr(table, name) != value:
                raise ValueError(f"{path} was measured with {name} {getattr(table, name)}, got {name} {value}")
        return table
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # shows that the place is not writable before minutes of measuring
        path.unlink()
    table = measure_latency(model, batch_size=batch_size or 1, dtype=dtype or "float32", device=device, **options)
    if path is not None:
        table.save(path)
    return table

"""What the whole-model benchmarks share: who takes part, what is derived from the times, what is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokcomp.bench.entries import FLOAT32, PRECISIONS, Entry, uncompressed_rivals
from tokcomp.bench.models import Row, compare_models, keep_everything
from tokcomp.bench.published_code import find_clones
from tokcomp.bench.ratios import Ratios
from tokcomp.bench.static_slice import StaticSlice
from tokcomp.methods import DiffRate, Method, ToMe
from torch import nn

from benchmarks.model.roofline import ideal_seconds

#: Stacks of ours: the compressed model as it runs, and as one CUDA graph.
STACKS = ("tokcomp", "tokcomp-graph")


@dataclass(frozen=True)
class Choice:
    """What the command line asks for. ``compiled``: "all", "timm" (whose blocks are all alike and compile in less than
    a minute; a compressed model's have shapes of their own) or "none". ``rivals``: whether other runtimes take part."""

    device: torch.device
    compiled: str
    clones: tuple[Path, ...] = ()
    rivals: bool = True

    @classmethod
    def of(cls, config: Any, device: torch.device) -> Choice:
        """From pytest's options.

        Raises:
            ValueError: --published-code names no clone.
        """
        clones = tuple(Path(folder) for folder in config.getoption("--published-code"))
        find_clones(clones)
        return cls(device, config.getoption("compiled") or "timm", clones, not config.getoption("--no-rivals"))


def batches(config: Any, own: Sequence[int]) -> Sequence[int]:
    """What --batches says, or a benchmark's ``own`` batch sizes.

    Raises:
        ValueError: --batches is no list of numbers from 1.
    """
    text = config.getoption("--batches")
    if not text:
        return own
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--batches must be numbers from 1 with commas between them, got {text!r}")
    return [int(part) for part in parts]


def all_entries(model: Any, method: Method, precision: str, choice: Choice) -> dict[str, Entry]:
    """Everyone who can run ``model`` under ``method``: those who are compared closely take turns next to each other."""
    entries = {"published": Entry("published", method)}
    if choice.device.type == "cpu" and precision != "float32":
        # On a CPU the published pipeline may be the faster in float32, which its users would then choose.
        entries[f"published{FLOAT32}"] = Entry("published", method, precision="float32")
    if choice.clones and isinstance(method, (DiffRate, ToMe)):
        entries["published-code"] = Entry("published-code", method, code=choice.clones)
    if choice.compiled == "all":
        entries["published-compiled"] = Entry("published-compiled", method)
    compiled, all_of_it = choice.compiled != "none", choice.compiled == "all"
    entries |= uncompressed_rivals(
        choice.device, precision, compiled=compiled, autotuned=all_of_it, others=choice.rivals
    )
    if all_of_it:
        entries["tokcomp-compiled"] = Entry("tokcomp-compiled", method)
    sliced, whole = StaticSlice.like(method, model), keep_everything(model)
    for stack in STACKS if choice.device.type == "cuda" else STACKS[:1]:
        entries[f"{stack}-uncompressed"] = Entry(stack, whole)
        entries[f"{stack}-slice"] = Entry(stack, sliced)
        entries[stack] = Entry(stack, method)
    if choice.device.type == "cpu" and precision == "float32":
        entries["tokcomp-int8-uncompressed"] = Entry("tokcomp-int8", whole)
        entries["tokcomp-int8"] = Entry("tokcomp-int8", method)
    return entries


def measure(
    model: nn.Module,
    entries: Mapping[str, Entry],
    batch: int,
    precision: str,
    timed: Any,
    results: Any,
    *,
    suite: str,
    name: str,
    shown: str = "tokcomp",
    baseline: str = "published",
) -> dict[str, Row]:
    """The entries' rows by name, those not measured left out and recorded with their reason; empty without timing."""
    # No gate here: compare_models has checked every entry by the time it calls measure.
    rows, not_measured = compare_models(
        model,
        entries,
        batch_sizes=[batch],
        precision=precision,
        device=results.device,
        baseline=baseline,
        measure=lambda calls: timed(calls, shown=shown),
        report=lambda line: print(line, flush=True),
    )
    for missing in not_measured:
        results.add_not_measured(suite, name, missing)
    return {row.name: row for row in rows}


@dataclass(frozen=True)
class Figures:
    """What a row says beside the others of its run; None where the run has nothing to compare with.

    The shares of rates are None for products in int8, whose rate is not measured.
    """

    share_of_matrix_rate: float | None
    share_of_ideal: float | None
    over_timm: tuple[float, float, float] | None
    over_timm_compiled: tuple[float, float, float] | None
    efficiency: tuple[float, float, float] | None
    tax: tuple[float, float, float] | None

    @classmethod
    def of(cls, row: Row, rows: Mapping[str, Row], entry: Entry, model: nn.Module, results: Any) -> Figures:
        """``results.rates_of(dtype)``: the device's rates, measured in the same run."""
        share_of_matrix_rate = share_of_ideal = None
        if not entry.in_int8:
            dtype = PRECISIONS[row.precision]
            rates = results.rates_of(dtype)
            share_of_matrix_rate = 2e9 * row.gflops * row.images_per_second / rates["matrix_flops_per_s"]
            share_of_ideal = row.share_of(ideal_seconds(model, entry.method, row.batch, dtype, rates))
        others = {name: rows.get(name) for name in ("timm", "timm-compiled")}
        whole, sliced = rows.get(f"{row.name}-uncompressed"), rows.get(f"{row.name}-slice")
        return cls(
            share_of_matrix_rate=share_of_matrix_rate,
            share_of_ideal=share_of_ideal,
            over_timm=None if others["timm"] is None else row.speed_over(others["timm"]),
            over_timm_compiled=None if others["timm-compiled"] is None else row.speed_over(others["timm-compiled"]),
            efficiency=None if whole is None else row.efficiency(whole),
            tax=None if sliced is None else row.tax(sliced),
        )


HEAD = ["model", "batch", "precision", "entry", "GFLOPs", "img/s", "over published", "least", "most"]
HEAD += ["over its float32", "over best rival", "which", "of ideal", "efficiency", "tax"]


def add_rows(
    results: Any,
    table: str,
    suite: str,
    model: nn.Module,
    label: Mapping[str, Any],
    rows: Mapping[str, Row],
    entries: Mapping[str, Entry],
) -> None:
    """Record every row with its figures, and show it. ``label``: what the record says of the model; "model" is shown,
    and "budget" with it."""
    title = str(label["model"]) + (f" {label['budget']}G" if "budget" in label else "")
    for name, row in rows.items():
        figures, ratios = Figures.of(row, rows, entries[name], model, results), Ratios.of(row, rows)
        cells = [title, str(row.batch), row.precision, name, f"{row.gflops:.2f}", f"{row.images_per_second:.1f}"]
        cells += [f"{ratio:.2f}x" for ratio in ratios.over_published or ()] or [""] * 3
        cells += [times(ratios.over_published_float32), times(ratios.over_best_rival), ratios.best_rival or ""]
        cells += ["" if figures.share_of_ideal is None else f"{figures.share_of_ideal:.0%}"]
        cells += [share(figures.efficiency), share(figures.tax)]
        results.add({"suite": suite, **label, **row.to_json(), **vars(figures), **vars(ratios)}, table, HEAD, cells)


def times(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}x"


def share(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.1%}"

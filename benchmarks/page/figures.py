"""The pictures of docs/results.md and docs/results-history.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokcomp.bench.entries import FLOAT32

_COLOURS = {
    "published": "#8c8c8c",
    "published-float32": "#5f5f5f",
    "published-compiled": "#b5a642",
    "timm": "#4c72b0",
    "timm-compiled": "#1f3f77",
    "onnxruntime": "#55a868",
    "onnxruntime-int8": "#a3d0ae",
    "openvino": "#8172b3",
    "tokcomp-uncompressed": "#dd9a9c",
    "tokcomp-slice": "#8f6f9f",
    "tokcomp": "#c44e52",
    "tokcomp-int8-uncompressed": "#f5c49b",
    "tokcomp-int8": "#e8873a",
    "tokcomp-graph-uncompressed": "#dd9a9c",
    "tokcomp-graph": "#c44e52",
    "tokcomp-compiled": "#7a1f2b",
    "tokcomp-graph-linear_gelu": "#e377c2",
    "conventional": "#55a868",
    "planned": "#ccb974",
    "ideal": "#222222",
}


def _figure(columns: int, width: float = 5.2, height: float = 3.8) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("the pictures need matplotlib: pip install 'tokcomp[demo]'") from error
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def draw_models(rows: Sequence[Mapping[str, Any]], device: str, path: Path) -> None:
    """Bars of images per second: a panel per precision, a group per model and batch, the range of the rounds on top.

    Products in int8 stand in the panel of float32, the precision of what they stand for."""
    rows = [
        {**row, "precision": "float32"} if row["precision"] == "int8" else row
        for row in rows
        if not row["name"].endswith(FLOAT32)
    ]
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    figure, panels = _figure(len(precisions))
    for axes, precision in zip(panels, precisions, strict=True):
        own = [row for row in rows if row["precision"] == precision]
        places = list(dict.fromkeys((row["model"], row["batch"]) for row in own))
        names = list(dict.fromkeys(row["name"] for row in own))
        width = 0.84 / len(names)
        for number, name in enumerate(names):
            chosen = [(places.index((row["model"], row["batch"])), row) for row in own if row["name"] == name]
            heights = [row["images_per_second"] for _, row in chosen]
            spread = [
                [row["images_per_second"] - row["least_images_per_second"] for _, row in chosen],
                [row["most_images_per_second"] - row["images_per_second"] for _, row in chosen],
            ]
            offsets = [place + (number - (len(names) - 1) / 2) * width for place, _ in chosen]
            axes.bar(offsets, heights, width * 0.94, yerr=spread, capsize=2, color=_COLOURS.get(name), label=name)
        axes.set_xticks(range(len(places)), [f"{model}\nbatch {batch}" for model, batch in places], fontsize=7)
        axes.set_ylabel("images per second")
        axes.set_title(f"{precision}, measured on {device}", fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
    figure.savefig(path, dpi=120)


def draw_batches(rows: Sequence[Mapping[str, Any]], device: str, path: Path) -> None:
    """Images per second against the batch size: a panel per precision, a line per model and entry."""
    precisions = list(dict.fromkeys(row["precision"] for row in rows if not row["name"].endswith(FLOAT32)))
    figure, panels = _figure(len(precisions))
    for axes, precision in zip(panels, precisions, strict=True):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for row in rows:
            if row["precision"] == precision:
                lines.setdefault((row["model"], row["name"]), []).append((row["batch"], row["images_per_second"]))
        several = len({model for model, _ in lines}) > 1
        for (model, name), points in lines.items():
            label = f"{model}, {name}" if several else name
            axes.plot(*zip(*sorted(points), strict=True), "o-", ms=3, color=_COLOURS.get(name), label=label)
        _logarithmic(axes, [row["batch"] for row in rows])
        axes.set_title(f"{precision}, measured on {device}", fontsize=9)
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)


def draw_predictions(data: Mapping[str, Any], path: Path) -> None:
    """For the first GPU: images per second of DeiT-S against the batch, and speed over the published code by model."""
    gpu = next(iter(data["gpus"]))
    rows = [row for row in data["rows"] if row["gpu"] == gpu]
    figure, (left, right) = _figure(2)
    for entry in dict.fromkeys(row["entry"] for row in rows):
        own = [row for row in rows if row["entry"] == entry and row["title"] == "DeiT-S"]
        points = sorted((row["batch"], row["images_per_second"]) for row in own)
        style = "--" if entry.endswith(("uncompressed", "timm-compiled")) else "-"
        left.plot(*zip(*points, strict=True), style, color=_COLOURS.get(entry, "#999999"), label=entry)
    _logarithmic(left, [row["batch"] for row in rows])
    left.set_title(f"DeiT-S, 2.3 G, {gpu}, float16: predicted, no GPU has run this", fontsize=9)
    left.legend(frameon=False, fontsize=7)

    titles = list(dict.fromkeys(row["title"] for row in rows))
    largest = max(row["batch"] for row in rows)
    rates = {(row["title"], row["entry"]): row["images_per_second"] for row in rows if row["batch"] == largest}
    names = ("timm-compiled", "conventional", "tokcomp-graph", "planned", "ideal")
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        heights = [rates[title, name] / rates[title, "published"] for title in titles]
        offsets = [place + (number - (len(names) - 1) / 2) * width for place in range(len(titles))]
        right.bar(offsets, heights, width * 0.94, color=_COLOURS[name], label=name)
    right.axhline(1, color="#8c8c8c", lw=0.8)
    right.set_xticks(range(len(titles)), titles)
    right.set_ylabel("speed over the published code")
    right.set_title(f"{gpu}, batch {largest}, float16: predicted, no GPU has run this", fontsize=9)
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)


def _logarithmic(axes: Any, batches: Sequence[int]) -> None:
    ticks = sorted(set(batches))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("batch")
    axes.set_ylabel("images per second")


def draw_history(
    lines: Mapping[tuple[str, str], Sequence[tuple[str, float, float | None]]], batch: int, path: Path
) -> None:
    """Images per second, and how many times the best rival, against the date: a line per machine and precision.

    ``lines``: (machine, precision) -> date, images per second, ratio or None; in the order of dates.
    """
    figure, (left, right) = _figure(2, width=4.4)
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter  # there, or _figure has said so

    machines = list(dict.fromkeys(machine for machine, _ in lines))
    precisions = list(dict.fromkeys(precision for _, precision in lines))
    for (machine, precision), points in lines.items():
        style = {
            "color": ("#4c72b0", "#c44e52", "#55a868", "#e8873a")[precisions.index(precision) % 4],
            "linestyle": ("-", "--", ":", "-.")[machines.index(machine) % 4],
        }
        dates = [datetime.fromisoformat(date) for date, _, _ in points]
        left.plot(dates, [rate for _, rate, _ in points], marker="o", ms=3, label=f"{precision}, {machine}", **style)
        known = [(date, ratio) for date, (_, _, ratio) in zip(dates, points, strict=True) if ratio is not None]
        if known:
            right.plot(*zip(*known, strict=True), marker="o", ms=3, **style)
    for axes, words in ((left, "images per second"), (right, "times the best rival of the run")):
        axes.set_ylabel(words)
        axes.set_ylim(bottom=0)
        axes.set_title(f"DeiT-S at 2.3 GFLOPs, batch {batch}", fontsize=9)
        axes.xaxis.set_major_locator(AutoDateLocator(minticks=3))
        axes.xaxis.set_major_formatter(ConciseDateFormatter(axes.xaxis.get_major_locator()))
        axes.tick_params(axis="x", labelsize=7)
    right.axhline(1, color="#8c8c8c", lw=0.8)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False, fontsize=7)
    figure.savefig(path, dpi=120)

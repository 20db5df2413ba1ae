"""What a comparison of models looks like: a headline, a table, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokcomp.bench.models import Row
from tokcomp.bench.ratios import Ratios, best_rival

_COLOURS = {
    "published": "#8c8c8c",
    "published-compiled": "#5a5a5a",
    "timm": "#4c72b0",
    "timm-compiled": "#1f3f77",
    "onnxruntime": "#55a868",
    "onnxruntime-int8": "#8fc79b",
    "openvino": "#8172b3",
    "tokcomp": "#c44e52",
    "tokcomp-int8": "#e8873a",
    "tokcomp-stock": "#e3a6a8",
    "tokcomp-onnx": "#d98880",
    "tokcomp-onnx-int8": "#f5c49b",
    "tokcomp-openvino": "#b79adf",
    "tokcomp-compiled": "#7a1f2b",
    "tokcomp-graph": "#4a0f18",
}


def headline(rows: Sequence[Row]) -> str:
    """A line per batch size and precision: our fastest entry against the best uncompressed rival, whoever it is."""
    lines = []
    for batch, run in _runs(rows).items():
        ours: dict[str, Row] = {}
        for row in run.values():
            if row.name.startswith("tokcomp"):
                ours[row.precision] = max(ours.get(row.precision, row), row, key=lambda one: one.images_per_second)
        for fastest in ours.values():
            best = best_rival(fastest.precision, run.values())
            over = "no uncompressed rival was measured"
            if best is not None:
                over = f"{fastest.speed_over(best)[0]:.2f}x the best uncompressed rival, {_named(best)}"
            lines.append(f"batch {batch}: {_named(fastest)}, {over}")
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """One line per entry and batch size, as text. A ratio is of like precision; the best rival's may be finer."""
    runs = _runs(rows)
    ratios = [Ratios.of(row, runs[row.batch]) for row in rows]
    half = any(one.over_published_float32 for one in ratios)
    head = ["batch", "model", "precision", "GFLOPs", "img/s", "least", "most", "vs published", "least", "most"]
    head += [*(["vs its float32"] if half else []), "vs best rival"]
    lines: list[Sequence[str]] = [head]
    for row, one in zip(rows, ratios, strict=True):
        rates = (row.images_per_second, row.least_images_per_second, row.most_images_per_second)
        cells = [str(row.batch), row.name, row.precision, f"{row.gflops:.2f}", *(f"{rate:.1f}" for rate in rates)]
        cells += [f"{ratio:.2f}x" for ratio in one.over_published or ()] or [""] * 3
        cells += [_times(one.over_published_float32)] if half else []
        lines.append([*cells, _times(one.over_best_rival)])
    return format_columns(lines)


def _runs(rows: Sequence[Row]) -> dict[int, dict[str, Row]]:
    """Batch size -> the rows that took turns, by entry."""
    runs: dict[int, dict[str, Row]] = {}
    for row in rows:
        runs.setdefault(row.batch, {})[row.name] = row
    return runs


def _named(row: Row) -> str:
    return f"{row.name} ({row.precision}) at {row.images_per_second:.1f} images/s"


def _times(ratio: tuple[float, float, float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}x"


def format_columns(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned text: words to the left, figures to the right; the first row is the head."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    wordy = [any(line[column][:1].isalpha() for line in lines[1:]) for column in range(len(lines[0]))]

    def cells(line: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(line, widths, wordy, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([cells(lines[0]), "  ".join("-" * width for width in widths), *map(cells, lines[1:])])


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of images per second by batch size with their range, and the speed-up over the published pipeline, as PNG.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError("the picture needs matplotlib: pip install 'tokcomp[demo]'") from error
    batches = list(dict.fromkeys(row.batch for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    by_place = {(row.name, row.batch): row for row in rows}
    figure = Figure(figsize=(max(6.0, 1.1 + 0.62 * len(batches) * len(names)), 4.2), layout="constrained")
    axes: Any = figure.subplots()
    width = 0.84 / len(names)
    for number, name in enumerate(names):
        measured = [index for index, batch in enumerate(batches) if (name, batch) in by_place]
        places = [index + (number - (len(names) - 1) / 2) * width for index in measured]
        chosen = [by_place[name, batches[index]] for index in measured]
        heights = [row.images_per_second for row in chosen]
        spread = [
            [row.images_per_second - row.least_images_per_second for row in chosen],
            [row.most_images_per_second - row.images_per_second for row in chosen],
        ]
        axes.bar(places, heights, width * 0.94, yerr=spread, capsize=2, color=_COLOURS.get(name), label=name)
        for place, row in zip(places, chosen, strict=True):
            label = f"{row.images_per_second:.0f}" if row.speedup is None else f"{row.speedup[0]:.2f}x"
            axes.annotate(
                label, (place, row.most_images_per_second), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.set_ylabel("images per second")
    axes.set_title(f"{title}\nabove the bars: speed over the published pipeline", fontsize=9)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)

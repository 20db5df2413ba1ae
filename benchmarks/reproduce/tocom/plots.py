"""Pictures of a summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tokcomp.report import SERIES_COLOURS
from tokcomp.tocom.plot import draw_gains

from benchmarks.reproduce.spread import mean_and_deviation

_WITHOUT, _WITH, _MATCHED = SERIES_COLOURS[0], SERIES_COLOURS[1], SERIES_COLOURS[3]


def draw_all(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write every plot as PNG; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "tocom-heat-map.png", folder / "tocom-degrees.png"]
    draw_gains(_means(summary), paths[0])
    figure = _degrees(summary)
    figure.tight_layout()
    figure.savefig(paths[1], dpi=110, metadata={"Software": None})
    plt.close(figure)
    return paths


def _means(summary: Mapping[str, Any]) -> list[dict[str, float]]:
    cells = []
    for cell, rows in summary["task"].items():
        source, target = map(int, cell.split(">"))
        without, _ = mean_and_deviation(rows["without"]["top1"])
        found, _ = mean_and_deviation(rows.get("with", rows["without"])["top1"])
        cells.append({"source": source, "target": target, "without": without, "with_tocom": found})
    return cells


def _degrees(summary: Mapping[str, Any]) -> Any:
    """Gains by target degree with their spread over the seeds, one column per source degree."""
    settings = summary["settings"]
    fields = {"top1": "gain of top-1, points", "cross_entropy": "change of cross entropy"}
    figure, axes = plt.subplots(len(fields), len(settings["sources"]), figsize=(9, 6), squeeze=False, sharey="row")
    for row, (field, title) in zip(axes, fields.items(), strict=True):
        for axis, source in zip(row, settings["sources"], strict=True):
            targets = [target for target in settings["targets"] if target != source]
            cells = [summary["task"][f"{source}>{target}"] for target in targets]
            lines = {"with ToCom": (_WITH, [cell["with"][field] for cell in cells], targets)}
            lines["with ToCom, scale chosen"] = (_MATCHED, [cell["chosen"][field] for cell in cells], targets)
            for shift, (label, (colour, values, at)) in enumerate(lines.items()):
                gains = [
                    [a - b for a, b in zip(value, cell["without"][field], strict=True)]
                    for value, cell in zip(values, cells, strict=True)
                ]
                means, deviations = zip(*map(mean_and_deviation, gains), strict=True)
                places = [target + 0.3 * (shift - 0.5) for target in at]
                axis.errorbar(places, means, deviations, label=label, color=colour, marker="o", ms=4, capsize=3, ls="")
            axis.axhline(0, color=_WITHOUT, ls=":")
            axis.set_title(f"fine-tuned at degree {source}", fontsize=10)
            axis.set_xticks(targets)
            axis.set_xlabel("used at degree")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", alpha=0.3)
        row[0].set_ylabel(title)
    axes[0][0].legend(frameon=False, fontsize=9)
    return figure

"""Loss and accuracy of a run over its epochs, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokcomp.files import replacing


def draw_curves(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw the rows of a run's log as PNG; False, with nothing written, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [row for row in rows if "loss" in row]
    left.plot([row["epoch"] for row in losses], [row["loss"] for row in losses], color="#0072b2")
    left.set(xlabel="epoch", ylabel="training loss")
    for name, label, colour in (("top1", "weights", "#0072b2"), ("ema_top1", "moving average", "#c2570c")):
        found = [row for row in rows if name in row]
        if found:
            points = [row["epoch"] for row in found], [row[name] for row in found]
            right.plot(*points, marker="o", markersize=3, label=label, color=colour)
    right.set(xlabel="epoch", ylabel="validation top-1, %")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True

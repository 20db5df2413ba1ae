"""What the study of time as a budget found, as a part of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokcomp.compare.answers import paired

from benchmarks.page.tables import number
from benchmarks.reproduce.spread import markdown

#: Rule -> what it is called, in the tables' order.
RULES = {
    "flops": "refined for multiply-adds",
    "time": "refined for time",
    "tome": "ToMe",
    "staircase": "One More Token",
}
#: Points of top-1 below the uncompressed model at which speeds are compared.
LOSSES = (0.5, 1.0, 2.0, 5.0)

_TEXT = """## Time as the budget

The same backbone at {size} x {size}. Schedules are refined ({candidates} candidates on {images} training pictures, from
ToMe's, EViT's, uniform and published ones) once for a share of the multiply-adds, and once for the time that the former
take by a table measured on this CPU ([Budgets](budgets.md)). ToMe is at the same multiply-adds. *One More Token* is the
staircase rule of "Pruning One More Token is Enough" (WACV 2025): it prunes once, after the attention of the fourth
block, as many tokens as make the most of alpha times the time saved and 1 - alpha times the accuracy kept (0.5 as
published). Images a second on {cpu}, {threads} threads, float32, in turns, the least and the most of the rounds in
brackets; the uncompressed model runs in the same stack. *Against multiply-adds*: top-1 less that of the schedule
refined for as large a share of the multiply-adds, in points, with its paired 95 % interval.

On this CPU the two budgets ask for nearly the same schedules: a block's time is close to a constant and its
multiply-adds. The constant is what keeps batch 1 from gaining as much as batch 16. Where refined schedules and ToMe
lose 2 to 3 points, the staircase rule, which prunes all at once, loses 12. Refined for time or for multiply-adds, a
schedule is as good as ToMe down to 55 %, and some 17 points better at 40 %.
"""


def section(record: Mapping[str, Any]) -> str:
    """The results as a part of the page."""
    facts, machine, rows = record["facts"], record["machine"], record["rows"]
    parts = [
        _TEXT.format(
            size=facts["img_size"],
            candidates=facts["candidates"],
            images=facts["refine_images"],
            cpu=machine["cpu"],
            threads=machine["threads"],
        ).strip()
    ]
    for batch, speeds in record["speeds"].items():
        here = {name: row for name, row in rows.items() if name in speeds}
        parts += [f"### Batch {batch}", _methods(batch, here, speeds), _equal_accuracy(here, speeds)]
    return "\n\n".join(parts)


def _methods(batch: str, rows: Mapping[str, Any], speeds: Mapping[str, Sequence[float]]) -> str:
    lines = []
    for name, row in rows.items():
        rate, least, most = speeds[name]
        label = RULES.get(row["rule"], "uncompressed")
        if row["rule"] == "staircase":
            label += f", alpha {row['setting']:g}"
        elif row["rule"] != "whole":
            label += f", {100 * row['setting']:.0f} %"
        other, against = rows.get(f"flops {row['setting']:g}"), ""
        if row["rule"] in ("time", "tome") and other is not None:
            against = "{:+.2f} ± {:.2f}".format(*paired(_hits(row), _hits(other)))
        cells = [label, f"{row['gflops']:.4g}", f"{row['table_ms'][batch]:.4g}"]
        cells += [f"{number(rate)} ({number(least)} - {number(most)})", f"{row['top1']:.2f} %", against]
        lines.append(cells)
    return markdown(["", "GFLOPs", "ms by the table", "images/s", "top-1", "against multiply-adds"], lines)


def _hits(row: Mapping[str, Any]) -> torch.Tensor:
    return torch.tensor([float(one) for one in row["right"]])


def _equal_accuracy(rows: Mapping[str, Any], speeds: Mapping[str, Sequence[float]]) -> str:
    whole = next(name for name, row in rows.items() if row["rule"] == "whole")
    start = (rows[whole]["top1"], speeds[whole][0])
    lines = []
    for rule, label in RULES.items():
        points = [start, *((row["top1"], speeds[name][0]) for name, row in rows.items() if row["rule"] == rule)]
        lines.append([label, *(speed_at(points, start[0] - loss) for loss in LOSSES)])
    head = ["images/s at top-1 less", *(f"{loss:g} points" for loss in LOSSES)]
    told = "Straight lines between neighbours in speed, the uncompressed model among them; > where none is lower."
    return markdown(head, lines) + f"\n\n{told}"


def speed_at(points: Sequence[tuple[float, float]], top1: float) -> str:
    """The greatest speed at which a line through the points (top-1, images a second), in order of speed, is at top1."""
    ordered = sorted(points, key=lambda point: point[1])
    best = max(place for place, point in enumerate(ordered) if point[0] >= top1)
    if best == len(ordered) - 1:
        return f"> {number(ordered[best][1])}"
    (high, slow), (low, fast) = ordered[best : best + 2]
    return number(slow + (fast - slow) * (high - top1) / (high - low))

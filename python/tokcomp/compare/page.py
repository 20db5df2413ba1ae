"""The comparison as one HTML page without network: Pareto plots, tables, pictures of what is kept."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tokcomp.api import compress, restore
from tokcomp.compare.recommend import overall_sentence, sentence
from tokcomp.compare.summary import header, table_of
from tokcomp.methods import Method
from tokcomp.report import code, curves, html_table, link, page, paragraph, picture, side_by_side
from tokcomp.visualize import draw_blocks, join_rows

_NOTES = (
    "Less the best: top-1 minus that of the best row at this budget, in points, with its paired 95 % interval over the "
    "images: an interval that reaches 0 means that these images cannot tell the two apart.",
    "Recommended: of the rows whose interval reaches the best, the one that is fastest beside the uncompressed model.",
    "Same answers: images that get the same class as from the uncompressed model. Images per second: measured on this "
    "device in turns with the uncompressed model; faster: the median of the turns' ratios.",
)


def draw_kept(
    model: nn.Module, methods: Mapping[str, Method], images: Tensor, mean: Sequence[float], std: Sequence[float]
) -> list[bytes]:
    """For each image [n, 3, H, W] as the model takes it, one PNG: a row per method. The model is plain and left so."""
    pictures = []
    shift, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    for image in images:
        rows: list[Image.Image] = []
        for name, method in methods.items():
            try:
                compress(model, method)
                rows.append(draw_blocks(model, image, image * scale + shift, label=name))
            finally:
                restore(model)
        buffer = io.BytesIO()
        join_rows(rows).save(buffer, "PNG", optimize=True)
        pictures.append(buffer.getvalue())
    return pictures


def render(record: Mapping[str, Any], title: str, pictures: Sequence[bytes] = (), explorer: str | None = None) -> str:
    """The page.

    Args:
        record: what ``results.json`` holds.
        title: of the page.
        pictures: PNG files of what is kept.
        explorer: the name of the explorer's page beside this one, if there is one.
    """
    dense = record["uncompressed"]
    lead = (
        f"Every method at equal cost, on {record['num_images']} images. Uncompressed: {dense['top1']:.2f} % top-1 at "
        f"{dense['gflops']:.4g} GFLOPs (1e9 multiply-adds per image)."
    )
    columns, overall = header(record), record.get("recommended")
    sections: list[tuple[str, list[str]]] = [("Accuracy against cost", _plots(record))]
    if overall:
        sections[0][1].append(paragraph(overall_sentence(overall)))
    for budget in record["budgets"]:
        parts = [html_table(columns, table_of(record, budget))]
        parts += [paragraph(sentence(budget["recommended"]))] if budget.get("recommended") else []
        parts += [
            paragraph(f"{name} is left out: {reason}.", dim=True) for name, reason in budget["impossible"].items()
        ]
        sections.append((f"At {budget['target']:g} GFLOPs", parts))
    sections[-1][1].extend(paragraph(note, dim=True) for note in _NOTES)
    if pictures:
        target = min(budget["target"] for budget in record["budgets"])
        caption = f"at {target:g} GFLOPs; black: pruned; outlined in one colour: merged"
        parts = [picture(png, caption) for png in pictures]
        more = [] if explorer is None else [link("Step through the blocks, by method and budget", explorer)]
        sections.append(("What is kept", [*more, *parts]))
    facts = record["facts"] | {"machine": record["machine"]["cpu"], "gpus": ", ".join(record["machine"]["gpus"])}
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "", {})]
    command = [code(record["command"])] if record.get("command") else []
    sections.append(("How it was measured", [*command, html_table(["", ""], rows)]))
    return page(title, lead, sections)


def _plots(record: Mapping[str, Any]) -> list[str]:
    dense = record["uncompressed"]
    series: dict[str, list[Mapping[str, Any]]] = {}
    for budget in record["budgets"]:
        for row in budget["rows"]:
            series.setdefault(row["name"], []).append(row)
    plots = []
    axes = [("gflops", "GFLOPs", "against multiply-adds"), ("images_per_second", "images/s", "against measured speed")]
    for axis, label, caption in axes:
        points = {
            name: [(row[axis], row["top1"]) for row in [dense, *rows] if axis in row] for name, rows in series.items()
        }
        points = {name: values for name, values in points.items() if len(values) > 1}
        rings = [(row[axis], row["top1"]) for row in _recommended(record) if axis in row]
        if points:
            plots.append(curves(points, caption=f"Top-1 {caption}", x_label=label, y_label="top-1, %", rings=rings))
    return [side_by_side(plots)] if plots else []


def _recommended(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of each budget the row that is recommended."""
    found = []
    for budget in record["budgets"]:
        name = (budget.get("recommended") or {}).get("name")
        found += [row for row in budget["rows"] if row["name"] == name]
    return found

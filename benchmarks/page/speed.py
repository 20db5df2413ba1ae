"""README's table of speed: every machine class, each precision against its own kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokcomp.bench.entries import UNCOMPRESSED

from benchmarks.page.tables import Record, markdown, number, paragraph, replace_block, rows_by_suite

BEGIN, END = "<!-- speed: drawn by `python -m benchmarks.page` -->", "<!-- /speed -->"
#: What the table is of.
MODEL, BUDGET = "deit_small_patch16_224", 2.3
#: Lines of a machine, in this order.
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
#: Entries of ours, of which a line has the fastest.
OURS = ("tokcomp", "tokcomp-graph", "tokcomp-int8")
_NOTHING = "-"


def replace_speed(text: str, records: Sequence[Record]) -> str:
    """README's text with the marked block drawn again.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    return replace_block(text, BEGIN, END, speed_section(records))


def speed_section(records: Sequence[Record]) -> str:
    """A headline, the table, and what its columns mean."""
    lines = [line for device in dict.fromkeys(one.device for one in records) for line in _lines(device, records)]
    columns = [
        ("machine", lambda line: line["machine"]),
        ("precision", lambda line: line["precision"]),
        ("batch", lambda line: number(line["batch"])),
        ("published", lambda line: _rate(line["published"])),
        ("best rival", lambda line: _best(line)),
        ("tokcomp", lambda line: _rate(line["ours"])),
        ("over published", lambda line: _ratio(line["ours"], "over_published")),
        ("over its float32", lambda line: _ratio(line["ours"], "over_published_float32")),
        ("over best rival", lambda line: _ratio(line["ours"], "over_best_rival")),
    ]
    legend = paragraph(
        "*Over published* and *over its float32*: over the published pipeline in the same precision and in float32.",
        "*Best rival*: the fastest of those that were measured on the uncompressed model in the same precision",
        "or a finer one. Products in int8 are a precision of their own.",
    )
    return "\n\n".join([_headline(lines), markdown(columns, lines), legend])


def _headline(lines: Sequence[Mapping[str, Any]]) -> str:
    """How far ours are ahead of the best rival, least to most, by machine, and who the rivals were."""
    parts = []
    for machine in dict.fromkeys(line["machine"] for line in lines):
        own = [line for line in lines if line["machine"] == machine]
        ours = [line["ours"] for line in own if line["ours"] is not None]
        ratios = [row["over_best_rival"][0] for row in ours if row["over_best_rival"]]
        if ratios:
            who = ", ".join(dict.fromkeys(name for line in own for name in line["rivals"]))
            part = f"- **{min(ratios):.1f}x to {max(ratios):.1f}x** on {machine} (measured there: {who})"
            parts.append(paragraph(part).replace("\n", "\n  "))
    if not parts:
        return "Not measured yet."
    return "\n".join(["Over the best uncompressed rival of like precision on the same machine:", "", *parts])


def _lines(device: str, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """A line per precision and batch of a machine."""
    own = [record for record in records if record.device == device]
    found = [
        (record, row)
        for record, row in rows_by_suite(own).get("models", [])
        if row["model"] == MODEL and row.get("budget") == BUDGET
    ]
    machines = {id(row): record.machine for record, row in found}
    rows = [row for _, row in found]
    for precision in PRECISIONS:
        for batch in sorted({row["batch"] for row in rows if row["precision"] == precision}):
            run = {row["name"]: row for row in rows if (row["precision"], row["batch"]) == (precision, batch)}
            ours = max((run[name] for name in OURS if name in run), key=_speed, default=None)
            rivals = [row for name, row in run.items() if name in UNCOMPRESSED]
            if ours is not None and ours["best_rival"] not in (*run, None):  # a finer precision's
                rivals += [row for row in rows if (row["name"], row["batch"]) == (ours["best_rival"], batch)]
            if ours is None and precision != "int8":
                continue
            best = max(rivals, key=_speed, default=None)
            if ours is not None:
                best = next((row for row in rivals if row["name"] == ours["best_rival"]), None)
            yield {
                "machine": machines[id(ours or best)],
                "precision": precision,
                "batch": batch,
                "published": run.get("published"),
                "ours": ours,
                "best": best,
                "rivals": [row["name"] for row in rivals],
            }


def _speed(row: Mapping[str, Any]) -> float:
    return row["images_per_second"]


def _rate(row: Mapping[str, Any] | None) -> str:
    return _NOTHING if row is None else number(row["images_per_second"])


def _best(line: Mapping[str, Any]) -> str:
    return _NOTHING if line["best"] is None else f"{_rate(line['best'])}, {line['best']['name']}"


def _ratio(row: Mapping[str, Any] | None, key: str) -> str:
    return _NOTHING if row is None or row.get(key) is None else f"{row[key][0]:.1f}x"

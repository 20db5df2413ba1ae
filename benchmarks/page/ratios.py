"""Rows of whole models with the ratios that compare like with like, worked out from the rounds, for old records too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from tokcomp.bench.models import Row
from tokcomp.bench.ratios import Ratios

#: What older records hold in their place: over the published pipeline in float32 whatever the row's precision.
_REPLACED = ("speedup", "over_timm", "over_timm_compiled")
_FIELDS = [field.name for field in fields(Row)]


def with_ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One record's rows of one suite in their order, each with :class:`Ratios` over those that took turns with it."""
    found = []
    for run in runs(rows):
        timed = {row["name"]: Row(**{name: row[name] for name in _FIELDS if name in row}) for row in run}
        for row in run:
            kept = {key: value for key, value in row.items() if key not in _REPLACED}
            found.append({**kept, **vars(Ratios.of(timed[row["name"]], timed))})
    return found


def runs(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """The rows that took turns: they stand together, of one model and batch, and a name that comes again is the next
    run's."""
    run: list[Mapping[str, Any]] = []
    for row in rows:
        same = not run or all(row.get(key) == run[0].get(key) for key in ("model", "budget", "batch"))
        if not same or row["name"] in {one["name"] for one in run}:
            yield run
            run = []
        run.append(row)
    if run:
        yield run

"""Like with like: which row of a run another is set against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokcomp.bench.entries import FLOAT32, UNCOMPRESSED, rank_of
from tokcomp.bench.models import Row

Ratio = tuple[float, float, float]


@dataclass(frozen=True)
class Ratios:
    """Speeds over others of the run: median, least and most of the rounds; None where the run has nobody to compare.

    ``over_published``: the published pipeline in the row's own precision. ``over_published_float32``: of a row in half
    precision, the published pipeline in float32. ``over_best_rival``: the fastest uncompressed rival, ``best_rival``.
    """

    over_published: Ratio | None
    over_published_float32: Ratio | None
    best_rival: str | None
    over_best_rival: Ratio | None

    @classmethod
    def of(cls, row: Row, run: Mapping[str, Row]) -> Ratios:
        """``run``: every row that took turns with it, by entry."""
        published, in_float32 = run.get("published"), run.get(f"published{FLOAT32}")
        alike = published is not None and published.precision == row.precision
        best = best_rival(row.precision, run.values())
        return cls(
            over_published=row.speed_over(published) if alike and published else None,
            over_published_float32=row.speed_over(in_float32) if in_float32 else None,
            best_rival=None if best is None else best.name,
            over_best_rival=None if best is None else row.speed_over(best),
        )


def best_rival(precision: str, rows: Iterable[Row]) -> Row | None:
    """The fastest uncompressed rival that computes in ``precision`` or a finer one.

    A finer one too: where a CPU has no bfloat16 in hardware, a rival in float32 is faster, and nearer to the truth.
    """
    rivals = [
        row
        for row in rows
        if row.name.removesuffix(FLOAT32) in UNCOMPRESSED and rank_of(row.precision) >= rank_of(precision)
    ]
    return max(rivals, key=lambda row: row.images_per_second, default=None)

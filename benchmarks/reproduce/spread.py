"""Values per seed: their spread, differences seed by seed, and how both are printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import TypeAlias

#: What was measured of one thing, one entry per seed: {"top1": [...], "cross_entropy": [...], ...}
Series: TypeAlias = dict[str, list[float]]

#: Two-sided 95 % quantile of Student's t, by degrees of freedom.
_T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (0 for one seed)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Mean difference of two series over the same seeds, and the half width of its 95 % interval (Student's t)."""
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    mean, deviation = mean_and_deviation(differences)
    degrees = len(differences) - 1
    quantile = _T95[degrees] if degrees < len(_T95) else 1.96
    return mean, quantile * deviation / math.sqrt(len(differences)) if degrees else math.nan


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard deviation over the seeds."""
    mean, deviation = mean_and_deviation(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def difference(values: Sequence[float], baseline: Sequence[float], digits: int = 2) -> str:
    """Mean paired difference, its 95 % interval, and on how many seeds it is positive."""
    if values is baseline:
        return ""
    mean, half = paired(values, baseline)
    if len(values) == 1:
        return f"{mean:+.{digits}f}"
    ahead = sum(a > b for a, b in zip(values, baseline, strict=True))
    even = sum(a == b for a, b in zip(values, baseline, strict=True))
    level = f", {even} level" if even else ""
    return f"{mean:+.{digits}f} ± {half:.{digits}f} ({ahead} of {len(values)}{level})"

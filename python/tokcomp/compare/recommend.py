"""Which method a comparison recommends: at each budget, and over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokcomp.compare.answers import paired


def recommend(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The fastest of the rows whose top-1 the images cannot tell from the best row's; the best if no speed is known.

    Args:
        rows: of one budget, with ``name``, ``top1``, ``less_best`` (top-1 less the best row's and half the width of its
            95 % interval) and perhaps ``speedup``, in turns with the uncompressed model. Random schedules, with
            ``random``, are not recommended.

    Returns:
        JSON data: the ``name``, the ``best`` row, the rows ``as_good`` as the best, itself among them, from the highest
        top-1 down, and whether speed decided (``by_speed``). None if there is no row to recommend.
    """
    rows = [row for row in rows if "random" not in row]
    if not rows:
        return None
    good = sorted((row for row in rows if sum(row["less_best"]) >= 0), key=lambda row: -row["top1"])
    best = max(rows, key=lambda row: row["top1"])
    if best not in good:  # a random schedule is better than all of them
        good.insert(0, best)
    by_speed = len(good) > 1 and all("speedup" in row for row in good)
    chosen = max(good, key=lambda row: row["speedup"]) if by_speed else best
    return {
        "name": chosen["name"],
        "best": best["name"],
        "as_good": [row["name"] for row in good],
        "by_speed": by_speed,
    }


def best_overall(hits: Sequence[Mapping[str, Tensor]]) -> dict[str, Any] | None:
    """The method of the highest top-1 on average over the budgets, of those that have a row at each.

    Args:
        hits: of each budget, by the row's name: [n] bool, the images that it gets right, the same images everywhere.

    Returns:
        JSON data: the ``name``, its mean ``top1`` in per cent, and the ``as_good``: methods whose mean the images do
        not tell from it, by the paired 95 % interval, itself among them, from the highest mean down. None if there are
        fewer than two budgets or no such method.
    """
    names = [name for name in hits[0] if all(name in one for one in hits)] if len(hits) > 1 else []
    if not names:
        return None
    means = {name: torch.stack([one[name] for one in hits]).double().mean(0) for name in names}
    ranked = sorted(names, key=lambda name: -float(means[name].mean()))
    best = ranked[0]
    good = [name for name in ranked if sum(paired(means[name], means[best])) >= 0]
    return {"name": best, "top1": 100.0 * float(means[best].mean()), "as_good": good}


def sentence(found: Mapping[str, Any]) -> str:
    """What :func:`recommend` found, in words."""
    name, good = found["name"], "; ".join(found["as_good"])  # a name may have a comma
    if len(found["as_good"]) == 1:
        return f"Recommended: {name}, the best by top-1; no other is within its interval."
    which = "the fastest" if found["by_speed"] else "the best by top-1"
    return f"Recommended: {name}, {which} of those that these images cannot tell from the best: {good}."


def overall_sentence(found: Mapping[str, Any]) -> str:
    """What :func:`best_overall` found, in words."""
    others = [one for one in found["as_good"] if one != found["name"]]
    text = f"Over all budgets: {found['name']} has the highest top-1 on average, {found['top1']:.2f} %"
    return text + (f"; these images cannot tell it from {'; '.join(others)}." if others else ".")

"""What the model card of a schedule's counts says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokcomp.hub.card import Bars, Card

#: What a card shows of a provenance, or of the settings in it.
_SHOWN = ("source", "model", "weights", "data", "gflops", "uncompressed_gflops", "top1", "uncompressed_top1")


def card_of_counts(
    pruned: Sequence[int] | None,
    merged: Sequence[int] | None,
    num_tokens: int | None,
    method: str,
    provenance: Mapping[str, Any],
) -> Card:
    """The card of counts per block, kept by pruning and by merging; one of the two may be missing.

    Args:
        pruned, merged, num_tokens, provenance: as of a schedule.
        method: the name of the method that they are for.
    """
    steps = [counts for counts in (pruned, merged) if counts is not None]
    left, kept = num_tokens or max(map(max, steps)), []
    for counts in zip(*steps, strict=True):
        left = min(left, *counts)
        kept.append(left)
    lists = {"kept by pruning": pruned, "kept by merging": merged, "left": kept}
    columns = {name: counts for name, counts in lists.items() if counts is not None}
    settings, command = provenance.get("settings"), provenance.get("command")
    known = {**settings, **provenance} if isinstance(settings, dict) else provenance
    entering = "" if num_tokens is None else f", where {num_tokens} enter the first"
    return Card(
        title=f"Compression schedule of {len(kept)} blocks",
        tag="compression-schedule",
        lead="How many tokens each block of a vision transformer keeps, prefix tokens (class, registers) included"
        f"{entering}.",
        use=f"""
import tokcomp
from tokcomp.methods import scheduled

schedule = tokcomp.CompressionSchedule.from_pretrained("owner/name")  # or this folder
tokcomp.compress(model, scheduled(schedule))  # {method}
""",
        facts={"method": method, **{name: known[name] for name in _SHOWN if name in known}},
        bars=Bars("Tokens after each block", kept, float(num_tokens or max(kept))),
        rows=[("block", *columns), *zip(range(len(kept)), *columns.values(), strict=True)],
        command=command if isinstance(command, str) else None,
    )

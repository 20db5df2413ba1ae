"""The method that a schedule's counts are for."""

from __future__ import annotations

from typing import Any

from tokcomp.methods.base import Method
from tokcomp.methods.diffrate import DiffRate
from tokcomp.methods.evit import EViT
from tokcomp.methods.tome import ToMe
from tokcomp.schedule import CompressionSchedule


def scheduled(schedule: CompressionSchedule, **settings: Any) -> Method:
    """DiffRate, ToMe or EViT with a schedule's counts, as its ``method`` says; DiffRate if it says nothing.

    ToMe merges as many tokens in each block as leave ``num_merge_kept`` of ``num_tokens``, at most half of the patches.
    EViT keeps as many as leave ``num_prune_kept``, the fused token included. A model of another number of tokens is
    refused.

    Args:
        schedule: the counts.
        settings: further arguments of :class:`tokcomp.DiffRate`.

    Raises:
        ValueError: ToMe or EViT is to follow a schedule without ``num_tokens`` or its counts, or :class:`DiffRate`
            refuses.
    """
    method = dict(schedule.method or {})
    name = method.pop("name", "diffrate")
    if name == "diffrate":
        return DiffRate(schedule, **settings)
    step = "merge" if name == "tome" else "prune"
    counts = schedule.num_merge_kept if name == "tome" else schedule.num_prune_kept
    if schedule.num_tokens is None or counts is None:
        raise ValueError(f"a schedule for {name} must have num_tokens and num_{step}_kept, got one without")
    prefix, alive = schedule.num_prefix_tokens, schedule.num_tokens
    dropped, rates = [], []
    for count in counts:
        left = min(count, alive)
        dropped.append(alive - left)
        kept = left - prefix - method.get("fuse", True)
        # The rate whose share of the patches, rounded up, is just this number.
        rates.append(1.0 if left == alive else (max(kept, 1) - 0.5) / (alive - prefix))
        alive = left
    made: Method = ToMe(dropped, **method) if name == "tome" else EViT(rates, **method)
    made.made_for = schedule.num_tokens, prefix
    return made

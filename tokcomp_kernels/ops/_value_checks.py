"""Checks of values, which cost a device synchronisation and so run only under TOKCOMP_CHECK=1 (read once at import).

Without them nothing is read or written out of bounds and sizes stay above zero whatever the values: NaN scores rank
last, a non-positive or NaN size counts as the floor, a source index out of range counts as pruned. With them each is an
error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def _refuse_where(op: str, argument: str, bad: Tensor, rule: str, values: Tensor) -> None:
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {argument} must {rule}, got {values[tuple(index)].item()} at {index} (TOKCOMP_CHECK=1)"
        )


def _refuse_few(op: str, role: Tensor, r: int) -> None:
    """An image merges r tokens only if it has so many sources, and a destination for them."""
    sources, destinations = (role == 1).sum(1), (role == 2).sum(1)
    few = (sources < r) | (destinations < 1)
    if r > 0 and bool(few.any()):
        image = int(few.nonzero()[0])
        raise ValueError(
            f"{op}: role must give every image at least r = {r} sources and 1 destination, got "
            f"{int(sources[image])} and {int(destinations[image])} in image {image} (TOKCOMP_CHECK=1)"
        )


def check_values(op: str, arguments: Mapping[str, Any]) -> None:
    """Refuse the first value that an argument of its name cannot have; a name means the same to every operator."""
    for name, values in arguments.items():
        if not torch.is_tensor(values) or name == "counts":  # every count is safe
            continue
        if name == "size":
            _refuse_where(op, name, ~((values > 0) & values.isfinite()), "be positive and finite", values)
        elif name == "token_mask":
            _refuse_where(op, name, ~((values >= 0) & (values <= 1)), "be between 0 and 1", values)
        elif name == "scores":  # -inf is how a key is left out
            _refuse_where(op, name, values.isnan(), "not be NaN", values)
        elif name == "importance":
            # A dead token is ranked by its place: its importance is not looked at.
            read = arguments["token_mask"] > 0 if "token_mask" in arguments else True
            _refuse_where(op, name, values.isnan() & read, "not be NaN", values)
        elif name == "role":
            _refuse_few(op, values, arguments["r"])
        elif name == "source":
            slots = arguments["x"].shape[1]
            _refuse_where(op, name, (values < -1) | (values >= slots), f"be between -1 and {slots - 1}", values)
        else:
            _refuse_where(op, name, ~values.isfinite(), "be finite", values)

"""How many random cases, how a failing one is named, and how near is near."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import torch
from torch import Tensor

CASES = int(os.environ.get("TOKCOMP_ORACLE_CASES", "8"))
#: What the roundings may add up to: 4 blocks of 1536 channels in the MLP (the widest case) or 7 of far fewer, forward
#: and backward, a dozen sums in each.
ROUNDING = 4 * 2 * 12 * 1536 * torch.finfo(torch.float64).eps


def each_case(check: Callable[[int], None]) -> None:
    first = os.environ.get("TOKCOMP_ORACLE_SEED")
    start = random.SystemRandom().randrange(2**31) if first is None else int(first)
    for seed in range(start, start + CASES):
        try:
            check(seed)
        except Exception as error:
            raise AssertionError(f"{error}\nTOKCOMP_ORACLE_SEED={seed} TOKCOMP_ORACLE_CASES=1 repeats it") from error


def assert_near(have: Tensor, want: Tensor, what: str, *, least: float = 0.0) -> None:
    """In relation to the norm of what is wanted, or to ``least`` where that is more."""
    assert want.isfinite().all(), f"{what}: the plain functions give no numbers"
    error, scale = (have - want).norm().item(), max(want.norm().item(), least)
    assert error <= ROUNDING * scale, f"{what}: off by {error:.1e} of {scale:.1e}"

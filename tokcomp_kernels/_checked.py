"""Every implementation of an operator refuses wrong arguments before anything of it runs, by the operator's check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from tokcomp_kernels import _checks, _partition_checks

P = ParamSpec("P")
R = TypeVar("R")


def checked(implementation: Callable[P, R]) -> Callable[P, R]:
    """``NAME_reference`` or ``NAME_triton`` after ``check_NAME``, which takes the same arguments."""
    return checked_as(implementation.__name__.rpartition("_")[0], implementation)


def checked_as(name: str, implementation: Callable[P, R]) -> Callable[P, R]:
    """``implementation`` after ``check_NAME``, which takes the operator's arguments."""
    check = check_of(name)

    @functools.wraps(implementation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        check(*args, **kwargs)
        return implementation(*args, **kwargs)

    return run


def check_of(name: str) -> Callable[..., Any]:
    """``check_NAME``."""
    home = _checks if hasattr(_checks, f"check_{name}") else _partition_checks
    check: Callable[..., Any] = getattr(home, f"check_{name}")
    return check

"""Every implementation of an operator refuses wrong arguments before anything of it runs, by the operator's check."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from tokcomp_kernels import _checks, _layer_checks, _partition_checks

P = ParamSpec("P")
R = TypeVar("R")

#: Kinds of calls that an implementation remembers as right; a program that makes more is checked afresh.
_REMEMBERED = 1024


def checked(implementation: Callable[P, R]) -> Callable[P, R]:
    """``NAME_reference`` or ``NAME_triton`` after ``check_NAME``, which takes the same arguments.

    A check looks at shapes, dtypes, devices and numbers alone, so what was right once is not looked at again: of 12 to
    20 us that a check takes, which a small batch's launches wait for, 2 to 4 are left.
    """
    name = implementation.__name__.rpartition("_")[0]
    check = check_of(name)
    right: set[Hashable] = set()

    @functools.wraps(implementation)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        kind = (*map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
        try:
            known = kind in right
        except TypeError:  # a symbolic shape, or a list where a number should be
            check(*args, **kwargs)
            return implementation(*args, **kwargs)
        if not known:
            check(*args, **kwargs)
            if len(right) >= _REMEMBERED:
                right.clear()
            right.add(kind)
        return implementation(*args, **kwargs)

    return run


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else value


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
    homes = (_checks, _layer_checks, _partition_checks)
    check: Callable[..., Any] = next(getattr(home, f"check_{name}") for home in homes if hasattr(home, f"check_{name}"))
    return check

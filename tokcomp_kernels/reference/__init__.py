"""Plain differentiable PyTorch for every operator: the specification, the tests' oracle and the last fallback."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from tokcomp_kernels._schema import OPERATORS, Operator


def _reference(operator: Operator) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(f"{__name__}.{operator.file}"), f"{operator.stem}_reference")
    return function


REFERENCES = {operator.name: _reference(operator) for operator in OPERATORS}

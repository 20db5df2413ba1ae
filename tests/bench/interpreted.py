"""What interpreted Triton kernels load, store and multiply, counted where the interpreter does it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest


@dataclass
class Launch:
    """One kernel launch: bytes of every unmasked element, bytes of distinct elements, multiply-adds of its dots."""

    kernel: str
    loaded: int = 0
    stored: int = 0
    multiply_adds: int = 0
    programs: int = 0
    _read: list[np.ndarray] = field(default_factory=list, repr=False)
    _written: list[np.ndarray] = field(default_factory=list, repr=False)

    @property
    def read(self) -> int:
        return _distinct(self._read)

    @property
    def written(self) -> int:
        return _distinct(self._written)


def _distinct(parts: list[np.ndarray]) -> int:
    """Bytes of the distinct elements among (address, width) pairs."""
    if not parts:
        return 0
    widths = np.unique(np.concatenate(parts), axis=0)[:, 1]
    return int(widths.sum())


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches made inside, in order; skips the test where kernels are not interpreted."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels run on the GPU here, where nothing counts their loads")
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches: list[Launch] = []
    call, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store, dot = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_dot

    def counted_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(Launch(self.fn.__name__, programs=int(np.prod(self.grid))))
        return call(self, *args, **kwargs)

    def touched(pointers: Any, mask: Any) -> np.ndarray:
        width = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].reshape(-1).astype(np.int64)
        return np.stack([addresses, np.full_like(addresses, width)], axis=1)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        found = touched(pointers, mask)
        launches[-1].loaded += int(found[:, 1].sum())
        launches[-1]._read.append(found)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        found = touched(pointers, mask)
        launches[-1].stored += int(found[:, 1].sum())
        launches[-1]._written.append(found)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        launches[-1].multiply_adds += int(np.prod(a.data.shape)) * b.data.shape[-1]
        return dot(self, a, b, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted_call)
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        patch.setattr(InterpreterBuilder, "create_dot", counted_dot)
        yield launches

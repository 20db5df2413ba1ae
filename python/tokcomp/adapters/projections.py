"""Where the weights are that make a block's queries and values, for ToCom: whole layers, or rows of a packed one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from tokcomp.adapters.base import UnsupportedModelError


class Rows(NamedTuple):
    """Some rows of a weight [R, C]."""

    module: nn.Module  # that holds it
    rows: slice
    name: str = "weight"
    #: Whether someone reads the weight past the module's forward, as nn.MultiheadAttention does its packed one.
    read_past: bool = False

    @property
    def weight(self) -> Tensor:
        """The whole weight, as the module holds it."""
        weight = self.module._parameters[self.name]
        assert weight is not None
        return weight

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


class Projection(NamedTuple):
    """The rows that make q and those that make v of one block's tokens [B, N, C], all heads together."""

    q: tuple[Rows, ...]
    v: tuple[Rows, ...]

    @property
    def width(self) -> int:
        """Channels of the tokens."""
        return self.q[0].weight.shape[1]

    @property
    def attention(self) -> int:
        """Channels of the queries, and of the values."""
        return sum(rows.num_rows for rows in self.q)


def rows_of(module: nn.Module, where: str, rows: slice | None = None, **options: object) -> Rows:
    """These rows of a module's weight, by default all of them; ``options``: as :class:`Rows`.

    Raises:
        UnsupportedModelError: the module has no floating-point weight of its own there.
    """
    found = Rows(module, slice(0, 0), **options)  # type: ignore[arg-type]
    weight = module._parameters.get(found.name) if isinstance(module, (nn.Linear, nn.MultiheadAttention)) else None
    if weight is None or not weight.is_floating_point():
        raise UnsupportedModelError(
            f"{where}: q, k and v must come from nn.Linear layers with floating-point weights of their own, got a "
            f"{type(module).__name__}"
        )
    return found._replace(rows=slice(0, weight.shape[0]) if rows is None else rows)


def packed(module: nn.Module, where: str, rows: slice | None = None, **options: object) -> Projection:
    """Of rows that make q, then k, then v, by default all of the module's."""
    every = rows_of(module, where, rows, **options)
    width, start = every.num_rows // 3, every.rows.start
    q, v = slice(start, start + width), slice(start + 2 * width, start + 3 * width)
    return Projection((every._replace(rows=q),), (every._replace(rows=v),))


def separate(q: nn.Module, v: nn.Module, where: str) -> Projection:
    """Of a layer for q and one for v.

    Raises:
        UnsupportedModelError: they are no layers, or fewer heads of v serve several of q.
    """
    found = Projection((rows_of(q, where),), (rows_of(v, where),))
    queries, values = found.q[0].num_rows, found.v[0].num_rows
    if queries != values:
        raise UnsupportedModelError(f"{where}: ToCom needs as many channels of v as of q, got {values} and {queries}")
    return found


def joined(parts: Iterable[Projection]) -> Projection:
    """Of attentions side by side, whose heads count as one attention's."""
    queries, values = zip(*parts, strict=True)
    return Projection(sum(queries, ()), sum(values, ()))

"""The weights of q and v that a plugin works on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokcomp.adapters import Adapter, UnsupportedModelError, find_adapter
from tokcomp.adapters.projections import Projection, Rows


class Width(NamedTuple):
    """Widths of one block: of its tokens, and of its queries (and values), all heads together."""

    tokens: int
    attention: int

    def __str__(self) -> str:
        return f"{self.tokens}" if self.tokens == self.attention else f"{self.tokens} (attention {self.attention})"


def projections_of(model: nn.Module) -> tuple[Adapter, list[Projection]]:
    """The model's adapter, and where the weights of q and v are in each block.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood, or has no such weights.
    """
    adapter = find_adapter(model)
    found = adapter.projections(model)
    per_block = [{id(piece.weight) for piece in pieces(one)} for one in found]
    if len(set().union(*per_block)) < sum(map(len, per_block)):
        raise UnsupportedModelError("each block must have its own q, k, v weight, got a model whose blocks share one")
    return adapter, found


def pieces(projection: Projection) -> tuple[Rows, ...]:
    """The rows of q, then those of v."""
    return projection.q + projection.v


def modules_of(projections: Iterable[Projection]) -> list[nn.Module]:
    """The modules that hold the weights, each once."""
    return list({id(piece.module): piece.module for one in projections for piece in pieces(one)}.values())


def width_of(projection: Projection) -> Width:
    return Width(projection.width, projection.attention)


def describe(widths: list[Width]) -> str:
    """For messages: ``12 blocks of width 384``."""
    distinct = list(dict.fromkeys(widths))
    return f"{len(widths)} blocks of width {' and '.join(map(str, distinct))}"


def read_rows(projection: Projection) -> Tensor:
    """A copy [2A, C] of the rows of q and v."""
    return torch.cat([piece.weight.detach()[piece.rows] for piece in pieces(projection)])


def write_rows(projection: Projection, rows: Tensor) -> None:
    """Replace the rows of q and v by ``rows`` [2A, C]."""
    parts = pieces(projection)
    for piece, new in zip(parts, rows.split([part.num_rows for part in parts]), strict=True):
        piece.weight.detach()[piece.rows].copy_(new)

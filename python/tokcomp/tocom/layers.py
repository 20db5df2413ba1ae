"""The packed q, k, v layers that a plugin works on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokcomp.adapters import Adapter, UnsupportedModelError, find_adapter


class Width(NamedTuple):
    """Widths of one block: of its tokens, and of its queries (and values), all heads together."""

    tokens: int
    attention: int

    def __str__(self) -> str:
        return f"{self.tokens}" if self.tokens == self.attention else f"{self.tokens} (attention {self.attention})"


def qkv_layers(model: nn.Module) -> tuple[Adapter, list[nn.Linear]]:
    """The model's adapter and its packed layers, one per block: rows of q, then of k, then of v.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood, or has no such layers.
    """
    adapter = find_adapter(model)
    layers = adapter.qkv_layers(model)
    for index, layer in enumerate(layers):
        weight = layer._parameters.get("weight") if isinstance(layer, nn.Linear) else None
        if weight is None or not weight.is_floating_point() or weight.shape[0] % 3:
            raise UnsupportedModelError(
                f"block {index}: q, k and v must come from one nn.Linear with its own floating-point weight, "
                f"got a {type(layer).__name__}"
            )
    if len({id(layer.weight) for layer in layers}) < len(layers):
        raise UnsupportedModelError("each block must have its own q, k, v weight, got a model whose blocks share one")
    return adapter, layers


def width_of(layer: nn.Linear) -> Width:
    rows, columns = layer.weight.shape
    return Width(columns, rows // 3)


def describe(widths: list[Width]) -> str:
    """For messages: ``12 blocks of width 384``."""
    distinct = list(dict.fromkeys(widths))
    return f"{len(widths)} blocks of width {' and '.join(map(str, distinct))}"


def read_rows(layer: nn.Linear) -> Tensor:
    """A copy [2A, C] of the rows of q and v."""
    width = width_of(layer).attention
    weight = layer.weight.detach()
    return torch.cat((weight[:width], weight[2 * width :]))


def write_rows(layer: nn.Linear, rows: Tensor) -> None:
    """Replace the rows of q and v by ``rows`` [2A, C]."""
    width = width_of(layer).attention
    weight = layer.weight.detach()
    weight[:width].copy_(rows[:width])
    weight[2 * width :].copy_(rows[width:])

"""Linear layers in int8 on CPU, with the interface of PackedWeights.

Weights are quantised when they are packed, activations row by row in every call (:mod:`tokcomp_kernels.int8`); all
between the products stays float32. The model's own weights are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.fastpath.packing import Layer, PackedWeights
from tokcomp_kernels import int8, tiles

#: Attribute of a tower whose products are in int8.
_MARK = "_tokcomp_int8"


class Int8Weights(PackedWeights):
    """Weights of linear layers in int8; a convolution, which sees the image itself, stays float32."""

    def _type_of(self, layer: Layer) -> torch.dtype:
        return torch.int8 if isinstance(layer, nn.Linear) else self.dtype

    def linear(self, layer: Layer, x: Tensor | int8.Rows) -> Tensor:
        """``layer(x)``; x may be what :meth:`linear_gelu` returned."""
        if isinstance(layer, nn.Linear):
            return self._linear(layer, x, None)
        assert isinstance(x, Tensor)
        return super().linear(layer, x)

    def linear_add(self, layer: Layer, x: Tensor | int8.Rows, residual: Tensor) -> Tensor:
        """``residual + layer(x)``; x may be what :meth:`linear_gelu` returned."""
        return self._linear(layer, x, residual)

    def linear_gelu(self, layer: Layer, x: Tensor, approximate: str) -> Any:
        """``F.gelu(layer(x), approximate=approximate)``, quantised for the layer that follows."""
        levels, entry = int8.activation_levels(), self._layers[layer]
        if approximate != "none":
            return int8.quantize_rows(F.gelu(self._linear(layer, x, None), approximate=approximate), levels)
        if isinstance(entry.packed, tiles.Int8Weight):
            rows = int8.quantize_rows(x, levels)
            return int8.quantize_rows(tiles.linear_int8(rows, entry.packed, entry.bias, levels, gelu=True), levels)
        return int8.linear_gelu(x, entry.packed, entry.bias, levels)

    def _linear(self, layer: Layer, x: Tensor | int8.Rows, residual: Tensor | None) -> Tensor:
        levels, entry = int8.activation_levels(), self._layers[layer]
        if isinstance(entry.packed, tiles.Int8Weight):
            rows = int8.quantize_rows(x, levels) if isinstance(x, Tensor) else x
            out = tiles.linear_int8(rows, entry.packed, entry.bias, levels)
            return out if residual is None else out.add_(residual)
        return int8.linear(x, entry.packed, entry.bias, levels, residual=residual)


def set_int8(tower: nn.Module, wanted: bool) -> None:
    """Compute a compressed tower's products in int8 from its next call on, or no longer."""
    if wanted:
        setattr(tower, _MARK, True)
    else:
        vars(tower).pop(_MARK, None)


def is_int8(tower: nn.Module) -> bool:
    """Whether a tower's products are to be in int8."""
    return vars(tower).get(_MARK, False)

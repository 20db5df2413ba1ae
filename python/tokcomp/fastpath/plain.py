"""Linear layers unpacked, for devices whose own products need no packing, with the interface of PackedWeights."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.fastpath.packing import Layer, has_watchers, wants_gradients
from tokcomp_kernels.ops._backends import FUSED_EMBEDDING_WINS

#: What tensor cores multiply, and float32.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


#: For the environment: 1 and 0 choose how images enter a model, whatever a GPU has measured.
FUSED_EMBEDDING = "TOKCOMP_FUSED_EMBEDDING"


@cache
def fused_embedding(device: torch.device) -> bool:
    """Whether patches are embedded as one product, and positions added in one pass with the first norm.

    Where TOKCOMP_FUSED_EMBEDDING=1 asks for it; without that variable, on CUDA where a GPU has measured it faster.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(FUSED_EMBEDDING)
    if value not in (None, "0", "1"):
        raise ValueError(f"{FUSED_EMBEDDING} must be 0 or 1, got {value!r}")
    return device.type == "cuda" and FUSED_EMBEDDING_WINS if value is None else value == "1"


class Products(Protocol):
    """The products of some of a model's linear layers with activations of ``dtype``."""

    dtype: torch.dtype

    def __contains__(self, layer: nn.Module) -> bool: ...

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """``layer(x)``."""

    def linear_gelu(self, layer: Layer, x: Tensor, approximate: str) -> Tensor:
        """``F.gelu(layer(x), approximate=approximate)``."""

    def linear_add(self, layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + layer(x)``."""


class PlainWeights:
    """Linear layers whose weights are read in place."""

    def __init__(self, layers: Iterable[Layer], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._layers = frozenset(layers)

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._layers

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight.flatten(1), layer.bias)  # a convolution's weight [C, colours, rows, columns]

    def linear_gelu(self, layer: Layer, x: Tensor, approximate: str) -> Tensor:
        if approximate == "none":
            return torch.ops.tokcomp.linear_gelu(x, layer.weight, layer.bias)
        return F.gelu(self.linear(layer, x), approximate=approximate)

    def linear_add(self, layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.linear(layer, x)


def plain_weights(model: nn.Module, layers: Iterable[Layer], x: Tensor) -> PlainWeights | None:
    """The products of ``layers`` on CUDA for computing on ``x``, or None if the ordinary path has to be taken.

    That is the case if gradients are wanted, under autocast, if the weights are not of x's type, and whenever something
    watches the operators.
    """
    layers = tuple(layers)
    if x.device.type != "cuda" or x.dtype not in DTYPES or torch.is_autocast_enabled("cuda"):
        return None
    if any(layer.weight.dtype != x.dtype or layer.weight.device != x.device for layer in layers):
        return None
    return None if wants_gradients(model, x) or has_watchers(x) else PlainWeights(layers, x.dtype)

"""Linear layers through oneDNN, with the layers' weights packed into oneDNN's own blocked layout.

F.linear on float32 goes through MKL, which is slow on some CPUs, and packs the weight in every call. Here a weight is
packed once per model. The packed copies live beside the model, never inside it: they are not in its state_dict, not
pickled and not deep-copied, and they go when the model goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

#: Element type of the activations -> the type in which to compute. oneDNN has no fast float16 on most CPUs.
COMPUTE_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
#: Layers that are a matrix product: a convolution whose patches do not overlap is one on the flattened patches.
Layer: TypeAlias = nn.Linear | nn.Conv2d
#: Elements of each weight that are compared before every forward pass, to notice writes through ``Tensor.data``.
_SAMPLES = 64


class _Source(NamedTuple):
    """What a packed weight was made from."""

    weight: Tensor
    data_ptr: int
    version: int | None

    @classmethod
    def of(cls, weight: Tensor) -> _Source:
        return cls(weight, weight.data_ptr(), None if weight.is_inference() else weight._version)

    def holds(self, weight: Tensor) -> bool:
        return (
            weight is self.weight
            and weight.data_ptr() == self.data_ptr
            and (self.version is None or weight._version == self.version)
        )


class PackedWeights:
    """Packed weights of some of a model's linear layers, in one compute type. Immutable."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sources = {layer: _Source.of(layer.weight) for layer in layers}
        self._views = [_sample(source.weight) for source in self._sources.values()]
        self._values = torch.cat(self._views) if self._views else None
        self._packed = {layer: _pack(layer.weight, dtype) for layer in layers}

    def is_current(self, layers: Sequence[Layer], dtype: torch.dtype) -> bool:
        """Whether the layers are the same and none of their weights has changed, in place or otherwise."""
        if dtype != self.dtype or len(layers) != len(self._sources):
            return False
        for layer in layers:
            source = self._sources.get(layer)
            if source is None or not source.holds(layer.weight):
                return False
        # Writes through .data leave no trace but the values. NaN differs from itself: such a model is packed anew.
        return self._values is None or torch.equal(torch.cat(self._views), self._values)

    def has(self, layer: nn.Module) -> bool:
        """Whether the layer's weight is among the packed ones."""
        return layer in self._packed

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """``layer(x)``."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed[layer], self._bias(layer), "none", [], "")

    def linear_gelu(self, layer: Layer, x: Tensor, approximate: str) -> Tensor:
        """``F.gelu(layer(x), approximate=approximate)``."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed[layer], self._bias(layer), "gelu", [], approximate)

    def linear_add(self, layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + layer(x)``."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed[layer], self._bias(layer), "add")

    def _bias(self, layer: Layer) -> Tensor | None:
        return None if layer.bias is None else layer.bias.to(self.dtype)


def _sample(weight: Tensor) -> Tensor:
    """A view of a few elements spread over the weight, both ends included."""
    flat = weight.detach().view(-1)
    step = max(1, (flat.numel() - 1) // (_SAMPLES - 1))
    # An odd step visits every column of a weight whose width is a power of two.
    return flat[:: step - 1 + step % 2 if step > 1 else 1]


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    # Ordinary tensors even under inference_mode, so that the pack outlives it.
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().flatten(1).to(dtype).contiguous(), None)


_cache: weakref.WeakKeyDictionary[nn.Module, PackedWeights] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def packed_weights(model: nn.Module, layers: Sequence[Layer], x: Tensor) -> PackedWeights | None:
    """The packed weights of ``layers`` for computing on ``x``, or None where the ordinary path has to be taken.

    That is: on other devices or types than this serves, when gradients are wanted, under autocast, and whenever someone
    watches the operators (torch.compile, export, tracing, functorch, dispatch modes such as FLOP counters).
    """
    dtype = COMPUTE_DTYPES.get(x.dtype)
    if dtype is None or not all(_packable(layer, x.dtype) for layer in layers):
        forget(model)
        return None
    if not _available(x):
        return None
    if torch.is_grad_enabled() and (
        x.requires_grad or any(parameter.requires_grad for parameter in model.parameters())
    ):
        return None
    packed = _cache.get(model)
    if packed is None or not packed.is_current(layers, dtype):
        with _lock:
            packed = _cache.get(model)
            if packed is None or not packed.is_current(layers, dtype):
                packed = _cache[model] = PackedWeights(layers, dtype)
    return packed


def forget(model: nn.Module) -> None:
    """Free the packed weights of ``model``, if there are any."""
    if model in _cache:
        with _lock:
            _cache.pop(model, None)


def has_hooks(modules: Sequence[nn.Module]) -> bool:
    """Whether anyone would notice that these modules' forward is not called."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _available(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def _packable(layer: Layer, dtype: torch.dtype) -> bool:
    weight = layer.weight
    return (
        weight.dtype == dtype
        and weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_contiguous()
        and weight.numel() > 0
    )

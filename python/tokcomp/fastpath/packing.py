"""Linear layers through oneDNN, with the layers' weights packed into oneDNN's own blocked layout.

F.linear on float32 goes through MKL, which is slow on some CPUs, and packs the weight in every call. Here a weight is
packed once per model; in bfloat16, on a CPU that multiplies tiles, in their order, for a product of our own. The packed
copies live beside the model, never inside it: they are not in its state_dict, not pickled and not deep-copied, and they
are freed with the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

from tokcomp_kernels import int8, tiles
from tokcomp_kernels.product_types import product_dtype

#: Supported element types of activations and weights; product_dtype says in which type the products are computed.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Layers that are a matrix product: a convolution whose patches do not overlap is one on the flattened patches.
Layer: TypeAlias = nn.Linear | nn.Conv2d
#: None if torch was built without oneDNN.
_linear: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
_linear_binary: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "binary", None)
#: Elements of each weight that are compared before every forward pass, to notice writes through ``Tensor.data``.
_SAMPLES = 64


@dataclass(frozen=True, eq=False)
class _Packed:
    """A layer's packed weight and what it was made from."""

    weight: Tensor
    bias: Tensor | None
    data_ptr: int
    version: int | None
    packed: Any  # a tensor, or an int8 weight with its scales
    view: Tensor  # a few elements of the weight as it is now
    values: Tensor  # and as they were when it was packed

    @classmethod
    def of(cls, layer: Layer, dtype: torch.dtype) -> _Packed:
        """The layer's packed weight in a type: one that another model made of the same parameter, or else a new one."""
        weight = layer.weight
        key = (id(weight), dtype)
        entry = _shared.get(key)
        if entry is None or not entry.is_of(layer) or not torch.equal(entry.view, entry.values):
            version = None if weight.is_inference() else weight._version
            view = _sample(weight)
            packed = _pack(weight, dtype)
            _shared[key] = entry = cls(weight, layer.bias, weight.data_ptr(), version, packed, view, view.clone())
        return entry

    def is_of(self, layer: Layer) -> bool:
        """Whether the layer's parameters are still the same tensors, at the same addresses and not written to."""
        weight = _parameter(layer, "weight")
        return (
            weight is self.weight
            and _parameter(layer, "bias") is self.bias
            and weight.data_ptr() == self.data_ptr
            and (self.version is None or weight._version == self.version)
        )


class PackedWeights:
    """Packed weights of some of a model's linear layers, in one compute type.

    Immutable except for the transposed weights, which a backward pass needs and which are packed on first use.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._layers = {layer: _Packed.of(layer, self._type_of(layer)) for layer in layers}
        self._transposed: dict[Layer, Tensor] = {}
        self.widest = max(layer.weight.shape[0] for layer in layers)  # columns of the widest output
        self._views = [entry.view for entry in self._layers.values()]
        self._values = torch.cat(self._views)

    def _type_of(self, layer: Layer) -> torch.dtype:
        """The type that a layer's weight is packed in."""
        return self.dtype

    def is_current(self, layers: Sequence[Layer], weight_dtype: torch.dtype, dtype: torch.dtype | None) -> bool:
        """Whether the pack is of these layers and types, and none of the weights has changed.

        ``dtype`` None: nothing is about to be computed, so any type will do.
        """
        if len(layers) != len(self._layers) or weight_dtype != self._values.dtype or dtype not in (self.dtype, None):
            return False
        for layer in layers:
            entry = self._layers.get(layer)
            if entry is None or not entry.is_of(layer):
                return False
        # Writes through .data show only in the values. NaN differs from itself: a model with NaN is repacked every
        # time.
        return torch.equal(torch.cat(self._views), self._values)

    def __contains__(self, layer: nn.Module) -> bool:
        return layer in self._layers

    @property
    def nbytes(self) -> int:
        """Bytes that the packed copies take, not counting oneDNN's padding."""
        return self.nbytes_of(self._layers)

    def nbytes_of(self, layers: Iterable[nn.Module]) -> int:
        """Bytes that the packed copies of these layers take, 0 for a layer that is not packed."""
        found = [layer for layer in layers if layer in self._layers]
        weights = [self._layers[layer].packed for layer in found]
        packed = [part for weight in weights for part in (weight if isinstance(weight, tuple) else (weight,))]
        packed += [self._transposed[layer] for layer in found if layer in self._transposed]
        return sum(one.numel() * one.element_size() for one in packed)

    def transposed(self, layer: nn.Linear) -> Tensor:
        """The packed weight of ``x -> x @ layer.weight``, the product that carries a gradient back."""
        packed = self._transposed.get(layer)
        if packed is None:
            with _lock:
                packed = self._transposed.get(layer)
                if packed is None:
                    packed = self._transposed[layer] = _pack(self._layers[layer].weight.detach().t(), self.dtype)
        return packed

    def linear(self, layer: Layer, x: Tensor) -> Tensor:
        """``layer(x)``."""
        entry = self._layers[layer]
        return product(x, entry.packed, self._bias(entry))

    def linear_gelu(self, layer: Layer, x: Tensor, approximate: str) -> Tensor:
        """``F.gelu(layer(x), approximate=approximate)``."""
        entry = self._layers[layer]
        if not _in_tiles(entry.packed):
            return _linear(x, entry.packed, self._bias(entry), "gelu", [], approximate)
        if approximate == "none":
            return tiles.linear(x, entry.packed, self._bias(entry), gelu=True)
        return F.gelu(tiles.linear(x, entry.packed, self._bias(entry)), approximate=approximate)

    def linear_add(self, layer: Layer, x: Tensor, residual: Tensor) -> Tensor:
        """``residual + layer(x)``."""
        entry = self._layers[layer]
        if _in_tiles(entry.packed):
            return tiles.linear(x, entry.packed, self._bias(entry)).add_(residual)
        return _linear_binary(x, residual, entry.packed, self._bias(entry), "add")

    def _bias(self, entry: _Packed) -> Tensor | None:
        return entry.bias if entry.bias is None or entry.bias.dtype == self.dtype else entry.bias.to(self.dtype)


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a packed weight [out, in], transposed, plus the bias: [..., out]."""
    return tiles.linear(x, packed, bias) if _in_tiles(packed) else _linear(x, packed, bias, "none", [], "")


def _in_tiles(packed: Tensor) -> bool:
    """Whether a weight lies in the order of a CPU's tiles (:mod:`tokcomp_kernels.tiles`), not in oneDNN's."""
    return packed.dim() == 3


def _parameter(layer: Layer, name: str) -> Tensor | None:
    # nn.Module's attribute lookup is slow; a DataParallel replica has plain attributes instead.
    parameter = layer._parameters.get(name)
    return parameter if parameter is not None else getattr(layer, name)


def _sample(weight: Tensor) -> Tensor:
    """A view of a few elements spread over the weight."""
    flat = weight.detach().view(-1)
    step = max(1, (flat.numel() - 1) // (_SAMPLES - 1))
    # An odd step visits every column of a weight whose width is a power of two.
    return flat[:: step - 1 + step % 2 if step > 1 else 1]


def _pack(weight: Tensor, dtype: torch.dtype) -> Any:
    # Ordinary tensors even under inference_mode, so that the pack outlives it.
    with torch.inference_mode(False), torch.no_grad():
        if dtype == torch.int8:
            matrix = weight.detach().flatten(1)
            return tiles.pack_int8(matrix) if tiles.takes(matrix, dtype) else int8.pack_weight(matrix)
        matrix = weight.detach().flatten(1).to(dtype).contiguous()
        return (
            tiles.pack(matrix) if tiles.takes(matrix, dtype) else torch.ops.mkldnn._reorder_linear_weight(matrix, None)
        )


_cache: weakref.WeakKeyDictionary[nn.Module, PackedWeights] = weakref.WeakKeyDictionary()
#: Models that share parameters share the packed copies. Keyed by the parameter's id and the compute type; an entry
#: lives as long as some model's PackedWeights do, and keeps the parameter alive.
_shared: weakref.WeakValueDictionary[tuple[int, torch.dtype], _Packed] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def packed_weights(
    model: nn.Module,
    layers: Iterable[Layer],
    x: Tensor,
    *,
    frozen: bool = False,
    autocast: bool = False,
    kind: type[PackedWeights] = PackedWeights,
) -> PackedWeights | None:
    """The packed weights of ``layers`` for computing on ``x``, or None if the ordinary path has to be taken.

    That is the case on unsupported devices or types, when gradients are wanted, under autocast (unless the caller says
    that it casts), and whenever something watches the operators (torch.compile, export, tracing, functorch, dispatch
    modes such as FLOP counters).

    Args:
        model: the model that the layers belong to; the packed copies live as long as it does.
        layers: the layers to pack.
        x: activations of the type, and on the device, of the computation.
        frozen: gradients may be wanted, but not for these layers' parameters: :mod:`tokcomp.fastpath.frozen` has the
            products that carry a gradient to their input.
        autocast: the caller casts activations to the packed weights' type, which under autocast is autocast's type.
        kind: what computes the products; a model has one kind at a time.
    """
    layers = list(dict.fromkeys(layers))
    packed = _cache.get(model)
    packed = packed if type(packed) is kind else None
    dtype = _compute_dtype(x.dtype, autocast)
    if packed is None or not packed.is_current(layers, x.dtype, dtype):
        if x.dtype not in DTYPES or not all(packable(layer, x.dtype) for layer in layers):
            forget(model)
            return None
        packed = None
    if dtype is None or not _available(x) or (_learns(layers) if frozen else wants_gradients(model, x)):
        return None
    if packed is None:
        with _lock:
            packed = _cache.get(model)
            if type(packed) is not kind or not packed.is_current(layers, x.dtype, dtype):
                packed = _cache[model] = kind(layers, dtype)
    return packed


def _compute_dtype(dtype: torch.dtype, autocast: bool) -> torch.dtype | None:
    """The type to compute in, or None if that is left to the ordinary path."""
    if not torch.is_autocast_enabled("cpu"):
        return product_dtype(dtype, "cpu") if dtype in DTYPES else None
    cast = torch.get_autocast_dtype("cpu")
    return cast if autocast and dtype == torch.float32 and product_dtype(cast, "cpu") == cast else None


def wants_gradients(model: nn.Module, x: Tensor) -> bool:
    """Whether a forward pass on x would record a graph."""
    return torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in model.parameters()))


def _learns(layers: Iterable[Layer]) -> bool:
    """Whether gradients are wanted for any of the layers' parameters."""
    if not torch.is_grad_enabled():
        return False
    return any(one.requires_grad for layer in layers for one in layer.parameters(recurse=False))


def packed_now(model: nn.Module) -> PackedWeights | None:
    """The packed weights that ``model`` has, current or not."""
    return _cache.get(model)


def forget(model: nn.Module) -> None:
    """Free the packed weights of ``model``, if there are any."""
    if model in _cache:
        with _lock:
            _cache.pop(model, None)


def has_hooks(modules: Sequence[nn.Module]) -> bool:
    """Whether these modules' forward must be called: someone watches it, or has put another in its place."""
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__ for module in modules)


def _available(x: Tensor) -> bool:
    return x.device.type == "cpu" and _linear is not None and torch._C._get_mkldnn_enabled() and not has_watchers(x)


def has_watchers(x: Tensor) -> bool:
    """Whether anything intercepts operators on x: subclasses, modes, functorch, tracing, tangents."""
    return (
        type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
    )


def packable(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether a layer's weight is an ordinary tensor of that type on the CPU, which a subclass of torchao's is not."""
    weight = layer.weight
    return (
        weight.dtype == dtype
        and weight.device.type == "cpu"
        and type(weight) in (nn.Parameter, Tensor)
        and weight.is_contiguous()
        and weight.numel() > 0
    )

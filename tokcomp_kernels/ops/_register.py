"""Registers one operator: fake, backends, autograd, autocast. The schema itself stands in ``_schema.py``.

Autograd is a kernel of our own rather than ``torch.library.register_autograd``, which refuses the keyword-only tensors
of our schemas (``size``, ``pruned_fill``) and takes longer where a gradient is wanted. Where none is, Python would take
two to three times as long as the CPU kernel on a tiny tensor; so compiled code stands there (csrc/python_keys.h), which
hands over to what is registered here only for gradients, tangents and refusals.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from tokcomp_kernels._checked import check_of, checked_as
from tokcomp_kernels._library import LIBRARY, NATIVE_KEYS, PYTHON_LIBRARY, native_kernels
from tokcomp_kernels._schema import BY_NAME, NAMESPACE, NATIVE_NAMESPACES
from tokcomp_kernels.ops._backends import Implementation
from tokcomp_kernels.ops._layouts import KEYS, refusal
from tokcomp_kernels.ops._value_checks import check_values

#: Every registered operator, for tests, benchmarks and `tokcomp info`.
IMPLEMENTATIONS: dict[str, Implementation] = {}

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


class Arguments:
    """Arguments of an operator in schema order: the dispatcher leaves out trailing ones that have their default."""

    def __init__(self, name: str) -> None:
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self._schema = self.overload._schema.arguments
        self._num_positional = sum(not argument.kwarg_only for argument in self._schema)

    def flatten(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        rest = self._schema[len(args) :]
        return [*args, *(kwargs.get(argument.name, argument.default_value) for argument in rest)]

    def redispatch(self, keyset: Any, flat: Sequence[Any]) -> Any:
        """The operator below autograd."""
        names = (argument.name for argument in self._schema[self._num_positional :])
        keywords = dict(zip(names, flat[self._num_positional :], strict=True))
        with torch._C._AutoDispatchBelowAutograd():
            keyset = keyset & torch._C._after_autograd_keyset
            return self.overload.redispatch(keyset, *flat[: self._num_positional], **keywords)

    def call(self, flat: Sequence[Any]) -> Any:
        names = (argument.name for argument in self._schema[self._num_positional :])
        keywords = dict(zip(names, flat[self._num_positional :], strict=True))
        return self.overload(*flat[: self._num_positional], **keywords)

    @property
    def names(self) -> list[str]:
        return [argument.name for argument in self._schema]

    def positions(self, names: Sequence[str]) -> list[int]:
        return [i for i, argument in enumerate(self._schema) if argument.name in names]


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    autograd: Callable[[Arguments], type[torch.autograd.Function]] | None = None,
    autocast: Sequence[str] = (),
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Register ``tokcomp::name``, whose schema names the differentiable inputs.

    ``autograd(arguments)`` gives the Function whose ``apply(keyset, *flat_arguments)`` runs where one of them requires
    a gradient. ``fake`` gets checked arguments. ``autocast`` names the inputs that take autocast's dtype, or
    ``autocast_dtype`` where one is given.
    """
    implementation = Implementation(name)
    IMPLEMENTATIONS[name] = implementation
    LIBRARY.impl(name, implementation.reference, "CompositeExplicitAutograd")
    for device in _DISPATCH_KEYS:
        _give_key(implementation, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", checked_as(name.lstrip("_"), fake), lib=LIBRARY)
    arguments = Arguments(name)
    refuse_layout = refusal(name, arguments.names)
    for key in KEYS:
        LIBRARY.impl(name, refuse_layout, key)
    _give_autograd(arguments, name, autograd(arguments) if autograd is not None else None)
    for device in _DISPATCH_KEYS if autocast else ():
        _give_autocast(arguments, name, arguments.positions(autocast), device, autocast_dtype)


def _give_key(implementation: Implementation, device: str) -> None:
    """Make the chosen backend answer on a device, unless it does already."""
    name = implementation.name
    backend = implementation.backend(device)
    checks = os.environ.get("TOKCOMP_CHECK", "0") == "1" and BY_NAME[name].public
    # A compiled CPU kernel has registered itself; elsewhere the reference answers from below every key.
    answers_now = "cpp" if device == "cpu" and name in native_kernels()["cpu"] else "reference"
    if backend == answers_now and not checks:
        return
    key = _DISPATCH_KEYS[device]
    if backend == "cuda" and NATIVE_KEYS is not None and not checks:
        PYTHON_LIBRARY.impl(name, implementation.beside_compiled, "CompositeExplicitAutograd")
        NATIVE_KEYS.own_backend(name, key, NATIVE_NAMESPACES[key], implementation.half_width)
        return
    run = implementation.callable(backend)
    if checks:
        run = _checked(name, run)
    LIBRARY.impl(name, run, key, allow_override=True)


def _checked(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    check = check_of(name)
    names = Arguments(name).names

    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)  # values can be looked at once the shapes are right
        check_values(name, {**dict(zip(names, args, strict=False)), **kwargs})
        return run(*args, **kwargs)

    return checked


def _give_autograd(arguments: Arguments, name: str, function: type[torch.autograd.Function] | None) -> None:
    """Register what happens above the kernels: in compiled code, and Python's where that hands over or is not there."""
    kernel = _autograd_kernel(arguments, name, function)
    if NATIVE_KEYS is None:
        LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
        return
    operator = BY_NAME[name]
    watched = operator.differentiable if operator.public else arguments.names  # a gradient's own is refused in all
    PYTHON_LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    NATIVE_KEYS.own_autograd(name, arguments.positions(watched))


def _autograd_kernel(
    arguments: Arguments, name: str, function: type[torch.autograd.Function] | None
) -> Callable[..., Any]:
    operator = BY_NAME[name]
    differentiable = arguments.positions(operator.differentiable)
    refuse_layout = refusal(name, arguments.names)

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        flat = arguments.flatten(args, kwargs)
        if any(isinstance(value, torch.Tensor) and value.is_nested for value in flat):
            refuse_layout(*flat)  # a jagged tensor is a class of its own, which no dispatch key below tells
        if forward_ad._current_level >= 0 and any(_has_tangent(flat[i]) for i in differentiable):
            raise NotImplementedError(
                f"Trying to use forward AD with {name} that does not support it because it has not been implemented "
                "yet; use reverse mode: torch.autograd.grad, torch.func.vjp or jacrev"
            )
        if torch.is_grad_enabled():
            if function is not None and any(flat[i] is not None and flat[i].requires_grad for i in differentiable):
                return function.apply(keyset, *flat)
            if not operator.public:
                refuse_second_order(name, *flat)
        return arguments.redispatch(keyset, flat)

    return autograd


def refuse_second_order(name: str, *values: Any) -> None:
    """Raise RuntimeError where a backward pass is itself to be differentiated: with grad mode on, in one of its inputs.

    Called by an operator's backward that is made of PyTorch's own operators, which would let it pass.
    """
    if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        raise RuntimeError(f"{name}: gradients of gradients are not available; call backward without create_graph=True")


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _give_autocast(
    arguments: Arguments, name: str, positions: Sequence[int], device: str, dtype: torch.dtype | None
) -> None:
    if NATIVE_KEYS is not None and dtype in (None, torch.float32):
        NATIVE_KEYS.own_autocast(name, device, positions, dtype is not None)
        return
    dispatch_key = f"Autocast{_DISPATCH_KEYS[device]}"
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, dispatch_key))

    def autocast(*args: Any, **kwargs: Any) -> Any:
        flat = arguments.flatten(args, kwargs)
        target = torch.get_autocast_dtype(device) if dtype is None else dtype
        for i in positions:
            if _autocasts(flat[i], device):
                flat[i] = flat[i].to(target)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return arguments.call(flat)

    LIBRARY.impl(name, autocast, dispatch_key)


def _autocasts(value: Any, device: str) -> bool:
    """Floating tensors of the device, float64 excepted, as for torch's own operators."""
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == device
        and value.is_floating_point()
        and value.dtype != torch.float64
    )

"""Noticing that a model has changed since it was captured."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from tokcomp.adapters import ADAPTERS
from tokcomp.methods import Method


class _Held(NamedTuple):
    """A parameter or buffer, the place where it was found, and its memory."""

    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    data_ptr: int
    memory: Tensor
    path: str

    def is_there(self) -> bool:
        return self.owner.get(self.name) is self.tensor and self.tensor.data_ptr() == self.data_ptr


class Watch:
    """What determines a model's results besides the values of its weights: its tensors, modules and method.

    Keeps the memory of every parameter and buffer alive, so that a graph that reads it by address reads the old
    weights, never something else.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._class = type(model)
        self._method = method_of(model)
        self._children: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = []
        self._tensors: list[_Held] = []
        for path, module in model.named_modules():
            if module._modules:
                self._children.append((path, module._modules, tuple(module._modules.values())))
            for owner in (module._parameters, module._buffers):
                for name, tensor in owner.items():
                    if tensor is not None:
                        full = f"{path}.{name}" if path else name
                        self._tensors.append(_Held(owner, name, tensor, tensor.data_ptr(), tensor.detach(), full))

    def change(self) -> str | None:
        """What has changed, for a message; None if a graph still computes what the model does.

        Values written in place are no change: a graph reads them where they are.
        """
        if type(self._model) is not self._class or method_of(self._model) is not self._method:
            return "its compression method"
        for path, children, known in self._children:
            if len(children) != len(known) or any(a is not b for a, b in zip(children.values(), known, strict=True)):
                return f"the modules in {path or 'the model'}"
        return next((f"the memory of {held.path}" for held in self._tensors if not held.is_there()), None)


def method_of(model: nn.Module) -> Method | None:
    """The method by which a model, or what torch.compile made of it, is compressed; None for any other module."""
    model = getattr(model, "_orig_mod", model)
    return next((adapter.method(model) for adapter in ADAPTERS if adapter.claims(model)), None)


def refuse_varying(model: nn.Module, what: str) -> None:
    """Raise ValueError if images keep different numbers of tokens, of which a graph could hold only one."""
    method = method_of(model)
    if method is not None and method.varies:
        raise ValueError(
            f"model must keep the same number of tokens of every image for {what}, got one compressed by "
            f"{type(method).__name__}; use ToMe, PiToMe or DiffRate"
        )

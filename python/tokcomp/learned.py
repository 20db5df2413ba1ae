"""The trained parts of learned methods: attached to a model, in its state_dict, read from a checkpoint.

The parts are a module of the model's own by the method's name, ``dynamicvit`` say: the optimizer trains them, ``.to()``
moves them, copies and pickles have them, and so do checkpoints of the whole model. They belong to the model and not to
the method, which has only settings. :func:`tokcomp.compress` uses them, :func:`tokcomp.restore` leaves them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tokcomp import methods
from tokcomp.adapters import Adapter, find_adapter
from tokcomp.in_flight import require_idle
from tokcomp.methods import LearnedMethod
from tokcomp.reading import read_tensors

ModelT = TypeVar("ModelT", bound=nn.Module)
#: Learned methods by the names that their parts have in a model.
LEARNED: dict[str, type[LearnedMethod]] = {
    kind.name: kind
    for kind in (getattr(methods, name) for name in methods.__all__)
    if isinstance(kind, type) and issubclass(kind, LearnedMethod) and not inspect.isabstract(kind)
}


def attach(model: ModelT, method: LearnedMethod) -> ModelT:
    """Give a model new, untrained parts for ``method``, in place. What they start from is drawn from torch's generator.

    Args:
        model: plain or compressed, of a family of plain vision transformers.
        method: :class:`tokcomp.DynamicViT`, say.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``method`` has no trained parts; or (UnsupportedModelError) the model is not understood.
        ValueError: the method does not fit the model, or the model has such parts.
        RuntimeError: another thread is calling the model.
    """
    _require_learned(method)
    adapter = find_adapter(model)
    geometry = adapter.geometry(model)
    method.validate(geometry)
    if is_attached(model, method):
        raise ValueError(
            f"model must have no parts of {type(method).__name__} yet, got one with them; detach them first"
        )
    weight = next(adapter.holder(model).parameters())
    parts = method.make_parts(adapter.token_shape(model), geometry.depth).to(weight.device, weight.dtype)
    _set_parts(adapter, model, {method.name: parts})
    return model


def detach(model: ModelT) -> ModelT:
    """Take the parts of all learned methods out of a model, in place; one without stays as it is.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: the model is compressed by a method that needs them.
        RuntimeError: another thread is calling the model.
    """
    adapter = find_adapter(model)
    if isinstance(adapter.method(model), LearnedMethod):
        raise ValueError("model must not be compressed by a learned method while its parts leave: restore it first")
    require_idle(model)
    for name in LEARNED:
        adapter.holder(model)._modules.pop(name, None)
    return model


def is_attached(model: nn.Module, method: LearnedMethod) -> bool:
    """Whether the model has parts of this method."""
    return method.name in find_adapter(model).holder(model)._modules


def load(path: str | os.PathLike[str], model: ModelT) -> ModelT:
    """Give a model the weights and the trained parts of a checkpoint, such as ``tokcomp finetune`` writes, in place.

    Everything is checked first: if this raises, the model is as it was.

    Args:
        path: a safetensors file of the whole model's state_dict.
        model: plain, of the checkpoint's kind. Parts of learned methods that it has are replaced.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: no such file.
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: the file is truncated or damaged, or its tensors are not the model's and no parts of a method's.
        RuntimeError: another thread is calling the model.
    """
    where = Path(path)
    if not where.is_file():
        raise FileNotFoundError(f"{where} does not exist")
    tensors, _ = read_tensors(where, "a model's checkpoint")
    try:
        load_state(model, tensors)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return model


def has_parts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict holds parts of a learned method."""
    return any(name in LEARNED for key in tensors for name in key.split("."))


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """:func:`load` of tensors by name."""
    adapter = find_adapter(model)
    if adapter.method(model) is not None:
        raise ValueError("model must be plain, got a compressed one: restore it first")
    holder = adapter.holder(model)
    path = next(name for name, module in model.named_modules() if module is holder)
    found: dict[str, dict[str, Tensor]] = {}
    rest = dict[str, Tensor]()
    for key, tensor in tensors.items():
        name, _, inner = key.removeprefix(f"{path}.").partition(".")
        if name in LEARNED:
            found.setdefault(name, {})[inner] = tensor
        else:
            rest[key] = tensor
    mine = tuple(f"{path}.{name}.".removeprefix(".") for name in LEARNED)
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(mine)}
    for key in sorted({*own, *rest}):
        want, got = (tuple(some[key].shape) if key in some else None for some in (own, rest))
        if want != got:
            wanted, had = ("nothing" if shape is None else f"of shape {shape}" for shape in (want, got))
            raise ValueError(f"{key} must be {wanted}, got {had}")
    weight = next(holder.parameters())
    parts = {name: LEARNED[name].parts_like(inner).to(weight.device, weight.dtype) for name, inner in found.items()}
    require_idle(model)
    for name in LEARNED:
        holder._modules.pop(name, None)
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(rest[key])
    _set_parts(adapter, model, parts)


def _set_parts(adapter: Adapter, model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    require_idle(model)
    holder = adapter.holder(model)
    for name, module in parts.items():
        holder.add_module(name, module.train(holder.training))


def _require_learned(method: object) -> None:
    if not isinstance(method, LearnedMethod):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"method must be one with trained parts ({', '.join(LEARNED)}), got {got}")

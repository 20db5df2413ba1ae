"""Modules that stand in for a model's own and share everything with them except chosen layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn


def modules_on_the_way(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[list[str], dict[str, nn.Module]]:
    """Paths of ``layers``, and every module between ``model`` and them by its path, children before parents."""
    names = {id(module): name for name, module in model.named_modules()}
    paths = [names[id(layer)] for layer in layers]
    parts = [path.split(".") for path in paths]
    prefixes = {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)} - {""}  # "": model itself
    return paths, {path: model.get_submodule(path) for path in sorted(prefixes, key=lambda path: -path.count("."))}


def twin_of(module: nn.Module) -> nn.Module:
    """A module of the same class, parameters, buffers, hooks and children; its children can be exchanged."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module), _modules=dict(module._modules))
    return twin


def twins_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """A twin of each module, with the twins of its children; children come before parents."""
    twins: dict[str, nn.Module] = {}
    for path, module in modules.items():
        children = {id(modules[child]): twins[child] for child in twins if child.rpartition(".")[0] == path}
        twins[path] = exchange(twin_of(module), children)
    return twins


def exchange(module: nn.Module, others: Mapping[int, nn.Module]) -> nn.Module:
    """Replace the children whose id is among ``others``."""
    for name, child in module._modules.items():
        module._modules[name] = others.get(id(child), child)
    return module


def twin_model(model: nn.Module, layers: Sequence[nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    """A twin of the whole model, and the twins of ``layers`` in it: for a model that differs only in those."""
    paths, own = modules_on_the_way(model, layers)
    twins = twins_of(own)
    root = exchange(twin_of(model), {id(own[path]): twin for path, twin in twins.items()})
    return root, [twins[path] if path else root for path in paths]

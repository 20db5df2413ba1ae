"""Code of a clone, apart from everything else: its modules, and single functions of files that do not import."""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import importlib
import importlib.util
import io
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokcomp.bench.published_code import PublishedCodeError, apart
from torch import nn

#: What the clones import and hardly use here, by name: names that PyTorch no longer has, a debugger, packages for logs,
#: registries and reshaping; each is supplied only where it is not installed.
_SUPPLIED: dict[str, dict[str, Any]] = {
    "torch._six": {"inf": math.inf, "container_abcs": collections.abc, "string_classes": str, "int_classes": int},
    "tensorboardX": {"SummaryWriter": None},
    "ipdb": {},
    "einops": {"rearrange": lambda x, pattern: {"b i j -> (b i) j": x.flatten(0, 1)}[pattern]},
    "fvcore": {},
    "fvcore.common": {},
    "fvcore.common.registry": {"Registry": type("Registry", (), {"__init__": lambda self, name: None})},
}
_SUPPLIED["fvcore.common.registry"]["Registry"].register = lambda self: lambda made: made


def imported(folder: Path, name: str, bare: Sequence[str] = ()) -> Any:
    """A module of a clone.

    Args:
        folder: that its top-level names are in.
        name: of the module.
        bare: packages of the clone whose own __init__ is left out.

    Raises:
        PublishedCodeError: it does not import here.
    """
    missing = {supplied: ModuleType(supplied) for supplied in _SUPPLIED if not _is_installed(supplied)}
    for supplied, module in missing.items():
        vars(module).update(_SUPPLIED[supplied])
    packages = {package: ModuleType(package) for package in bare}
    for package, module in packages.items():
        path = folder / package.replace(".", "/")
        if not path.is_dir():
            raise PublishedCodeError(f"{folder.name} has no {package}")
        module.__path__ = [str(path)]
    try:
        with _standing_in(missing), apart((folder,)), contextlib.redirect_stdout(io.StringIO()), _standing_in(packages):
            return importlib.import_module(name)
    except Exception as error:
        raise PublishedCodeError(f"{folder.name} does not import: {type(error).__name__}: {error}") from error


def functions(path: Path, owner: str, names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Functions of a class in a file that is not imported: only they are run, with torch alone around them.

    Raises:
        PublishedCodeError: there is no such file, class or function.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise PublishedCodeError(f"{path.name} cannot be read: {error}") from error
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner]
    bodies = [node for one in classes for node in one.body if isinstance(node, ast.FunctionDef) and node.name in names]
    if {node.name for node in bodies} != set(names):
        raise PublishedCodeError(f"{path.name} has no {owner} with {', '.join(names)}")
    found: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(compile(ast.Module(list(bodies), []), str(path), "exec"), found)
    return {name: found[name] for name in names}


def silent(make: Callable[[], Any]) -> Any:
    """What the clones print while they are made or run is left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@contextmanager
def _standing_in(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    missing = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)

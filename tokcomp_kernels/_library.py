"""Define the operators and load the compiled kernels, if there are any that fit this machine.

Importing never fails for want of kernels: ``load_error`` then says why there are none, in one line. Kernels that are
there and do not fit are a warning too: without them everything still runs, and takes longer.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from tokcomp_kernels._schema import NAMESPACE, NATIVE_NAMESPACES, OPERATORS, PYTHON_NAMESPACE, digest

REBUILD = "pip install -e . (or make build)"


def _define(namespace: str, tags: tuple[torch.Tag, ...] = ()) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for operator in OPERATORS:
        library.define(operator.schema, tags=tags)
    return library


#: The handle on which ops/ registers fakes, gradients and backends.
LIBRARY = _define(NAMESPACE, (torch.Tag.pt2_compliant_tag,))
#: The handle on which ops/ registers what compiled code above the kernels hands over to.
PYTHON_LIBRARY = _define(PYTHON_NAMESPACE)
# A library's definitions live as long as its handle.
_NATIVE_LIBRARIES = [_define(namespace) for namespace in NATIVE_NAMESPACES.values()]


def _module_path() -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_C" + suffix)
        if path.exists():
            return path
    return None


def _cpu_features() -> frozenset[str] | None:
    """The instruction sets of this CPU in /proc/cpuinfo's names, or None where that is not to be had."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)


def _mismatch(built: dict[str, Any]) -> str | None:
    """Why kernels built so cannot be loaded here, or None. Asked before loading: afterwards is too late."""
    if built["torch"] != torch.__version__:
        version = built["torch"].partition("+")[0]
        # The same version in another build, for CPUs or for another CUDA, is not to be had by its number.
        exchange = "" if version == torch.__version__.partition("+")[0] else f"pip install torch=={version}, or "
        return f"built for torch {built['torch']}, running torch {torch.__version__}: {exchange}rebuild with {REBUILD}"
    if built["schemas"] != digest():  # PyTorch would end the process
        return f"built from other sources, whose operators take other arguments: rebuild with {REBUILD}"
    features = _cpu_features()
    missing = [] if features is None else [name for name in built["cpu_features"].split() if name not in features]
    if missing:
        return (
            f"built for a CPU with {', '.join(missing)}, which this one lacks: "
            f"rebuild with TOKCOMP_CPU_ARCH=native {REBUILD}"
        )
    return None


def _load() -> tuple[Any, str | None]:
    path = _module_path()
    if path is None:
        return None, f"no compiled kernels for this Python in {Path(__file__).parent}: build them with {REBUILD}"
    try:
        built = json.loads(path.with_suffix(".json").read_text())
        if reason := _mismatch(built):
            return None, f"{path.name}: {reason}"
        module = importlib.import_module("tokcomp_kernels._C")
    except (ImportError, OSError, ValueError, KeyError) as error:
        return None, f"{path.name}: {_one_line(error)}; rebuild with {REBUILD}"
    try:
        if "cpu_levels" in built:
            module.load_cpu_kernels()
    except RuntimeError as error:
        return None, f"{path.name}: {_one_line(error)}; rebuild with {REBUILD}"
    return module, None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


# A TOKCOMP_CPU_CAPABILITY that is not to be had is an error here, as a wrong TOKCOMP_BACKEND is: ValueError.
_C, load_error = _load()
if load_error is not None and _module_path() is not None:
    warnings.warn(f"tokcomp runs without its compiled kernels. {load_error}", RuntimeWarning, stacklevel=2)

#: The compiled code that can stand above the kernels (csrc/python_keys.h), or None: no kernels, or an older build.
NATIVE_KEYS = _C if hasattr(_C, "own_autograd") else None


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"


#: TOKCOMP_DEPENDENT_LAUNCH: whether GPU kernels may begin while the ones before them end. Compiled code reads it too.
DEPENDENT_LAUNCH = _flag("TOKCOMP_DEPENDENT_LAUNCH")


def build_info() -> dict[str, Any]:
    """What was built: versions, architectures, compiler, operators per backend. Empty where nothing is loaded.

    ``cpu_levels``: the instruction sets that the CPU kernels were compiled for, of default, avx2, avx512, avx512_bf16.
    ``cpu_capability``: the one that runs here, the best that this CPU has or what TOKCOMP_CPU_CAPABILITY names.
    """
    return _C.build_info() if _C is not None else {}


def native_kernels() -> dict[str, frozenset[str]]:
    """The operators that have a compiled kernel, by device type ("cpu", "cuda"), as the dispatcher knows them."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        key.lower(): frozenset(op.name for op in OPERATORS if has_kernel(f"{namespace}::{op.name}", key))
        for key, namespace in NATIVE_NAMESPACES.items()
    }

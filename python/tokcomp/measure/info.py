"""What this installation has and would use: versions, built kernels, devices, types, backends."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "timm", "triton", "safetensors", "numpy")
#: Settings that change what runs, and what they mean.
_VARIABLES = ("TOKCOMP_BACKEND", "TOKCOMP_CPU_CAPABILITY", "TOKCOMP_CHECK", "TRITON_INTERPRET")


def package_versions() -> dict[str, str | None]:
    """Versions of tokcomp, Python and tokcomp's dependencies; None for what is not installed."""
    from tokcomp import __version__

    found: dict[str, str | None] = {"tokcomp": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    import torch

    # The distribution's metadata omits the build ("+cu132", "+cpu").
    found["torch"] = torch.__version__
    return found


def machine() -> dict[str, Any]:
    """The processors of this machine, on which its results were measured."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[dict[str, Any]]:
    """The devices that torch can compute on."""
    import torch

    from tokcomp.measure.instruction_sets import in_words, instruction_sets

    host = machine()
    detail = ", ".join(filter(None, [f"{host['cores']} cores", in_words(instruction_sets())]))
    found: list[dict[str, Any]] = [{"device": "cpu", "name": host["cpu"], "detail": detail}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        found.append({"device": f"cuda:{index}", "name": properties.name, "detail": detail})
    return found


def backends() -> dict[str, dict[str, str]]:
    """Public operator -> device type -> the backend that runs there: cpp, cuda, triton or reference."""
    from tokcomp_kernels.ops import IMPLEMENTATIONS

    return {
        name: {device: implementation.backend(device) for device in ("cpu", "cuda")}
        for name, implementation in IMPLEMENTATIONS.items()
        if not name.startswith("_")
    }


def cpu_products() -> list[dict[str, str]]:
    """The type in which this CPU computes the linear layers and convolutions of a model of each type, and why."""
    from tokcomp_kernels.product_types import CPU_PRODUCTS

    return [
        {"dtype": _name(dtype), "products": _name(chosen.dtype), "reason": chosen.reason}
        for dtype, chosen in CPU_PRODUCTS.items()
    ]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def collect() -> dict[str, Any]:
    """All of it, as JSON data."""
    import tokcomp_kernels

    return {
        "versions": package_versions(),
        "built": tokcomp_kernels.build_info(),
        "not_loaded": tokcomp_kernels.load_error,
        "native_kernels": {device: sorted(names) for device, names in tokcomp_kernels.native_kernels().items()},
        "devices": devices(),
        "cpu_products": cpu_products(),
        "backends": backends(),
        "settings": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }

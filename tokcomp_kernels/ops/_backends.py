"""Which implementation owns an operator on a device.

TOKCOMP_BACKEND, read once at import:

- ``auto`` (default): on CPU the compiled kernel, on CUDA the compiled kernel where it is the measured winner, else
  Triton, unless that is a contender for what PyTorch does well itself;
- ``cuda``: on CUDA the compiled kernel wherever there is one, else as ``auto``;
- ``triton``: on CUDA Triton; on CPU Triton's interpreter where TRITON_INTERPRET=1 is set;
- ``reference``: plain PyTorch everywhere.

What is missing falls back to the reference, which runs on every device; so does float64 on CUDA. A compiled CUDA kernel
that takes half precision alone (:data:`HALF_WIDTHS`) leaves the rest to Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokcomp_kernels._library import native_kernels
from tokcomp_kernels._schema import BY_NAME
from tokcomp_kernels.reference import REFERENCES

BACKENDS = ("auto", "cuda", "triton", "reference")
#: GPU -> operator -> the backend that was the fastest there. ``make gpu-check`` writes it.
OWNERS = Path(__file__).with_name("owners.json")
#: Operators that PyTorch's own kernels make up well, until a GPU says otherwise.
CONTENDERS = frozenset({"linear_gelu"})

#: Operators whose compiled CUDA kernel takes float16 and bfloat16 alone, and heads of at most so many numbers.
HALF_WIDTHS = {"attention": 80, "_attention_heads": 80}
#: An operator that no benchmark times -> the one whose kernel it shares, and so the owner.
SAME_KERNEL = {"_attention_heads": "attention"}


def _owned(backend: str) -> frozenset[str]:
    """The operators that every GPU which has measured them gives to ``backend``."""
    gpus: list[dict[str, str]] = list(json.loads(OWNERS.read_text()).values())
    operators = {operator for owners in gpus for operator in owners}
    return frozenset(op for op in operators if {owners[op] for owners in gpus if op in owners} == {backend})


#: Operators whose compiled CUDA kernel has run on a GPU and beaten Triton's there. Until then Triton owns the key.
CUDA_WINNERS = _owned("cuda")
#: Operators for which Triton's kernel has to beat PyTorch's own on a GPU before it takes their place.
TRITON_CONTENDERS = (CONTENDERS | _owned("reference")) - _owned("triton")
#: Whether every GPU that has measured it is faster with a model's patch embedding fused: an entry beside operators'.
FUSED_EMBEDDING_WINS = "embedding" in _owned("fused")


def requested_backend() -> str:
    backend = os.environ.get("TOKCOMP_BACKEND", "auto")
    if backend not in BACKENDS:
        raise ValueError(f"TOKCOMP_BACKEND must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Implementation:
    """One operator's backends. Triton's launcher is imported on first use."""

    name: str

    @property
    def reference(self) -> Callable[..., Any]:
        return REFERENCES[self.name]

    def backend(self, device_type: str) -> str:
        """``cpp``, ``cuda``, ``triton`` or ``reference``."""
        requested = requested_backend()
        has_triton = _has_triton()
        if requested == "reference":
            return "reference"
        if device_type == "cpu":
            if requested == "triton" and _interpreting() and has_triton:
                return "triton"
            return "cpp" if self.name in native_kernels()["cpu"] else "reference"
        if device_type == "cuda":
            built = self.name in native_kernels()["cuda"]
            if built and (
                requested == "cuda" or (requested == "auto" and SAME_KERNEL.get(self.name, self.name) in CUDA_WINNERS)
            ):
                return "cuda"
            contends = requested != "triton" and self.name in TRITON_CONTENDERS
            return "triton" if has_triton and not contends else "reference"
        return "reference"

    def callable(self, backend: str) -> Callable[..., Any]:
        """The implementation itself, outside the dispatcher."""
        if backend == "reference":
            return self.reference
        if backend == "cpp":
            return getattr(torch.ops.tokcomp_cpu, self.name).default
        if backend == "cuda":
            return _elsewhere(getattr(torch.ops.tokcomp_cuda, self.name).default, self.beside_compiled, self.half_width)
        if backend == "triton":
            return _elsewhere(self._launch_triton, self.reference, 0)
        raise ValueError(f"backend must be one of cpp, cuda, triton, reference, got {backend!r}")

    @property
    def half_width(self) -> int:
        """The widest that a compiled CUDA kernel for half precision alone takes; 0 for a kernel of every type."""
        return HALF_WIDTHS.get(self.name, 0)

    @property
    def beside_compiled(self) -> Callable[..., Any]:
        """What takes the calls that the compiled CUDA kernel does not take."""
        return self.callable("triton") if self.half_width and _has_triton() else self.reference

    def _launch_triton(self, *args: Any, **kwargs: Any) -> Any:
        return _triton_launcher(self.name)(*args, **kwargs)


@functools.cache
def _triton_launcher(name: str) -> Callable[..., Any]:
    operator = BY_NAME[name]
    launcher: Callable[..., Any] = getattr(
        importlib.import_module(f"tokcomp_kernels.triton.{operator.file}"), f"{operator.stem}_triton"
    )
    return launcher


def _elsewhere(fast: Callable[..., Any], rest: Callable[..., Any], half_width: int) -> Callable[..., Any]:
    """``fast`` where it takes the call by its first argument, else ``rest``: as csrc/python_keys.h decides it."""

    def run(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (fast if _takes(first, half_width) else rest)(first, *args, **kwargs)

    return run


def _takes(first: torch.Tensor | None, half_width: int) -> bool:
    if first is None or not half_width:
        return first is not None and first.dtype != torch.float64
    return first.dtype in (torch.float16, torch.bfloat16) and (first.dim() == 0 or first.shape[-1] <= half_width)

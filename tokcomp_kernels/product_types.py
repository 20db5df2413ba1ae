"""In which type a product of matrices is computed on CPU: in its operands' own only where the processor has one for it.

PyTorch takes bfloat16 and float16 on every CPU, but where the processor has no instructions for them it emulates them,
at a fifth of float32's speed or less, and oneDNN refuses to pack such weights; and some have slow ones. There float32
is both faster and more exact. Whoever computes products asks here; nothing else looks at the processor.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Limits on oneDNN that leave AVX-512 but take the bfloat16 instructions away.
_LIMITS_WITHOUT_BFLOAT16 = ("AVX512_CORE", "AVX512_CORE_VNNI")


class ProductType(NamedTuple):
    """The type that products of some type are computed in, and why."""

    dtype: torch.dtype
    reason: str


def _of_bfloat16() -> ProductType:
    if not _onednn_says("_is_mkldnn_bf16_supported"):
        return ProductType(torch.float32, f"oneDNN has no bfloat16 on this CPU{_limit()}; PyTorch would emulate it")
    # oneDNN also takes bfloat16 where AVX-512 lacks the instructions, at less than half of float32's speed.
    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _LIMITS_WITHOUT_BFLOAT16
    multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if limited or (torch.cpu._is_avx512_supported() and not multiplies):
        return ProductType(torch.float32, f"AVX-512 without bfloat16 instructions{_limit()}; oneDNN would emulate them")
    # As measured on a virtual machine that hides its tiles: half of float32's speed. AMD's have twice of it.
    if torch.cpu._is_avx512_supported() and _is_intel() and not torch.cpu._is_amx_tile_supported():
        return ProductType(torch.float32, "Intel's bfloat16 instructions are slower than float32's without tiles (AMX)")
    return ProductType(torch.bfloat16, "oneDNN multiplies bfloat16 in hardware")


def _of_float16() -> ProductType:
    if not _onednn_says("_is_mkldnn_fp16_supported"):
        return ProductType(torch.float32, f"oneDNN has no float16 on this CPU{_limit()}; PyTorch would emulate it")
    return ProductType(torch.float16, "oneDNN multiplies float16 in hardware")


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


def _onednn_says(question: str) -> bool:
    """What PyTorch itself asks before it packs weights; False in a torch without oneDNN."""
    try:
        return bool(getattr(torch.ops.mkldnn, question)())
    except (AttributeError, RuntimeError, NotImplementedError):
        return False


def _limit() -> str:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return f" (ONEDNN_MAX_CPU_ISA={limit})" if limit else ""


#: Type of the operands -> what the CPU computes their products in. The one answer, found once; tests replace it.
CPU_PRODUCTS: dict[torch.dtype, ProductType] = {
    torch.float64: ProductType(torch.float64, "its own"),
    torch.float32: ProductType(torch.float32, "its own"),
    torch.bfloat16: _of_bfloat16(),
    torch.float16: _of_float16(),
}


def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """The type in which products of ``dtype`` are computed on a device; on all but the CPU its own."""
    return CPU_PRODUCTS[dtype].dtype if device_type == "cpu" and dtype in CPU_PRODUCTS else dtype


def autocast(device_type: str, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``; nothing for None, nor, with a warning, where products of ``dtype`` would be emulated."""
    if dtype is None:
        return nullcontext()
    if product_dtype(dtype, device_type) != dtype:
        chosen = CPU_PRODUCTS[dtype]
        warnings.warn(f"mixed precision in {dtype} is {chosen.dtype} here: {chosen.reason}", stacklevel=2)
        return nullcontext()
    return torch.autocast(device_type, dtype)


def unless_emulated(device_type: str) -> AbstractContextManager[Any]:
    """Switch off an autocast around this on CPU whose products would be emulated: they are float32's in here."""
    if device_type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    dtype = torch.get_autocast_dtype("cpu")
    return nullcontext() if product_dtype(dtype, "cpu") == dtype else torch.autocast("cpu", enabled=False)


def widened(x: Tensor) -> AbstractContextManager[Any]:
    """Compute the products of modules on tensors like x in a wider type where x's own would be emulated.

    Weights are cast in every call: this is for layers that run as the modules they are.
    """
    dtype = product_dtype(x.dtype, x.device.type)
    return nullcontext() if dtype == x.dtype else _Widened(x.dtype, dtype)


class _Widened(TorchFunctionMode):
    """While open, products of tensors of type ``narrow`` are computed in ``wide`` and rounded to ``narrow``."""

    def __init__(self, narrow: torch.dtype, wide: torch.dtype) -> None:
        super().__init__()
        self._narrow, self._wide = narrow, wide

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(self._takes(one) for one in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        args = [self._cast(one) for one in args]
        return func(*args, **{name: self._cast(one) for name, one in kwargs.items()}).to(self._narrow)

    def _takes(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dtype == self._narrow

    def _cast(self, value: Any) -> Any:
        return value.to(self._wide) if self._takes(value) else value


_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.linear, F.conv2d, F.scaled_dot_product_attention),
        *(torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm),
    }
)

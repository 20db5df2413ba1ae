"""What the launchers share: dtype rules, layouts, the current device, and small device functions."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokcomp_kernels._checks import refuse
from tokcomp_kernels._library import DEPENDENT_LAUNCH
from tokcomp_kernels._numbers import MIN_SIZE

if triton.knobs.runtime.interpret:
    from tokcomp_kernels.triton._interpreter import take_indices_from_arrays

    take_indices_from_arrays()

#: The interpreter multiplies bfloat16 bit patterns as integers, and rounds towards zero to bfloat16.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_MIN_SIZE = tl.constexpr(MIN_SIZE)
SUPPORTED = (torch.float16, torch.bfloat16, torch.float32)
LOG2_E = tl.constexpr(1.4426950408889634)


def require_supported(op: str, argument: str, tensor: Tensor) -> None:
    """float64 is for the CPU kernels and the reference: Triton kernels accumulate in float32."""
    if tensor.dtype not in SUPPORTED:
        got = str(tensor.dtype).removeprefix("torch.")
        refuse(op, argument, "be float16, bfloat16 or float32 for the Triton kernel", got, TypeError)


def cdiv(count: int, size: int) -> int:
    """Parts of ``size`` that ``count`` takes. Triton's own is for constants of kernels, and takes microseconds here."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The least power of two that is not below ``count``, at least 1; Triton's own takes microseconds here."""
    return 1 << max(count - 1, 0).bit_length()


def inner_contiguous(tensor: Tensor) -> Tensor:
    """The tensor, or a compact copy where its last dimension is strided (kernels take that stride to be 1)."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def strides(tensor: Tensor | None, *names: str) -> dict[str, int]:
    """Leading strides by a kernel's names for them; zeros for a tensor that is not there."""
    return dict(zip(names, tensor.stride() if tensor is not None else (0,) * len(names), strict=False))


def dependent_launch(tensor: Tensor) -> dict[str, bool]:
    """Launch options under which a kernel that calls :func:`begin_grid` begins while the one before it ends.

    None unless TOKCOMP_DEPENDENT_LAUNCH=1 asks for them, on a GPU that has programmatic dependent launch.
    """
    return _dependent_launch(tensor.device)


@cache
def _dependent_launch(device: torch.device) -> dict[str, bool]:
    if not DEPENDENT_LAUNCH or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"DEPENDENT": True, "launch_pdl": True}


def device_guard(tensor: Tensor) -> torch.cuda.device_of:
    """Make the tensor's GPU current while a kernel is launched; nothing for a CPU tensor."""
    return torch.cuda.device_of(tensor)


@triton.jit
def begin_grid(DEPENDENT: tl.constexpr):
    """A kernel's first step: with DEPENDENT the memory of the grid before is ready from here on, and the next grid may
    begin, to wait here in turn."""
    if DEPENDENT:
        wait: tl.constexpr = "griddepcontrol.wait; // $0"
        let: tl.constexpr = "griddepcontrol.launch_dependents; // $0"
        tl.inline_asm_elementwise(wait, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(let, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def effective_size(size):
    """``size`` where it is above the least size, else that: also for NaN, which compares false."""
    size = size.to(tl.float32)
    return tl.where(size > _MIN_SIZE, size, _MIN_SIZE)


@triton.jit
def dot(a, b, accumulator):
    """``accumulator + a @ b``, summed in float32 and without TF32, under the interpreter too."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 values rounded to the nearest ``dtype``, ties to even, under the interpreter too."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        result = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result

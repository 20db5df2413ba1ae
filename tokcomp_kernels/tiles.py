"""Products of bfloat16 and of int8 on CPUs that multiply tiles of matrices (AMX), with GELU in the same pass.

oneDNN has such products too. What it lacks is a GELU that costs less than its product, and calls that are cheap beside
the few tokens of one image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokcomp_kernels import _library as _loads_the_compiled_kernels  # noqa: F401
from tokcomp_kernels.int8 import Rows, quantize_weight

#: Inputs of a layer, in bytes of one row, and outputs come in multiples of these.
DEPTH, WIDTH = 64, 16
_LIBRARY = torch.library.Library("tokcomp_tiles", "DEF")
_LIBRARY.define("usable() -> bool")
_LIBRARY.define("pack(Tensor weight) -> Tensor")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")
_LIBRARY.define(
    "linear_bytes(Tensor q, Tensor row_scale, Tensor weight, Tensor scale, Tensor sums, int zero, Tensor? bias,"
    " bool gelu) -> Tensor"
)

#: Whether compiled kernels were loaded that multiply tiles, on a CPU and a system that let them.
USABLE: bool = (
    torch._C._dispatch_has_kernel_for_dispatch_key("tokcomp_tiles::linear", "CPU") and torch.ops.tokcomp_tiles.usable()
)


class Int8Weight(NamedTuple):
    """A quantised weight: ``packed`` in the order of its tiles; for each output a scale and the sum of its integers."""

    packed: Tensor
    scale: Tensor
    sums: Tensor


def takes(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight [out, in] fits whole tiles in ``dtype``, bfloat16 or int8, where tiles are usable."""
    out, depth = weight.shape
    fits = depth * dtype.itemsize % DEPTH == 0 and out % WIDTH == 0 and out * depth > 0
    return USABLE and dtype in (torch.bfloat16, torch.int8) and fits


def pack(weight: Tensor) -> Tensor:
    """A bfloat16 weight [out, in] in the order of its tiles, [out / 16, in / 32, 512]."""
    packed: Tensor = torch.ops.tokcomp_tiles.pack(weight)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, through an erf-GELU where asked for: x [..., in], bias [out] -> [..., out], bfloat16.

    Products are added up in float32 and rounded once. The GELU is within 2e-6 |x|, far below bfloat16's rounding.
    """
    found: Tensor = torch.ops.tokcomp_tiles.linear(x, packed, bias, gelu)
    return found


def pack_int8(weight: Tensor) -> Int8Weight:
    """A float32 weight [out, in] for :func:`linear_int8`."""
    q, scale = quantize_weight(weight)
    return Int8Weight(pack(q.view(torch.bfloat16)), scale, q.sum(1, dtype=torch.int32))


def linear_int8(rows: Rows, weight: Int8Weight, bias: Tensor | None, levels: int, *, gelu: bool = False) -> Tensor:
    """Rows [..., in], quantised to ``levels``, times the weight, transposed, plus the bias: float32 [..., out].

    Through an erf-GELU where asked for. Products are added up exactly, in 32 bits.
    """
    found: Tensor = torch.ops.tokcomp_tiles.linear_bytes(*rows, *weight, levels + 1, bias, gelu)
    return found

"""Products of bfloat16 on CPUs that multiply tiles of matrices (AMX), with GELU in the same pass.

oneDNN has such products too. What it lacks is a GELU that costs less than its product, and calls that are cheap beside
the few tokens of one image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels import _library as _loads_the_compiled_kernels  # noqa: F401

#: Inputs and outputs of a layer come in multiples of these.
DEPTH, WIDTH = 32, 16
_LIBRARY = torch.library.Library("tokcomp_tiles", "DEF")
_LIBRARY.define("usable() -> bool")
_LIBRARY.define("pack(Tensor weight) -> Tensor")
_LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu) -> Tensor")

#: Whether compiled kernels were loaded that multiply tiles, on a CPU and a system that let them.
USABLE: bool = (
    torch._C._dispatch_has_kernel_for_dispatch_key("tokcomp_tiles::linear", "CPU") and torch.ops.tokcomp_tiles.usable()
)


def takes(weight: Tensor) -> bool:
    """Whether :func:`pack` takes a weight [out, in]: bfloat16, its sizes whole tiles, where tiles are usable."""
    out, depth = weight.shape
    return USABLE and weight.dtype == torch.bfloat16 and depth % DEPTH == 0 and out % WIDTH == 0 and out * depth > 0


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] in the order of its tiles, [out / 16, in / 32, 512]."""
    packed: Tensor = torch.ops.tokcomp_tiles.pack(weight)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``x @ weight.T + bias``, through an erf-GELU where asked for: x [..., in], bias [out] -> [..., out], bfloat16.

    Products are added up in float32 and rounded once. The GELU is within 2e-6 |x|, far below bfloat16's rounding.
    """
    found: Tensor = torch.ops.tokcomp_tiles.linear(x, packed, bias, gelu)
    return found

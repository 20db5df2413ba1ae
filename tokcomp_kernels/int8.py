"""Linear layers of int8 on CPU: activations to bytes with a scale for each row, exact products of integers, and back.

A row x of activations is ``scale * (q - zero)`` with ``scale = max |x| / levels``, ``zero = levels + 1`` and q in 1 to
``2 * levels + 1``; a weight has a scale for each output. The scale per row keeps an image's result apart from what else
is in its batch.

The compiled kernels are in csrc/cpu/int8. Where there are none for this CPU, the products are oneDNN's, and what lies
around them is plain PyTorch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels import _library as _loads_the_compiled_kernels  # noqa: F401

#: The greatest magnitude of a quantised weight.
WEIGHT_LEVELS = 127
_LIBRARY = torch.library.Library("tokcomp_int8", "DEF")
_LIBRARY.define("levels() -> int")
_LIBRARY.define("quantize_rows(Tensor x, int levels) -> (Tensor q, Tensor scale)")
_LIBRARY.define("pack(Tensor weight) -> Tensor")
_LAYER = "Tensor x, Tensor? row_scale, Tensor weight, Tensor scale, Tensor sums, Tensor? bias"
_LIBRARY.define(f"linear({_LAYER}, Tensor? residual, int levels) -> Tensor")
_LIBRARY.define(f"linear_gelu({_LAYER}, int levels) -> (Tensor q, Tensor scale)")


def _compiled(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"tokcomp_int8::{name}", "CPU")


#: Whether the compiled kernels multiply as well, not only quantise.
MULTIPLIES: bool = _compiled("linear")


def quantize_rows_reference(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Bytes q, shaped as x [..., C], and scales [...] with ``x = scale * (q - levels - 1)`` within half a scale.

    A row of zeros has scale 0; NaN and infinity stay in the scale, and so in whatever it scales.
    """
    most = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    scale = most / levels
    normal = scale.isfinite() & (scale >= torch.finfo(x.dtype).tiny)
    inverse = torch.where(normal, 1 / scale, 0)
    q = (x.nan_to_num(0, 0, 0) * inverse[..., None]).round().clamp(-levels, levels) + (levels + 1)
    return q.to(torch.uint8), torch.where(normal | ~scale.isfinite(), scale, 0)


if not _compiled("quantize_rows"):
    _LIBRARY.impl("quantize_rows", quantize_rows_reference, "CPU")


class Rows(NamedTuple):
    """Quantised activations: bytes q [..., C], a scale [...] for each row."""

    q: Tensor
    scale: Tensor


class Weight(NamedTuple):
    """A quantised weight [out, in], packed for the kernels or for oneDNN; a scale and a sum for each output."""

    packed: Tensor
    scale: Tensor
    sums: Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and scales [out] of a weight [out, in], within half a scale; a row of zeros has scale 0."""
    scale = weight.abs().amax(1) / WEIGHT_LEVELS
    inverse = torch.where(scale > 0, 1 / scale, 0)
    q = (weight * inverse[:, None]).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    return q.to(torch.int8), scale


def quantize_rows(x: Tensor, levels: int) -> Rows:
    """Activations [..., C] of float32 as bytes, as :func:`quantize_rows_reference` has it."""
    return Rows(*torch.ops.tokcomp_int8.quantize_rows(x, levels))


def pack_weight(weight: Tensor) -> Weight:
    """A float32 weight [out, in] for :func:`linear` and :func:`linear_gelu`."""
    q, scale = quantize_weight(weight)
    packed = torch.ops.tokcomp_int8.pack(q) if MULTIPLIES else torch.ops.onednn.qlinear_prepack(q, None)
    return Weight(packed, scale, q.sum(1, dtype=torch.int32))


def linear(
    x: Tensor | Rows, weight: Weight, bias: Tensor | None, levels: int, *, residual: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias + residual`` of x [..., in] in float32, or quantised already: float32 [..., out].

    Products are added up exactly, in 32 bits.
    """
    if MULTIPLIES:
        rows = x if isinstance(x, Rows) else (x, None)
        return torch.ops.tokcomp_int8.linear(*rows, *weight, bias, residual, levels)
    return _linear_by_onednn(x, weight, bias, levels, residual=residual)


def linear_gelu(x: Tensor | Rows, weight: Weight, bias: Tensor | None, levels: int) -> Rows:
    """An erf-GELU of :func:`linear`, quantised for the layer that follows. The GELU is within 2e-6 |x|."""
    if MULTIPLIES:
        rows = x if isinstance(x, Rows) else (x, None)
        return Rows(*torch.ops.tokcomp_int8.linear_gelu(*rows, *weight, bias, levels))
    return quantize_rows(F.gelu(_linear_by_onednn(x, weight, bias, levels)), levels)


def _linear_by_onednn(
    x: Tensor | Rows, weight: Weight, bias: Tensor | None, levels: int, *, residual: Tensor | None = None
) -> Tensor:
    """:func:`linear` where no kernels are compiled for this CPU: oneDNN's product, and plain PyTorch around it."""
    rows = x if isinstance(x, Rows) else quantize_rows(x, levels)
    found = _multiply(rows.q, weight.packed, weight.scale, levels + 1)
    found = found.view(*rows.q.shape[:-1], len(weight.scale))  # oneDNN forgets the dimensions of an empty batch
    found *= rows.scale[..., None]
    for term in (bias, residual):
        if term is not None:
            found += term
    return found


def _multiply(q: Tensor, packed: Tensor, scale: Tensor, zero: int) -> Tensor:
    """oneDNN's product of bytes about ``zero``, in float32, but for the rows' scales."""
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    found: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        q, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found


def unavailable() -> str | None:
    """Why products of int8 cannot be computed on this CPU, or None."""
    if not MULTIPLIES and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        return "tokcomp's kernels are not compiled for it, and this PyTorch has no oneDNN products of int8"
    return None


@functools.cache
def activation_levels() -> int:
    """127; or 63 where the processor adds pairs of products in 16 bits, which more could exceed.

    x86 without VNNI does so. The compiled kernels know for which they were compiled. oneDNN is asked with products that
    would exceed them: a limit that is set on it counts as well.
    """
    if MULTIPLIES:
        found: int = torch.ops.tokcomp_int8.levels()
        return found
    count, width = 16, 64
    weight = torch.full((count, width), WEIGHT_LEVELS, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    q = torch.full((count, width), 255, dtype=torch.uint8)
    products = _multiply(q, packed, torch.ones(count), 128)
    return 127 if bool((products == 127 * WEIGHT_LEVELS * width).all()) else 63

"""Products of int8 on CPU: activations to bytes with a scale for each row, oneDNN's product, and back.

A row x of activations is ``scale * (q - zero)`` with ``scale = max |x| / levels``, ``zero = levels + 1`` and q in 1 to
``2 * levels + 1``; a weight has a scale for each output. oneDNN multiplies exact integers. The scale per row keeps an
image's result apart from what else is in its batch.

The three steps around the product, here in plain PyTorch, have compiled kernels in csrc/cpu/int8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels import _library as _loads_the_compiled_kernels  # noqa: F401

#: The greatest magnitude of a quantised weight.
WEIGHT_LEVELS = 127
_LIBRARY = torch.library.Library("tokcomp_int8", "DEF")
_LIBRARY.define("quantize_rows(Tensor x, int levels) -> (Tensor q, Tensor scale)")
_LIBRARY.define("rescale_rows(Tensor(a!) product, Tensor scale, Tensor? bias, Tensor? residual) -> Tensor(a!)")
_LIBRARY.define(
    "requantize_gelu_rows(Tensor product, Tensor scale, Tensor? bias, int levels) -> (Tensor q, Tensor scale)"
)


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


def rescale_rows_reference(product: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """``product * scale + bias + residual`` into product [..., C]; scale is [...]."""
    product *= scale[..., None]
    for term in (bias, residual):
        if term is not None:
            product += term
    return product


def requantize_gelu_rows_reference(
    product: Tensor, scale: Tensor, bias: Tensor | None, levels: int
) -> tuple[Tensor, Tensor]:
    """GELU of :func:`rescale_rows_reference`, then :func:`quantize_rows_reference`, in one pass."""
    return quantize_rows_reference(F.gelu(rescale_rows_reference(product.clone(), scale, bias, None)), levels)


REFERENCES: dict[str, Callable[..., Any]] = {
    "quantize_rows": quantize_rows_reference,
    "rescale_rows": rescale_rows_reference,
    "requantize_gelu_rows": requantize_gelu_rows_reference,
}
#: Whether compiled kernels were loaded.
IS_NATIVE: bool = torch._C._dispatch_has_kernel_for_dispatch_key("tokcomp_int8::quantize_rows", "CPU")
if not IS_NATIVE:
    for _name, _function in REFERENCES.items():
        _LIBRARY.impl(_name, _function, "CPU")


class Rows(NamedTuple):
    """Quantised activations: bytes q [..., C], a scale [...] for each row."""

    q: Tensor
    scale: Tensor


class Weight(NamedTuple):
    """A quantised weight: ``packed`` for oneDNN, of [out, in] int8; a scale for each output; their zeros."""

    packed: Tensor
    scale: Tensor
    zero: Tensor


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in] and scales [out] of a weight [out, in], within half a scale; a row of zeros has scale 0."""
    scale = weight.abs().amax(1) / WEIGHT_LEVELS
    inverse = torch.where(scale > 0, 1 / scale, 0)
    q = (weight * inverse[:, None]).round().clamp(-WEIGHT_LEVELS, WEIGHT_LEVELS)
    return q.to(torch.int8), scale


def pack_weight(weight: Tensor) -> Weight:
    """A float32 weight [out, in] for :func:`product`."""
    q, scale = quantize_weight(weight)
    packed = torch.ops.onednn.qlinear_prepack(q, None)
    return Weight(packed, scale, torch.zeros(len(scale), dtype=torch.int64))


def product(rows: Rows, weight: Weight, levels: int) -> Tensor:
    """Rows [..., in] times a weight [out, in], transposed, in float32 [..., out], but for the rows' scales."""
    found = _multiply(rows.q, weight.packed, weight.scale, weight.zero, levels + 1)
    return found.view(*rows.q.shape[:-1], len(weight.scale))  # oneDNN forgets the dimensions of an empty batch


def _multiply(q: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, x_zero: int) -> Tensor:
    found: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        q, 1.0, x_zero, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found


def unavailable() -> str | None:
    """Why products of int8 cannot be computed on this CPU, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this PyTorch has no oneDNN products of int8"
    return None


@functools.cache
def activation_levels() -> int:
    """127; or 63 where the processor adds pairs of products in 16 bits, which more could exceed.

    x86 without VNNI does so. The processor itself is asked, with products that would exceed them: a limit that is set
    on oneDNN counts as well.
    """
    count, width = 16, 64
    weight = torch.full((count, width), WEIGHT_LEVELS, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    ones, zeros = torch.ones(count), torch.zeros(count, dtype=torch.int64)
    q = torch.full((count, width), 255, dtype=torch.uint8)
    found = _multiply(q, packed, ones, zeros, 128)
    return 127 if bool((found == 127 * WEIGHT_LEVELS * width).all()) else 63

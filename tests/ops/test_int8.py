"""The steps around a product of int8: compiled kernels against their plain forms, and the product against integers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels import int8

pytestmark = pytest.mark.skipif(int8.unavailable() is not None, reason=str(int8.unavailable()))

SHAPES = [(3, 33, 48), (1, 1, 1), (2, 5, 33), (0, 4, 8), (2, 3, 0), (1, 2, 257)]
EPS = torch.finfo(torch.float32).eps
steps = torch.ops.tokcomp_int8


def values(*shape: int) -> Tensor:
    """Rows of very different ranges, one of zeros."""
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-2])[:, None]
    x[..., :1, :].mul_(0)
    return x


@pytest.mark.parametrize("levels", [63, 127])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_rows_are_the_plain_form_s_to_the_bit(shape: tuple[int, ...], levels: int) -> None:
    torch.manual_seed(0)
    for x in (values(*shape), values(*shape[:-2], shape[-1], shape[-2]).mT):
        found, expected = steps.quantize_rows(x, levels), int8.quantize_rows_reference(x, levels)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        q, scale = found
        error = (scale[..., None] * (q.double() - levels - 1) - x).abs()
        assert (error <= scale[..., None] * (0.5 + levels * EPS)).all()


def test_ties_go_to_the_even_number() -> None:
    q, scale = steps.quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5]]), 127)
    assert scale.item() == 1
    assert (q.int() - 128).tolist() == [[127, 0, 2, 0, -2, 2]]


def test_no_nan_and_no_infinity_is_silent() -> None:
    x = torch.ones(4, 40)
    x[1, 39], x[2, 0], x[3] = float("nan"), float("inf"), 1e-44
    weight = int8.pack_weight(torch.eye(40) + 0.5)
    for quantize in (steps.quantize_rows, int8.quantize_rows_reference):
        q, scale = quantize(x, 63)
        assert scale.isfinite().tolist() == [True, False, False, True]
        product = int8.product(int8.Rows(q, scale), weight, 63)
        out = steps.rescale_rows(product, scale, None, None)
        assert out.isfinite().all(1).tolist() == [True, False, False, True]
        again = steps.requantize_gelu_rows(product, scale, None, 63)[1]
        assert again.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_scaled_as_the_plain_form_says(shape: tuple[int, ...]) -> None:
    """Three roundings of float32, of terms no larger than their sum."""
    torch.manual_seed(1)
    product, scale, bias, residual = values(*shape), torch.rand(shape[:-1]), torch.randn(shape[-1]), values(*shape)
    for more in ((None, None), (bias, None), (None, residual), (bias, residual)):
        exact = int8.rescale_rows_reference(
            product.double(), scale.double(), *(one if one is None else one.double() for one in more)
        )
        terms = (product * scale[..., None]).abs() + sum(one.abs() for one in more if one is not None)
        out = product.clone()
        assert steps.rescale_rows(out, scale, *more).data_ptr() == out.data_ptr()
        assert ((out - exact).abs() <= 3 * EPS * terms).all()


@pytest.mark.parametrize("levels", [63, 127])
def test_gelu_and_the_next_quantisation_in_one_pass(levels: int) -> None:
    torch.manual_seed(2)
    product, scale, bias = values(3, 17, 45), torch.rand(3, 17), torch.randn(45)
    exact = F.gelu(product.double() * scale[..., None] + bias)
    bound = 8 * EPS * (product.abs() * scale[..., None] + bias.abs())
    for function in (steps.requantize_gelu_rows, int8.requantize_gelu_rows_reference):
        q, found = function(product, scale, bias, levels)
        assert ((found * levels - exact.abs().amax(-1)).abs() <= bound.amax(-1) * 2).all()
        step = found[..., None].double()
        assert ((step * (q.double() - levels - 1) - exact).abs() <= step * (0.5 + levels * EPS) + bound).all()


@pytest.mark.parametrize(("rows", "width", "outputs"), [(1, 1, 1), (2, 33, 5), (197, 384, 48), (33, 1536, 7)])
def test_the_product_is_exact_but_for_float32(rows: int, width: int, outputs: int) -> None:
    """With as many levels as this CPU allows, at their extremes, where its sums are largest.

    With AMX the sum of the bytes is rounded to float32 before what the zero adds is taken away, elsewhere after.
    """
    torch.manual_seed(3)
    levels = int8.activation_levels()
    q = torch.randint(1, 2 * levels + 2, (rows, width), dtype=torch.uint8)
    q[: rows // 2] = 2 * levels + 1
    weight = torch.randint(-127, 128, (outputs, width)).float()
    weight[0] = 127
    packed = int8.pack_weight(weight)
    quantised, scale = int8.quantize_weight(weight)
    whole = (q.long() - levels - 1) @ quantised.long().T
    found = int8.product(int8.Rows(q, torch.ones(rows)), packed, levels).double()
    exact, raw = whole * scale.double(), (q.long() @ quantised.long().T) * scale.double()
    assert ((found - exact).abs() <= 2 * EPS * exact.abs() + EPS * raw.abs()).all()


def test_a_processor_that_saturates_gets_fewer_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a processor would say: two products of bytes, added in 16 bits, are at most 32767."""

    def saturating(q: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, x_zero: int) -> Tensor:
        pairs = (q.int() * int8.WEIGHT_LEVELS).unflatten(1, (-1, 2)).sum(2).clamp(-32768, 32767).sum(1)
        return (pairs - x_zero * int8.WEIGHT_LEVELS * q.shape[1]).float()[:, None].expand(-1, len(scale))

    monkeypatch.setattr(int8, "_multiply", saturating)
    assert int8.activation_levels.__wrapped__() == 63
    # With those no pair can exceed 16 bits.
    assert 2 * (2 * 63 + 1) * int8.WEIGHT_LEVELS <= 32767


def test_a_weight_is_quantised_row_by_row() -> None:
    weight = torch.tensor([[254.0, -1.0, 1.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.0]])
    q, scale = int8.quantize_weight(weight)
    assert torch.equal(scale, torch.tensor([254.0, 0.0, 0.5]) / 127)
    assert q.tolist() == [[127, 0, 0], [0, 0, 0], [-127, 64, 0]]

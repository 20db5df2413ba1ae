"""Linear layers on a CPU's tiles against float64, within what rounding and the GELU's polynomials may lose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels import int8, tiles

pytestmark = pytest.mark.skipif(not tiles.USABLE, reason="no tiles of bfloat16 on this CPU")

#: Rows x, inputs, outputs: blocks of rows whole and not, odd numbers of column tiles, depth in one piece and in three.
SHAPES = [
    ((1,), 32, 16),
    ((2, 33), 64, 48),
    ((197,), 384, 80),
    ((129,), 1056, 32),
    ((0, 5), 32, 16),
    ((3, 256), 96, 144),
]


def layer(depth: int, width: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(width, depth).div(depth**0.5).bfloat16(), torch.randn(width).bfloat16()


def assert_right(x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> None:
    found = tiles.linear(x, tiles.pack(weight), bias, gelu=gelu).double()
    before = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    exact = F.gelu(before) if gelu else before
    # Sums in float32 of exact products, in any order; a GELU is nowhere steeper than 1.13; then one rounding.
    terms = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    lost = 1.13 * (x.shape[-1] + 1) * torch.finfo(torch.float32).eps * terms
    if gelu:
        lost = lost + 2e-6 * before.abs()
    bound = lost + torch.finfo(torch.bfloat16).eps / 2 * (exact.abs() + lost) + torch.finfo(torch.bfloat16).tiny
    assert found.shape == exact.shape
    assert ((found - exact).abs() <= bound).all()


@pytest.mark.parametrize(("rows", "depth", "width"), SHAPES)
def test_right_within_rounding(rows: tuple[int, ...], depth: int, width: int) -> None:
    weight, bias = layer(depth, width)
    x = torch.randn(*rows, depth).bfloat16()
    for gelu in (False, True):
        assert_right(x, weight, bias, gelu=gelu)
    assert_right(torch.randn(depth, *rows).bfloat16().movedim(0, -1), weight, None, gelu=False)


def test_gelu_of_every_size() -> None:
    x = torch.cat([torch.linspace(-9, 9, 6001), torch.logspace(-30, 4, 500), -torch.logspace(-30, 4, 500)])
    assert_right(F.pad(x[:, None], (0, 31)).bfloat16(), torch.eye(16, 32).bfloat16(), None, gelu=True)


def test_no_nan_and_no_infinity_is_silent() -> None:
    weight = tiles.pack(torch.eye(32).bfloat16())
    x = torch.ones(40, 32).bfloat16()
    x[1, 3], x[39, 0] = float("nan"), float("inf")
    for gelu in (False, True):
        finite = tiles.linear(x, weight, None, gelu=gelu).isfinite().all(1)
        assert finite.logical_not().nonzero().flatten().tolist() == [1, 39]


def test_an_image_s_result_does_not_depend_on_its_batch_or_threads() -> None:
    weight, bias = layer(1056, 144)
    packed, x = tiles.pack(weight), torch.randn(3, 197, 1056).bfloat16()
    whole = tiles.linear(x, packed, bias, gelu=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for one, image in zip(whole, x, strict=True):
            assert torch.equal(tiles.linear(image, packed, bias, gelu=True), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("rows", "depth", "width"), [(shape[0], 2 * shape[1], shape[2]) for shape in SHAPES])
def test_products_of_int8_are_exact_but_for_their_scales(rows: tuple[int, ...], depth: int, width: int) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(width, depth), torch.randn(width)
    x = int8.Rows(*int8.quantize_rows_reference(torch.randn(*rows, depth), 127))
    q, scale = int8.quantize_weight(weight)
    sums = F.linear(x.q.double() - 128, q.double())
    exact = sums * scale.double() * x.scale[..., None].double() + bias.double()
    packed = tiles.pack_int8(weight)
    eps = torch.finfo(torch.float32).eps
    # An integer becomes a float, is scaled twice, and joins the bias: four roundings.
    lost = 2 * eps * ((exact - bias).abs() + exact.abs())
    found = tiles.linear_int8(x, packed, bias, 127).double()
    assert found.shape == exact.shape and ((found - exact).abs() <= lost).all()
    found = tiles.linear_int8(x, packed, bias, 127, gelu=True).double()
    assert ((found - F.gelu(exact)).abs() <= 1.13 * lost + (2e-6 + 4 * eps) * exact.abs()).all()
    plain = tiles.linear_int8(x, packed, None, 127).double()
    assert ((plain - (exact - bias)).abs() <= 2 * lost + eps * bias.abs()).all()


def test_what_does_not_fit_is_refused() -> None:
    weight, bias = layer(64, 48)
    packed = tiles.pack(weight)
    takes = [tiles.takes(weight[:, :depth], dtype) for depth in (64, 32, 33) for dtype in (torch.bfloat16, torch.int8)]
    assert takes == [True, True, True, False, False, False] and not tiles.takes(weight, torch.float32)
    for x in (torch.zeros(2, 32).bfloat16(), torch.zeros(2, 64)):
        with pytest.raises(ValueError, match=r"x must be bfloat16 \[..., 64\]"):
            tiles.linear(x, packed, bias)
    with pytest.raises(ValueError, match="bias must be BFloat16 of 48"):
        tiles.linear(torch.zeros(2, 64).bfloat16(), packed, bias[:-1])
    with pytest.raises(ValueError, match="multiple of 16"):
        tiles.pack(weight[:-1])

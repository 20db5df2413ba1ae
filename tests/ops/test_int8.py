"""Linear layers of int8: quantised rows against their plain form, layers against integers and float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels import int8

pytestmark = pytest.mark.skipif(int8.unavailable() is not None, reason=str(int8.unavailable()))

SHAPES = [(3, 33, 48), (1, 1, 1), (2, 5, 33), (0, 4, 8), (2, 3, 0), (1, 2, 257)]
#: Rows x, inputs, outputs: tiles of rows and of depth whole and not, blocks of rows, panels of every width, one thread
#: and more.
LAYERS = [((1,), 1, 1), ((2,), 33, 5), ((0, 3), 8, 4), ((2, 3), 4, 0), ((197,), 384, 48), ((33,), 1536, 7)]
LAYERS += [((1, 577), 384, 80), ((13, 2), 6, 144), ((129,), 68, 1000)]
EPS = torch.finfo(torch.float32).eps
steps = torch.ops.tokcomp_int8


@pytest.fixture(params=["own", "onednn"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Our own products, and oneDNN's, which stand in where none are compiled."""
    if request.param == "own" and not int8.MULTIPLIES:
        pytest.skip("no kernels are compiled for this CPU")
    if request.param == "onednn":
        if not hasattr(torch.ops.onednn, "qlinear_prepack"):
            pytest.skip("this PyTorch has no oneDNN products of int8")
        monkeypatch.setattr(int8, "MULTIPLIES", False)
    int8.activation_levels.cache_clear()
    yield request.param
    int8.activation_levels.cache_clear()


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


def extreme_layer(rows: tuple[int, ...], width: int, outputs: int) -> tuple[int8.Rows, Tensor]:
    """As many levels as this CPU allows, at their extremes, where sums are largest."""
    levels = int8.activation_levels()
    q = torch.randint(1, 2 * levels + 2, (*rows, width), dtype=torch.uint8)
    q[: len(q) // 2] = 2 * levels + 1
    weight = torch.randint(-127, 128, (outputs, width)).float()
    weight[:1] = 127
    weight[:, :1] = 127  # so that integers are quantised as they are
    return int8.Rows(q, torch.rand(rows)), weight


@pytest.mark.parametrize(("rows", "width", "outputs"), LAYERS)
def test_products_are_exact_but_for_their_scales(rows: tuple[int, ...], width: int, outputs: int) -> None:
    """An integer becomes a float, is scaled twice, and joins bias and residual: five roundings, of terms no larger than
    their sum. oneDNN with AMX rounds the sum of the bytes to float32 before what the zero adds is taken away."""
    torch.manual_seed(3)
    levels = int8.activation_levels()
    x, weight = extreme_layer(rows, width, outputs)
    packed = int8.pack_weight(weight)
    quantised, scale = int8.quantize_weight(weight)
    both = scale.double() * x.scale.double()[..., None]
    product = F.linear(x.q.double() - levels - 1, quantised.double()) * both
    raw = 0 if int8.MULTIPLIES else EPS * F.linear(x.q.double(), quantised.double()).abs() * both
    bias, residual = torch.randn(outputs), torch.randn(*rows, outputs)
    for more in ((None, None), (bias, None), (None, residual), (bias, residual.mT.contiguous().mT)):
        added = [one.double() for one in more if one is not None]
        exact, terms = sum(added, product), sum((one.abs() for one in added), product.abs())
        found = int8.linear(x, packed, more[0], levels, residual=more[1])
        assert found.shape == exact.shape and found.dtype == torch.float32
        assert ((found - exact).abs() <= 2.5 * EPS * terms + raw).all()


@pytest.mark.parametrize(("rows", "width", "outputs"), LAYERS)
def test_what_is_not_quantised_yet_is_quantised_first(rows: tuple[int, ...], width: int, outputs: int) -> None:
    torch.manual_seed(4)
    levels = int8.activation_levels()
    x, bias = torch.randn(*rows, width), torch.randn(outputs)
    packed = int8.pack_weight(torch.randn(outputs, width))
    quantised = int8.quantize_rows(x, levels)
    odd = torch.randn(width, *rows).movedim(0, -1)
    assert torch.equal(int8.linear(x, packed, bias, levels), int8.linear(quantised, packed, bias, levels))
    assert torch.equal(int8.linear(odd, packed, bias, levels), int8.linear(odd.contiguous(), packed, bias, levels))
    for one, other in zip(
        int8.linear_gelu(x, packed, bias, levels), int8.linear_gelu(quantised, packed, bias, levels), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("rows", "width", "outputs"), [layer for layer in LAYERS if layer[2] > 0])
def test_gelu_and_the_next_quantisation(rows: tuple[int, ...], width: int, outputs: int) -> None:
    torch.manual_seed(2)
    levels = int8.activation_levels()
    x, bias, weight = torch.randn(*rows, width), torch.randn(outputs), torch.randn(outputs, width)
    packed = int8.pack_weight(weight)
    before = int8.linear(x, packed, bias, levels).double()
    exact = F.gelu(before)
    bound = (2e-6 + 4 * EPS) * before.abs()
    q, found = int8.linear_gelu(x, packed, bias, levels)
    assert q.shape == exact.shape and found.shape == exact.shape[:-1]
    assert ((found * levels - exact.abs().amax(-1)).abs() <= 2 * bound.amax(-1) + EPS * exact.abs().amax(-1)).all()
    step = found[..., None].double()
    assert ((step * (q.double() - levels - 1) - exact).abs() <= step * (0.5 + levels * EPS) + bound).all()


def test_no_nan_and_no_infinity_is_silent() -> None:
    levels = int8.activation_levels()
    x = torch.ones(4, 40)
    x[1, 39], x[2, 0], x[3] = float("nan"), float("inf"), 1e-44
    weight = int8.pack_weight(torch.eye(40) + 0.5)
    for quantize in (steps.quantize_rows, int8.quantize_rows_reference):
        rows = int8.Rows(*quantize(x, levels))
        assert rows.scale.isfinite().tolist() == [True, False, False, True]
        assert int8.linear(rows, weight, None, levels).isfinite().all(1).tolist() == [True, False, False, True]
        again = int8.linear_gelu(rows, weight, None, levels).scale
        assert again.isfinite().tolist() == [True, False, False, True]


def test_an_image_s_result_does_not_depend_on_its_batch_or_threads() -> None:
    torch.manual_seed(5)
    levels, x, bias = int8.activation_levels(), torch.randn(5, 197, 132), torch.randn(1537)
    packed = int8.pack_weight(torch.randn(1537, 132))
    whole, hidden = int8.linear(x, packed, bias, levels), int8.linear_gelu(x, packed, bias, levels)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for index, image in enumerate(x):
            assert torch.equal(int8.linear(image, packed, bias, levels), whole[index])
            for one, other in zip(int8.linear_gelu(image, packed, bias, levels), hidden, strict=True):
                assert torch.equal(one, other[index])
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused(products: str) -> None:
    if products == "onednn":
        pytest.skip("oneDNN has words of its own")
    levels, packed = int8.activation_levels(), int8.pack_weight(torch.randn(6, 8))
    for x, more, message in (
        (torch.zeros(2, 12), {}, r"weight must be packed of \[6, 12\]"),
        (torch.zeros(2, 8).double(), {}, "x must be float32"),
        (torch.zeros(2, 8), {"bias": torch.zeros(5)}, "bias must be Float of 6 elements"),
        (torch.zeros(2, 8), {"residual": torch.zeros(3, 6)}, "residual must be Float of 12 elements"),
        (int8.Rows(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(3)), {}, "row_scale must be Float of 2 elements"),
    ):
        with pytest.raises(ValueError, match=message):
            int8.linear(x, packed, more.get("bias"), levels, residual=more.get("residual"))
    with pytest.raises(ValueError, match="levels must be 1 to"):
        int8.linear(torch.zeros(2, 8), packed, None, levels + 1)
    with pytest.raises(ValueError, match="weight must be int8"):
        steps.pack(torch.zeros(2, 8))


def test_a_processor_that_saturates_gets_fewer_levels(products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN would say there: two products of bytes, added in 16 bits, are at most 32767."""

    def saturating(q: Tensor, packed: Tensor, scale: Tensor, zero: int) -> Tensor:
        pairs = (q.int() * int8.WEIGHT_LEVELS).unflatten(1, (-1, 2)).sum(2).clamp(-32768, 32767).sum(1)
        return (pairs - zero * int8.WEIGHT_LEVELS * q.shape[1]).float()[:, None].expand(-1, len(scale))

    assert int8.activation_levels() in (63, 127)
    monkeypatch.setattr(int8, "_multiply", saturating)
    int8.activation_levels.cache_clear()
    assert int8.activation_levels() == (63 if products == "onednn" else steps.levels())
    # With those no pair can exceed 16 bits.
    assert 2 * (2 * 63 + 1) * int8.WEIGHT_LEVELS <= 32767


def test_a_weight_is_quantised_row_by_row() -> None:
    weight = torch.tensor([[254.0, -1.0, 1.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.0]])
    q, scale = int8.quantize_weight(weight)
    assert torch.equal(scale, torch.tensor([254.0, 0.0, 0.5]) / 127)
    assert q.tolist() == [[127, 0, 0], [0, 0, 0], [-127, 64, 0]]

"""Gradients past frozen linear layers through packed weights: right, lean, and taken only where they may be."""

from __future__ import annotations

import pytest
import torch
from tokcomp import fastpath
from tokcomp.fastpath import frozen, packing
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")

IN, HIDDEN, OUT = 24, 72, 40
DTYPES = [torch.float32, torch.bfloat16]
#: |gelu'| and |gelu''| stay below these.
SLOPE, CURVATURE = 1.13, 0.8


def rounding(terms: int, dtype: torch.dtype) -> float:
    """Relative error of a sum of products: ``terms`` roundings in float32, then one to ``dtype``."""
    unit = torch.finfo(torch.float32).eps
    return terms * unit / (1 - terms * unit) + (torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)


class Layers(nn.Module):
    def __init__(self, seed: int, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(IN, HIDDEN, bias=bias), nn.Linear(HIDDEN, OUT, bias=bias)
        self.to(dtype).requires_grad_(False)

    def pack(self, x: torch.Tensor) -> packing.PackedWeights:
        packed = fastpath.packed_weights(self, [self.first, self.second], x, frozen=True)
        assert packed is not None
        return packed


@pytest.fixture
def in_hardware(set_products):
    set_products(bfloat16="bfloat16")


def exact(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    weight = layer.weight.double()
    return weight, torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.double()


def make(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_linear(seed, dtype, with_residual, in_hardware):
    layers = Layers(seed, dtype, bias=seed != 2)
    x = make((3, 5, IN), seed + 10, dtype).requires_grad_()
    residual = make((3, 5, HIDDEN), seed + 20, dtype).requires_grad_() if with_residual else None
    grad = make((3, 5, HIDDEN), seed + 30, dtype)
    packed = layers.pack(x)
    if residual is None:
        out = fastpath.linear(packed, layers.first, x)
    else:
        out = fastpath.linear_add(packed, layers.first, x, residual)
    out.backward(grad)

    weight, bias = exact(layers.first)
    want = F.linear(x.detach().double(), weight, bias)
    reach = F.linear(x.detach().double().abs(), weight.abs(), bias.abs())
    if residual is not None:
        want, reach = want + residual.detach().double(), reach + residual.detach().double().abs()
        assert torch.equal(residual.grad, grad)
    # oneDNN may round the product before it adds the residual.
    assert ((out.double() - want).abs() <= 2 * rounding(IN + 2, dtype) * reach).all()
    wanted_grad, reach = grad.double() @ weight, grad.double().abs() @ weight.abs()
    assert ((x.grad.double() - wanted_grad).abs() <= rounding(HIDDEN, dtype) * reach).all()
    assert out.dtype == x.grad.dtype == dtype and layers.first.weight.grad is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_gelu_mlp(seed, dtype, groups, monkeypatch, in_hardware):
    if groups > 1:
        monkeypatch.setattr(frozen, "_images_at_once", lambda *_: 2)
    layers = Layers(seed, dtype)
    x = make((5, 4, IN), seed + 10, dtype).requires_grad_()
    residual = make((5, 4, OUT), seed + 20, dtype).requires_grad_() if seed else None
    grad = make((5, 4, OUT), seed + 30, dtype)
    out = fastpath.gelu_mlp(layers.pack(x), layers.first, layers.second, x, residual)
    out.backward(grad)

    (weight1, bias1), (weight2, bias2) = exact(layers.first), exact(layers.second)
    values = x.detach().double().requires_grad_()
    before = F.linear(values, weight1, bias1)
    after = F.gelu(before)
    want = F.linear(after, weight2, bias2)
    want.backward(grad.double())
    want = want.detach() if residual is None else want.detach() + residual.detach().double()

    # Errors, step by step: before the GELU, after it, at the end; then back. erf and exp are good to a few units.
    function = 8 * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    before, after = before.detach().abs(), after.detach().abs()
    off_before = rounding(IN + 1, dtype) * F.linear(x.detach().double().abs(), weight1.abs(), bias1.abs())
    off_after = SLOPE * off_before + function * (after + before)
    reach = F.linear(after + off_after, weight2.abs(), bias2.abs())
    reach = reach if residual is None else reach + residual.detach().double().abs()
    off_out = F.linear(off_after, weight2.abs()) + 2 * rounding(HIDDEN + 2, dtype) * reach
    assert ((out.double() - want).abs() <= off_out).all()

    inner, reach = (grad.double() @ weight2).abs(), grad.double().abs() @ weight2.abs()
    off_inner = SLOPE * rounding(OUT, dtype) * reach + inner * (CURVATURE * off_before + function * (1 + before))
    reach = (SLOPE * inner + off_inner) @ weight1.abs()
    off_grad = off_inner @ weight1.abs() + rounding(HIDDEN, dtype) * reach
    assert ((x.grad.double() - values.grad).abs() <= off_grad).all()
    if residual is not None:
        assert torch.equal(residual.grad, grad)


@pytest.mark.parametrize("used", [(0, 1, 2), (1, 2), (2,)], ids=["q-k-v", "k-v", "v"])
def test_heads(used):
    layers = Layers(25, torch.float32)  # HIDDEN = 3 parts of 2 heads of 12
    x = make((3, 5, IN), 26, torch.float32).requires_grad_()
    heads = fastpath.linear_heads(layers.pack(x), layers.first, x, 2)
    wanted = layers.first(x).view(3, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
    grads = make((3, 3, 2, 5, 12), 27, torch.float32)
    for have, want in zip(heads, wanted, strict=True):
        torch.testing.assert_close(have, want)
        assert have.untyped_storage().data_ptr() == heads[0].untyped_storage().data_ptr()  # no copies
    [have] = torch.autograd.grad([heads[part] for part in used], x, [grads[part] for part in used])
    [want] = torch.autograd.grad([wanted[part] for part in used], x, [grads[part] for part in used])
    torch.testing.assert_close(have, want)
    with torch.no_grad():
        for have, want in zip(fastpath.linear_heads(layers.pack(x), layers.first, x, 2), heads, strict=True):
            assert torch.equal(have, want) and not have.requires_grad


def test_tanh_gelu():
    layers = Layers(4, torch.float32)
    x = make((2, 3, IN), 5, torch.float32).requires_grad_()
    out = fastpath.gelu_mlp(layers.pack(x), layers.first, layers.second, x, approximate="tanh")
    want = layers.second(F.gelu(layers.first(x), approximate="tanh"))
    [have_grad], [want_grad] = torch.autograd.grad(out.sum(), x), torch.autograd.grad(want.sum(), x)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(have_grad, want_grad)
    assert (out - fastpath.gelu_mlp(layers.pack(x), layers.first, layers.second, x)).abs().max() > 1e-5


STRIDED = {
    "transposed": lambda x: x.transpose(0, 1),
    "strided columns": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_any_strides_and_no_images(view):
    layers = Layers(6, torch.float32)
    base = make((4, 4, IN), 7, torch.float32)
    x = view(base).detach().requires_grad_()
    packed = layers.pack(x)
    grad = view(make((4, 4, OUT), 8, torch.float32))
    out = fastpath.gelu_mlp(packed, layers.first, layers.second, x) + fastpath.linear(
        packed, layers.second, fastpath.linear(packed, layers.first, x)
    )
    hidden = layers.first(x)
    want = layers.second(F.gelu(hidden)) + layers.second(hidden)
    torch.testing.assert_close(out, want)
    [have_grad], [want_grad] = (torch.autograd.grad(one, x, grad) for one in (out, want))
    torch.testing.assert_close(have_grad, want_grad)


def test_same_bits_whatever_else_is_in_the_batch():
    layers = Layers(9, torch.float32)
    x = make((7, 5, IN), 10, torch.float32)
    grad = make((7, 5, OUT), 11, torch.float32)

    def run(part):
        one = x[part].clone().requires_grad_()
        fastpath.gelu_mlp(layers.pack(one), layers.first, layers.second, one).backward(grad[part])
        return one.grad

    whole = run(slice(None))
    assert torch.equal(whole, run(slice(None)))
    torch.testing.assert_close(whole[2:4], run(slice(2, 4)))


def test_what_is_kept_for_the_backward_pass():
    layers = Layers(12, torch.float32)
    x = make((2, 3, IN), 13, torch.float32).requires_grad_()
    residual = make((2, 3, OUT), 14, torch.float32).requires_grad_()
    packed = layers.pack(x)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: shapes.append(kept.shape) or kept, lambda kept: kept):
        fastpath.linear(packed, layers.first, x)
        fastpath.linear_add(packed, layers.second, x.new_ones(2, 3, HIDDEN), residual)
        assert shapes == []
        fastpath.gelu_mlp(packed, layers.first, layers.second, x, residual)
        assert shapes == [(2, 3, HIDDEN)]


def test_transposed_copies_are_made_when_a_gradient_passes():
    layers = Layers(15, torch.float32)
    x = make((2, 3, IN), 16, torch.float32)
    packed = layers.pack(x)
    once = 4 * (IN * HIDDEN + HIDDEN * OUT)
    fastpath.gelu_mlp(packed, layers.first, layers.second, x)
    fastpath.linear_add(packed, layers.second, x.new_ones(2, 3, HIDDEN), make((2, 3, OUT), 1, x.dtype).requires_grad_())
    assert packed.nbytes == once
    fastpath.linear(packed, layers.first, x.requires_grad_())
    assert packed.nbytes == once + 4 * IN * HIDDEN
    fastpath.gelu_mlp(packed, layers.first, layers.second, x)
    assert packed.nbytes == 2 * once


CHANGES = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "through numpy": lambda weight: weight.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_packed_anew(change):
    layers = Layers(17, torch.float32)
    x = make((2, 3, IN), 18, torch.float32).requires_grad_()

    def gradient():
        return torch.autograd.grad(fastpath.linear(layers.pack(x), layers.first, x).sum(), x)[0]

    before = gradient()
    change(layers.first.weight)
    torch.testing.assert_close(gradient(), 2 * before)


def test_a_weight_changed_between_the_passes_does_not_matter():
    layers = Layers(19, torch.float32)
    x = make((2, 3, IN), 20, torch.float32).requires_grad_()
    want = torch.autograd.grad(layers.first(x).sum(), x)[0]
    out = fastpath.linear(layers.pack(x), layers.first, x)
    layers.first.weight.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], want)


def test_second_derivative_is_refused():
    layers = Layers(21, torch.float32)
    x = make((2, 3, IN), 22, torch.float32).requires_grad_()
    packed = layers.pack(x)
    for out in (
        fastpath.linear(packed, layers.first, x),
        fastpath.linear_heads(packed, layers.first, x, 2)[1],
        fastpath.gelu_mlp(packed, layers.first, layers.second, x),
    ):
        [grad] = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


def test_refused_where_it_does_not_serve(set_products):
    set_products(bfloat16="bfloat16", float16="float32")
    layers = Layers(23, torch.float32)
    x = make((2, 3, IN), 24, torch.float32)

    def packed(x=x, frozen=True):
        return fastpath.packed_weights(layers, [layers.first, layers.second], x, frozen=frozen)

    assert packed() is not None and packed(x.requires_grad_()) is not None
    assert packed(frozen=False) is None  # inference's rule: no gradients at all
    assert packed(x.detach().double()) is None and packed(x.detach().bfloat16()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert packed() is None
        cast = fastpath.packed_weights(layers, [layers.first], x, frozen=True, autocast=True)
        assert cast is not None and cast.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert fastpath.packed_weights(layers, [layers.first], x, frozen=True, autocast=True) is None
    for parameter in (layers.first.weight, layers.second.bias):
        parameter.requires_grad_(True)
        assert packed() is None
        with torch.no_grad():
            assert packed() is not None
        parameter.requires_grad_(False)
    layers.first.to("meta")
    assert packed() is None

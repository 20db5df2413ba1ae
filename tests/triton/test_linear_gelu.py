"""The Triton product with a GELU: partial blocks on every side, groups of blocks, and how the dispatcher treats it."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import tokcomp_kernels.triton.linear_gelu as linear_gelu_module
from tests.triton.inputs import DEVICE, DTYPES, SMALLEST, UNIT, normal
from tokcomp_kernels import linear_gelu
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import Sample
from tokcomp_kernels.triton._gelu import LONG_ERROR, SHORT_ERROR
from tokcomp_kernels.triton.linear_gelu import linear_gelu_triton


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "features", "width"), [(1, 1, 1), (97, 70, 33), (64, 32, 48)], ids=str)
def test_every_block_is_written_once(rows, features, width, dtype, monkeypatch):
    """Small blocks in groups of two, so that the last group is smaller and every edge is a partial block."""
    tiles = {"BLOCK_M": 16, "BLOCK_F": 16, "BLOCK_K": 16, "GROUP_M": 2, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(linear_gelu_module, "launch_config", lambda *_, **__: tiles)
    x, weight, bias = (
        normal(0, rows, width, dtype=dtype),
        normal(1, features, width, dtype=dtype),
        normal(2, features, dtype=dtype),
    )
    sample = Sample("linear_gelu", "blocks", (x, weight, bias))
    out = linear_gelu_triton(*sample.args)
    assert_right(sample, out)
    assert torch.equal(out, linear_gelu_triton(*sample.args))
    assert torch.equal(out[-1:], linear_gelu_triton(x[-1:], weight, bias)), "a row depends on the others"


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, of -inf + inf
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_is_within_the_rounding_of_its_type(dtype):
    """Against float64's erf, tails included: nothing cancels, so the error of Q is relative wherever GELU is small.

    Beyond the fit's error, Q(a) = P(1 / (1 + p a)) 2^(-a^2 log2(e) / 2): three roundings of the exponent count a^2 / 2
    times each; P's 8 steps, whose terms add up to twice their sum, the inverse and the power 40 units in all.
    """
    x = torch.cat([torch.linspace(-14, 14, 1021), torch.tensor([0.0, -0.0, 1e-30, 3e4, -3e4, 1e-3])]).to(dtype)
    out = linear_gelu_triton(x[:, None].to(DEVICE), torch.ones(1, 1, dtype=dtype, device=DEVICE))[:, 0].double().cpu()
    exact, tail = x.double(), torch.special.erfc(x.double().abs() / 2**0.5) / 2
    want = exact.clamp(min=0) - exact.abs() * tail
    fit = LONG_ERROR if dtype == torch.float32 else SHORT_ERROR
    lost = exact.abs() * tail * (fit + (1.5 * exact**2 + 40) * UNIT[torch.float32])
    assert bool(((out - want).abs() <= lost + UNIT[dtype] * want.abs() * 1.01 + max(SMALLEST[dtype], 2.0**-126)).all())
    special = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype, device=DEVICE)
    have = linear_gelu_triton(special[:, None], torch.ones(1, 1, dtype=dtype, device=DEVICE))[:, 0].cpu()
    assert have.isnan().tolist() == [True, False, True] and have[1] == float("inf")


def test_shapes_and_layouts():
    weight, bias = normal(0, 6, 20), normal(1, 6)
    assert linear_gelu_triton(normal(2, 20), weight, bias).shape == (6,)
    x = normal(3, 2, 3, 4, 40)[..., ::2].transpose(0, 2)
    out = linear_gelu_triton(x, weight, bias)
    assert out.shape == (4, 3, 2, 6) and out.is_contiguous()
    torch.testing.assert_close(out, F.gelu(F.linear(x, weight, bias)), rtol=0, atol=2e-6)
    assert linear_gelu_triton(x[:0], weight).shape == (0, 3, 2, 6)
    assert linear_gelu_triton(x, weight[:0], bias[:0]).shape == (4, 3, 2, 0)
    empty = linear_gelu_triton(x[..., :0], weight[:, :0], bias)
    torch.testing.assert_close(empty, F.gelu(bias).expand(4, 3, 2, 6))


def test_frozen_weights_cost_no_gradient():
    x, weight, bias = normal(0, 3, 5).requires_grad_(), normal(1, 4, 5), normal(2, 4)
    out = linear_gelu(x, weight, bias)
    saved = out.grad_fn.saved_tensors
    assert [tuple(t.shape) for t in saved] == [(3, 5), (4, 5), (4,)], "what lies before the GELU is not kept"
    (grad,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)).sum(), x)
    torch.testing.assert_close(grad, want)

"""Linear layers in training through oneDNN: right, used where they should be, and nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from tokcomp.fastpath import training
from tokcomp.fastpath.training import FastLinear
from tokcomp.finetune.tuner import FineTuner
from tokcomp.runs.recipe import FINETUNE_RECIPE

pytestmark = pytest.mark.skipif(training._product is None, reason="this torch has no oneDNN")


def make(rows, width, out, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*rows, width), (out, width), (out,), (*rows, out)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(tensors, *, fast, bias=True, frozen=False):
    x, weight, offset, grad = (tensor.clone() for tensor in tensors)
    leaves = [x.requires_grad_()]
    if not frozen:
        leaves.append(weight.requires_grad_())
    if bias:
        leaves.append(offset.requires_grad_())
    arguments = (x, weight, offset) if bias else (x, weight)
    if fast:
        with FastLinear():
            out = F.linear(*arguments)
    else:
        out = F.linear(*arguments)
    return out, [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("rows", "width", "out"), [((4, 197), 96, 288), ((1201,), 70, 130), ((2, 3, 50), 384, 384)])
def test_as_right_as_the_plain_layer(rows, width, out, bias, frozen):
    tensors = make(rows, width, out)
    fast, have = run(tensors, fast=True, bias=bias, frozen=frozen)
    assert type(fast.grad_fn).__name__ == "_LinearBackward"
    _, plain = run(tensors, fast=False, bias=bias, frozen=frozen)
    _, exact = run([tensor.double() for tensor in tensors], fast=False, bias=bias, frozen=frozen)
    for one, other, want in zip(have, plain, exact, strict=True):
        # The plain layer's rounding is one draw and oneDNN's another, of as long a sum.
        bound = 8 * (other - want).abs().max() + torch.finfo(torch.float32).eps * want.abs().max()
        assert one.shape == want.shape and one.is_contiguous()
        assert (one - want).abs().max() <= bound


def test_strides_of_any_kind():
    x, weight, offset, grad = make((300, 128), 96, 96)
    x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    _, have = run((x, weight, offset, grad), fast=True)
    _, want = run((x.double(), weight.double(), offset.double(), grad.double()), fast=False)
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5 * other.abs().max().item())


def test_same_bits_twice():
    tensors = make((4, 197), 96, 288)
    for one, other in zip(run(tensors, fast=True)[1], run(tensors, fast=True)[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", ["float64", "small", "no gradient", "autocast", "transposed weight"])
def test_everything_else_is_left_alone(case):
    x, weight, offset, _ = make((4, 4) if case == "small" else (4, 197), 96, 96)
    if case == "float64":
        x, weight, offset = x.double(), weight.double(), offset.double()
    if case == "transposed weight":
        weight = weight.t()
    weight.requires_grad_(case != "no gradient")
    with FastLinear(), torch.autocast("cpu", enabled=case == "autocast"):
        out = F.linear(x, weight, offset)
    assert out.grad_fn is None or type(out.grad_fn).__name__ != "_LinearBackward"
    if case != "autocast":
        assert torch.equal(out, F.linear(x, weight, offset))


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_training_step_uses_it_unless_blocks_are_recomputed(make_vit, images_for, monkeypatch, recomputes):
    calls = []
    monkeypatch.setattr(training, "_product", lambda *args, inner=training._product: calls.append(1) or inner(*args))
    found = []
    for fast, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        model = make_vit(embed_dim=96, depth=2).to(dtype)
        tokcomp.compress(model, tokcomp.ToMe(2)).set_grad_checkpointing(recomputes)
        tuner = FineTuner(
            model,
            replace(FINETUNE_RECIPE, mixup=0.0, cutmix=0.0),
            num_classes=5,
            total_steps=2,
            steps_per_epoch=2,
            device=torch.device("cpu"),
            fast_linear=fast,
        )
        images = images_for(model, 64).to(dtype)
        calls.clear()
        tuner.step(images, torch.arange(64) % 5)
        # Forward, and both gradients, of four layers in each of two blocks.
        assert len(calls) == (24 if fast and not recomputes else 0)
        found.append([parameter.grad.double() for parameter in model.parameters()])
    for fast, plain, exact in zip(*found, strict=True):
        assert (fast - exact).norm() <= 8 * (plain - exact).norm() + 1e-6 * exact.norm()

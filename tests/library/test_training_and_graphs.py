"""Gradients, training mode, autocast, torch.compile and torch.export of compressed models."""

from __future__ import annotations

import pytest
import tokcomp
import torch

from tests.library.conftest import METHODS as VIT_METHODS
from tests.library.small_caformer import caformer
from tests.library.test_caformer import METHODS as CAFORMER_METHODS

METHODS = {"vit": {**VIT_METHODS, "tome_mlp": tokcomp.ToMeMLP(6)}, "caformer": CAFORMER_METHODS}
_SHARED = dict(drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.2)
DROPOUTS = {
    "vit": dict(**_SHARED, pos_drop_rate=0.1, attn_drop_rate=0.1, patch_drop_rate=0.2),
    "caformer": dict(**_SHARED, attn_drop=0.1),
}


@pytest.fixture(params=[(kind, name) for kind in METHODS for name in METHODS[kind]], ids="-".join)
def compressed(request, make_vit):
    """A small model of one kind under one method, made with options of its kind: compressed({kind: options})."""
    kind, name = request.param

    def make(options=None):
        model = (make_vit if kind == "vit" else caformer)(**(options or {}).get(kind, {}))
        return tokcomp.compress(model, METHODS[kind][name])

    return make


def test_gradients_reach_every_parameter(compressed, images_for):
    model = compressed().double()
    model(images_for(model).double()).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# A CAFormer's merge weighted by similarity is left out: sizes, and with them the similarity, carry no gradient.
@pytest.mark.parametrize(
    "compressed",
    [("vit", "diffrate"), ("vit", "tome_mlp"), ("caformer", "merge"), ("caformer", "prune")],
    ids="-".join,
    indirect=True,
)
def test_gradient_is_the_slope(compressed, images_for):
    """The change of the loss along a small step, tokens' groups unchanged, against the gradient."""
    model = compressed().double()
    images = images_for(model).double()
    weight = (model.blocks if hasattr(model, "blocks") else model.stages[2].blocks)[1].mlp.fc1.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (slope,) = torch.autograd.grad(model(images).square().sum(), weight)
    step = 1e-6
    with torch.no_grad():
        weight.add_(direction, alpha=step)
        above = model(images).square().sum()
        weight.sub_(direction, alpha=2 * step)
        below = model(images).square().sum()
    # Central difference: error step^2 times the third derivative, and float64 rounding divided by the step.
    torch.testing.assert_close((above - below) / (2 * step), (slope * direction).sum(), rtol=1e-6, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(compressed, images_for):
    model = compressed().double()
    images = images_for(model).double()
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-12, rtol=1e-9)


def test_training_mode_with_all_dropouts(compressed, images_for):
    model = compressed(DROPOUTS).train()
    images = images_for(model)
    torch.manual_seed(0)
    first, second = model(images), model(images)
    first.sum().backward()
    assert not torch.equal(first, second) and first.isfinite().all()
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_autocast(make_vit, method, images_for):
    model = tokcomp.compress(make_vit(), method)
    images = images_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
        logits.sum().backward()
        with torch.no_grad():
            assert model(images).isfinite().all()
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dynamic"),
    [
        (tokcomp.DiffRate(tokcomp.CompressionSchedule([14, 11], [12, 6])), True),
        (tokcomp.EViT(0.6, blocks=(1,)), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_compile(make_vit, images_for, method, dynamic):
    torch._dynamo.reset()
    model = tokcomp.compress(make_vit(depth=2), method)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        for batch in (3, 5) if dynamic else (3,):
            images = images_for(model, batch, seed=batch)
            torch.testing.assert_close(compiled(images), model(images), atol=2e-5, rtol=0)
    images = images_for(model)
    compiled(images).sum().backward()
    compiled_grad = model.patch_embed.proj.weight.grad.clone()
    model.zero_grad()
    model(images).sum().backward()
    torch.testing.assert_close(compiled_grad, model.patch_embed.proj.weight.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressed",
    [*(("vit", name) for name in VIT_METHODS), ("caformer", "prune_merge"), ("caformer", "tome")],
    ids="-".join,
    indirect=True,
)
def test_export(compressed, images_for):
    model = compressed()
    batch = torch.export.Dim("batch", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images_for(model),), dynamic_shapes=({0: batch},))
        images = images_for(model, batch=5, seed=1)
        torch.testing.assert_close(program.module()(images), model(images), atol=2e-5, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(make_vit, method, images_for, grad):
    """The packed path of inference would drop the tangents without a word."""
    from torch.autograd import forward_ad

    model = tokcomp.compress(make_vit(), method).requires_grad_(False)
    images = images_for(model)
    with torch.set_grad_enabled(grad), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward AD"):
        model(forward_ad.make_dual(images, torch.ones_like(images)))
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(model, (images,), (torch.ones_like(images),))

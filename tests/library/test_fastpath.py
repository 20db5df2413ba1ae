"""Inference on CPU through packed weights: taken when it may be, unnoticed, and never stale."""

from __future__ import annotations

import copy
import gc

import pytest
import tokcomp
import torch
from tokcomp.adapters.timm_vit import fast as timm_vit_fast
from tokcomp.fastpath import packing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.multiplied import Multiplied
from tests.threads import in_threads

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),  # of the switch that ordinary() uses
]

METHOD = tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 14, 11, 11], [17, 12, 11, 6]))
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calls(monkeypatch):
    """Layers that went through the packed weights."""
    seen = []
    for name in ("linear", "linear_gelu", "linear_add"):
        original = getattr(packing.PackedWeights, name)

        def spy(self, layer, *args, original=original):
            seen.append(layer)
            return original(self, layer, *args)

        monkeypatch.setattr(packing.PackedWeights, name, spy)
    return seen


@pytest.fixture
def model(make_vit):
    return tokcomp.compress(make_vit(), METHOD)


def ordinary(model, images=IMAGES):
    """The same model's logits without the fast path."""
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        return model(images)


def close(ours, expected, tolerance=2e-5):
    # The same float32 sums in another order, on logits of order 1.
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


def test_every_layer_is_packed(model, calls):
    with torch.no_grad():
        fast = model(IMAGES)
    assert len(calls) == 4 * 4 + 1
    calls.clear()
    close(fast, ordinary(model))
    assert not calls
    with torch.inference_mode():
        close(model(IMAGES), fast)
    assert len(calls) == 17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_no_worse_than_the_ordinary_path(make_vit, calls, dtype, half_products):
    torch.manual_seed(0)
    schedule = tokcomp.CompressionSchedule([17] * 4, [17] * 4)  # no token to be sorted the other way by rounding
    model = tokcomp.compress(make_vit(embed_dim=48), tokcomp.DiffRate(schedule)).to(dtype)
    images = torch.randn(8, 3, 32, 32).to(dtype)
    exact = ordinary(copy.deepcopy(model).double(), images.double())
    slow_error = (ordinary(model, images).double() - exact).abs().mean()
    with torch.no_grad():
        fast = model(images)
    assert fast.dtype == dtype and len(calls) == 17
    assert packing.packed_now(model).dtype == (dtype if half_products else torch.float32)
    assert (fast.double() - exact).abs().mean() < 1.5 * slow_error


def test_module_is_untouched(model):
    keys = [sorted(vars(module)) for module in model.modules()]
    with torch.no_grad():
        model(IMAGES)
    assert [sorted(vars(module)) for module in model.modules()] == keys


IN_PLACE = {
    "mul_": lambda weight: weight.mul_(1.5),
    "copy_": lambda weight: weight.copy_(torch.randn_like(weight)),
    "one element": lambda weight: weight[3, 5].add_(1.0),
    "data": lambda weight: weight.data.mul_(1.5),
    "data copy": lambda weight: weight.data.copy_(torch.randn_like(weight)),
    "set data": lambda weight: setattr(weight, "data", weight.data * 1.5),
    "numpy": lambda weight: weight.detach().numpy().__imul__(1.5),
}


@pytest.mark.parametrize("layer", ["blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.2.mlp.fc1", "blocks.3.mlp.fc2"])
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_weights_changed_in_place_are_noticed(model, calls, layer, change, mode):
    with mode():
        before = model(IMAGES)
    with torch.no_grad():
        IN_PLACE[change](model.get_submodule(layer).weight)
    calls.clear()
    with mode():
        after = model(IMAGES)
    assert len(calls) == 17 and not torch.equal(after, before)
    close(after.clone(), ordinary(model))


def test_replaced_and_reshaped_layers_are_noticed(model):
    with torch.no_grad():
        model(IMAGES)
        model.blocks[1].mlp.fc1 = nn.Linear(24, 40)
        model.blocks[1].mlp.fc2 = nn.Linear(40, 24, bias=False)
        close(model(IMAGES), ordinary(model))
        model.blocks[2].attn.qkv.weight = nn.Parameter(torch.randn(72, 24))
        close(model(IMAGES), ordinary(model))
        model.patch_embed.proj.weight.mul_(2)
        close(model(IMAGES), ordinary(model), 1e-4)
        model.blocks[0].attn.proj.bias.add_(1)
        close(model(IMAGES), ordinary(model), 1e-4)


def test_optimizer_steps_are_noticed(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(IMAGES).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            close(model(IMAGES), ordinary(model), 1e-4)


def test_inference_tensors_as_weights(make_vit, calls):
    with torch.inference_mode():
        model = tokcomp.compress(make_vit(), METHOD)
        model(IMAGES)
        model.blocks[0].attn.qkv.weight.mul_(1.5)
        after = model(IMAGES)
    assert len(calls) == 34
    close(after.clone(), ordinary(model))


@pytest.mark.slow
def test_packed_weights_go_with_the_model_and_with_restore(make_vit):
    model = tokcomp.compress(make_vit(), METHOD)
    with torch.no_grad():
        model(IMAGES)
        assert model in packing._cache
        tokcomp.restore(model)
        assert model not in packing._cache
        tokcomp.compress(model, METHOD)(IMAGES)
        gc.collect()  # models of other tests
        alive = len(packing._cache)
        copies = [copy.deepcopy(model) for _ in range(3)]
        assert len(packing._cache) == alive
        for twin in copies:
            twin(IMAGES)
        assert len(packing._cache) == alive + 3
        del copies, twin
        gc.collect()
        assert len(packing._cache) == alive
        model.to("meta")
        model(torch.empty(2, 3, 32, 32, device="meta"))
        assert model not in packing._cache


def test_one_pack_however_many_threads(model, monkeypatch):
    made = []
    original = packing.PackedWeights.__init__
    monkeypatch.setattr(packing.PackedWeights, "__init__", lambda self, *args: made.append(1) or original(self, *args))
    expected = ordinary(model)

    def work(_):
        with torch.no_grad():
            close(model(IMAGES), expected)

    in_threads(work, range(8))
    assert len(made) == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_ordinary_path_where_something_watches(model, calls, set_products):
    set_products(bfloat16="bfloat16")
    model(IMAGES).sum().backward()  # gradients wanted
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(IMAGES)
        with FlopCounterMode(display=False) as counter:
            model(IMAGES)
        assert counter.get_total_flops() > 2 * 10**6  # linear layers would not be counted on the fast path
        torch.jit.trace(model, IMAGES, check_trace=False)
        model.train()
        model(IMAGES)
        model.double().eval()
        model(IMAGES.double())
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_without_such_products_is_float32(model, calls, set_products, dtype):
    set_products(bfloat16="float32", float16="float32")
    layers = [model.blocks[1].attn.qkv, model.blocks[2].mlp.fc2]
    inputs = []
    with torch.no_grad():
        expected = model(IMAGES)
        calls.clear()
        with torch.autocast("cpu", dtype):
            logits = model(IMAGES)
            assert len(calls) == 17
            for layer in layers:
                layer.register_forward_hook(lambda _, args, out: inputs.append((args[0].dtype, out.dtype)))
            model(IMAGES)
            assert torch.is_autocast_enabled("cpu")
    assert inputs == [(torch.float32, torch.float32)] * 2
    # Of all products the head's alone is in the half type, of which its output is.
    assert logits.dtype == dtype and (logits - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["training", "checkpointed", "hooks"])
def test_modules_of_a_half_model_multiply_in_float32(make_vit, half_products, dtype, way):
    """Whatever keeps a model off the packed weights, its products are of the type that the CPU has them in."""
    model = tokcomp.compress(make_vit(), METHOD).to(dtype)
    model.set_grad_checkpointing(way == "checkpointed")
    for block in model.blocks if way == "hooks" else ():
        block.mlp.fc1.register_forward_hook(lambda *_: None)
    with Multiplied() as multiplied, torch.set_grad_enabled(way != "hooks"):
        logits = model(IMAGES.to(dtype))
        if way != "hooks":
            logits.float().square().sum().backward()
    assert logits.dtype == dtype and logits.isfinite().all()
    assert multiplied.dtypes == {dtype if half_products else torch.float32}
    assert all(one.grad is None or one.grad.dtype == dtype for one in model.parameters())


def test_frozen_model_needs_no_no_grad(model, calls):
    model.requires_grad_(False)
    logits = model(IMAGES)
    assert calls and not logits.requires_grad
    calls.clear()
    images = IMAGES.clone().requires_grad_()
    model(images).sum().backward()
    assert not calls and images.grad.abs().sum() > 0


def test_other_layers_keep_their_own_forward(model, calls):
    class LowRank(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    model.blocks[1].attn.qkv.__class__ = LowRank
    nn.utils.parametrizations.weight_norm(model.blocks[2].mlp.fc2)
    with torch.no_grad():
        close(model(IMAGES), ordinary(model), 1e-4)
    assert len(calls) == 2 * 4 + 1


def test_strided_images(model, calls):
    with torch.no_grad():
        expected = model(IMAGES)
        close(model(IMAGES.to(memory_format=torch.channels_last)), expected)
        close(model(IMAGES.transpose(2, 3).contiguous().transpose(2, 3)), expected)
        close(model(torch.stack((IMAGES, IMAGES), -1)[..., 0]), expected)
    assert len(calls) == 4 * 17


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_large_batches_run_in_groups(make_vit, monkeypatch, pool):
    model = tokcomp.compress(make_vit(global_pool=pool), METHOD)
    images = torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    batches = []
    original = timm_vit_fast.run_block
    monkeypatch.setattr(timm_vit_fast, "run_block", lambda *args: batches.append(len(args[1])) or original(*args))
    with torch.no_grad():
        expected = model(images)
        assert batches == [11] * 4
        batches.clear()
        monkeypatch.setattr(timm_vit_fast, "_ACTIVATION_ELEMENTS", 4 * 17 * 96)
        close(model(images), expected)
        assert batches[::4] == [4, 4, 3]
        batches.clear()
        model.blocks[0].register_forward_hook(lambda *_: None)  # a hook sees the whole batch
        close(model(images), expected)
        assert batches == [11] * 4


def test_wrong_image_size_gives_timms_error(model):
    with torch.no_grad(), pytest.raises(AssertionError, match="Input height"):
        model(torch.randn(1, 3, 40, 32))

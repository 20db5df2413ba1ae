"""applied: differentiable in the plugin, and nothing left behind."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import tokcomp
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.tocom.conftest import IMAGES, qkv_weights, same_bits


def structure(model):
    """Everything that a context could leave behind."""
    return [
        (name, id(module), type(module), sorted(vars(module)), list(module._modules), module.training)
        for name, module in model.named_modules()
    ]


def folded_by_autograd(model, plugin, images, source, target, scale):
    """Logits with W' of Eq. 6-7 in place of every packed weight, W' computed from the plugin's Parameters."""
    weights = {}
    low, high = sorted((source, target))
    columns = slice(plugin.rank * low, plugin.rank * high)
    factor = scale if target > source else -scale
    for index, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv.weight.detach().chunk(3)
        q = q + factor * plugin.q_up[index][:, columns] @ plugin.q_down[index][columns]
        v = v + factor * plugin.v_up[index][:, columns] @ plugin.v_down[index][columns]
        weights[f"blocks.{index}.attn.qkv.weight"] = torch.cat((q, k, v))
    return torch.func.functional_call(model, weights, (images,))


def gradients(plugin, logits):
    plugin.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return {name: parameter.grad for name, parameter in plugin.named_parameters()}


@pytest.mark.parametrize("pair", [(0, 4), (3, 1)], ids=str)
@pytest.mark.parametrize("method", [None, tokcomp.ToMe(2), tokcomp.EViT(num_pruned=2)], ids=["plain", "tome", "evit"])
def test_gradients_are_those_of_folding(make_vit, make_plugin, pair, method):
    model = make_vit().double()
    plugin, images = make_plugin(model).double(), IMAGES.double()
    if method is not None:
        tokcomp.compress(model, method)
    before, clean = qkv_weights(model), structure(model)
    expected = folded_by_autograd(model, plugin, images, *pair, 0.1)
    wanted = gradients(plugin, expected)
    with plugin.applied(model, *pair, 0.1):
        logits = model(images)
    found = gradients(plugin, logits)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=1e-12)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-12, rtol=1e-10, msg=name)
    columns = slice(2 * min(pair), 2 * max(pair))
    assert found["q_down.0"][columns].abs().min() > 0
    assert not found["q_down.0"][: columns.start].any() and not found["v_up.2"][:, columns.stop :].any()
    assert same_bits(qkv_weights(model), before) and structure(model) == clean


def test_trains_and_leaves_the_weights_alone(make_vit):
    model = tokcomp.compress(make_vit().requires_grad_(False), tokcomp.ToMe(3))
    torch.manual_seed(0)
    plugin, before = tokcomp.ToCom(model, max_degree=3), [one.clone() for one in model.parameters()]
    optimizer = torch.optim.AdamW(plugin.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        with plugin.applied(model, 0, 3, 0.1):
            loss = (model(IMAGES) - 1).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_no_step_copies_a_weight(make_vit, make_plugin, compressed):
    """Nothing that is kept for the backward pass is of a packed weight's size but the weight itself."""
    model = make_vit(embed_dim=48, depth=2)
    if compressed:
        tokcomp.compress(model, tokcomp.ToMe(2))
    plugin = make_plugin(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *plugin.parameters())}
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks, plugin.applied(model, 1, 3):
        model(IMAGES[:1])
    full = [t for t in kept if 48 in t.shape and 144 in t.shape and t.untyped_storage().data_ptr() not in own]
    assert kept and not full


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_nested_contexts_add_up(make_vit, make_plugin, compressed):
    model = make_vit().double()
    if compressed:
        tokcomp.compress(model, tokcomp.ToMe(2))
    plugin, other, images = make_plugin(model).double(), make_plugin(model, seed=1).double(), IMAGES.double()
    clean = structure(model)
    with torch.no_grad():
        plain = model(images)
        with plugin.applied(model, 0, 3):
            outer = model(images)
            with plugin.applied(model, 3, 4), other.applied(model, 0, 0):
                inner = model(images)
            torch.testing.assert_close(model(images), outer, atol=0, rtol=0)
        with plugin.applied(model, 0, 4):
            torch.testing.assert_close(model(images), inner, atol=1e-12, rtol=0)
            with plugin.applied(model, 4, 0):
                torch.testing.assert_close(model(images), plain, atol=1e-12, rtol=0)
        assert (inner - outer).abs().max() > 1e-3 and (plain - outer).abs().max() > 1e-3
        plugin.fold(model, 0, 3)
        with plugin.applied(model, 3, 4):
            torch.testing.assert_close(model(images), inner, atol=1e-12, rtol=0)
            plugin.unfold(model)
            plugin.fold(model, 0, 2)
            with plugin.applied(model, 2, 3):
                torch.testing.assert_close(model(images), inner, atol=1e-12, rtol=0)
            plugin.unfold(model)
    assert structure(model) == clean


def test_contexts_may_end_in_any_order(make_vit, make_plugin):
    model = make_vit()
    plugin, clean = make_plugin(model), structure(model)
    with torch.no_grad():
        with plugin.applied(model, 2, 4):
            expected = model(IMAGES)
        first, second = plugin.applied(model, 0, 2), plugin.applied(model, 2, 4)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.equal(model(IMAGES), expected)
        second.__exit__(None, None, None)
    assert structure(model) == clean


def test_exceptions_leave_the_model_clean(make_vit, make_plugin):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    plugin, before, clean = make_plugin(model), qkv_weights(model), structure(model)
    with pytest.raises(KeyboardInterrupt), plugin.applied(model, 0, 2), plugin.applied(model, 2, 4):
        raise KeyboardInterrupt
    with contextlib.suppress(RuntimeError, ValueError), plugin.applied(model, 0, 2):
        model(IMAGES[:, :2])
    assert structure(model) == clean and same_bits(qkv_weights(model), before)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_made_inside_are_without(make_vit, make_plugin, way):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    plugin = make_plugin(model)
    with torch.no_grad():
        before = model(IMAGES)
        with plugin.applied(model, 0, 4):
            twin = way(model)
            assert not torch.equal(model(IMAGES), before)
        assert torch.equal(twin(IMAGES), before)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]


def test_what_is_done_to_the_model_inside_stays(make_vit, make_plugin):
    model = make_vit()
    plugin, seen = make_plugin(model), []
    own = [id(module) for module in model.modules()]
    with plugin.applied(model, 0, 2):
        model.train()
        tokcomp.compress(model, tokcomp.ToMe(2))
        handle = model.blocks[1].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
        model(IMAGES)
        model.blocks[2].mlp.fc1 = replaced = nn.Linear(24, 96)
        assert list(model.state_dict()) == list(make_vit().state_dict())
        model.double()
    assert len(seen) == 1
    model(IMAGES.double()) if replaced.weight.dtype == torch.float64 else pytest.fail("not converted")
    assert len(seen) == 2 and all(module.training for module in model.modules())
    assert model.blocks[2].mlp.fc1 is replaced and model.blocks[0].attn.qkv.weight.dtype == torch.float64
    handle.remove()
    tokcomp.restore(model)
    assert all(type(block) is type(make_vit().blocks[0]) for block in model.blocks)
    assert [id(module) for module in model.modules() if module is not replaced] == [
        one for one in own if one in {id(module) for module in model.modules()}
    ]


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("method", [None, tokcomp.ToMe(2)], ids=["plain", "tome"])
def test_gradient_checkpointing(make_vit, make_plugin, inside, method):
    model = make_vit().double()
    if method is not None:
        tokcomp.compress(model, method)
    plugin, images = make_plugin(model).double(), IMAGES.double()
    with plugin.applied(model, 1, 4):
        wanted = gradients(plugin, model(images))
    model.set_grad_checkpointing()
    with plugin.applied(model, 1, 4):
        logits = model(images)
        if inside:
            found = gradients(plugin, logits)
    if not inside:
        with torch.no_grad(), plugin.applied(model, 0, 1):  # the teacher, say
            model(images)
        found = gradients(plugin, logits)
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name


def test_the_whole_model_checkpointed(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    with plugin.applied(model, 0, 4):
        wanted = gradients(plugin, model(IMAGES))
        found = gradients(plugin, checkpoint(model, IMAGES, use_reentrant=False))
    assert all(torch.equal(found[name], wanted[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half model"])
def test_low_precision(make_vit, make_plugin, dtype, autocast):
    model = make_vit(embed_dim=48)
    plugin = make_plugin(model, std=0.3)
    with torch.no_grad(), plugin.applied(model, 0, 4):
        exact = model(IMAGES)
    plain_error = []
    with contextlib.ExitStack() as stack:
        images = IMAGES
        if autocast:
            stack.enter_context(torch.autocast("cpu", dtype))
        else:
            twin, images = copy.deepcopy(model), IMAGES.to(dtype)
            with torch.no_grad():
                plugin.fold(twin, 0, 4)
                plain_error.append((twin.to(dtype)(images).float() - exact).abs().mean())
            model.to(dtype)
        with plugin.applied(model, 0, 4):
            logits = model(images)
    assert logits.dtype == dtype
    error = (logits.float() - exact).abs().mean()
    # As far from float32 as half types take a model of this depth; at most 2x the folded weights' own error.
    assert error < (2 * plain_error[0] if plain_error else 40 * torch.finfo(dtype).eps)
    logits.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.any() for parameter in plugin.parameters())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_the_fast_path_steps_aside_and_comes_back(make_vit, make_plugin):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    plugin = make_plugin(model)
    with torch.no_grad():
        fast = model(IMAGES)
        with plugin.applied(model, 0, 4):
            applied = model(IMAGES)
        assert torch.equal(model(IMAGES), fast)
        plugin.fold(model, 0, 4)
        torch.testing.assert_close(applied, model(IMAGES), atol=1e-4, rtol=0)


def test_one_pass_of_a_search(make_vit, make_plugin):
    """Frozen layers that go through packed weights elsewhere still get their terms."""
    model = make_vit()
    plugin, search = make_plugin(model), tokcomp.DiffRateSearch(model)
    search.eval()
    plain, _ = search(IMAGES)
    with plugin.applied(model, 0, 4):
        applied, _ = search(IMAGES)
    assert (plain - applied).abs().max() > 1e-3
    plugin.fold(model, 0, 4)
    torch.testing.assert_close(search(IMAGES)[0], applied, atol=1e-4, rtol=0)


def test_other_device_types_are_met(make_vit, make_plugin):
    model = make_vit().to("meta")
    plugin = make_plugin(make_vit())
    with plugin.applied(model, 0, 4):
        assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)


def test_equal_degrees_change_nothing(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    with torch.no_grad(), plugin.applied(model, 3, 3) as inside:
        assert inside is model and torch.equal(model(IMAGES), make_vit()(IMAGES))


@pytest.mark.slow
def test_compiled(make_vit, make_plugin):
    model = make_vit(depth=2)
    plugin = make_plugin(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        plain = compiled(IMAGES)
        with plugin.applied(model, 0, 4):
            torch.testing.assert_close(compiled(IMAGES), model(IMAGES))
            assert (compiled(IMAGES) - plain).abs().max() > 1e-3
        torch.testing.assert_close(compiled(IMAGES), plain)

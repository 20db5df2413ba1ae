"""Input that fold and unfold refuse, the model as it was."""

from __future__ import annotations

import copy

import pytest
import tokcomp
import torch
from tokcomp.folded import fold_of
from tokcomp.tocom.fold import forget_fold
from torch import nn

from tests.tocom.conftest import qkv_weights, same_bits


def check_untouched(model, before, plugin, error, message, *args, **kwargs):
    with pytest.raises(error, match=message):
        plugin.fold(model, *args, **kwargs)
    assert same_bits(qkv_weights(model), before)
    with pytest.raises(error, match=message), plugin.applied(model, *args, **kwargs):
        raise AssertionError("must not be entered")
    assert same_bits(qkv_weights(model), before)


WRONG = {
    "source below": (ValueError, "source must be at least 0, got -1", (-1, 2)),
    "target above": (ValueError, "target must be a degree from 0 to 4, got 5", (0, 5)),
    "float": (TypeError, "target must be an integer, got 2.0", (0, 2.0)),
    "bool": (TypeError, "source must be an integer, got True", (True, 2)),
    "none": (TypeError, "target must be an integer, got None", (0, None)),
    "nan": (ValueError, "scale must be finite, got nan", (0, 2, float("nan"))),
    "inf": (ValueError, "scale must be finite, got -inf", (0, 2, float("-inf"))),
    "text": (TypeError, "scale must be a number, got '0.1'", (0, 2, "0.1")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_degrees_and_scales(make_vit, make_plugin, case):
    model = make_vit()
    error, message, args = WRONG[case]
    check_untouched(model, qkv_weights(model), make_plugin(model), error, message, *(*args, 0.1)[:3])
    assert fold_of(model) is None


@pytest.mark.parametrize("options", [dict(embed_dim=48), dict(depth=5), dict(embed_dim=12)], ids=str)
def test_plugin_for_another_model(make_vit, make_plugin, options):
    model = make_vit()
    plugin = make_plugin(make_vit(**options))
    message = r"the plugin was made for \d blocks of width \d+, got a model of 4 blocks of width 24"
    check_untouched(model, qkv_weights(model), plugin, ValueError, message, 0, 2, 0.1)


def test_plugin_for_another_method(make_vit, make_plugin):
    model = tokcomp.compress(make_vit(), tokcomp.EViT(num_pruned=2))
    plugin = make_plugin(model)
    plugin.method = "tome"
    check_untouched(
        model, qkv_weights(model), plugin, ValueError, "method tome, got a model compressed by evit", 0, 2, 1
    )
    tokcomp.compress(model, tokcomp.ToMe(2))
    plugin.fold(model, 0, 2)
    tokcomp.restore(model)
    plugin.fold(model, 0, 3)


def test_two_plugins(make_vit, make_plugin):
    model = make_vit()
    first, second = make_plugin(model, seed=1), make_plugin(model, seed=2)
    plain = qkv_weights(model)
    first.fold(model, 0, 2)
    before = qkv_weights(model)
    with pytest.raises(
        RuntimeError, match=r"another plugin is already folded .* \(degree 0 to 2 at scale 0\.1\): unfold"
    ):
        second.fold(model, 0, 2)
    assert same_bits(qkv_weights(model), before)
    second.unfold(model)
    assert same_bits(qkv_weights(model), plain)
    second.fold(model, 0, 2)


CHANGES = {
    "one element": lambda layer: layer.weight.detach()[60, 7].add_(1e-3),
    "scaled": lambda layer: layer.weight.detach().mul_(1.5),
    "other weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(72, 24))),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("converted", [False, True], ids=["float32", "converted"])
def test_weights_changed_since_the_fold(make_vit, make_plugin, change, converted):
    model = make_vit()
    plugin = make_plugin(model)
    plugin.fold(model, 0, 2)
    if converted:
        if change == "one element":
            pytest.skip("after a conversion only part of the elements is compared")
        model.double()
    CHANGES[change](model.blocks[2].attn.qkv)
    before = qkv_weights(model)
    for step in (plugin.unfold, lambda model: plugin.fold(model, 0, 1)):
        with pytest.raises(RuntimeError, match="q and v weights must be those that the fold"):
            step(model)
        assert same_bits(qkv_weights(model), before) and fold_of(model) is not None
    forget_fold(model)
    plugin.unfold(model)
    assert same_bits(qkv_weights(model), before) and list(model.buffers()) == []
    plugin.fold(model, 0, 2)


def test_other_weights_may_change(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    plugin.fold(model, 0, 2)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[30].add_(1)  # a row of k
        model.head.weight.mul_(2)
    changed = qkv_weights(model)[0][24:48]
    plugin.unfold(model)
    assert torch.equal(qkv_weights(model)[0][24:48], changed)
    assert torch.equal(qkv_weights(model)[0][:24], qkv_weights(make_vit())[0][:24])


def test_values_that_are_not_finite(make_vit, make_plugin):
    model = make_vit()
    plugin, before = make_plugin(model), qkv_weights(model)
    with torch.no_grad():
        plugin.v_up[3][2, 1] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got others in block 3"):
        plugin.fold(model, 0, 2)
    assert same_bits(qkv_weights(model), before)
    plugin.fold(model, 1, 2)  # other steps are sound


def test_models_that_cannot_take_a_plugin(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    with pytest.raises(
        tokcomp.UnsupportedModelError, match=r"torch\.nn\.modules\.container\.Sequential is not a model"
    ):
        plugin.fold(nn.Sequential(model), 0, 2)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        plugin.unfold("model")
    with pytest.raises(ValueError, match="must have weights to fold into, got one on the meta device"):
        plugin.fold(make_vit().to("meta"), 0, 2)
    shared = make_vit()
    shared.blocks[1].attn.qkv = shared.blocks[0].attn.qkv
    with pytest.raises(tokcomp.UnsupportedModelError, match="each block must have its own"):
        tokcomp.ToCom(shared)
    normed = make_vit()
    nn.utils.parametrizations.weight_norm(normed.blocks[2].attn.qkv)
    with pytest.raises(tokcomp.UnsupportedModelError, match=r"block 2: q, k and v must come from nn\.Linear layers"):
        plugin.fold(normed, 0, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(rank=0), ValueError, "rank must be at least 1, got 0"),
        (dict(rank=2.0), TypeError, r"rank must be an integer, got 2\.0"),
        (dict(max_degree=0), ValueError, "max_degree must be at least 1, got 0"),
        (dict(max_degree="16"), TypeError, "max_degree must be an integer, got '16'"),
    ],
)
def test_wrong_sizes(make_vit, options, error, message):
    with pytest.raises(error, match=message):
        tokcomp.ToCom(make_vit(), **options)


def test_another_method_for_a_folded_model(make_vit, make_plugin):
    model = make_vit()
    plugin = make_plugin(model)
    plugin.method = "tome"
    plugin.fold(model, 0, 2)
    before = qkv_weights(model)
    message = r"method must be tome, which .* \(degree 0 to 2 at scale 0\.1\) was trained with, got evit; unfold"
    with pytest.raises(ValueError, match=message):
        tokcomp.compress(model, tokcomp.EViT(num_pruned=2))
    assert same_bits(qkv_weights(model), before) and type(model) is type(make_vit())
    tokcomp.compress(model, tokcomp.ToMe(2))
    with pytest.raises(ValueError, match=message):
        tokcomp.compress(copy.deepcopy(model), tokcomp.EViT(num_pruned=2))
    plugin.unfold(model)
    tokcomp.compress(model, tokcomp.EViT(num_pruned=2))
    plugin.method = None  # as of plugins made by hand, or in the published code's files
    plugin.fold(model, 0, 2)
    tokcomp.compress(model, tokcomp.ToMe(2))

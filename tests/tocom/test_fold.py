"""fold and unfold: the weights they write, and those they give back."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle

import pytest
import timm
import tokcomp
import torch
from tokcomp.fastpath import packing
from tokcomp.folded import fold_of
from torch import nn

from tests.tocom.conftest import IMAGES, qkv_weights, same_bits

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def by_hand(plugin, block, weight, source, target, scale):
    """W' of Eq. 6-7, one step at a time in float64."""
    width = weight.shape[0] // 3
    folded = weight.double().clone()
    sign = 1 if target > source else -1
    for step in range(min(source, target), max(source, target)):
        rows = slice(plugin.rank * step, plugin.rank * (step + 1))
        for first, up, down in ((0, plugin.q_up, plugin.q_down), (2 * width, plugin.v_up, plugin.v_down)):
            product = up[block][:, rows].double() @ down[block][rows].double()
            folded[first : first + width] += sign * scale * product
    return folded.detach()


def test_shapes_and_start(make_vit):
    model = make_vit(depth=3)
    torch.manual_seed(1)
    plugin = tokcomp.ToCom(model)
    for names, shape in ((("q_down", "v_down"), (32, 24)), (("q_up", "v_up"), (24, 32))):
        for name in names:
            parameters = list(getattr(plugin, name))
            assert [tuple(one.shape) for one in parameters] == [shape] * 3
            assert all(isinstance(one, nn.Parameter) and one.requires_grad for one in parameters)
    assert not any(up.any() for up in (*plugin.q_up, *plugin.v_up))
    assert all(down.std() > 0.05 for down in (*plugin.q_down, *plugin.v_down))
    before = qkv_weights(model)
    plugin.fold(model, 0, 16)
    assert same_bits(qkv_weights(model), before)


def test_size_for_deit_b(meta_model):
    plugin = tokcomp.ToCom(meta_model("deit_base_patch16_224"))
    assert sum(one.numel() for one in plugin.parameters()) == 12 * 4 * 32 * 768  # 1.2 M, as in the paper


@pytest.mark.parametrize("pair", [(0, 3), (1, 4), (4, 0), (3, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights(make_vit, make_plugin, pair, dtype):
    model = make_vit().to(dtype)
    plugin, before = make_plugin(model, seed=3, rank=3), qkv_weights(model)
    plugin.fold(model, *pair, scale=0.15)
    for block, (old, new) in enumerate(zip(before, qkv_weights(model), strict=True)):
        exact = by_hand(plugin, block, old, *pair, 0.15)
        # A sum of 12 products and W in float32 or better, then one rounding to the weight's type.
        accumulate = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        bound = 0.5 * torch.finfo(dtype).eps * exact.abs() + 16 * accumulate * (exact.abs().max() + 1)
        assert ((new.double() - exact).abs() <= bound).all()
        assert torch.equal(new[24:48], old[24:48])  # k


def test_algebra(make_vit, make_plugin):
    model = make_vit().double()
    plugin, before = make_plugin(model).double(), qkv_weights(model)

    def delta(source, target):
        plugin.fold(model, source, target)
        return torch.stack([new - old for new, old in zip(qkv_weights(model), before, strict=True)])

    forth, back = delta(0, 4), delta(4, 0)  # the second fold replaces the first
    tolerance = {"atol": 1e-14, "rtol": 0}
    torch.testing.assert_close(forth, -back, **tolerance)
    torch.testing.assert_close(delta(0, 1) + delta(1, 3) + delta(3, 4), forth, **tolerance)
    torch.testing.assert_close(delta(1, 3), delta(1, 4) + delta(4, 3), **tolerance)
    assert not delta(3, 3).any() and forth.abs().max() > 0.1
    plugin.unfold(model)
    assert same_bits(qkv_weights(model), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_unfold_gives_back_the_bits(make_vit, make_plugin, dtype, compressed):
    model = make_vit().to(dtype)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, :3] = torch.tensor([-0.0, 1e-7, 3e4])
    plugin = make_plugin(model)
    if compressed:
        tokcomp.compress(model, tokcomp.ToMe(2))
    before, parameters, keys = qkv_weights(model), list(model.parameters()), list(model.state_dict())
    plugin.fold(model, 0, 4)
    assert not same_bits(qkv_weights(model), before)
    assert list(model.state_dict()) == keys
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    plugin.fold(model, 3, 1)
    plugin.unfold(model)
    assert same_bits(qkv_weights(model), before) and fold_of(model) is None
    assert list(model.buffers()) == [] and not any("tokcomp_f" in name for name in vars(model))
    plugin.unfold(model)
    assert same_bits(qkv_weights(model), before)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


JOURNEYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "half": lambda model: model.half(),
    "bfloat16, float": lambda model: model.bfloat16().float(),
    "double": lambda model: model.double(),
    "half of a copy": lambda model: copy.deepcopy(model).half(),
    "to": lambda model: model.to("cpu", torch.bfloat16),
    "compress": lambda model: tokcomp.compress(model, tokcomp.ToMe(1)),
    "restore": tokcomp.restore,
    "train, no gradients": lambda model: model.train().requires_grad_(False),
    "state_dict": lambda model: model if not model.load_state_dict(model.state_dict())[0] else None,
}


@pytest.mark.parametrize("journey", JOURNEYS)
def test_the_fold_travels(make_vit, make_plugin, journey):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    plugin = make_plugin(model)
    never_folded = JOURNEYS[journey](copy.deepcopy(model))
    plugin.fold(model, 1, 4)
    moved = JOURNEYS[journey](model)
    assert not same_bits(qkv_weights(moved), qkv_weights(never_folded))
    if moved is not model:
        untouched = qkv_weights(model)
    copy.deepcopy(plugin).unfold(moved)
    assert same_bits(qkv_weights(moved), qkv_weights(never_folded))
    if moved is not model:
        assert same_bits(qkv_weights(model), untouched)


def test_a_loaded_plugin_replaces_its_own_fold(make_vit, make_plugin, tmp_path):
    model = make_vit()
    plugin = make_plugin(model)
    plugin.fold(model, 0, 4)
    plugin.save(tmp_path / "plugin.safetensors")
    expected = by_hand(plugin, 1, make_vit().blocks[1].attn.qkv.weight, 0, 1, 0.1)
    loaded = tokcomp.ToCom.load(tmp_path / "plugin.safetensors", model)
    loaded.fold(model, 0, 1)
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight.detach().double(), expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        loaded.q_up[0].add_(1)  # trained on: still the same plugin
    loaded.fold(model, 0, 2)
    loaded.unfold(model)
    assert same_bits(qkv_weights(model), qkv_weights(make_vit()))


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda mode: mode.__name__
)
def test_under_any_mode(make_vit, make_plugin, mode):
    model = make_vit()
    plugin, before = make_plugin(model), qkv_weights(model)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        plugin.fold(model, 0, 4)
    folded = model.blocks[2].attn.qkv.weight
    torch.testing.assert_close(
        folded.detach().double(), by_hand(plugin, 2, before[2], 0, 4, 0.1), atol=1e-5, rtol=0
    )  # not in bfloat16
    model(IMAGES).sum().backward()
    assert folded.grad is not None
    with mode():
        plugin.unfold(model)
    assert same_bits(qkv_weights(model), before)


def test_inference_tensors_as_weights(make_vit, make_plugin):
    with torch.inference_mode():
        model = make_vit()
        plugin = make_plugin(model)
        before = qkv_weights(model)
    plugin.fold(model, 0, 4)
    assert not same_bits(qkv_weights(model), before)
    plugin.unfold(model)
    assert same_bits(qkv_weights(model), before)


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_packed_weights_notice(make_vit, make_plugin):
    model = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
    plugin = make_plugin(model)
    with torch.no_grad():
        before = model(IMAGES)
        assert model in packing._cache
        plugin.fold(model, 0, 4)
        folded = model(IMAGES)
        assert model in packing._cache
        twin = tokcomp.compress(make_vit(), tokcomp.ToMe(2))
        for block, weight in zip(twin.blocks, qkv_weights(model), strict=True):
            block.attn.qkv.weight.copy_(weight)
        assert torch.equal(folded, twin(IMAGES)) and (folded - before).abs().max() > 0.01
        plugin.unfold(model)
        assert torch.equal(model(IMAGES), before)
    del twin
    gc.collect()


def test_other_attention_width(make_vit, make_plugin):
    model = make_vit(block_fn=wide_block)
    plugin = make_plugin(model)
    assert plugin.q_down[0].shape == (8, 24) and plugin.q_up[0].shape == (48, 8)
    before = qkv_weights(model)
    plugin.fold(model, 4, 1)
    weight = model.blocks[3].attn.qkv.weight.detach()
    torch.testing.assert_close(weight.double(), by_hand(plugin, 3, before[3], 4, 1, 0.1), atol=1e-5, rtol=0)
    assert torch.equal(weight[48:96], before[3][48:96])
    with torch.no_grad():
        logits = model(IMAGES)
        plugin.unfold(model)
        with plugin.applied(model, 4, 1, 0.1):
            torch.testing.assert_close(model(IMAGES), logits, atol=1e-4, rtol=0)


def wide_block(dim, num_heads, **kwargs):
    """timm's Block whose heads are twice as wide together as its tokens."""
    from timm.models.vision_transformer import Attention, Block

    if "attn_head_dim" not in inspect.signature(Attention).parameters:
        pytest.skip(f"timm {timm.__version__} has no attn_head_dim")
    block = Block(dim, num_heads, **kwargs)
    block.attn = Attention(dim, num_heads, attn_head_dim=2 * dim // num_heads, qkv_bias=True)
    return block

"""What every family of the table has to do."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import tokcomp
import torch
from timm.models.eva import EvaBlock
from tokcomp import learned
from tokcomp.adapters import find_adapter
from tokcomp.fastpath import rows
from tokcomp.methods import LearnedMethod
from tokcomp.runs.recipe import TOCOM_RECIPE
from tokcomp.tocom.distill import Distiller
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.families.table import FAMILIES, support_table
from tests.tocom.conftest import lively_plugin

DOCS = Path(__file__).resolve().parents[2] / "docs"
IDS = [f"{family.library}: {family.name}" for family in FAMILIES]


@pytest.fixture(params=FAMILIES, ids=IDS)
def family(request):
    if request.param.missing:
        pytest.skip(request.param.missing)
    return request.param


@pytest.fixture
def model(family):
    return family.build()


def build(name):
    family = FAMILIES[IDS.index(name)]
    if family.missing:
        pytest.skip(family.missing)
    return family.build()


def images_for(model, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(batch, *find_adapter(model).image_shape(model), generator=generator, dtype=torch.float64)
    return images.to(dtype)


def logits(model, images):
    return find_adapter(model).logits(model(images))


def diffrate(model, pipeline="prune_merge"):
    adapter = find_adapter(model)
    tokens, metric = adapter.num_tokens(model), "cls_attn" if adapter.geometry(model).has_class_token else "image_attn"
    prune, merge = [tokens, tokens - 3, tokens - 6, tokens - 6], [tokens, tokens - 5, tokens - 6, tokens - 9]
    return tokcomp.DiffRate(tokcomp.CompressionSchedule(prune, merge), metric=metric, pipeline=pipeline)


def methods_for(model):
    methods = [diffrate(model), diffrate(model, "merge_prune"), tokcomp.ToMe(3), tokcomp.ToMe(2, prop_attn=False)]
    if find_adapter(model).geometry(model).has_class_token:
        methods += [tokcomp.EViT(0.6, blocks=(1, 2)), tokcomp.EViT(num_pruned=2, fuse=False)]
    return methods


@torch.no_grad()
def test_compressing_nothing_is_the_plain_model(model):
    """In float64 to rounding; in smaller types ours is as near to that as the plain model in that type is."""
    exact = logits(copy.deepcopy(model).double(), images_for(model, torch.float64))
    scale = exact.abs().max()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        cast = copy.deepcopy(model).to(dtype)
        plain = logits(cast, images_for(model, dtype)).double()
        ours = logits(tokcomp.compress(cast, tokcomp.ToMe(0)), images_for(model, dtype)).double()
        # Another order of the same sums: some 50 roundings on the way, or a few times what the plain model is off.
        assert (ours - exact).abs().max() <= 4 * (plain - exact).abs().max() + 50 * torch.finfo(dtype).eps * scale


@torch.no_grad()
def check_images_alone(model, images, monkeypatch):
    """The logits of a batch are those of each image alone, whether its padding is computed and masked or left out."""
    alone, packed = torch.cat([logits(model, image[None]) for image in images]), []
    monkeypatch.setattr(rows.Rows, "packed", lambda self, x, own=rows.Rows.packed: packed.append(x) or own(self, x))
    for least in (2, 0):
        assert not packed
        monkeypatch.setattr(rows, "LEAST_PADDING", least)
        torch.testing.assert_close(logits(model, images), alone)
    varies = find_adapter(model).method(model).varies
    assert bool(packed) == varies
    return varies


@torch.no_grad()
def test_images_that_keep_different_numbers_of_tokens_do_not_see_each_other(model, monkeypatch):
    """Places, biases of pairs, heads and pooling are those of each image's own tokens."""
    model = model.double()
    images = images_for(model, torch.float64, 6) * torch.tensor([0.1, 1, 2, 0.2, 1, 3])[:, None, None, None]
    geometry = find_adapter(model).geometry(model)
    if geometry.spreads_tokens:
        with pytest.raises(ValueError, match="DToMe needs a plain vision transformer, got a hierarchical model"):
            tokcomp.calibrate(model, [images], 3)
        return
    methods = [tokcomp.calibrate(model, [images[3:]], 3)]
    methods += [tokcomp.ATS(12, (0, 2))] if geometry.has_class_token else []
    for method in methods:
        with monkeypatch.context() as patch:
            assert check_images_alone(tokcomp.compress(model, method), images[:3], patch)


@torch.no_grad()
def test_methods_between_the_blocks(model, monkeypatch):
    """Places and biases follow their tokens, and the parts go where the blocks are; or it is said why not."""
    model = model.double()
    images, adapter = images_for(model, torch.float64, 3), find_adapter(model)
    geometry, before = adapter.geometry(model), model.state_dict().keys()
    for method in (tokcomp.EvoViT(0.5, [1]), tokcomp.SPViT(0.6, [1, 2]), tokcomp.AViT(0.9, 1.0, -1.0)):
        trained = isinstance(method, LearnedMethod)
        try:
            tokcomp.compress(learned.attach(model, method) if trained else model, method)
        except ValueError:
            assert geometry.spreads_tokens or not geometry.has_class_token
            continue
        except tokcomp.UnsupportedModelError as error:
            assert trained and adapter.reads_patches(model) and "answers by its class token alone" in str(error)
        else:
            with monkeypatch.context() as patch:
                check_images_alone(model, images, patch)
            kept = tokcomp.trace(model, images)[2].amax(1) + 1
            assert (kept < adapter.num_tokens(model)).any()
            assert tokcomp.flops(model, images=images) < tokcomp.flops(tokcomp.restore(model))
        if trained:
            assert model.state_dict().keys() != before
            learned.detach(model)
        assert model.state_dict().keys() == before


@torch.no_grad()
def test_restored_and_copied_models_are_the_same(model):
    images = images_for(model)
    before = logits(model, images)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    parameters, fresh = [id(parameter) for parameter in model.parameters()], copy.deepcopy(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in methods_for(model):
        assert tokcomp.compress(model, method) is model
        compressed = logits(model, images)
        assert torch.isfinite(compressed).all() and not torch.equal(compressed, before)
        assert list(model.state_dict()) == list(state)
        assert [id(parameter) for parameter in model.parameters()] == parameters
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(logits(copied, images), compressed)
            assert tokcomp.flops(copied) == tokcomp.flops(model)
    assert torch.equal(logits(tokcomp.restore(copied), images), before)
    assert torch.equal(logits(tokcomp.compress(fresh, method), images), compressed)  # whatever it was compressed by
    assert isinstance(find_adapter(model).method(model), tokcomp.Method)
    for _ in range(2):
        assert tokcomp.restore(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, images), before)


@torch.no_grad()
def test_traces_follow_the_tokens(model):
    geometry, tokens = find_adapter(model).geometry(model), find_adapter(model).num_tokens(model)
    prefix = geometry.num_prefix_tokens
    plain = tokcomp.trace(model, images_for(model))
    assert all(torch.equal(one, torch.arange(tokens).expand(2, -1)) for one in plain)
    for method in methods_for(model):
        maps = tokcomp.trace(tokcomp.compress(model, method), images_for(model))
        assert len(maps) == geometry.depth
        assert torch.equal(maps[-1][:, :prefix], torch.arange(prefix).expand(2, -1))
        assert maps[-1].max() < tokens - 4 and not (maps[-1][:, prefix:, None] == torch.arange(prefix)).any()


def test_search(model):
    """Gradients are finite, and what the search stands for is what compression by its schedule gives."""
    model = model.double()
    adapter, images = find_adapter(model), images_for(model, torch.float64)
    metric = "cls_attn" if adapter.geometry(model).has_class_token else "image_attn"
    search = tokcomp.DiffRateSearch(model, metric=metric, match_inference=True).eval()
    with torch.no_grad():
        for step, dropped in ((search.prune, (0, 3, 6, 6)), (search.merge, (0, 5, 6, 9))):
            for number, count in zip(step, dropped, strict=True):
                if number.logits.numel() > 1:
                    number.logits.zero_()
                    number.logits[count] = 40.0
    ours, flops = search(images)
    (ours.square().sum() + flops / 1e6).backward()
    gradients = [number.logits.grad for step in (search.prune, search.merge) for number in step]
    gradients = [gradient for gradient in gradients if gradient is not None]
    # Hierarchical models only merge, and not in the first and last block of their stage.
    assert len(gradients) >= (2 if adapter.geometry(model).spreads_tokens else 4)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    with torch.no_grad():
        compressed = logits(tokcomp.compress(model, search.method()), images)
    assert tokcomp.flops(model) == int(flops)
    # Masked attention gives every key eps / N = 1e-6 / N besides; four blocks carry that on.
    assert (ours - compressed).abs().max() <= 1e-4 * compressed.abs().max()


def test_flops_are_those_of_a_counted_run(model):
    adapter, images = find_adapter(model), images_for(model, batch=1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    # Alg. 2 counts the embedding for prefix tokens too.
    prefix = adapter.cost(model).embed * adapter.geometry(model).num_prefix_tokens
    assert tokcomp.flops(model) == counter.get_total_flops() // 2 + prefix


@torch.no_grad()
def test_tocom_folds_and_unfolds(model):
    tocom, images = lively_plugin(model, std=0.3), images_for(model)
    assert len(tocom.q_down) == 4
    state = {name: one.clone() for name, one in model.state_dict().items()}
    for method in (None, tokcomp.ToMe(3)):
        before = logits(model if method is None else tokcomp.compress(model, method), images)
        with tocom.applied(model, 0, 3):
            applied = logits(model, images)
            for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(logits(copied, images), before)
        assert torch.equal(logits(model, images), before)
        tocom.fold(model, 0, 3)
        folded = logits(model, images)
        assert (folded - before).abs().max() > 0.01 * before.abs().max()
        torch.testing.assert_close(applied, folded, rtol=0, atol=1e-4 * float(folded.abs().max()))
        tocom.unfold(model)
    with tocom.applied(tokcomp.restore(model), 0, 3):
        torch.testing.assert_close(logits(tokcomp.compress(model, method), images), applied)
        tokcomp.restore(model)
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["timm: EVA02", "timm: CAFormer", "transformers: ViT", "torchvision: ViT", "timm: ViT, parallel scaling"],
)
def test_a_plugin_is_trained_and_switched(name):
    model = build(name)
    plugin, images = lively_plugin(model, std=0.3), images_for(model)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    switchable = tokcomp.Switchable(model, plugin, degrees=(0, 2), scale=0.5)
    answers = [find_adapter(model).logits(switchable(images, degree)) for degree in (0, 2)]
    assert switchable.memory()[0] == 0 < switchable.memory()[2]
    with torch.no_grad():
        plugin.fold(model, 0, 2, scale=0.5)
        torch.testing.assert_close(logits(tokcomp.compress(model, tokcomp.ToMe(2)), images), answers[1])
    plugin.unfold(model)
    tokcomp.restore(model)
    before = [parameter.clone() for parameter in plugin.parameters()]
    recipe = replace(TOCOM_RECIPE, lr=0.01, warmup_epochs=0.0, mixup=0.0, cutmix=0.0)
    distiller = Distiller(
        model, plugin, tokcomp.ToMe, recipe, total_steps=4, steps_per_epoch=4, device=torch.device("cpu")
    )
    assert not distiller.headless
    losses = [float(distiller.step(images.clone())) for _ in range(3)]
    assert min(losses) > 0 and max(losses) < float("inf")
    changed = [not torch.equal(one, old) for one, old in zip(plugin.parameters(), before, strict=True)]
    assert all(changed)
    assert own == {parameter.data_ptr() for parameter in model.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm: DINOv3", "timm: rope ViT, learnt angles"])
def test_rotary_places_follow_pruned_tokens(name):
    """timm's own attention on the tokens that are left, given their own angles, computes the same."""
    model = build(name).double()
    prefix, images = model.num_prefix_tokens, images_for(model, torch.float64)
    tokcomp.compress(model, diffrate(model, "prune"))
    ours, maps = model.forward_features(images), tokcomp.trace(model, images)
    tokcomp.restore(model)
    x, table = model._pos_embed(model.patch_embed(images))
    x, alive = model.norm_pre(x), torch.arange(x.shape[1]).expand(2, -1)
    for number, (block, now) in enumerate(zip(model.blocks, maps, strict=True)):
        assert isinstance(block, EvaBlock)
        angles = table[number] if table.ndim == 4 else table[None]  # [H or 1, P, 2D]
        places = alive[:, prefix:] - prefix
        angles = torch.stack([angles[:, one] for one in places])  # [B, H or 1, P', 2D]
        branch = block.attn(block.norm1(x), rope=angles)
        x = x + (branch if block.gamma_1 is None else block.gamma_1 * branch)
        # The order of the slots is the model's own; which tokens are in them, the map says.
        order = torch.stack(
            [now[image, alive[image]].masked_fill(now[image, alive[image]] < 0, 999).argsort() for image in range(2)]
        )
        order = order[:, : int(now.max()) + 1]
        x, alive = x.gather(1, order[..., None].expand(-1, -1, x.shape[2])), alive.gather(1, order)
        branch = block.mlp(block.norm2(x))
        x = x + (branch if block.gamma_2 is None else block.gamma_2 * branch)
    torch.testing.assert_close(ours, model.norm(x), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm: BEiT", "timm: relative positions, post-norm"])
def test_biases_follow_pruned_tokens(name):
    """timm's own blocks, told not to look at the tokens that were pruned before, compute the same."""
    model = build(name).double()
    prefix, images = model.num_prefix_tokens, images_for(model, torch.float64)
    tokcomp.compress(model, diffrate(model, "prune"))
    ours, maps = model(images), tokcomp.trace(model, images)
    x, places = find_adapter(model).place(tokcomp.restore(model), model.patch_embed(images))
    alive = torch.ones(x.shape[:2], dtype=torch.bool)
    for block, now in zip(model.blocks, maps, strict=True):
        hidden = x.new_zeros(x.shape[:2]).masked_fill(~alive, float("-inf"))[:, None, None]
        x = block(x, hidden if places.table is None else places.table + hidden)
        alive = now >= 0
    patches = alive[:, prefix:, None].double()
    pooled = (model.norm(x)[:, prefix:] * patches).sum(1) / patches.sum(1)
    torch.testing.assert_close(ours, model.head(model.fc_norm(pooled)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_a_slot_s_place_is_that_of_a_token_in_it(prefix):
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(1))
    importance = x.norm(dim=2)
    for method in (diffrate_of(20, 14, 9), diffrate_of(20, 9, 14), tokcomp.ToMe(6), tokcomp.EViT(0.5, blocks=(0,))):
        assignment = method.assign(0, 20, prefix)
        score = x if isinstance(method, tokcomp.ToMe) else importance
        out, _, source = method.reduce(x, score, assignment, size=None, num_prefix_tokens=prefix)
        for kept in (
            method.kept_places(score, source, out.shape[1], prefix),
            tokcomp.Method.kept_places(method, score, source, out.shape[1], prefix),
        ):
            assert torch.equal(source.gather(1, kept), torch.arange(out.shape[1]).expand(2, -1))
    # Where nothing merges into it, a slot holds the very token whose place it has.
    alone = source.unsqueeze(2).eq(torch.arange(out.shape[1])).sum(1) == 1
    kept = method.kept_places(score, source, out.shape[1], prefix)
    assert torch.equal(out[alone], x.gather(1, kept[..., None].expand(-1, -1, 8))[alone])


def diffrate_of(tokens, prune, merge):
    return tokcomp.DiffRate(tokcomp.CompressionSchedule([prune], [merge]))


@pytest.mark.slow
@torch.no_grad()
def test_compiles_whole():
    model = tokcomp.compress(build("timm: DINOv3"), tokcomp.ToMe(3))
    images = images_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=0, atol=1e-4)


def test_the_docs_hold_the_table():
    text = (DOCS / "adding-a-model-family.md").read_text() + (DOCS.parent / "README.md").read_text()
    assert text.count(support_table()) == 1, "run: python -m tests.families.table"

"""AdaptFormer's branches: what they compute beside every method and ToCom, what trains, files, and taking them away."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokcomp import adaptformer
from tokcomp.reading import DIGEST
from tokcomp.runs.recipe import ADAPTFORMER_RECIPE, Recipe

from tests.library.conftest import make_vit, meta_model, published  # noqa: F401
from tests.library.small_caformer import caformer
from tests.tocom.conftest import lively_plugin
from tests.train.conftest import StopAfter
from tests.train.test_finetune import make_run

CPU = torch.device("cpu")
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5
METHODS = {
    "none": None,
    "diffrate": tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 13, 11, 9], [17, 11, 9, 7])),
    "tome": tokcomp.ToMe(3),
    "tome_mlp": tokcomp.ToMeMLP(4),
    "evit": tokcomp.EViT(0.6, blocks=(0, 2)),
}


def shake(model, std=0.3, seed=3):
    """Branches with something in them, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def adapted(make_vit):  # noqa: F811
    """adapted(dtype, **arguments of make_vit): a model whose branches were trained."""

    def make(dtype=torch.float32, *, bottleneck=5, scale=0.7, **vit):
        return shake(adaptformer.attach(make_vit(**vit).to(dtype), bottleneck, scale))

    return make


def by_hand(model):
    """The same model without branches, hooks on its MLPs adding what they add: hooks are heeded on every path."""
    other = copy.deepcopy(model)
    branches = [block.mlp.adapter for block in other.blocks]
    adaptformer.detach(other)
    for block, branch in zip(other.blocks, branches, strict=True):

        def add(module, inputs, out, branch=branch):
            hidden = F.relu(F.linear(inputs[0], branch.down.weight, branch.down.bias))
            return out + branch.scale * F.linear(hidden, branch.up.weight, branch.up.bias)

        block.mlp.register_forward_hook(add)
    return other


def compressed(model, method):
    return model if METHODS[method] is None else tokcomp.compress(model, METHODS[method])


def compared(logits, expected):
    """Two orders of the same sums, some 60 long in 4 blocks; lively logits are of size 1 to 10."""
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(logits, expected, atol=2000 * eps, rtol=2000 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_branch_is_beside_the_mlp(adapted, method, dtype):
    model = compressed(adapted(dtype), method)
    images = IMAGES.to(dtype)
    with torch.no_grad():
        compared(model(images), compressed(by_hand(model), method)(images))
        plain = compressed(adaptformer.detach(copy.deepcopy(model)), method)
        assert (model(images) - plain(images)).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_a_new_branch_changes_nothing(make_vit, method):  # noqa: F811
    model = compressed(make_vit().double(), method)
    with torch.no_grad():
        before = model(IMAGES.double())
        adaptformer.attach(model)
        assert torch.equal(model(IMAGES.double()), before)


def test_layer_scale_and_the_order_of_compressing(adapted):
    """The branch goes the MLP's way; whether the model is compressed before or after makes no difference."""
    model = adapted(init_values=0.5)
    first = tokcomp.compress(copy.deepcopy(model), tokcomp.ToMe(3))
    bare = tokcomp.compress(adaptformer.detach(copy.deepcopy(model)), tokcomp.ToMe(3))
    second = adaptformer.attach(bare, 5, 0.7)
    second.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = by_hand(model)
        compared(model(IMAGES), expected(IMAGES))
        assert torch.equal(first(IMAGES), second(IMAGES))
        compared(first(IMAGES), tokcomp.compress(expected, tokcomp.ToMe(3))(IMAGES))


def test_taking_them_away_leaves_the_model_as_it_was(make_vit):  # noqa: F811
    model = make_vit()
    before = {name: (type(module), list(vars(module)), list(module._modules)) for name, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        logits = model(IMAGES)
        packed = tokcomp.compress(copy.deepcopy(model), tokcomp.ToMe(3))(IMAGES)
    tokcomp.compress(shake(adaptformer.attach(model)), tokcomp.ToMe(3))
    assert adaptformer.is_attached(model) and set(parameters) < set(dict(model.named_parameters()))
    with torch.no_grad():
        assert not torch.allclose(model(IMAGES), packed, atol=1e-2)
        adaptformer.detach(model)
        assert torch.equal(model(IMAGES), packed)
        tokcomp.restore(model)
        assert torch.equal(model(IMAGES), logits)
    after = {name: (type(module), list(vars(module)), list(module._modules)) for name, module in model.named_modules()}
    assert after == before and not adaptformer.is_attached(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    adaptformer.detach(model)


@pytest.mark.parametrize("method", ["none", "tome"])
def test_copies_and_pickles(adapted, method):
    model = compressed(adapted(), method)
    with torch.no_grad():
        expected = model(IMAGES)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(IMAGES), expected)
            other.blocks[0].mlp.adapter.up.weight.add_(1)
            assert not torch.equal(other(IMAGES), expected) and torch.equal(model(IMAGES), expected)
        half = copy.deepcopy(model).bfloat16()
        assert half(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_multiply_adds(make_vit):  # noqa: F811
    model = make_vit()
    before = tokcomp.flops(model)
    assert tokcomp.flops(adaptformer.attach(model, 5)) == before + 4 * 17 * 2 * 24 * 5
    tokcomp.compress(model, tokcomp.ToMe(3))
    bare = tokcomp.compress(adaptformer.detach(copy.deepcopy(model)), tokcomp.ToMe(3))
    assert tokcomp.flops(model) - tokcomp.flops(bare) == (14 + 11 + 8 + 5) * 2 * 24 * 5


# ---- with ToCom


@pytest.fixture
def plugin(make_vit):  # noqa: F811
    return lively_plugin(make_vit(), seed=1)


def test_with_a_plugin(adapted, plugin):
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = IMAGES[:3]
    switchable = tokcomp.Switchable(model, plugin, 0, [0, 2, 4])
    expected = {}
    for degree in (0, 2, 4):
        other = by_hand(model)
        plugin.fold(other, 0, degree)
        with torch.no_grad():
            expected[degree] = tokcomp.compress(other, tokcomp.ToMe(degree))(images)
        compared(switchable(images, degree), expected[degree])
    assert not torch.allclose(expected[0], expected[4], atol=0.05)
    plugin.fold(model, 0, 4)
    tokcomp.compress(model, tokcomp.ToMe(4))
    with torch.no_grad():
        compared(model(images), expected[4])
        plugin.unfold(model)
        with plugin.applied(model, 0, 4):
            compared(model(images), expected[4])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- training


@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_branches_and_classifier_alone(adapted, method):
    model = compressed(adapted(), method).train()
    names = adaptformer.freeze(model)
    assert len(names) == 4 * 4 + 2 and {"head.weight", "blocks.3.mlp.adapter.up.bias"} <= set(names)
    F.cross_entropy(model(IMAGES), LABELS).backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == set(names)
    assert all(bool(parameter.grad.any()) for name, parameter in model.named_parameters() if name in found)


RECIPE = replace(ADAPTFORMER_RECIPE, lr=1e-2, batch_size=8, mixup=0.8, model_ema_decay=0.5, drop_path=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.05, 0.0])
def test_training_moves_branches_and_classifier_alone_and_resumes(make_vit, tmp_path, weight_decay):  # noqa: F811
    recipe = replace(RECIPE, weight_decay=weight_decay)

    def model():
        torch.manual_seed(4)
        model = adaptformer.attach(make_vit(drop_path_rate=0.1), 5)
        adaptformer.freeze(model)
        return tokcomp.compress(model, tokcomp.ToMe(3))

    before = {name: tensor.clone() for name, tensor in model().state_dict().items()}
    whole = make_run(tmp_path / "whole", recipe, model=model())
    assert whole.train(StopAfter(whole))
    after = whole.trainee.model.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".adapter." in name or name.startswith("head.")}

    first = make_run(tmp_path / "parts", recipe, model=model())
    assert not first.train(StopAfter(first, 3))
    second = make_run(tmp_path / "parts", recipe, model=model())
    second.resume()
    assert second.train(StopAfter(second), resumed=True)
    for name in ("last.safetensors", "last_ema.safetensors", "best.safetensors"):
        ours, theirs = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert set(ours) == moved and all(torch.equal(ours[key], theirs[key]) for key in ours), name
    loaded = tokcomp.compress(adaptformer.load(tmp_path / "whole" / "last.safetensors", make_vit()), tokcomp.ToMe(3))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGES), whole.trainee.model.eval()(IMAGES))


def test_the_recipe_of_the_paper():
    recipe: Recipe = ADAPTFORMER_RECIPE
    assert (recipe.opt, recipe.lr, recipe.sched, recipe.weight_decay) == ("adamw", 1e-3, "cosine", 1e-4)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.drop_path) == (100, 0, 0.1)
    assert not recipe.mixes and recipe.aa is None and recipe.smoothing == recipe.reprob == recipe.hflip == 0


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files(adapted, make_vit, tmp_path, dtype):  # noqa: F811
    model, path = adapted(dtype), tmp_path / "adapter.safetensors"
    with torch.no_grad():
        model.head.bias.add_(1)
    adaptformer.save(model, path, facts={"why": "a test"})
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert about["format"] == "tokcomp.adaptformer" and about["tokcomp"] == '{"why": "a test"}'
    assert (about["bottleneck"], about["scale"], about["num_classes"]) == ("5", "0.7", "5")
    other = adaptformer.attach(make_vit().to(dtype), 9)  # replaced
    assert adaptformer.load(path, other) is other and adaptformer.is_saved(path)
    with torch.no_grad():
        assert torch.equal(other(IMAGES.to(dtype)), model(IMAGES.to(dtype)))
    assert other.blocks[0].mlp.adapter.scale == 0.7
    assert set(adaptformer.state(model)) == set(load_file(path))


def test_headless_and_distilled(tmp_path, make_vit):  # noqa: F811
    from timm.models.deit import VisionTransformerDistilled

    headless = shake(adaptformer.attach(make_vit(num_classes=0), 5))
    assert all(".adapter." in name for name in adaptformer.freeze(headless))
    adaptformer.save(headless, tmp_path / "headless")
    other = adaptformer.load(tmp_path / "headless", make_vit(num_classes=0))
    with torch.no_grad():
        assert torch.equal(other(IMAGES), headless(IMAGES))
    distilled = adaptformer.attach(make_vit(cls=VisionTransformerDistilled))
    assert {"head.weight", "head_dist.weight"} <= set(adaptformer.freeze(distilled))


def broken(kind, path):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = {name: text for name, text in file.metadata().items() if name != DIGEST}
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
        return
    if kind == "other":
        about.pop("format")
    elif kind == "version":
        about["version"] = "2"
    elif kind == "metadata":
        del about["scale"]
    elif kind == "missing":
        del tensors["blocks.1.mlp.adapter.up.bias"]
    elif kind == "more":
        tensors["norm.weight"] = torch.ones(24)
    save_file(tensors, path, about)


FILES = {
    "truncated": "must be an AdaptFormer file, got a file that does not load",
    "other": "must be an AdaptFormer file, got a file of 18 other tensors",
    "version": "version must be 1, got 2; another tokcomp wrote it",
    "metadata": "the metadata must say bottleneck, scale, depth and width",
    "missing": r"blocks.1.mlp.adapter.up.bias must be \(24,\), got nothing",
    "more": r"norm.weight must be absent, got \(24,\)",
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_do_not_load(adapted, make_vit, tmp_path, kind):  # noqa: F811
    path = tmp_path / "adapter.safetensors"
    adaptformer.save(adapted(), path)
    broken(kind, path)
    model = adaptformer.attach(make_vit(), 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=FILES[kind]):
        adaptformer.load(path, model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("vit", "message"),
    [
        (dict(depth=3), "made for 4 blocks of width 24, got a model of 3 blocks of width 24"),
        (dict(embed_dim=36), "made for 4 blocks of width 24, got a model of 4 blocks of width 36"),
        (dict(num_classes=7), "its classifier is one of 5 classes, the model's of 7"),
        (dict(num_classes=0), "its classifier is one of 5 classes, the model's of 0"),
    ],
)
def test_files_for_other_models(adapted, make_vit, tmp_path, vit, message):  # noqa: F811
    path = tmp_path / "adapter.safetensors"
    adaptformer.save(adapted(), path)
    model = make_vit(**vit)
    with pytest.raises(ValueError, match=message):
        adaptformer.load(path, model)
    assert not adaptformer.is_attached(model)


def test_wrong_input(make_vit, tmp_path):  # noqa: F811
    model = make_vit()
    for error, message, arguments in (
        (TypeError, "bottleneck must be an integer, got 2.0", (2.0,)),
        (TypeError, "bottleneck must be an integer, got True", (True,)),
        (ValueError, "bottleneck must be at least 1, got 0", (0,)),
        (TypeError, "scale must be a number, got '1'", (2, "1")),
        (ValueError, "scale must be finite, got nan", (2, float("nan"))),
    ):
        with pytest.raises(error, match=message):
            adaptformer.attach(model, *arguments)
    assert not adaptformer.is_attached(model)
    for function in (adaptformer.freeze, adaptformer.state, lambda one: adaptformer.save(one, tmp_path / "none")):
        with pytest.raises(ValueError, match="must have AdaptFormer branches, got one without; attach or load them"):
            function(model)
    with pytest.raises(ValueError, match="must have no AdaptFormer branches yet"):
        adaptformer.attach(adaptformer.attach(model))
    with pytest.raises(tokcomp.UnsupportedModelError, match="branches are for timm's VisionTransformer, got a"):
        adaptformer.attach(caformer())
    with pytest.raises(FileNotFoundError, match="none does not exist"):
        adaptformer.load(tmp_path / "none", model)
    assert not list(tmp_path.iterdir())

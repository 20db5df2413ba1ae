"""Trained parts of methods: on the model, in its checkpoint, through compress and restore; cost; what is refused.

That the methods compute what their papers say is tested in tests/oracle, their training in tests/train.
"""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import timm
import tokcomp
import torch
from safetensors.torch import save_file
from tokcomp import learned
from tokcomp.blocks.passages import watched_passages
from tokcomp.dense.segmenter import position_tokens
from tokcomp.methods import Answers

METHODS = {"dynamicvit": tokcomp.DynamicViT(0.6), "spvit": tokcomp.SPViT(0.6)}
#: Tokens in each of 4 blocks, of 17.
COUNTS = {"dynamicvit": [17, 10, 6, 4], "spvit": [17, 11, 8, 7]}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def attached(make_vit, method):
    model = learned.attach(make_vit(), method)
    with torch.no_grad():
        for parameter in model._modules[method.name].parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def test_compressed_and_restored(attached, method, images_for):
    """The parts stay as they are through both, and copies and pickles have them."""
    model, images = attached, images_for(attached)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [set(vars(module)) for module in model.modules()]
    before = model(images)
    tokcomp.compress(model, method)
    compressed = model(images)
    assert not torch.equal(compressed, before)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images), compressed)
        assert copied._modules[method.name] is not model._modules[method.name]
    assert model.state_dict().keys() == state.keys()
    assert any(name.startswith(f"{method.name}.0.") for name in state)
    tokcomp.compress(model, tokcomp.ToMe(2))
    assert torch.equal(tokcomp.compress(model, method)(images), compressed)
    tokcomp.restore(model)
    assert torch.equal(model(images), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [set(vars(module)) for module in model.modules()] == attributes
    learned.detach(model)
    assert not learned.is_attached(model, method) and torch.equal(model(images), before)


def test_a_checkpoint_brings_the_parts(attached, make_vit, method, images_for, tmp_path):
    images, path = images_for(attached), tmp_path / "model.safetensors"
    save_file(attached.state_dict(), path)
    want = tokcomp.compress(attached, method)(images)
    for other in (make_vit(7), learned.attach(make_vit(7), method)):
        assert learned.load(path, other) is other
        assert torch.equal(tokcomp.compress(other, method)(images), want)
        assert all(parameter.requires_grad for parameter in other.parameters())


def test_tokens_are_really_dropped_and_counted(attached, method, images_for):
    model, images = tokcomp.compress(attached, method), images_for(attached)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model(images)
    assert seen == COUNTS[method.name]
    maps = tokcomp.trace(model, images)
    assert [int(one.max()) + 1 for one in maps] == COUNTS[method.name]
    gone = (maps[-1] < 0).sum(1).tolist()
    assert gone == [0 if method.name == "spvit" else 13] * 3
    plain = tokcomp.flops(tokcomp.restore(model))
    tokcomp.compress(model, tokcomp.ToMe([0] * 4))
    assert tokcomp.flops(model) == plain
    assert tokcomp.flops(tokcomp.compress(model, method)) == tokcomp.flops(model, images=images) < 0.69 * plain


def test_published_cost(meta_model):
    """DynamicViT's own code multiplies 2,980,897,728 times, less the class token's share of the patch embedding."""
    model, costs = meta_model("deit_small_patch16_224"), []
    rates = ((0.617, 0.369, 0.137), (0.7, 0.39, 0.21))
    for method in (tokcomp.DynamicViT(0.7), *map(tokcomp.SPViT, rates), tokcomp.EvoViT()):
        if isinstance(method, tokcomp.methods.LearnedMethod) and not learned.is_attached(model, method):
            learned.attach(tokcomp.restore(model), method)
        costs.append(tokcomp.flops(tokcomp.compress(model, method)))
    assert costs[0] == 2_980_897_728 + 768 * 384
    for kept, cost in zip(([120, 72, 26], [137, 76, 41]), costs[1:3], strict=True):
        arriving = [196, *(count + packages for packages, count in enumerate(kept, 1))]
        blocks = 3 * sum(12 * 384**2 * n + 2 * 384 * n**2 for n in (count + 1 for count in arriving))
        selector = 6 * (64 * 64 + 64 * 32 + 32 * 16 + 16 * 2) + 2 * 6 * 3
        assert cost == blocks + 197 * 768 * 384 + 384 * 1000 + sum(arriving[:3]) * selector
    assert [round(cost / 1e9, 2) for cost in costs[1:]] == [2.46, 2.67, 3.05]


def test_tokens_of_evo_vit_come_back(make_vit, images_for):
    """Slots are those of the slow path, the last one the placeholders'; features, pooling and cost are right."""
    model, method = make_vit(global_pool="avg"), tokcomp.EvoViT(0.5, [1, 3])
    images = images_for(model)
    tokcomp.compress(model, method)
    maps = tokcomp.trace(model, images)
    assert [int(one.max()) for one in maps] == [16, 9, 9, 9]
    assert all((one[:, 1:] == 9).sum().item() == 3 * 8 for one in maps[1:]) and torch.equal(maps[1], maps[2])
    assert not torch.equal(maps[2], maps[3])
    assert tokcomp.flops(model) == tokcomp.flops(model, images=images)
    plain = tokcomp.EvoViT(0.5, [1, 3], representative=False)
    assert [int(one.max()) for one in tokcomp.trace(tokcomp.compress(model, plain), images)] == [16, 8, 8, 8]
    tokcomp.compress(model, method)
    features = model.forward_features(images)
    assert features.shape == (3, 17, 24) and torch.equal(position_tokens(model, images), features)
    last = model.forward_intermediates(images, indices=1, intermediates_only=True, norm=True, output_fmt="NLC")[0]
    torch.testing.assert_close(last, features[:, 1:])
    torch.testing.assert_close(model(images), model.forward_head(features))
    everything = tokcomp.EvoViT(1.0)
    torch.testing.assert_close(tokcomp.compress(model, everything)(images), tokcomp.restore(model)(images))
    for arguments, message in (
        ({"keep_rate": 0}, r"keep_rate must be in \(0, 1\], got 0"),
        ({"momentum": 2}, r"momentum must be in \(0, 1\], got 2"),
        ({"blocks": [0, 2]}, "blocks must rise and start above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tokcomp.EvoViT(**arguments)
    with pytest.raises(TypeError, match=r"keep_rate must be a number, got \(0.5, 0.4\)"):
        tokcomp.EvoViT((0.5, 0.4))
    with pytest.raises(TypeError, match="method must be one with trained parts"):
        tokcomp.learned.attach(model, method)


def test_a_vit_halts_tokens(make_vit, images_for):
    """Each image of a batch as if it were alone; the settings of the halting come with the checkpoint."""
    torch.manual_seed(0)
    model, method = make_vit(), tokcomp.AViT(0.6, scale=2.0, shift=-0.5)
    learned.attach(model, method)
    images = images_for(model) * torch.tensor([0.1, 1.0, 3.0])[:, None, None, None]
    state = model.state_dict()
    assert state["avit.scale"] == 2 and state["avit.shift"] == -0.5
    tokcomp.compress(model, tokcomp.AViT(0.6)).double()
    images = images.double()
    together, alone = model(images), torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)
    left = [(one.amax(1) + 1).tolist() for one in tokcomp.trace(model, images)]
    assert left[0] == [17] * 3 and len({*left[1]}) > 1 and all(count < 17 for count in left[-1])
    assert tokcomp.flops(model, images=images) < tokcomp.flops(tokcomp.compress(model, tokcomp.ToMe([0] * 4)))
    tokcomp.compress(model, tokcomp.AViT(0.6))
    assert model(images[:0]).shape == (0, 5)
    # Nothing halts, so that the class token's answer is that of the last block alone.
    model._modules["avit"].shift.fill_(-1e4)
    torch.testing.assert_close(model(images), tokcomp.restore(model)(images))
    # As the prior has it: 2 of 4 blocks before it, and the one in which it halts.
    assert tokcomp.AViT().counts(12, 197, 1) == [(197, 197)] * 9 + [(1, 1)] * 3
    with pytest.raises(ValueError, match="attention must be 'tokcomp' for AViT"):
        tokcomp.compress(model, tokcomp.AViT(), attention="stock")


def test_a_vit_losses_by_hand():
    class Passed:
        ponder = torch.tensor([3.0, 5.0], dtype=torch.float64)
        halting = tuple(torch.tensor(one, dtype=torch.float64) for one in (0.1, 0.2, 0.5, 0.2))

    method = tokcomp.AViT(ponder_weight=0.25, prior_weight=2.0, prior_depth=2)
    found = method.penalties(Passed, None, None)
    prior = [0.98 * math.exp(-((2 - b) ** 2) / 2) / (math.exp(-2) + math.exp(-0.5)) for b in range(4)]
    assert sum(method.prior(4)[:2]) == pytest.approx(0.98) and method.prior(4) == pytest.approx(prior)
    want = sum(p * math.log(p / float(h)) for p, h in zip(prior, Passed.halting, strict=True)) / 4
    assert found["ponder"].item() == pytest.approx(0.25 * 4) and want > 0
    assert found["prior"].item() == pytest.approx(2.0 * want)
    one = lambda *h: method.penalties(type("P", (), {"ponder": Passed.ponder, "halting": h}), None, None)["prior"]  # noqa: E731
    assert torch.autograd.gradcheck(one, [one_.clone().requires_grad_() for one_ in Passed.halting])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"threshold": 1}, ValueError, r"threshold must be in \(0, 1\), got 1"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"shift": "x"}, TypeError, "shift must be a number, got 'x'"),
        ({"ponder_weight": -1}, ValueError, "ponder_weight must be 0 or more, got -1"),
        ({"prior_depth": 4}, None, "prior_depth must be a block from 1 to 3 of the model, got 4"),
    ],
)
def test_wrong_settings_of_a_vit(make_vit, arguments, kind, message):
    with pytest.raises(kind or ValueError, match=message):
        learned.attach(make_vit(), tokcomp.AViT(**arguments))


def test_feature_maps_have_every_position(attached, method, images_for):
    images = images_for(attached)
    maps = tokcomp.compress(attached, method).forward_intermediates(images, intermediates_only=True)
    assert len(maps) == 4 and all(one.shape == (3, 24, 4, 4) for one in maps)


def test_half_precision_and_no_images(attached, method, images_for):
    images = images_for(attached)
    want = tokcomp.compress(attached, method)(images)
    torch.testing.assert_close(attached.double()(images.double()), want.double(), rtol=1e-4, atol=1e-4)
    assert attached(images.double()[:0]).shape == (0, 5)
    have = attached.bfloat16()(images.bfloat16())
    assert have.dtype == torch.bfloat16 and have.isfinite().all()


def test_rotary_places_follow(images_for):
    eva = timm.models.Eva(
        img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5, use_rot_pos_emb=True,
        global_pool="token",
    ).eval()  # fmt: skip
    for method in METHODS.values():
        images = images_for(eva)
        learned.attach(eva, method)
        exact = copy.deepcopy(eva).double()
        tokcomp.compress(exact, method)
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(exact(images.double())[order], exact(images.double()[order]))


def test_losses_by_hand(method):
    generator = torch.Generator().manual_seed(0)
    randn = partial(torch.randn, generator=generator, dtype=torch.float64)
    first = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]], dtype=torch.float64)
    second = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1]], dtype=torch.float64)
    ours, theirs = (Answers(randn(2, 5), randn(2, 5, 3)) for _ in range(2))

    class Drawn:
        decisions = (first, second)

    found = method.penalties(Drawn, ours, theirs)
    if method.name == "dynamicvit":
        ratio = [((3 / 4 - 0.6) ** 2 + (2 / 4 - 0.6) ** 2) / 2, ((2 / 4 - 0.36) ** 2 + (1 / 4 - 0.36) ** 2) / 2]
    else:
        ratio = [(5 / 8 - 0.6) ** 2, (3 / 8 - 0.36) ** 2]
    assert found["ratio"].item() == pytest.approx(2.0 * sum(ratio) / 2)
    p, q = theirs.logits.softmax(-1), ours.logits.softmax(-1)
    assert found["logits"].item() == pytest.approx(0.5 * (p * (p / q).log()).sum().item() / 2)
    squares = [(ours.tokens[b, 1 + t] - theirs.tokens[b, 1 + t]).square().mean() for b, t in ((0, 0), (0, 3), (1, 3))]
    assert found["tokens"].item() == pytest.approx(0.5 * sum(squares).item() / 3)
    assert method.penalties(Drawn, ours, None).keys() == {"ratio"}


def test_losses_have_right_gradients(method):
    torch.manual_seed(0)
    taught = Answers(torch.randn(2, 5).double(), torch.randn(2, 5, 3).double())

    def total(logits, tokens, first, second):
        class Drawn:
            decisions = (first, second)

        return torch.stack(list(method.penalties(Drawn, Answers(logits, tokens), taught).values())).sum()

    shapes = ((2, 5), (2, 5, 3), (2, 4), (2, 4))
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    # The tokens' error takes the decisions as they are, so their gradient is the ratio's alone.
    assert torch.autograd.gradcheck(lambda a, b: total(a, b, *inputs[2:]), inputs[:2])
    alone = lambda a, b: method.penalties(type("D", (), {"decisions": (a, b)}), taught, None)["ratio"]  # noqa: E731
    assert torch.autograd.gradcheck(alone, inputs[2:])


def test_training_reaches_every_part_even_where_nothing_is_left(attached, method, images_for):
    """An image of which a stage drops everything gives numbers, and the gradient still reaches the predictors."""
    model = tokcomp.compress(attached, method).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("0.out.bias", "1.out.bias")) and method.name in name:
                parameter.copy_(torch.tensor([-50.0, 50.0]))
    with watched_passages() as passages:
        logits = model(images_for(model))
    (passage,) = passages
    assert passage.decisions[-1].sum() == 0 and logits.isfinite().all()
    torch.stack([logits.sum(), *(one.sum() for one in passage.decisions)]).sum().backward()
    grads = [p.grad for name, p in model.named_parameters() if name.startswith(f"{method.name}.")]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    with watched_passages() as passages:
        model.eval()(images_for(model))
    assert passages == []


def test_what_is_refused(make_vit, method, tmp_path):
    name, model = type(method).__name__, make_vit()
    with pytest.raises(ValueError, match=f"model must have the trained parts of {name}, got one without: load a check"):
        tokcomp.compress(model, method)
    for wrong in (tokcomp.ToMe(2), type(method)):
        with pytest.raises(TypeError, match=r"method must be one with trained parts .* got (ToMe|the class)"):
            learned.attach(model, wrong)
    learned.attach(model, method)
    with pytest.raises(ValueError, match=f"model must have no parts of {name} yet, got one with them"):
        learned.attach(model, method)
    with pytest.raises(ValueError, match=r"the model's (predictors|selectors) must be 2 of width 24.*, got 3 of 24"):
        tokcomp.compress(model, type(method)(0.6, [1, 2]))
    model.head.double(), model._modules[method.name].double()
    with pytest.raises(ValueError, match=r"must be torch.float32 on cpu as the model is, got torch.float64 on cpu"):
        tokcomp.compress(model, method)
    model.float()
    tokcomp.compress(model, method)
    with pytest.raises(ValueError, match="model must not be compressed by a learned method while its parts leave"):
        learned.detach(model)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"weights.safetensors: model must be plain, got a compressed one"):
        learned.load(path, model)
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        learned.load(tmp_path / "absent", model)
    pooled = make_vit(global_pool="avg")
    with pytest.raises(tokcomp.UnsupportedModelError, match="needs a model that answers by its class token alone"):
        tokcomp.compress(learned.attach(pooled, method), method)
    with pytest.raises(ValueError, match=f"{name} needs a plain vision transformer, got a hierarchical model"):
        method.validate(tokcomp.methods.Geometry(4, 0, False, 16, spreads_tokens=True))
    with pytest.raises(ValueError, match=f"{name} needs a class token, which this model does not have"):
        learned.attach(make_vit(class_token=False, global_pool="avg"), method)


def test_hostile_checkpoints_change_nothing(make_vit, method, tmp_path):
    model, path = make_vit(), tmp_path / "weights.safetensors"
    good = learned.attach(make_vit(3), method).state_dict()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    norm = f"{method.name}.0.norm.weight"
    changes = {
        norm: torch.ones(10**6),  # as if of a width whose layers would take terabytes
        f"{method.name}.7.norm.weight": torch.ones(24),
        f"{method.name}.0.out.bias": torch.ones(2, dtype=torch.int64),
        f"{method.name}.odd": torch.ones(1),
        "blocks.0.attn.qkv.weight": torch.ones(3),
        "blocks.9.attn.qkv.weight": torch.ones(3),
    }
    for key, value in changes.items():
        save_file({**good, key: value}, path)
        with pytest.raises(ValueError, match=rf"{path.name}: .* must (be|hold)"):
            learned.load(path, model)
    save_file({key: value for key, value in good.items() if key != norm}, path)
    with pytest.raises(ValueError, match=f"{norm} must be a vector, got nothing"):
        learned.load(path, model)
    assert model.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"keep_rate": 1.2}, ValueError, r"keep_rate must be in \(0, 1\], got 1.2"),
        ({"keep_rate": (0.5, 0.7, 0.3)}, ValueError, "keep_rate must not rise from stage to stage"),
        ({"blocks": [2, 1]}, ValueError, "blocks must rise"),
        ({"blocks": 2}, TypeError, "blocks must be a list of block numbers, got 2"),
        ({"ratio_weight": -1}, ValueError, "ratio_weight must be 0 or more and finite, got -1"),
        ({"distill_weight": "x"}, TypeError, "distill_weight must be a number, got 'x'"),
        ({"blocks": [1, 4]}, None, r"blocks must be below the model's depth 4, got \(1, 4\)"),
        ({"keep_rate": (0.5, 0.3)}, None, r"keep_rate must be one number, or one for each of \(1, 2, 3\)"),
    ],
)
def test_wrong_settings(make_vit, method, arguments, kind, message):
    if kind is None:
        with pytest.raises(ValueError, match=message):
            learned.attach(make_vit(), type(method)(**arguments))
        return
    with pytest.raises(kind, match=message):
        type(method)(**arguments)

"""Training methods with parts of their own: their losses in the one step, the teacher, exact resumption."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from tokcomp import learned
from tokcomp.blocks.passages import watched_passages
from tokcomp.finetune.tuner import FineTuner
from tokcomp.methods import Answers
from tokcomp.runs.recipe import soft_cross_entropy
from tokcomp.runs.steps import MODEL, seed_all

from tests.train.conftest import StopAfter
from tests.train.test_finetune import (
    LIVELY,
    PLAIN,
    SHAPE,
    flat,
    make_images,
    make_model,
    make_run,
    make_tuner,
)

METHODS = {"dynamicvit": tokcomp.DynamicViT(0.6, [1, 2]), "spvit": tokcomp.SPViT(0.6, [1, 2])}
#: Under which tokens leave in training too, and whose losses need no teacher.
DROPPING = {"avit": tokcomp.AViT(0.9, 1.0, -3.0, ponder_weight=0.5), "evovit": tokcomp.EvoViT(0.5, layerwise=0.3)}
#: Of a model that averages its patches; the run is stopped in its first phase, which ends with its sixth step.
SECOND = {"second": tokcomp.EvoViT(0.5, [1], layerwise=0.75, second_weight=0.5)}
ALL = {**METHODS, **DROPPING, **SECOND}


def prepared(name, dtype=torch.float32, drop_path=0.0):
    """A compressed model and its teacher, if it has one."""
    model = make_model("none", dtype, drop_path, global_pool="avg" if name in SECOND else "token")
    teacher = copy.deepcopy(model) if name in METHODS else None
    torch.manual_seed(1)
    if isinstance(ALL[name], tokcomp.methods.LearnedMethod):
        learned.attach(model, ALL[name])
    return tokcomp.compress(model, ALL[name]), teacher


@pytest.mark.parametrize("name", METHODS)
def test_a_step_minimises_answer_and_penalties(name):
    """The gradients of one step in float64 are those of the losses written out."""
    recipe = replace(PLAIN, smoothing=0.0)
    model, teacher = prepared(name, torch.float64)
    twin, images = copy.deepcopy(model).train(), make_images(8, torch.float64)
    tuner = make_tuner(recipe, model=model, teacher=teacher)
    loss = tuner.step(images[0].clone(), images[1])
    seed_all(3, MODEL, 0, 0)
    with watched_passages() as passages:
        tokens = twin.forward_features(images[0])
        logits = twin.forward_head(tokens)
    plain = teacher.eval()
    with torch.no_grad():
        taught = plain.forward_features(images[0])
        answers = plain.forward_head(taught)
    found = METHODS[name].penalties(passages[0], Answers(logits, tokens), Answers(answers, taught))
    assert found.keys() == {"ratio", "logits", "tokens"} and all(one > 0 for one in found.values())
    want = soft_cross_entropy(logits, F.one_hot(images[1], 5)) + sum(found.values())
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for (path, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None, path
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11 * max(1.0, theirs.grad.abs().max()))


def test_a_methods_parts_learn_at_a_rate_of_their_own():
    """One step of AdamW moves every weight by its group's rate."""
    model, teacher = prepared("dynamicvit")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    recipe = replace(PLAIN, weight_decay=0.0, backbone_lr_scale=0.01)
    make_tuner(recipe, model=model, teacher=teacher).step(*make_images(8))
    moved = {name: (one.detach() - before[name]).abs().max().item() for name, one in model.named_parameters()}
    assert all(0 < far <= 1.001 * recipe.lr * (1 if "dynamicvit" in name else 0.01) for name, far in moved.items())
    assert max(far for name, far in moved.items() if "dynamicvit" in name) > 0.9 * recipe.lr


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_at_first_a_methods_parts_learn_alone(sched):
    """Two steps with the backbone fixed, then two with it, which a resumed training takes as well."""
    recipe = replace(PLAIN, sched=sched, frozen_epochs=0.5)
    tuner = make_tuner(recipe, model=prepared("dynamicvit")[0])
    before = {name: one.detach().clone() for name, one in tuner.model.named_parameters()}
    images, labels = make_images(8)
    for moved in ({True}, {True}, {True, False}, {True, False}):
        if tuner.step_number == 1:
            state = copy.deepcopy(tuner.state())
        tuner.step(images.clone(), labels)
        now = dict(tuner.model.named_parameters())
        assert {"dynamicvit" in name for name, one in now.items() if not torch.equal(one, before[name])} == moved
    again = make_tuner(recipe, model=prepared("dynamicvit")[0])
    again.load_state(state)
    for _ in range(3):
        again.step(images.clone(), labels)
    assert all(torch.equal(one, now[name]) for name, one in again.model.named_parameters())


def averaging(method):
    """A compressed model that averages its patches, in float64."""
    torch.manual_seed(0)
    return tokcomp.compress(VisionTransformer(**SHAPE, global_pool="avg").double(), method)


def test_evovit_selects_before_every_block_at_first_in_training_alone():
    method = tokcomp.EvoViT(blocks=[1], layerwise=0.5)
    tuner = make_tuner(PLAIN, model=averaging(method), total=4)
    images, labels = make_images(8, torch.float64)
    for blocks in ([1, 2], [1, 2], [1], [1]):
        twin = make_tuner(PLAIN, model=tokcomp.compress(copy.deepcopy(tuner.model), tokcomp.EvoViT(blocks=blocks)))
        assert tuner.step(images.clone(), labels) == twin.step(images.clone(), labels)
        plain = tokcomp.compress(copy.deepcopy(tuner.model), tokcomp.EvoViT(blocks=[1])).eval()
        assert torch.equal(tuner.model.eval()(images), plain(images))
        tuner.model.train()


def test_a_second_classifier_is_trained_and_left_behind(tmp_path):
    """On the class token, for half of the loss; checkpoints of the run have it, the weights do not."""
    method = tokcomp.EvoViT(second_weight=0.5)
    tuner = make_tuner(replace(PLAIN, smoothing=0.0), model=averaging(method))
    twin, (images, labels) = copy.deepcopy(tuner.model), make_images(8, torch.float64)
    loss = tuner.step(images.clone(), labels)
    second, tokens = twin.second_classifier, twin.forward_features(images)
    answers = twin.forward_head(tokens), second.head(second.norm(tokens[:, 0]))
    want = sum(0.5 * F.cross_entropy(one, labels) for one in answers)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for (path, ours), theirs in zip(tuner.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-11, msg=path)
    run = make_run(tmp_path, replace(PLAIN, model_ema_decay=0.7), model=averaging(method).float())
    assert run.train(StopAfter(run))
    assert any("second_classifier" in key for key in flat(run.trainee.state()))
    for file in ("best.safetensors", "last.safetensors", "last_ema.safetensors"):
        VisionTransformer(**SHAPE, global_pool="avg").load_state_dict(load_file(tmp_path / file))
    with pytest.raises(ValueError, match="second_weight must be 0 for a model that does not average its patches"):
        make_tuner(PLAIN, model=tokcomp.compress(make_model("none"), method))


@pytest.mark.parametrize("name", ["spvit"])
def test_training_finds_the_keep_rates_and_the_teacher_stays(name):
    model, teacher = prepared(name)
    tokcomp.compress(model, type(METHODS[name])(0.85, [1, 2]))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    tuner = make_tuner(replace(PLAIN, lr=5e-2), model=model, teacher=teacher, total=30)
    images, labels = make_images()
    for _ in range(30):
        tuner.step(images.clone(), labels)
    with watched_passages() as passages, torch.no_grad():
        for _ in range(8):
            model(images)
    shares = torch.stack([torch.stack(one.decisions).mean((1, 2)) for one in passages]).mean(0)
    assert (shares - torch.tensor([0.85, 0.85**2])).abs().max() < 0.12  # at first a half and a quarter
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    def run(folder):
        model, teacher = prepared(name, drop_path=0.3)
        return make_run(folder, LIVELY, model=model, teacher=teacher)

    whole, first = run(tmp_path / "whole"), run(tmp_path / "parts")
    assert whole.train(StopAfter(whole))
    assert not first.train(StopAfter(first, 5))
    second = run(tmp_path / "parts")
    second.resume()
    assert second.train(StopAfter(second), resumed=True)
    want, have = flat(whole.trainee.state()), flat(second.trainee.state())
    parts = {"evovit": None, "second": "second_classifier"}.get(name, name)
    assert want.keys() == have.keys() and (parts is None or any(f".{parts}." in key for key in want))
    assert all(torch.equal(tensor, have[key]) for key, tensor in want.items())
    for file in ("log.csv", "best.safetensors", "last.safetensors", "last_ema.safetensors"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    last = tmp_path / "parts" / "last.safetensors"
    saved, plain = load_file(last), isinstance(ALL[name], tokcomp.EvoViT)  # which leaves no parts
    model = make_model("none", global_pool="avg" if name in SECOND else "token")
    if plain:
        model.load_state_dict(saved)
    again = tokcomp.compress(model if plain else learned.load(last, model), ALL[name])
    assert saved.keys() == again.state_dict().keys()
    images, _ = make_images(4)
    assert torch.equal(again.eval()(images), second.trainee.model.eval()(images))


@pytest.mark.parametrize("method", DROPPING.values(), ids=DROPPING)
def test_methods_that_drop_tokens_in_training_too(method):
    """Training lowers the loss, and A-ViT's the blocks that tokens go through."""
    model = make_model("none")
    if isinstance(method, tokcomp.AViT):
        learned.attach(model, method)
    tuner = make_tuner(PLAIN, model=tokcomp.compress(model, method), total=20)
    images, labels = make_images()
    before = tokcomp.flops(model, images=images)
    losses = [tuner.step(images.clone(), labels).item() for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]
    assert tokcomp.flops(model, images=images) <= (0.9 if method.varies else 1) * before
    with pytest.raises(
        ValueError, match=f"teacher must be None for {type(method).__name__}, whose losses compare with"
    ):
        make_tuner(PLAIN, model=model, teacher=make_model("none"))


def test_pieces_and_blocks_computed_again():
    """With --grad-accum-steps each piece has its own passage, with --grad-checkpointing one that is not run twice."""
    found = []
    for checkpointing in (False, True):
        model, teacher = prepared("dynamicvit", torch.float64)
        model.set_grad_checkpointing(checkpointing)
        tuner = make_tuner(PLAIN, model=model, teacher=teacher, pieces=2)
        found.append((tuner.step(*make_images(8, torch.float64)), [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_refused():
    model, teacher = prepared("dynamicvit")
    with pytest.raises(ValueError, match="compiled must be False for DynamicViT, whose losses watch the forward pass"):
        make_tuner(PLAIN, model=model, teacher=teacher, compiled=True)
    with pytest.raises(
        ValueError, match="teacher must be None for a method whose losses compare with none, got Vision"
    ):
        make_tuner(PLAIN, teacher=teacher)
    with pytest.raises(ValueError, match="backbone_lr_scale must be 1 for a model without parts of a method"):
        make_tuner(replace(PLAIN, backbone_lr_scale=0.1))
    with pytest.raises(ValueError, match="frozen_epochs must be 0 for a model without parts of a method"):
        make_tuner(replace(PLAIN, frozen_epochs=1.0))
    assert isinstance(make_tuner(PLAIN, model=model), FineTuner)  # its losses without a teacher's

"""Training compressed models: steps, exact resumption, processes, divergence, and the weights that come out."""

from __future__ import annotations

import copy
import functools
import json
import os
from dataclasses import replace

import pytest
import timm
import tokcomp
import torch
import torch.multiprocessing as multiprocessing
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from tokcomp.finetune.run import FineTuneRun
from tokcomp.finetune.tuner import FineTuner
from tokcomp.measure.evaluate import evaluate
from tokcomp.runs import distributed
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.checkpoint import load_checkpoint, save_checkpoint
from tokcomp.runs.distributed import ALONE
from tokcomp.runs.log import read_log
from tokcomp.runs.recipe import Recipe
from tokcomp.runs.steps import DivergedError

from tests.train.conftest import StopAfter

CPU = torch.device("cpu")
PLAIN = Recipe(lr=1e-2, min_lr=1e-4, weight_decay=0.05, epochs=2, batch_size=8, mixup=0.0, cutmix=0.0, drop_path=0.0)
#: Everything that draws random numbers, and a moving average that moves.
LIVELY = replace(PLAIN, mixup=0.8, cutmix=1.0, drop_path=0.3, model_ema_decay=0.7, clip_grad=1.0, warmup_epochs=0.5)
METHODS = {
    "diffrate": tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 13, 9], [17, 11, 7])),
    "tome": tokcomp.ToMe(4),
    "evit": tokcomp.EViT(0.6, blocks=(0, 2)),
    "none": None,
}
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 5}


def make_model(method="diffrate", dtype=torch.float32, drop_path=0.3, **options):
    torch.manual_seed(0)
    model = VisionTransformer(**SHAPE, drop_path_rate=drop_path, **options).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    return model if METHODS[method] is None else tokcomp.compress(model, METHODS[method])


def make_images(count=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(count) % 5
    images = torch.randn(count, 3, 32, 32, generator=generator) + labels[:, None, None, None] / 2
    return images.to(dtype), labels


def make_tuner(recipe, *, model=None, method="diffrate", world=ALONE, pieces=1, total=8, **options):
    model = make_model(method, drop_path=recipe.drop_path) if model is None else model
    return FineTuner(
        model,
        recipe,
        num_classes=5,
        total_steps=total,
        steps_per_epoch=4,
        device=CPU,
        seed=3,
        world=world,
        pieces=pieces,
        **options,
    )


def make_run(folder, recipe=LIVELY, *, images=None, checkpoint_steps=1, **options):
    images, labels = make_images() if images is None else images
    tuner = make_tuner(recipe, **options)
    batches = TensorBatches(images, labels, 8, 3)
    held_out = make_images(20)
    return FineTuneRun(
        tuner,
        batches,
        lambda model: evaluate(model, [held_out], device=CPU),
        folder,
        settings={"lr": recipe.lr},
        facts={"model": "tiny"},
        total_steps=8,
        checkpoint_steps=checkpoint_steps,
        log_steps=3,
    )


def flat(state):
    """Tensors of a nested state, by path."""
    if isinstance(state, torch.Tensor):
        return {"": state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {f"{key}.{path}": tensor for key, value in items for path, tensor in flat(value).items()}


def gradients(tuner):
    return [parameter.grad.double() for parameter in tuner.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method):
    images, labels = make_images()
    tuner = make_tuner(PLAIN, method=method, total=30)
    losses = [tuner.step(images.clone(), labels).item() for _ in range(30)]
    # Smoothing 0.1 over 5 classes leaves an entropy of 0.4.
    assert losses[0] > 1.2 and losses[-1] < 0.7 * losses[0]
    assert tuner.step_number == 30 and 0 < tuner.learning_rate < PLAIN.lr


def test_tokens_are_really_dropped():
    tuner = make_tuner(PLAIN)
    seen = []
    for block in tuner.model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    tuner.step(*make_images(8))
    assert seen == [17, 11, 7]


def test_pieces_add_up_to_the_batch():
    """In float64, mixing on: the pieces hold whole pairs, so they are mixed as the batch is."""
    recipe = replace(LIVELY, drop_path=0.0, clip_grad=None, model_ema_decay=None)
    found = []
    for pieces in (1, 2):
        tuner = make_tuner(recipe, model=make_model(dtype=torch.float64, drop_path=0.0), pieces=pieces)
        batches = TensorBatches(*make_images(dtype=torch.float64), 8, 3, pieces=pieces)
        loss = [tuner.step(*batch).item() for batch in batches.iterate(0, 1)]
        found.append((loss, gradients(tuner)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for whole, pieced in zip(found[0][1], found[1][1], strict=True):
        # float64 sums of some thousand terms in two orders.
        torch.testing.assert_close(pieced, whole, rtol=0, atol=1e-11 * max(1.0, whole.abs().max().item()))


def test_the_moving_average_moves_by_its_decay():
    recipe = replace(PLAIN, model_ema_decay=0.7)
    tuner = make_tuner(recipe)
    before = copy.deepcopy(tuner.model.state_dict())
    tuner.step(*make_images(8))
    for name, average in tuner.ema.module.state_dict().items():
        want = 0.7 * before[name].double() + 0.3 * tuner.model.state_dict()[name].double()
        torch.testing.assert_close(average.double(), want, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-7)
    images, _ = make_images(4)
    assert tuner.ema.module(images).shape == (4, 5)  # compressed as well
    assert tokcomp.flops(tuner.ema.module) == tokcomp.flops(tuner.model)


def test_gradients_are_clipped():
    tuner = make_tuner(replace(PLAIN, clip_grad=1e-3))
    tuner.step(*make_images(8))
    norm = torch.stack([grad.norm() for grad in gradients(tuner)]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-4)


def test_bfloat16_autocast_trains_on_float32_weights():
    tuner = make_tuner(PLAIN, amp_dtype=torch.bfloat16, total=30)
    images, labels = make_images()
    losses = [tuner.step(images.clone(), labels).item() for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in tuner.model.parameters())


def test_float16_is_refused_on_cpu():
    with pytest.raises(ValueError, match="mixed precision in float16 must run on cuda, got cpu; use bfloat16"):
        make_tuner(PLAIN, amp_dtype=torch.float16)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(monkeypatch):
    # Tracing is what can go wrong; code generation takes a compiler and half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    recipe = replace(PLAIN, clip_grad=None)
    found = []
    for compiled in (False, True):
        tuner = make_tuner(recipe, model=make_model(dtype=torch.float64, drop_path=0.0), compiled=compiled)
        images, labels = make_images(8, torch.float64)
        tuner.step(images, labels)
        found.append(gradients(tuner))
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-11 * max(1.0, plain.abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", [4, 6])  # an epoch's end, and within one
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stopped_after):
    """Weights, moving average, optimizer, log and files, bit for bit; with mixup, drop path and clipping."""
    whole = make_run(tmp_path / "whole")
    assert whole.train(StopAfter(whole))
    first = make_run(tmp_path / "parts", checkpoint_steps=3)
    assert not first.train(StopAfter(first, stopped_after))
    assert first.trainee.step_number == stopped_after
    second = make_run(tmp_path / "parts", checkpoint_steps=3)
    second.resume()
    assert second.trainee.step_number == stopped_after
    assert second.train(StopAfter(second), resumed=True)
    want, have = flat(whole.trainee.state()), flat(second.trainee.state())
    assert want.keys() == have.keys() and len(want) > 3 * 30
    for name, tensor in want.items():
        assert torch.equal(tensor, have[name]), name
    for name in ("log.csv", "best.safetensors", "last.safetensors", "last_ema.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    one, other = whole.summary(), second.summary()
    assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}


def test_the_state_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="the state must be of a run with the same recipe and precision"):
        make_tuner(PLAIN).load_state(make_tuner(LIVELY).state())


@pytest.mark.slow
def test_a_checkpoint_that_kept_the_sum_of_its_losses_is_resumed(tmp_path):
    whole = make_run(tmp_path / "whole")
    whole.train(StopAfter(whole))
    first = make_run(tmp_path / "parts")
    first.train(StopAfter(first, 5))
    state = load_checkpoint(tmp_path / "parts" / "checkpoint.pt", "finetune")
    assert len(state["losses"]) == 1 and state.pop("last_loss") > 0
    state["losses"] = [sum(state["losses"]), 1]
    save_checkpoint(tmp_path / "parts" / "checkpoint.pt", "finetune", state)
    second = make_run(tmp_path / "parts")
    assert second.train(StopAfter(second), resumed=True)
    assert (tmp_path / "parts" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad_step=4):
    images, labels = make_images()
    chosen, _ = TensorBatches(images, labels, 8, 3).keys(bad_step - 1)[0]
    images[chosen, 1, 2, 3] = float("nan")
    run = make_run(tmp_path, PLAIN, images=(images, labels))
    with pytest.raises(DivergedError, match=rf"the loss of step {bad_step} is nan; the checkpoint before it is kept"):
        run.train(StopAfter(run))
    kept = make_run(tmp_path, PLAIN)
    kept.resume()
    assert kept.trainee.step_number == bad_step - 1 and kept.trainee.is_finite()
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [0, 3][: 1 + (bad_step > 3)]


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """A step whose loss is finite may still ruin the weights, by an infinite gradient."""
    run = make_run(tmp_path, PLAIN)
    step = run.trainee.step

    def ruinous(*batch):
        loss = step(*batch)
        if run.trainee.step_number == 3:
            run.trainee.model.head.bias.data[2] = float("inf")
        return loss

    monkeypatch.setattr(run.trainee, "step", ruinous)
    with pytest.raises(DivergedError, match="the weights are not finite numbers after step 3; the checkpoint before"):
        run.train(StopAfter(run))
    kept = make_run(tmp_path, PLAIN)
    kept.resume()
    assert kept.trainee.step_number == 2 and not (tmp_path / "best.safetensors").exists()


@pytest.mark.slow
def test_the_weights_load_into_timm(tmp_path):
    run = make_run(tmp_path)
    run.train(StopAfter(run))
    images, _ = make_images(6)
    for name, model in (("last", run.trainee.model), ("last_ema", run.trainee.ema.module)):
        path = tmp_path / f"{name}.safetensors"
        assert load_file(path).keys() == VisionTransformer(**SHAPE).state_dict().keys()
        fresh = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **SHAPE)
        tokcomp.compress(fresh.eval(), METHODS["diffrate"])
        with torch.no_grad():
            assert torch.equal(fresh(images), model.eval()(images))
    with safe_open(tmp_path / "best.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["tokcomp"])
    assert facts["model"] == "tiny" and facts["top1"] == run.summary()["best"]["top1"]


def test_the_folder_holds_what_is_promised(tmp_path):
    run = make_run(tmp_path)
    run.train(StopAfter(run))
    rows = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 8]
    assert [("loss" in row, "top1" in row, "ema_top1" in row) for row in rows] == [
        (False, True, True),
        (True, False, False),
        (True, True, True),
        (True, False, False),
        (True, True, True),
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["epochs"] == 2
    assert summary["before"]["top1"] == rows[0]["top1"] and summary["last"]["top1"] == rows[-1]["top1"]
    assert summary["best"]["top1"] == max(row[name] for row in rows[1:] for name in ("top1", "ema_top1") if name in row)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def _process(rank, size, port, folder):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = distributed.join(CPU)
    value = torch.tensor([rank + 1.0])
    reduced = [world.sum_(value.clone()), world.mean_(value.clone()), world.broadcast_(value.clone())]
    world.barrier()
    found = {"rank": world.rank, "size": world.size, "reduced": torch.cat(reduced).tolist()}
    for name, recipe, steps in (("plain", PLAIN, 1), ("lively", LIVELY, 3)):
        tuner = make_tuner(recipe, world=world)
        batches = TensorBatches(*make_images(), 8, 3, world=world)
        for batch in batches.iterate(0, steps):
            tuner.step(*batch)
        held_out = [tensor[rank::size] for tensor in make_images(21)]
        accuracy = evaluate(tuner.model.eval(), [held_out], device=CPU, world=world)
        found[name] = {"gradients": gradients(tuner), "top1": accuracy.top1, "images": accuracy.num_images}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.leave()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, free_port):
    """Gradients and accuracy; a run of two processes draws what one process draws in two pieces."""
    multiprocessing.spawn(_process, (2, free_port, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [(one["rank"], one["size"], one["reduced"]) for one in both] == [(r, 2, [3.0, 1.5, 1.0]) for r in range(2)]

    def alone(recipe, steps, pieces, dtype):
        tuner = make_tuner(recipe, model=make_model(dtype=dtype, drop_path=recipe.drop_path), pieces=pieces)
        for batch in TensorBatches(*make_images(dtype=dtype), 8, 3, pieces=pieces).iterate(0, steps):
            tuner.step(*batch)
        images, labels = make_images(21, dtype)
        return gradients(tuner), evaluate(tuner.model.eval(), [(images, labels)], device=CPU).top1

    for name, recipe, steps, pieces in (("plain", PLAIN, 1, 1), ("lively", LIVELY, 3, 2)):
        exact, _ = alone(recipe, steps, pieces, torch.float64)
        single, top1 = alone(recipe, steps, pieces, torch.float32)
        for rank in range(2):
            assert both[rank][name]["images"] == 21 and both[rank][name]["top1"] == top1
            for have, want, one in zip(both[rank][name]["gradients"], exact, single, strict=True):
                # One process's own rounding, which is a random draw like the two processes', and the sum's.
                bound = 8 * (one - want).abs().max() + 8 * torch.finfo(torch.float32).eps * want.abs().max()
                assert (have - want).abs().max() <= bound
    for one, other in zip(both[0]["lively"]["gradients"], both[1]["lively"]["gradients"], strict=True):
        assert torch.equal(one, other)

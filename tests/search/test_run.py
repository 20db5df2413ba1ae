"""A whole search: its loss and gradients, several targets, several processes, what it writes."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokcomp
import torch
import torch.multiprocessing as multiprocessing
from tokcomp import DiffRateSearch
from tokcomp.budgets import Budget
from tokcomp.measure.evaluate import evaluate
from tokcomp.runs import distributed
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.checkpoint import load_checkpoint
from tokcomp.runs.distributed import World
from tokcomp.runs.log import read_log
from tokcomp.search.plot import plot_kept
from tokcomp.search.run import run_search, run_searches
from tokcomp.search.settings import flops_weight

from tests.search.runs import (
    RECIPE,
    SETTINGS,
    WEIGHT,
    StopAfter,
    batches_of,
    budget_of,
    held_out,
    images_of,
    logits_in,
    model_of,
    same_logits,
    search,
)


@pytest.mark.slow
def test_the_budget_is_met_and_nothing_else_changes():
    model = model_of()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(4), np.random.seed(4)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    result = search(steps=60, model=model, held_out=held_out, settings=replace(SETTINGS, eval_interval=0))
    assert result.complete and result.steps == 60
    assert result.gflops == pytest.approx(0.6 * result.uncompressed_gflops, rel=0.03)
    assert result.costs == {"flops": pytest.approx(result.gflops)}
    assert tokcomp.flops(tokcomp.compress(model, tokcomp.DiffRate(result.schedule))) == round(result.gflops * 1e9)
    tokcomp.restore(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])


def test_accuracy_is_that_of_the_compressed_model():
    model = model_of()
    result = search(model=model, held_out=held_out)
    assert [row["step"] for row in result.log if "top1" in row] == [3, 6]
    device = torch.device("cpu")
    assert result.uncompressed_top1 == evaluate(model, held_out(), device=device).top1
    tokcomp.compress(model, tokcomp.DiffRate(result.schedule))
    assert result.top1 == result.log[-1]["top1"] == evaluate(model, held_out(), device=device).top1


def test_one_step_is_that_of_the_paper():
    """The first step's gradient: cross entropy plus weight * (F - T)^2, by hand."""
    model = model_of(drop_path=0.0, dtype=torch.float64)
    recipe = replace(RECIPE, opt="sgd", lr=1.0, min_lr=1.0, mixup=0.0, cutmix=0.0)
    images, labels = images_of(8)
    batches = TensorBatches(images, labels, 8, 0)
    budget = budget_of(model)
    found = _logits_after(model, batches, [budget], replace(SETTINGS, recipe=recipe, steps=1))
    alone = DiffRateSearch(model)
    logits, flops = alone(images.double())
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    (loss + WEIGHT * (flops / 1e9 - budget.target) ** 2).backward()
    # timm's sgd is Nesterov's with momentum 0.9: the first step goes 1.9 gradients far. The logits and their gradients
    # are float32; the batch's order changes sums in float64 only.
    for name, parameter in alone.named_parameters():
        if parameter.grad is not None and not name.startswith("model."):
            wanted = -1.9 * parameter.grad
            # Three roundings: the gradient's two terms to float32 each, and their sum; then the update's own.
            assert (found[name] - wanted).abs().max() <= 8 * torch.finfo(torch.float32).eps * wanted.abs().max().clamp(
                min=1
            )
            assert name in ("prune.0.logits", "merge.0.logits") or wanted.abs().max() > 1e-3


def _logits_after(model, batches, budgets, settings, world=distributed.ALONE):
    with tempfile.TemporaryDirectory() as folder:
        run_search(model, batches, budgets, settings, output=Path(folder) / "run", world=world)
        return logits_in(Path(folder) / "run")


def test_warm_up_leaves_the_budget_out():
    settings = replace(SETTINGS, steps=4)
    epoch = batches_of().steps_per_epoch  # 2
    warm = replace(settings, budget_warmup_epochs=3 / epoch)
    results = [
        run_search(model_of(), batches_of(), budget_of(model_of(), weight=weight), chosen).log
        for weight, chosen in ((0.0, settings), (WEIGHT, warm), (WEIGHT, settings))
    ]
    entropy = [[row["cross_entropy"] for row in log] for log in results]
    assert entropy[0][0] == entropy[1][0] != entropy[2][0]  # steps 1 and 2
    assert results[1][1]["loss"] > results[1][1]["cross_entropy"] and results[1][0]["loss"] == entropy[1][0]


@pytest.mark.slow
def test_several_targets_are_those_of_separate_runs(tmp_path):
    shares = {"0.6": 0.6, "0.8": 0.8}
    model = model_of()
    together = run_searches(
        model,
        batches_of(),
        {name: [budget_of(model, share)] for name, share in shares.items()},
        SETTINGS,
        held_out=held_out,
        output=tmp_path / "both",
    )
    states = load_checkpoint(tmp_path / "both" / "checkpoint.pt", "search")["targets"]
    for (name, share), found, state in zip(shares.items(), together, states, strict=True):
        alone = search(tmp_path / name, share=share, held_out=held_out)
        assert found.schedule == alone.schedule and found.log == alone.log and found.top1 == alone.top1
        assert same_logits(state["logits"], logits_in(tmp_path / name))
        assert (tmp_path / "both" / f"log-{name}.csv").read_bytes() == (tmp_path / name / "log.csv").read_bytes()
        assert (tmp_path / "both" / f"kept-{name}.png").is_file()
        assert tokcomp.CompressionSchedule.load(tmp_path / "both" / f"schedule-{name}.json") == alone.schedule
    assert together[0].schedule != together[1].schedule


@pytest.mark.slow
def test_several_budgets_are_summed():
    model = model_of()
    half = budget_of(model, 0.5)
    result = run_search(model, batches_of(), [half, half], replace(SETTINGS, log_interval=1))
    assert list(result.costs) == ["flops", "flops_2"]
    row, one = result.log[0], search(settings=replace(SETTINGS, log_interval=1), share=0.5).log[0]
    assert row["loss"] - row["cross_entropy"] == pytest.approx(2 * (one["loss"] - one["cross_entropy"]), rel=1e-12)


@pytest.mark.parametrize("mixing", [True, False], ids=["mixup", "plain"])
def test_pieces_of_a_batch_are_the_batch(mixing):
    recipe = RECIPE if mixing else replace(RECIPE, mixup=0.0, cutmix=0.0)
    settings = replace(SETTINGS, recipe=recipe, steps=1)
    whole = _gradients(settings, batches_of())
    pieces = _gradients(settings, batches_of(pieces=4))
    for name, gradient in whole.items():
        # Each piece's gradient is rounded to float32 once, and so is each of the three sums.
        assert (pieces[name] - gradient).abs().max() <= 8 * torch.finfo(torch.float32).eps * _scale(whole)


def _gradients(settings, batches, world=distributed.ALONE):
    """The first step's gradients of the cross entropy, by an optimizer that takes them as they are."""
    recipe = replace(settings.recipe, opt="sgd", lr=1.0, min_lr=1.0)
    model = model_of(drop_path=0.0, dtype=torch.float64)
    found = _logits_after(model, batches, [budget_of(model, weight=0.0)], replace(settings, recipe=recipe), world)
    return {name: value / -1.9 for name, value in found.items()}


def _scale(gradients) -> float:
    return max(float(gradient.abs().max()) for gradient in gradients.values())


class _Share(World):
    """A process's share without the others."""

    def sum_(self, tensor):
        return tensor

    def mean_(self, tensor):
        return tensor

    def from_main(self, make):
        return make()

    def barrier(self):
        pass

    @property
    def is_main(self):
        return True


def _process(rank: int, size: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = distributed.join(torch.device("cpu"))
    plain = replace(SETTINGS, recipe=replace(RECIPE, mixup=0.0, cutmix=0.0), steps=1)
    gradients = _gradients(plain, batches_of(world=world), world) if rank == 0 else _other(plain, world)
    model = model_of(drop_path=0.0, dtype=torch.float64)
    mine = list(held_out_share(world))
    result = run_search(
        model,
        batches_of(world=world),
        budget_of(model),
        SETTINGS,
        held_out=lambda: mine,
        world=world,
        stop=StopAfter(5) if rank == 1 else None,  # one wants to, and all do
    )
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    lists = [result.schedule.num_prune_kept, result.schedule.num_merge_kept]
    record = {"steps": result.steps, "schedule": lists, "top1": [row.get("top1") for row in result.log]}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(record, file)
    distributed.leave()


def _other(settings, world):
    """The same calls as rank 0's, whose folder rank 1 neither has nor needs."""
    recipe = replace(settings.recipe, opt="sgd", lr=1.0, min_lr=1.0)
    model = model_of(drop_path=0.0, dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        run_search(
            model,
            batches_of(world=world),
            budget_of(model, weight=0.0),
            replace(settings, recipe=recipe),
            output=Path(folder) / "unwritten",
            world=world,
        )
        assert not (Path(folder) / "unwritten").exists()


def held_out_share(world):
    images, labels = images_of(12, seed=2)
    yield images[world.rank :: world.size], labels[world.rank :: world.size]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path, free_port):
    multiprocessing.spawn(_process, (2, free_port, str(tmp_path)), nprocs=2)
    plain = replace(SETTINGS, recipe=replace(RECIPE, mixup=0.0, cutmix=0.0), steps=1)
    alone = _gradients(plain, batches_of())
    halves = [_gradients(plain, batches_of(world=World(rank, 2)), _Share(rank, 2)) for rank in range(2)]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    eps = torch.finfo(torch.float32).eps
    for name, gradient in alone.items():
        # Float64 but for the parameters: every process rounds its gradient to float32, and the mean once more.
        bound = 2 * eps * (halves[0][name].abs() + halves[1][name].abs() + gradient.abs()) + 1e-12
        assert ((found[name] - gradient).abs() <= bound).all()
    model = model_of(drop_path=0.0, dtype=torch.float64)
    one = run_search(
        model, batches_of(), budget_of(model), replace(SETTINGS, steps=6), held_out=held_out, stop=StopAfter(5)
    )
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert records[0] == records[1]
    assert records[0]["schedule"] == [one.schedule.num_prune_kept, one.schedule.num_merge_kept]
    assert records[0]["top1"] == [row.get("top1") for row in one.log] and records[0]["steps"] == one.steps == 5


def test_what_is_written_says_where_it_comes_from(tmp_path):
    result = search(
        tmp_path / "a" / "run", held_out=held_out, facts={"model": "tiny", "data": "noise"}, command="tokcomp x"
    )
    folder = tmp_path / "a" / "run"
    assert {path.name for path in folder.iterdir()} >= {"schedule.json", "log.csv", "kept.png", "summary.json"}
    schedule = tokcomp.CompressionSchedule.load(folder / "schedule.json")
    assert schedule == result.schedule
    provenance = schedule.provenance
    assert provenance["settings"]["model"] == "tiny" and provenance["settings"]["data"] == "noise"
    assert provenance["settings"]["lr"] == 0.3 and provenance["settings"]["seed"] == 0
    assert provenance["gflops"] == result.gflops and provenance["top1"] == result.top1
    assert provenance["budgets"][0]["target"] == pytest.approx(0.6 * result.uncompressed_gflops)
    assert provenance["versions"]["torch"] == torch.__version__ and provenance["command"] == "tokcomp x"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["targets"][0]["num_prune_kept"] == result.schedule.num_prune_kept
    rows = read_log(folder / "log.csv")
    assert [row["step"] for row in rows] == [2, 3, 4, 6] and rows == result.log
    assert [rows[-1][f"prune_{block}"] for block in range(4)] == result.schedule.num_prune_kept
    assert (folder / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("pipeline", ["prune", "merge", "merge_prune"])
def test_pipelines_of_one_kind(tmp_path, pipeline):
    result = search(tmp_path, settings=replace(SETTINGS, pipeline=pipeline, metric="image_attn"))
    assert (result.schedule.num_prune_kept is None) == ("prune" not in pipeline)
    assert (result.schedule.num_merge_kept is None) == ("merge" not in pipeline)
    assert (tmp_path / "schedule.json").is_file()


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("tokcomp.search.plot.find_spec", lambda name: None)
    assert not plot_kept([{"step": 1, "kept_0": 5}], tmp_path / "kept.png") and not list(tmp_path.iterdir())
    search(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["targets"][0]["plot"] is None


def test_weights_of_small_models_pull_as_on_deit_t():
    assert flops_weight(1.2538) == flops_weight(4.6) == flops_weight(17.6) == 5.0
    # Half the cost too much is the same loss for a small model as for DeiT-T.
    assert flops_weight(0.02) * (0.5 * 0.02) ** 2 == pytest.approx(5 * (0.5 * 1.2538) ** 2)


def test_a_budget_of_ones_own():
    class Tokens(Budget):
        name, unit, target, weight = "tokens", "tokens", 32.0, 1.0

        def cost(self, counts):
            return counts.num_out.sum()

        def loss(self, counts):
            return (self.cost(counts) - self.target).square()

    result = run_search(model_of(), batches_of(), Tokens(), replace(SETTINGS, steps=40))
    assert abs(result.costs["tokens"] - 32) <= 2 and {"tokens"} <= result.log[0].keys()

"""The second stage of a search: never worse than its starts, at the budget, the same every time, resumable."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import tokcomp
import torch
import torch.nn.functional as F
from tokcomp.budgets import FlopsBudget
from tokcomp.equal_cost import Ruler, evit_for_budget, random_schedule, tome_for_budget, uniform
from tokcomp.methods import scheduled
from tokcomp.refine import Refinement, RefineSettings, refine, starts_for
from tokcomp.refine.candidates import Candidate, Moves, methods_for
from tokcomp.runs.steps import StopRequest
from tokcomp.schedule import CompressionSchedule


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 5}
    model = timm.models.VisionTransformer(**shape).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that answers depend on which tokens are left
    return model


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (12,), generator=generator)
    return list(zip(images.split(5), labels.split(5), strict=True))


def budget_of(model, share=0.6):
    return share * Ruler(model).flops(None)


@torch.no_grad()
def loss_of(model, method, batches, answers=None):
    """Mean cross entropy of the compressed model: by the public names alone."""
    tokcomp.compress(model, method)
    logits = torch.cat([model(images) for images, _ in batches])
    tokcomp.restore(model)
    wanted = torch.cat([labels for _, labels in batches]) if answers is None else answers
    return float(F.cross_entropy(logits, wanted))


def starts(model):
    ruler, budget = Ruler(model), budget_of(model)
    merging_first = uniform(ruler, budget, pipeline="merge_prune", metric="cls_attn_v", similarity_weighted_size=False)
    return {
        **starts_for(model, "mine", ruler, budget, {"mine": merging_first}),
        "bare": evit_for_budget(model, budget, fuse=False),
        "random": random_schedule(ruler, budget, torch.Generator().manual_seed(0), metric="random", seed=4),
    }


@pytest.mark.parametrize("name", ["mine", "tome", "evit", "uniform", "bare", "random"])
def test_a_start_becomes_a_schedule_and_back(model, batches, tmp_path, name):
    method = starts(model)[name]
    moves = Moves(Ruler(model), budget_of(model))
    candidate = Candidate.from_json(json.loads(json.dumps(moves.of(method).to_json())))
    moves.ruler.as_schedule(method).save(tmp_path / "schedule.json")
    for again in (moves.method(candidate), scheduled(CompressionSchedule.load(tmp_path / "schedule.json"))):
        assert type(again) is type(method) and moves.ruler.settings_of(again) == moves.ruler.settings_of(method)
        assert moves.ruler.counts(again) == moves.ruler.counts(method)
        assert loss_of(model, again, batches) == loss_of(model, method, batches)


def test_every_move_meets_the_budget(model):
    moves = Moves(Ruler(model), budget_of(model))
    parents = [moves.of(method) for method in starts(model).values()]
    drawn = [moves.step(parents, np.random.default_rng(seed)) for seed in range(40)]
    made = [one for one in drawn if one is not None]  # some shapes reach the budget at no strength
    assert len(made) > 30
    made += [moves.at_budget(method, parents[0].drops, parents[0].pruned) for method in moves.methods]
    assert len({one.key for one in made}) > 25
    for one in made:
        assert 0.9 * moves.budget < moves.cost(one) <= moves.budget
        moves.method(one).validate(moves.ruler.geometry)
        assert moves.ruler.counts(moves.method(one)).kept[-1] >= 1 + 2


def test_the_result_is_the_best_and_no_start_is_better(model, batches):
    found = refine(model, batches, budget_of(model) / 1e9, starts(model), RefineSettings(40, seed=1))
    expected = {name: loss_of(model, method, batches) for name, method in starts(model).items()}
    assert found.starts == pytest.approx(expected, rel=1e-12)
    assert found.loss == pytest.approx(loss_of(model, found.method, batches), rel=1e-12)
    # Seeded: with these weights the moves do find something better, at no higher cost than the budget.
    assert found.loss < min(expected.values()) and found.cost <= budget_of(model)
    assert found.complete and found.tried == 40 and not any(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        plain = torch.cat([model(images) for images, _ in batches]).softmax(-1)
    told = RefineSettings(8, loss="answers")
    unlabelled = refine(model, [(images, -torch.ones(len(images))) for images, _ in batches], budget_of(model) / 1e9,
                        {"tome": tome_for_budget(model, budget_of(model))}, told)  # fmt: skip
    assert unlabelled.loss == pytest.approx(loss_of(model, unlabelled.method, batches, plain), rel=1e-12)


class AfterSome(StopRequest):
    """Wants to stop after a given number of candidates."""

    def __init__(self, count):
        super().__init__()
        self.left = count

    @property
    def wanted(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.slow
def test_a_stopped_refinement_goes_on_to_the_same_result(model, batches, tmp_path):
    def run(path, stop, candidates=36, seed=0):
        given = (model, batches, Ruler(model), budget_of(model), starts(model), RefineSettings(candidates, seed))
        return Refinement(*given, state=path).run(stop)

    def kept(path):
        return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}

    whole = run(tmp_path / "whole.json", StopRequest())
    for count in (4, 9, 13):
        part = run(tmp_path / "parts.json", AfterSome(count))
        assert not part.complete
    assert run(tmp_path / "parts.json", StopRequest()).schedule == whole.schedule
    assert kept(tmp_path / "parts.json") == kept(tmp_path / "whole.json")
    assert run(tmp_path / "parts.json", StopRequest()).tried == 36  # nothing is left to do
    run(tmp_path / "other.json", StopRequest(), seed=5)
    assert kept(tmp_path / "other.json")["seen"] != kept(tmp_path / "whole.json")["seen"]
    with pytest.raises(ValueError, match=r"whole.json' must be this refinement's state, got that of one with other"):
        run(tmp_path / "whole.json", StopRequest(), seed=5)


def test_another_cost_than_multiply_adds_can_be_the_limit(model, batches):
    budget = FlopsBudget(model, budget_of(model) / 1e9, 1.0)
    # Tokens that enter blocks, whatever they cost.
    ruler = Ruler(model, lambda counts: float(counts.num_in.sum()) / 50)
    found = Refinement(model, batches, ruler, 1.0, starts_for(model, "mine", ruler, 1.0), RefineSettings(12)).run(
        StopRequest()
    )
    assert 45 <= sum([17, *ruler.counts(found.method).kept[:-1]]) <= 50
    exact = Ruler(model, lambda counts: float(budget.cost(counts)) / budget.target)
    assert exact.cost(None) * budget_of(model) == pytest.approx(Ruler(model).cost(None))


def test_what_operators_offer_depends_on_the_model(model):
    kinds = methods_for(Ruler(model).geometry)
    assert {"name": "tome", "prop_attn": True} in kinds and {"name": "evit", "fuse": True} in kinds
    assert {one["metric"] for one in kinds if "metric" in one} == {"cls_attn", "image_attn", "cls_attn_v"}
    pooled = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, num_heads=2, depth=2, class_token=False, global_pool="avg"
    )
    assert {one["metric"] for one in methods_for(Ruler(pooled).geometry) if "metric" in one} == {"image_attn"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"loss": "accuracy"}, "loss must be labels or answers, got 'accuracy'"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RefineSettings(**settings)


def test_nothing_to_start_from_is_refused(model, batches):
    with pytest.raises(ValueError, match="starts must hold at least one method"):
        refine(model, batches, 1e-3, {})
    with pytest.raises(ValueError, match="the calibration images must be at least one"):
        refine(model, [], 1e-3, {"tome": tokcomp.ToMe(2)})

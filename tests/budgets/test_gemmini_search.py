"""Latency and power on Gemmini as budgets, rates and hardware in turn."""

from __future__ import annotations

import copy
import itertools

import pytest
import tokcomp
import torch
from tokcomp.budgets import Gemmini, GemminiSearch, TargetError, Technology, TokenCounts, counts_of
from tokcomp.budgets.gemmini import can_be_generated, points_of
from tokcomp.budgets.gemmini_search import log_cosh

NAME = "deit_small_patch16_224"


@pytest.fixture(scope="module")
def counts(deit_small) -> TokenCounts:
    return counts_of(deit_small, tokcomp.DiffRate.published(NAME, gflops=2.9))


def test_log_cosh():
    x = torch.tensor([-3.0, -1e-4, 0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(log_cosh(x), torch.cosh(x).log(), rtol=1e-12, atol=1e-15)
    assert log_cosh(torch.tensor([1e5, -1e5])).isfinite().all()


def test_budgets_give_the_models_own_values(deit_small, counts):
    search = GemminiSearch(deit_small, target_ms=40, target_mw=98)
    latency, power = search.budgets
    exact = search.cost(points_of([search.hardware()]), counts)[:, 0]
    assert latency.cost(counts).item() == pytest.approx(exact[0].item(), rel=1e-12)
    assert power.cost(counts).item() == pytest.approx(exact[1].item(), rel=1e-12)
    assert latency.loss(counts).item() == pytest.approx(log_cosh(exact[0] - 40).item(), rel=1e-9)
    assert (latency.unit, power.unit) == ("ms", "mW") and latency.cost(counts).dtype == torch.float64


def test_fewer_tokens_cost_less_by_gradient_and_in_truth(deit_small, counts):
    """Eq. 17 as printed would give the rates a gradient of the other sign: E rising with the share removed."""
    search = GemminiSearch(deit_small, target_ms=40, target_mw=98)
    for budget in search.budgets:
        own = TokenCounts(*(part.clone().requires_grad_() for part in counts))
        budget.cost(own).backward()
        for part, grad in zip(counts, (own.num_in.grad, own.num_out.grad), strict=True):
            assert (grad > 0).all()
            # Over two tiles of the array either way the smoothed slope is near the difference quotient.
            for block in range(4, 10):
                moved = []
                for change in (-32.0, 32.0):
                    other = part.clone()
                    other[block] += change
                    pair = counts._replace(**{"num_in" if part is counts.num_in else "num_out": other})
                    moved.append(budget.cost(pair).item())
                assert grad[block].item() == pytest.approx((moved[1] - moved[0]) / 64, rel=0.25)


def test_the_hardware_comes_to_what_the_rates_need(deit_small, counts):
    search = GemminiSearch(deit_small, target_ms=24, target_mw=75)
    before = sum(budget.loss(counts).item() for budget in search.budgets)
    losses = [search.hardware_step(counts, step).item() for step in range(20)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(losses))
    after = sum(budget.loss(counts).item() for budget in search.budgets)
    assert after == pytest.approx(losses[-1], rel=1e-9)
    assert before > 40 and after < 10, (before, after, search.hardware())
    assert can_be_generated(points_of([search.hardware()])).item()


@pytest.mark.slow
def test_logits_move_towards_what_is_cheaper(deit_small, counts):
    """With a latency target below reach of this width, a wider array must grow likelier."""
    search = GemminiSearch(deit_small, target_ms=12)
    for step in range(40):
        search.hardware_step(counts, step)
    probability = {name: logits.detach().softmax(0) for name, logits in search.logits.items()}
    assert probability["mesh_rows"][3] > probability["mesh_rows"][0]
    assert probability["mesh_columns"][3] > probability["mesh_columns"][0]


def test_the_noise_is_a_function_of_seed_and_step(make_vit):
    model = make_vit()
    counts = counts_of(model, tokcomp.ToMe(2))

    def run(seed: int, steps: range) -> dict[str, torch.Tensor]:
        search = GemminiSearch(model, target_mw=4.5, seed=seed)
        for step in steps:
            torch.rand(1)  # nobody's generator matters
            search.hardware_step(counts, step)
        return search.logits

    first, again, other, later = (run(*one) for one in ((0, range(3)), (0, range(3)), (1, range(3)), (0, range(1, 4))))
    for name, logits in first.items():
        assert torch.equal(logits, again[name])
    for different in (other, later):
        assert any(not torch.equal(logits, different[name]) for name, logits in first.items())


def test_a_resumed_search_is_the_uninterrupted_one(make_vit, tmp_path):
    model = make_vit()
    counts = counts_of(model, tokcomp.ToMe(2))
    whole = GemminiSearch(model, target_ms=0.03, target_mw=4.5)
    for step in range(6):
        whole.budgets[0].step(counts, step)
        whole.budgets[1].step(counts, step)
        if step == 2:
            torch.save([budget.state_dict() for budget in whole.budgets], tmp_path / "state.pt")
    resumed = GemminiSearch(model, target_ms=0.03, target_mw=4.5)
    for budget, state in zip(resumed.budgets, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        budget.load_state_dict(state)
    for step in range(3, 6):
        resumed.budgets[0].step(counts, step)
    for name, logits in whole.logits.items():
        assert torch.equal(logits, resumed.logits[name])
    assert whole.hardware() == resumed.hardware()
    assert torch.equal(whole.costs(counts), resumed.costs(counts))


@pytest.mark.parametrize("spoil", [dict(logits={}), dict(logits=None), dict(hardware={"bus_bits": 3.0})])
def test_a_wrong_state_is_refused_and_changes_nothing(make_vit, spoil):
    search = GemminiSearch(make_vit(), target_mw=4.5)
    state = {**copy.deepcopy(search.state_dict()), **spoil}
    before = copy.deepcopy(search.state_dict())
    with pytest.raises(ValueError, match=r"must be that of a Gemmini search|must be one of"):
        search.load_state_dict({name: value for name, value in state.items() if value is not None})
    assert search.state_dict()["hardware"] == before["hardware"]
    assert all(torch.equal(value, before["logits"][name]) for name, value in search.state_dict()["logits"].items())


def test_hardware_that_is_not_searched_stays(make_vit):
    model, point = make_vit(), Gemmini(mesh_rows=8, mesh_columns=8)
    search = GemminiSearch(model, target_mw=3.55, hardware=point, search_hardware=False)
    budget = search.budgets[0]
    budget.step(counts_of(model), 0)
    assert search.hardware() == point and budget.state_dict() == {}
    assert budget.describe()["hardware"] == point.to_json()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(), ValueError, "needs target_ms, target_mw or both"),
        (dict(target_ms=1e4), TargetError, r"target_ms must lie between .* ms on any Gemmini of Table 7, got 10000"),
        (dict(target_mw=0.1, search_hardware=False), TargetError, "target_mw must lie .* mW on this Gemmini, got 0.1"),
        (dict(target_ms=-1), ValueError, "target_ms must be a finite number above 0"),
        (dict(target_mw=4.5, temperature=0), ValueError, "temperature must be a finite number above 0"),
        (dict(target_mw=4.5, power_weight=-1), ValueError, "power_weight must be a finite number"),
        (dict(target_mw=4.5, hardware=Gemmini(mesh_rows=8)), ValueError, "hardware must be a point that Gemmini can"),
    ],
)
def test_wrong_arguments_are_named(make_vit, options, error, message):
    with pytest.raises(error, match=message):
        GemminiSearch(make_vit(), **options)


def test_a_budget_describes_itself(make_vit):
    technology = Technology(clock_mhz=500)
    described = GemminiSearch(make_vit(), target_mw=4.504, technology=technology).budgets[0].describe()
    assert described["budget"] == "gemmini_power" and described["unit"] == "mW" and described["searched"]
    assert described["technology"]["clock_mhz"] == 500 and described["hardware"] == described["start"]
    assert described["uncompressed"] > 4.5

"""Several budgets at once on a search's own proxies: what they agree on comes about, between others they settle."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokcomp
import torch
from tokcomp.budgets import (
    Budget,
    FlopsBudget,
    Gemmini,
    GemminiCost,
    GemminiSearch,
    LatencyBudget,
    LatencyTable,
    counts_of,
    least_counts,
)
from tokcomp.budgets.gemmini import points_of
from tokcomp.search.model import DiffRateSearch


def table_of(model: torch.nn.Module) -> LatencyTable:
    """A machine that charges 1 ms per 4 tokens in attention and 0.1 ms for whatever follows."""
    counts = list(range(2, 18))
    block = dict(projections=24 * 72 + 24 * 24, width=24, mlp=2 * 24 * 96)
    return LatencyTable(
        depth=4,
        num_tokens=17,
        num_prefix_tokens=1,
        block=block,
        batch_size=1,
        dtype="float32",
        embed_ms=0.5,
        counts=counts,
        attention_ms=[float(-(-count // 4)) for count in counts],
        reduce_ms=[0.0] * 16,
        mlp_ms=[0.1] * 16,
        head_ms=[0.1] * 16,
    )


def settle(search: DiffRateSearch, budgets: Sequence[Budget], steps: int = 150) -> list[float]:
    """Let the budgets alone move the proxies; the costs that come about."""
    parameters = [parameter for parameter in search.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        counts = search.counts()
        sum(budget.weight * budget.loss(counts) for budget in budgets).backward()
        optimizer.step()
        for budget in budgets:
            budget.step(search.counts(), step)
    with torch.no_grad():
        return [budget.cost(search.counts()).item() for budget in budgets]


def test_each_budget_alone_reaches_its_target(make_vit):
    model = make_vit()
    dense, least = counts_of(model), least_counts(model)
    flops = FlopsBudget(model, 0.00055, weight=1e8)
    latency = LatencyBudget(model, table_of(model), target_ms=16)
    small = Gemmini(mesh_rows=4, mesh_columns=4)
    target_ms = GemminiCost(model)(points_of([small]), counts_of(model, tokcomp.ToMe(2)))[0].item()
    gemmini = GemminiSearch(model, target_ms=target_ms, latency_weight=1e3, hardware=small, search_hardware=False)
    for budget in (flops, latency, gemmini.budgets[0]):
        (cost,) = settle(DiffRateSearch(model), [budget])
        spread = (budget.cost(dense) - budget.cost(least)).item()
        # One token more or less in one block, or one step of the staircase.
        assert abs(cost - budget.target) <= 0.13 * spread, (budget.name, cost, budget.target)


@pytest.mark.slow
def test_two_budgets_settle_between_their_schedules(make_vit):
    """One asks for few multiply-adds, the other for many milliseconds: what comes is between what each would give."""
    model = make_vit()
    flops = FlopsBudget(model, 0.00045, weight=1e8)
    latency = LatencyBudget(model, table_of(model), target_ms=19)
    (few,) = settle(DiffRateSearch(model), [flops])
    search = DiffRateSearch(model)
    settle(search, [latency])
    many = flops.cost(search.counts()).item()
    both = settle(DiffRateSearch(model), [flops, latency])[0]
    assert few < both < many


def test_two_budgets_that_agree_are_both_met(make_vit):
    model = make_vit()
    latency = LatencyBudget(model, table_of(model), target_ms=16)
    search = DiffRateSearch(model)
    settle(search, [latency])
    gflops = search.flops().item() / 1e9
    flops = FlopsBudget(model, gflops, weight=1e8)
    have = settle(DiffRateSearch(model), [latency, flops])
    assert have[0] == pytest.approx(16, abs=1) and have[1] == pytest.approx(gflops, rel=0.08)


@pytest.mark.slow
def test_rates_and_hardware_in_turn(make_vit):
    """Slow hardware, fast target: the hardware grows while the rates keep to the multiply-adds."""
    model = make_vit()
    flops = FlopsBudget(model, 0.00055, weight=1e8)
    hardware = GemminiSearch(model, target_ms=0.02, latency_weight=1e4)
    before = hardware.hardware()
    costs = settle(DiffRateSearch(model), [flops, *hardware.budgets], steps=100)
    assert hardware.hardware() != before
    assert costs[0] == pytest.approx(0.00055, rel=0.1) and costs[1] == pytest.approx(0.02, rel=0.2)


def test_the_search_reaches_its_smallest_counts_and_no_further(make_vit):
    """least_counts is what the proxies end at when every logit but the smallest candidate's is gone."""
    for options, granularity in ((dict(), 1), (dict(), 3), (dict(class_token=False, global_pool="avg"), 5)):
        model = make_vit(**options)
        search = DiffRateSearch(model, granularity, metric="image_attn")
        with torch.no_grad():
            for number in (*search.prune, *search.merge):
                number.logits[-1] = 1e4
        counts, least = search.counts(), least_counts(model, granularity)
        assert counts.num_in.tolist() == least.num_in.tolist() and counts.num_out.tolist() == least.num_out.tolist()

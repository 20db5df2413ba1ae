"""The search on random models, images and proxies in float64: logits, multiply-adds, and every proxy's gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokcomp import DiffRateSearch
from tokcomp.bench.published_search import PublishedSearch
from torch import Tensor

from tests.oracle.cases import Case
from tests.oracle.checks import assert_near, each_case
from tests.oracle.search_rules import Proxy, multiply_adds, search

STEPS = ("prune", "merge")
#: Blocks, grid, heads and head width of a model in which merged tokens have the time to merge again.
GROWING = (7, 6, 2, 8)
Logits = dict[str, list[Tensor]]


def falling(case: Case, granularity: int) -> Logits:
    return {step: case.falling_logits(granularity, case.rng.choice((0.6, 0.9))) for step in STEPS}


def merging_again(case: Case) -> Logits:
    """Every prune proxy keeps all, every merge proxy merges, so what has grown is soon among the sources."""
    merge = case.falling_logits(4, 0.6)
    keep_all = [torch.full_like(row, -1e3).index_fill(0, torch.tensor(0), 1e3) for row in merge]
    return {"prune": keep_all, "merge": merge}


def compare(
    case: Case, mine: DiffRateSearch | PublishedSearch, granularity: int, logits: Logits, **options: Any
) -> None:
    """``options`` are those of the plain search."""
    leaves = {step: [row.clone().requires_grad_() for row in logits[step]] for step in STEPS}
    prune, merge = (
        [Proxy(row, granularity, case.num_patches, case.num_prefix) for row in leaves[step]] for step in STEPS
    )
    want = torch.stack([search(case.plain, image, prune, merge, **options) for image in case.images])

    mine.double().eval()
    own = {step: [proxy.logits for proxy in getattr(mine, step)] for step in STEPS}
    with torch.no_grad():
        for step in STEPS:
            for parameter, row in zip(own[step], logits[step], strict=True):
                parameter.copy_(row)
    have, flops = mine(case.images)

    what = f"{type(mine).__name__}, {case.family}, granularity {granularity}, {options}"
    assert_near(have, want, f"logits of {what}")
    losses = (F.cross_entropy(logits, case.labels) for logits in (have, want))
    assert_gradients(*(gradients(loss, of) for loss, of in zip(losses, (own, leaves), strict=True)), what)
    if case.num_prefix == 1:
        by_step = {"prune": prune, "merge": merge}
        steps = options.get("pipeline", "prune_merge").split("_")
        want_flops = multiply_adds(case.plain, list(zip(*(by_step[step] for step in steps), strict=True)))
        assert_near(flops, want_flops, f"multiply-adds of {what}")
        assert_gradients(gradients(flops, own), gradients(want_flops, leaves), f"multiply-adds of {what}")


def gradients(value: Tensor, leaves: Logits) -> dict[str, Tensor]:
    """By step and block; zeros where nothing depends, as where nothing was masked."""
    flat = {f"{step}.{block}": row for step in STEPS for block, row in enumerate(leaves[step])}
    if not value.requires_grad:
        return {name: torch.zeros_like(row) for name, row in flat.items()}
    found = torch.autograd.grad(value, list(flat.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(flat, found, strict=True))


def assert_gradients(have: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    """Each by its own norm; one of less than a millionth of the largest by that."""
    least = 1e-6 * max(gradient.norm().item() for gradient in want.values())
    for name, gradient in want.items():
        assert_near(have[name], gradient, f"gradient of {name}, {what}", least=least)


@pytest.mark.parametrize("pipeline", ["prune_merge", "merge_prune", "prune", "merge"])
def test_search(pipeline: str) -> None:
    def check(seed: int) -> None:
        case = Case(seed)
        granularity = case.rng.randint(1, 5)
        options = {
            "metric": "cls_attn_v" if seed % 3 == 0 else "cls_attn",
            "pipeline": pipeline,
            "match_inference": seed % 4 == 0,
        }
        mine = DiffRateSearch(case.model, granularity, **options)
        compare(case, mine, granularity, falling(case, granularity), **options)

    each_case(check)


def test_merged_tokens_merge_again() -> None:
    def check(seed: int) -> None:
        case = Case(seed, shape=GROWING)
        compare(case, DiffRateSearch(case.model, 4), 4, merging_again(case))

    each_case(check)


def test_a_deit_s_like_model() -> None:
    """196 patches, 6 heads of 64 channels, granularity 4; a third of the depth and one image."""
    case = Case(7, family="class token", shape=(4, 14, 6, 64))
    case.images, case.labels = case.images[:1], case.labels[:1]
    compare(case, DiffRateSearch(case.model, 4), 4, falling(case, 4))


def test_the_baseline_of_the_speed() -> None:
    """It differentiates the maximum of each row of the softmax, as published."""

    def check(seed: int) -> None:
        family = ("class token", "pooled", "registers", "layer scale, q and k norm")[seed // 2 % 4]
        if seed % 2:
            case, granularity = Case(seed, family, GROWING), 4
            logits = merging_again(case)
        else:
            case, granularity = Case(seed, family), 1 + seed // 2 % 5
            logits = falling(case, granularity)
        compare(case, PublishedSearch(case.model, granularity), granularity, logits, hold_maximum=False)

    each_case(check)

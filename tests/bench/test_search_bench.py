"""The search's benchmark: both sides take the same step, and a wrong one is not timed."""

from __future__ import annotations

import pytest
import torch
from tokcomp.bench import search as bench
from tokcomp.bench.models import DisagreementError, create_model
from tokcomp.measure.timing import interleave, stopwatch

CPU = torch.device("cpu")
OPTIONS = {"img_size": 64, "depth": 3}


def test_rows():
    rows = bench.compare_search(
        "deit_tiny_patch16_224",
        batch=2,
        precision="float32",
        device=CPU,
        measure=lambda calls: interleave(calls, stopwatch(CPU), rounds=2, turn_seconds=0),
        competitors=("published", "tokcomp"),
        **OPTIONS,
    )
    assert [row.name for row in rows] == ["published", "tokcomp"]
    assert rows[0].speedup == (1, 1, 1)
    for row in rows:
        assert row.images_per_second > 0 and len(row.seconds) == 2 and min(row.speedup) > 0
        assert 0 < row.memory < row.total_memory
        assert row.to_json()["precision"] == "float32"


def test_memory_is_that_of_the_step_alone():
    ballast = torch.ones(3 * 2**26)  # 768 MiB that the measuring process must not count
    used, total = bench._cpu_memory("tokcomp", "deit_tiny_patch16_224", 2, "float32", OPTIONS)
    assert 2**20 < used < 2**28 and used < total
    assert ballast[-1] == 1


def test_without_timing_there_are_no_rows():
    model = {"name": "deit_tiny_patch16_224", "batch": 1, "precision": "bfloat16", **OPTIONS}
    assert bench.compare_search(**model, device=CPU, measure=lambda calls: {}) == []


def test_every_competitor_takes_the_same_step():
    model = create_model("deit_tiny_patch16_224", **OPTIONS)
    images, labels = bench.draw(model, 3)
    steps = {name: bench.Step(name, model, "float32") for name in bench.COMPETITORS}
    logits = {name: step(images, labels) for name, step in steps.items()}
    for name, step in steps.items():
        torch.testing.assert_close(logits[name], logits["published"], atol=1e-4, rtol=0)
        torch.testing.assert_close(step.gradients(), steps["published"].gradients(), rtol=1e-4, atol=1e-8)
        weight = step.search.model.blocks[0].mlp.fc1.weight
        assert (weight.grad is not None) == (name == "published")
    kept = [int(proxy()) for proxy in steps["tokcomp"].search.prune]
    assert 4 < kept[2] < kept[1] < kept[0] == 17


@pytest.mark.parametrize("wrong", ["logits", "gradients"])
def test_a_step_that_differs_is_not_timed(monkeypatch, wrong):
    model = create_model("deit_tiny_patch16_224", **OPTIONS)
    bench.check_agreement("tokcomp", model, "float32")
    if wrong == "gradients":
        original = bench.Step.gradients
        monkeypatch.setattr(
            bench.Step, "gradients", lambda self: original(self) * (1 + 1e-3 * hasattr(self.search, "counts"))
        )
    else:
        call = bench.Step.__call__
        monkeypatch.setattr(
            bench.Step, "__call__", lambda self, *args: call(self, *args) + 1e-2 * hasattr(self.search, "counts")
        )
    with pytest.raises(DisagreementError, match=wrong):
        bench.check_agreement("tokcomp", model, "float32")


def test_an_unknown_competitor_is_refused():
    with pytest.raises(ValueError, match="competitor must be one of published"):
        bench.Step("timm", create_model("deit_tiny_patch16_224", **OPTIONS), "float32")

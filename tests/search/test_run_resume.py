"""Searches that stop and go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tokcomp
from tokcomp.budgets import FlopsBudget
from tokcomp.runs.log import read_log
from tokcomp.search.run import run_search

from tests.search.runs import (
    RECIPE,
    SETTINGS,
    WEIGHT,
    StopAfter,
    batches_of,
    held_out,
    logits_in,
    model_of,
    same_logits,
    search,
)


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_resumed_search_is_the_uninterrupted_one(tmp_path, stop_at):
    whole = search(tmp_path / "whole", held_out=held_out)
    first = search(tmp_path / "parts", held_out=held_out, stop=StopAfter(stop_at))
    assert not first.complete and first.steps == stop_at
    assert not (tmp_path / "parts" / "summary.json").exists()
    second = search(tmp_path / "parts", held_out=held_out, resume=True)
    assert second.complete and second.schedule == whole.schedule and second.log == whole.log
    assert second.uncompressed_top1 == whole.uncompressed_top1
    assert same_logits(logits_in(tmp_path / "whole"), logits_in(tmp_path / "parts"))
    for name in ("log.csv", "schedule.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_rows_after_the_checkpoint_are_redone(tmp_path):
    whole = search(tmp_path / "whole")
    folder = tmp_path / "killed"
    search(folder, stop=StopAfter(3))
    kept = (folder / "checkpoint.pt").read_bytes()
    search(folder, resume=True, stop=StopAfter(2))
    (folder / "checkpoint.pt").write_bytes(kept)  # as if killed before its checkpoint of step 4 was there
    (folder / ".checkpoint.pt.half.tmp").write_bytes(b"half")
    assert read_log(folder / "log.csv")[-1]["step"] > 3
    assert search(folder, resume=True).log == whole.log
    assert (folder / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
    assert not list(folder.glob(".*.tmp"))


def test_resuming_a_finished_search_changes_nothing(tmp_path):
    first = search(tmp_path, held_out=held_out)
    again = search(tmp_path, held_out=held_out, resume=True)
    assert again == first and first.top1 is not None


def test_resuming_nothing_starts(tmp_path):
    assert search(tmp_path / "new", resume=True).schedule == search().schedule


def test_other_settings_are_refused_by_name(tmp_path):
    search(tmp_path, stop=StopAfter(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for change, name in (
        ({"granularity": 2}, "granularity"),
        ({"seed": 1}, "seed"),
        ({"match_inference": True}, "match_inference"),
        ({"recipe": replace(RECIPE, lr=0.2)}, "lr"),
        ({"recipe": replace(RECIPE, mixup=0.5)}, "mixup"),
        ({"log_interval": 3}, "log_interval"),
    ):
        with pytest.raises(ValueError, match=rf"a resumed run must keep its settings, got {name} = "):
            search(tmp_path, resume=True, settings=replace(SETTINGS, **change))
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_another_budget_model_or_length_is_refused_by_name(tmp_path):
    search(tmp_path, stop=StopAfter(2), facts={"model": "a"})
    for options, name in (
        ({"share": 0.5, "facts": {"model": "a"}}, "targets"),
        ({"steps": 7, "facts": {"model": "a"}}, "steps"),
        ({"facts": {"model": "b"}}, "model"),
    ):
        with pytest.raises(ValueError, match=rf"got {name} = .* was started with"):
            search(tmp_path, resume=True, **options)
    search(tmp_path, resume=True, facts={"model": "a"}, settings=replace(SETTINGS, checkpoint_interval=5))


class Learning(FlopsBudget):
    """Its target follows the counts of the steps."""

    def __init__(self, model) -> None:
        super().__init__(model, 0.7 * tokcomp.flops(model) / 1e9, WEIGHT)
        self.seen: list[int] = []

    def step(self, counts, step):
        self.seen.append(step)
        assert not counts.num_out.requires_grad
        self.target += 1e-3 * (float(self.cost(counts)) - self.target)

    def state_dict(self):
        return {"target": self.target}

    def load_state_dict(self, state):
        self.target = state["target"]

    def describe(self):
        return {"budget": self.name, "weight": self.weight}


def test_a_budget_that_learns_is_resumed_too(tmp_path):
    budgets = [Learning(model_of()) for _ in range(3)]
    whole = run_search(model_of(), batches_of(), budgets[0], SETTINGS, output=tmp_path / "whole")
    run_search(model_of(), batches_of(), budgets[1], SETTINGS, output=tmp_path / "parts", stop=StopAfter(3))
    parts = run_search(model_of(), batches_of(), budgets[2], SETTINGS, output=tmp_path / "parts", resume=True)
    assert budgets[0].seen == list(range(6)) and budgets[1].seen + budgets[2].seen == list(range(6))
    assert parts.log == whole.log and budgets[2].target == budgets[0].target
    assert same_logits(logits_in(tmp_path / "whole"), logits_in(tmp_path / "parts"))
    assert abs(budgets[0].target - Learning(model_of()).target) > 0

"""Searches that diverge, and arguments that are refused."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from unittest.mock import Mock

import pytest
import tokcomp
import torch
from tokcomp import DiffRateSearch
from tokcomp.budgets import FlopsBudget
from tokcomp.runs.checkpoint import load_checkpoint
from tokcomp.runs.steps import DivergedError
from tokcomp.search.run import run_search, run_searches
from tokcomp.search.settings import SearchSettings

from tests.search.runs import (
    SETTINGS,
    WEIGHT,
    batches_of,
    budget_of,
    model_of,
    search,
)


class Poisoned(FlopsBudget):
    """Not a number from its n-th loss on."""

    def __init__(self, model, step: int, share: float = 0.6) -> None:
        super().__init__(model, share * tokcomp.flops(model) / 1e9, WEIGHT)
        self.left = step

    def loss(self, counts):
        self.left -= 1
        return super().loss(counts) * (float("nan") if self.left <= 0 else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path, step):
    model = model_of()
    with pytest.raises(
        DivergedError, match=rf"not finite at step {step}; the last good checkpoint is .*\.pt"
    ) as caught:
        run_search(model, batches_of(), Poisoned(model, step), SETTINGS, output=tmp_path)
    assert caught.value.step == step
    saved = load_checkpoint(tmp_path / "checkpoint.pt", "search")
    assert saved["step"] == (step - 1) // 2 * 2
    assert all(torch.isfinite(value).all() for value in saved["targets"][0]["logits"].values())
    assert search(tmp_path, resume=True).log == search().log  # from the last good checkpoint


def test_weights_that_are_no_numbers_stop_at_once():
    model = model_of()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
    with pytest.raises(DivergedError, match="not finite at step 1; nothing was written"):
        search(model=model)


def test_an_output_folder_that_holds_a_run_is_refused(tmp_path):
    search(tmp_path)
    for name in ("checkpoint.pt", "summary.json", "schedule.json"):
        with pytest.raises(ValueError, match=r"must not hold another run, got '.*'; continue that run with --resume"):
            search(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="must not hold another run"):
        search(tmp_path)  # the log alone
    (tmp_path / "log.csv").unlink()
    search(tmp_path)


def test_an_unwritable_folder_is_found_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(DiffRateSearch, "forward", lambda *a: pytest.fail("a step was taken"))
    with pytest.raises(OSError):
        search(tmp_path / "file" / "run")

    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=PermissionError("read-only")))
    with pytest.raises(PermissionError, match="read-only"):
        search(tmp_path / "run", held_out=lambda: pytest.fail("images were looked at"))


def test_unfit_arguments_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match="targets must have at least one budget each"):
        run_searches(model, batches_of(), {"": []}, SETTINGS)
    with pytest.raises(ValueError, match=r"batch size must be a multiple of 2 .* pairs for mixup"):
        run_search(model, batches_of(9), budget_of(model), SETTINGS)
    with pytest.raises(ValueError, match="budget_warmup_epochs must leave steps for the budget, got 6 of 6"):
        search(settings=replace(SETTINGS, budget_warmup_epochs=3.0))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        SearchSettings(steps=0)
    with pytest.raises(ValueError, match="eval_interval must be 0 or more, got -1"):
        SearchSettings(eval_interval=-1)
    headless = model_of()
    headless.reset_classifier(0)
    with pytest.raises(ValueError, match="the model must have a classifier"):
        run_search(headless, batches_of(), budget_of(model), SETTINGS)

"""DiffRate's reproduction: schedules at a cost, searches, the whole command in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import tokcomp
import torch
from tokcomp.assets import DIGITS_MODEL
from tokcomp.equal_cost import Counts, Ruler, evit_for_budget, tome_for_budget

from benchmarks.reproduce.diffrate import __main__ as diffrate
from benchmarks.reproduce.diffrate import schedules
from benchmarks.reproduce.diffrate.measure import held_out_pictures, training_pictures
from benchmarks.reproduce.diffrate.plan import PIPELINES, QUICK, SearchSettings, Settings
from benchmarks.reproduce.diffrate.units import all_units
from tools.assets.choose_schedule import search_digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model() -> Any:
    return timm.create_model(DIGITS_MODEL).eval()


def tokens_left(model: Any, method: Any) -> list[int]:
    """What really is left after each block, by running the model."""
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = tokcomp.trace(tokcomp.compress(model, method), images)
    tokcomp.restore(model)
    return [len(one[one >= 0].unique()) for one in maps]


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("share", [0.5, 0.33])
def test_random_schedules_cost_the_budget(model: Any, pipeline: str, share: float) -> None:
    budget = share * tokcomp.flops(model)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        method = schedules.random_method(model, budget, generator, pipeline=pipeline)
        assert schedules.cost(model, method) == pytest.approx(budget, rel=0.01)
        before_merge, kept = schedules.counts(model, method)
        assert kept == tokens_left(model, method)
        assert kept[0] == 65 and kept == sorted(kept, reverse=True)
        assert all(
            there >= middle >= left for there, middle, left in zip([65, *kept], before_merge, kept, strict=False)
        )


def test_the_pipelines_drop_the_same_tokens_by_the_same_steps(model: Any) -> None:
    before_merge, kept = [65, 50, 40, 20, 10, 8], [65, 40, 30, 20, 6, 8]
    for pipeline in ("prune_merge", "merge_prune"):
        method = Ruler(model).diffrate(Counts(before_merge, kept), pipeline=pipeline)
        assert schedules.counts(model, method) == ([65, 50, 40, 20, 10, 6], [65, 40, 30, 20, 6, 6])
    for pipeline in ("prune", "merge"):
        method = Ruler(model).diffrate(Counts(before_merge, kept), pipeline=pipeline)
        assert schedules.counts(model, method)[1] == [65, 40, 30, 20, 6, 6]


@pytest.mark.parametrize("share", [0.5, 0.4, 0.33])
def test_uniform_drops_the_same_share(model: Any, share: float) -> None:
    budget = share * tokcomp.flops(model)
    method = schedules.uniform(model, budget)
    assert schedules.cost(model, method) == pytest.approx(budget, rel=0.01)
    _, kept = schedules.counts(model, method)
    ratio = (kept[1] - 1) / 64
    expected = [64.0]
    for block in range(1, 6):
        expected.append(64 * ratio**block)
    assert kept[0] == 65
    # Rounding the first ratio to whole tokens moves the k-th count by up to k/2 tokens times ratio^(k-1).
    assert all(
        abs(count - 1 - want) <= 1 + k / 2
        for k, (count, want) in enumerate(zip(kept, expected, strict=True))
        if want >= 3
    )


def test_fit_reaches_the_budget_and_keeps_the_shape(model: Any) -> None:
    found = tokcomp.DiffRate(tokcomp.CompressionSchedule([65, 60, 50, 70, 20, 12], [65, 40, 45, 30, 30, 9]))
    assert schedules.counts(model, found) == ([65, 60, 40, 40, 20, 12], [65, 40, 40, 30, 20, 9])
    for share in (0.6, 0.5, 0.4):
        budget = share * tokcomp.flops(model)
        fitted = schedules.fit(model, found, budget)
        assert schedules.cost(model, fitted) == pytest.approx(budget, rel=0.01)
        _, kept = schedules.counts(model, fitted)
        assert kept[1] == kept[2] > kept[3] > kept[4] > kept[5]
    own = schedules.cost(model, found)
    assert schedules.counts(model, schedules.fit(model, found, own)) == schedules.counts(model, found)


@pytest.mark.parametrize(("pipeline", "wanted"), [("merge", tome_for_budget), ("prune", evit_for_budget)])
def test_other_methods_counts_cost_what_they_cost(model: Any, pipeline: str, wanted: Any) -> None:
    other = wanted(model, 0.5 * tokcomp.flops(model))
    method = schedules.like(model, other, pipeline)
    assert tokens_left(model, method) == tokens_left(model, other)
    assert schedules.cost(model, method) == schedules.cost(model, other)


def test_a_search_repeats_and_moves_towards_its_target(model: Any) -> None:
    runs = []
    for _ in range(2):
        search, log = search_digits(model, 0.4, epochs=6 * 8 / 1437, batch_size=8, seed=3, log_every=1)
        runs.append((search.proxy_state(), log))
    assert [line.step for line in runs[0][1]] == [1, 2, 3, 4, 5, 6]
    assert runs[0][1] == runs[1][1]
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())
    # Before the first step every free block keeps half of its patches, at 62 % of the cost.
    assert runs[0][1][0].share == pytest.approx(0.616, abs=0.001) and runs[0][1][-1].share < 0.55
    assert runs[0][1][-1].num_prune_kept[0] == 65


def test_few_pictures_are_drawn_once(model: Any) -> None:
    def losses(num_pictures: int, seed: int) -> list[float]:
        two = 2 * 8 / 1437  # epochs; at a learning rate of 0 only the pictures can make a difference
        log = search_digits(
            model, 0.4, epochs=two, batch_size=8, lr=0.0, num_pictures=num_pictures, seed=seed, log_every=1
        )[1]
        return [line.cross_entropy for line in log]

    first, second = losses(8, seed=0)
    assert first == pytest.approx(second, rel=1e-4)
    other, _ = losses(8, seed=1)
    assert first != pytest.approx(other, rel=1e-4)
    first, second = losses(0, seed=0)
    assert first != pytest.approx(second, rel=1e-4)


def test_tome_from_block_1(model: Any) -> None:
    budget = 0.5 * tokcomp.flops(model)
    method = schedules.tome_from_block_1(model, budget)
    assert schedules.cost(model, method) == pytest.approx(budget, rel=0.01)
    left = tokens_left(model, method)
    assert left[0] == 65 and left[1] < 65
    with pytest.raises(ValueError, match="budget must be at least"):
        schedules.tome_from_block_1(model, 0.33 * tokcomp.flops(model))


def test_no_two_drawings_are_alike() -> None:
    held_out, labels = held_out_pictures(720)
    training, _ = training_pictures(64)
    assert torch.equal(labels[:360], labels[360:])
    everything = torch.cat([held_out, training]).flatten(1)
    assert len(everything.unique(dim=0)) == 784


def test_units_are_named_once_and_need_what_there_is() -> None:
    for settings in (Settings(), QUICK):
        units = all_units(settings)
        names = {unit.name for unit in units}
        assert len(names) == len(units)
        assert all(need in names for unit in units for need in unit.needs)
    assert len(Settings().seeds) >= 5 and len(Settings().shares) == 3


def test_the_name_of_a_search_tells_it_from_the_others() -> None:
    default = SearchSettings(0.5)
    others = [
        SearchSettings(0.4),
        SearchSettings(0.5, metric="random"),
        SearchSettings(0.5, pipeline="prune"),
        SearchSettings(0.5, match_inference=True),
        SearchSettings(0.5, epochs=1),
        SearchSettings(0.5, images=16),
    ]
    assert len({one.name for one in [default, *others]}) == 7


@pytest.mark.slow
def test_the_command_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--jobs", "1", "--output", str(tmp_path / "out")]
    assert diffrate.main(options) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {"diffrate-equal-cost.png", "diffrate-random.png", "diffrate-schedules.png"}
    assert written == {"models", "units", "results.json", "tables.md", *plots}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["equal_cost"]) == {"0.5"}
    rows = results["equal_cost"]["0.5"]["rows"]
    assert {"DiffRate", "ToMe", "EViT", "uniform"} < set(rows)
    for series in rows.values():
        assert len(series["top1"]) == 2 and all(0 <= value <= 100 for value in series["top1"])
        shares = [1e6 * m / dense for m, dense in zip(series["mflops"], results["uncompressed"]["flops"], strict=True)]
        assert shares == pytest.approx([0.5, 0.5], rel=0.02)
    assert set(results["ablations"]) == {"metric", "pipeline", "images", "epochs"}
    gaps = results["match_inference"]["0.5"]["gap"]
    assert max(gaps["match_inference=True"]["logits"]) < 1e-4
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert tables.count("\n## ") == 9 and "nan" not in tables.lower()
    capsys.readouterr()
    assert diffrate.main(options) == 0
    units = len(all_units(QUICK))
    assert f"{units} of {units} units are there already" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["equal_cost"] == results["equal_cost"]


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert diffrate.main(["--output", str(tmp_path / "file")]) == 2
    assert "--output must be a folder" in capsys.readouterr().err

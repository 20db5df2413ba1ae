"""ToCom's reproduction: the halves of the digits, the plan, the whole command in small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reproduce.tocom import __main__ as command
from benchmarks.reproduce.tocom import data, training, units
from benchmarks.reproduce.tocom.measure import compensated_logits, logits_of, measured
from benchmarks.reproduce.tocom.plan import HALVES, QUICK, Run, Settings, ablations, method_of, runs
from benchmarks.reproduce.tocom.summary import summarize
from benchmarks.reproduce.tocom.tables import all_tables
from benchmarks.reproduce.tocom.units import all_units
from tests.tocom.conftest import lively_plugin


@pytest.fixture(scope="module")
def model() -> Any:
    model = training.new_model(3, 5, 0.0).eval().requires_grad_(False)
    torch.nn.init.normal_(model.head.weight)  # it starts at zero, and then no answer depends on the rest
    return model


def test_the_halves_share_no_digit_and_labels_start_at_zero() -> None:
    low, high = data.digits_of("low"), data.digits_of("high")
    assert len(low[1]) + len(high[1]) == 1437
    held_out = [data.digits_of(half, held_out=True)[1] for half in HALVES]
    assert sum(map(len, held_out)) == 360
    for _, labels in (low, high):
        assert labels.unique().tolist() == [0, 1, 2, 3, 4]


def test_the_task_is_split_evenly_and_by_seed() -> None:
    (ink, labels), (rest, _) = data.task_split("high", 50, seed=1)
    assert labels.bincount().tolist() == [10] * 5
    everything = torch.cat([ink, rest]).flatten(1)
    assert len(everything) == len(data.digits_of("high")[1])
    assert torch.equal(everything.sum(0), data.digits_of("high")[0].flatten(1).sum(0))
    assert not torch.equal(ink, data.task_split("high", 50, seed=2)[0][0])
    assert torch.equal(ink, data.task_split("high", 50, seed=1)[0][0])


def test_fine_tuning_is_of_every_weight_and_the_same_at_first(tmp_path: Path) -> None:
    recipe = replace(QUICK.pretrain, epochs=8 / 720, batch_size=8, warmup_epochs=0).describe()
    units.pretrain(tmp_path, "low", 1, recipe)
    before = load_file(tmp_path / "models" / "pretrained-low-1.safetensors")
    # Two steps: the new classifier starts at zero, and so do the gradients of everything before it.
    recipe = replace(QUICK.finetune, epochs=2, batch_size=8, warmup_epochs=0).describe()
    for degree in (0, 2):
        units.finetune(tmp_path, "low", 1, degree, 8, 10, recipe)
    zero, two = (load_file(tmp_path / "models" / f"finetuned-low-1-{degree}.safetensors") for degree in (0, 2))
    assert all(not torch.equal(value, before[name]) for name, value in zero.items())
    assert zero.keys() == two.keys() and any(not torch.equal(value, two[name]) for name, value in zero.items())


def test_a_measurement() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = measured(logits, torch.tensor([0, 0]), logits.flip(0))
    p, q = logits.softmax(-1), logits.flip(0).softmax(-1)
    assert found.top1 == 50
    assert found.cross_entropy == pytest.approx(float(-p[:, 0].log().mean()))
    assert found.divergence == pytest.approx(float((q * (q / p).log()).sum(-1).mean()))
    assert measured(logits, torch.tensor([0, 1]), logits).divergence == 0


def test_a_measurement_leaves_the_model_as_it_was(model: Any) -> None:
    images = data.held_out_pictures("low", 3)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits_of(model, method_of(4, 4), images)
    found = compensated_logits(model, method_of(4, 4), images, lively_plugin(model, std=1.0, rank=1), 0, 4, 0.1)
    assert not torch.allclose(plain, found)
    assert torch.equal(plain, logits_of(model, method_of(4, 4), images))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_units_are_named_once_and_need_what_there_is() -> None:
    for settings in (Settings(), QUICK):
        every = all_units(settings)
        names = {unit.name for unit in every}
        assert len(names) == len(every)
        assert all(need in names for unit in every for need in unit.needs)
    assert len(Settings().seeds) >= 5
    assert set(ablations(Settings())) > {"shared LoRA", "classification loss", "no inversion"}


def results(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Made-up results: every number of the j-th run is j, and 10 more for each tenth of scale."""

    def row(value: float) -> dict[str, float]:
        return {"top1": value, "cross_entropy": 100 - value, "divergence": value}

    cells = [f"{source}>{target}" for source in settings.sources for target in settings.targets]
    for place, run in enumerate(runs(settings)):
        yield f"plain-{run}", {kind: {cell: row(place) for cell in cells} for kind in ("task", "validation", "own")}
        for one in (settings.plugin, *ablations(settings).values()):
            scales = sorted({*settings.scales, one.scale}) if one == settings.plugin else [one.scale]
            found = {
                cell: {f"{scale:g}": row(place + 100 * scale) for scale in scales}
                for cell in cells
                if len(set(cell.split(">"))) == 2
            }
            yield f"evaluate-{run}-{one.name}", dict.fromkeys(("task", "validation", "own"), found)
            yield f"plugin-{run}-{one.name}", {"parameters": 7, "loss": place}


def test_the_summary_pairs_seeds_and_averages_halves(tmp_path: Path) -> None:
    settings = replace(QUICK, halves=("low", "high"), ablation_halves=("low", "high"))
    (tmp_path / "units").mkdir()
    for name, result in results(settings):
        (tmp_path / "units" / f"{name}.json").write_text(json.dumps({"result": result}))
    summary = summarize(tmp_path, settings)
    assert runs(settings)[:2] == [Run("low", 0), Run("high", 0)]
    cell = summary["task"]["0>2"]
    assert cell["without"]["top1"] == [0.5, 2.5]
    assert cell["with"]["top1"] == [10.5, 12.5]
    # The largest scale has the lowest cross entropy.
    assert cell["chosen"]["top1"] == [10.5, 12.5] and cell["scales"] == {"low": [0.1, 0.1], "high": [0.1, 0.1]}
    assert summary["scales"]["0>2"]["0.05"]["top1"] == [5.5, 7.5]
    assert summary["halves"]["high"]["0>2"]["without"]["top1"] == [1, 3]
    assert summary["ablations"]["s = 1"]["task"]["0>2"]["top1"] == [100.5, 102.5]
    assert summary["ablations"]["ToCom"]["loss"] == [0.5, 2.5]
    assert "+10.00 ± 0.00 (2 of 2)" in all_tables(summary)


@pytest.mark.slow
def test_the_command_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--jobs", "1", "--output", str(tmp_path / "out")]
    assert command.main(options) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"models", "units", "results.json", "tables.md", "tocom-heat-map.png", "tocom-degrees.png"}
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["task"]) == {"0>0", "0>1", "0>2", "2>0", "2>1", "2>2"}
    assert all(len(cell["without"]["top1"]) == 2 for cell in results["task"].values())
    assert "nan" not in (tmp_path / "out" / "tables.md").read_text().lower()
    capsys.readouterr()
    assert command.main(options) == 0
    count = len(all_units(QUICK))
    assert f"{count} of {count} units are there already" in capsys.readouterr().out

"""The measuring itself: turns, ratios, the gate, records. Nothing here depends on how fast anything is."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import tokcomp
import torch
from tokcomp.bench import models
from tokcomp.cli import main
from tokcomp.measure.provenance import find_device, provenance, save_record
from tokcomp.measure.timing import Samples, copies_beyond_cache, device_rates, interleave, rotating
from torch import Tensor

CPU = torch.device("cpu")
RUN = itertools.count()


def test_competitors_take_turns() -> None:
    log: list[str] = []
    costs = {"a": 0.02, "b": 0.05}

    def watch(call: Any, launches: int) -> float:
        return costs[call()]

    calls = {name: (lambda name=name: log.append(name) or name) for name in costs}
    samples = interleave(calls, watch, rounds=3, turn_seconds=0.1)
    assert log[-6:] == ["a", "b"] * 3
    assert samples["a"].seconds == (0.02,) * 3 and samples["b"].median == 0.05


def test_long_turns_for_short_calls() -> None:
    launched: list[int] = []

    def watch(call: Any, launches: int) -> float:
        launched.append(launches)
        return 0.004

    interleave({"a": lambda: None}, watch, rounds=1, turn_seconds=0.1)
    assert launched[-1] == 25


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Samples((4.0, 9.0, 2.0)), Samples((2.0, 3.0, 2.0))
    assert fast.speedup_over(slow) == (2.0, 1.0, 3.0)


def test_rotation_and_copies() -> None:
    call = rotating(lambda value: value, [(1,), (2,)])
    assert [call(), call(), call()] == [1, 2, 1]
    assert copies_beyond_cache([torch.empty(1 << 20)], CPU) == 16  # 4 MiB each against twice 32 MiB
    assert copies_beyond_cache([torch.empty(4), 3], CPU) == 64


def test_records_never_replace_one_another(tmp_path: Path) -> None:
    record = {"provenance": provenance(CPU), "rows": [1.5]}
    first, second = save_record(tmp_path, record), save_record(tmp_path, record)
    assert save_record(tmp_path, record, second) == second
    assert first != second and json.loads(first.read_text()) == json.loads(second.read_text()) == record
    with pytest.raises(ValueError, match="JSON"):
        save_record(tmp_path, {**record, "rows": [float("nan")]})
    assert sorted(tmp_path.iterdir()) == sorted([first, second])
    assert {"date", "device", "commit", "versions", "host"} <= record["provenance"].keys()


def small_vit() -> torch.nn.Module:
    return timm.create_model("test_vit", img_size=64, num_classes=5).eval()


def gate(precision: str, fault: Callable[[Tensor], Tensor] = lambda logits: logits) -> dict[str, float]:
    model, method = small_vit(), tokcomp.ToMe(2)
    run = models.build_runner(models.Entry("tokcomp", method), model, models.PRECISIONS[precision], CPU)
    with torch.inference_mode():
        return models.check_agreement(lambda images: fault(run(images)), model, method, precision, CPU)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gate_passes_what_agrees(precision: str) -> None:
    errors = gate(precision)
    assert 0 < errors["tokcomp"] <= 2 * errors["published"] + torch.finfo(models.PRECISIONS[precision]).eps


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda logits: logits * 1.01, "logits are 0.01 off in float32"),
        (lambda logits: logits * (1 + 1e-6 * next(RUN)), "two runs of the compressed model .* differ"),
    ],
    ids=["wrong", "unsteady"],
)
def test_the_gate_stops_what_does_not(fault: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(models.DisagreementError, match=words):
        gate("float32", fault)


def test_entries_are_checked() -> None:
    with pytest.raises(ValueError, match="competitor must be one of"):
        models.Entry("somebody")
    for competitor, method in (("timm", tokcomp.ToMe(2)), ("tokcomp", None)):
        with pytest.raises(ValueError, match="a method must be given for all but uncompressed rivals"):
            models.Entry(competitor, method)


COMMAND = ("bench", "-m", "test_vit", "-b", "1", "2", "--rounds", "2", "--device", "cpu", "--no-rivals")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = tmp_path / "plan.json"
    tokcomp.CompressionSchedule([101, 90, 80, 60, 40, 20], [101, 80, 70, 50, 30, 10]).save(schedule)
    assert main([*COMMAND, "--schedule", str(schedule), "--results", str(tmp_path / "results")]) == 0
    text = capsys.readouterr().out
    assert "test_vit, DiffRate plan.json, float32" in text.splitlines()[0]
    first, second = text.splitlines()[1:3]
    assert first.startswith("batch 1: tokcomp (float32) at ") and second.startswith("batch 1: tokcomp-int8 (int8) at ")
    assert all("x the best uncompressed rival, timm (float32)" in line for line in (first, second))
    [record_path] = (tmp_path / "results").glob("*.json")
    record = json.loads(record_path.read_text())
    assert [(row["name"], row["batch"]) for row in record["rows"]] == [
        (name, batch) for batch in (1, 2) for name in ("published", "timm", "tokcomp", "tokcomp-int8")
    ]
    assert all(len(row["seconds"]) == 2 and row["images_per_second"] > 0 for row in record["rows"])
    assert record_path.with_suffix(".png").stat().st_size > 1000


def test_command_goes_on_without_what_does_not_compile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At batch 2 alone: table and picture do without those rows, and the reason is said and recorded."""

    def at_one(model: Any, **options: Any) -> Any:
        def run(images: Tensor) -> Tensor:
            if images.shape[0] > 1:
                raise RuntimeError("no compiler")
            return model(images)

        return run

    monkeypatch.setattr(torch, "compile", at_one)
    assert main([*COMMAND, "--method", "tome", "--r", "4", "--torchcompile", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    compiled = ("published-compiled", "timm-compiled", "tokcomp-compiled")
    for name in compiled:
        assert f"not measured: {name}, batch 2: RuntimeError: no compiler" in text
    [record_path] = tmp_path.glob("*.json")
    record = json.loads(record_path.read_text())
    assert {row["batch"] for row in record["rows"] if row["name"] in compiled} == {1}
    assert [one["name"] for one in record["not_measured"]] == list(compiled)
    assert record_path.with_suffix(".png").stat().st_size > 1000


def test_devices_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got 'tpu'"):
        find_device("tpu")
    with pytest.raises(ValueError, match=r"device must be one of the [0-9]+ GPUs that PyTorch sees, got 'cuda:99'"):
        find_device("cuda:99")


def test_rates_are_of_the_type_that_products_are_computed_in(set_products: Callable[..., None]) -> None:
    """oneDNN cannot multiply bfloat16 by a weight that was packed in float32."""
    set_products(bfloat16="float32")
    assert device_rates(CPU, torch.bfloat16)["matrix_flops_per_s"] > 0

"""The whole-model benchmarks on toy models: who takes part, what is derived, what is recorded."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import tokcomp
import torch
from tokcomp.bench import entries as entries_module
from tokcomp.bench.rivals import RivalError
from tokcomp.schedule import published_budgets

from benchmarks import test_batch_sweep, test_models, test_tocom, test_training, training_steps, whole_model
from benchmarks.model.roofline import ideal_seconds
from benchmarks.shapes import SUBJECTS, TABLE_1, Subject
from benchmarks.whole_model import Choice, all_entries, batches
from tests.bench.toys import CPU, METHOD, FakeResults, make_vit, timed

CUDA = torch.device("cuda")
TOY = Subject("toy", 1.0)


def config(**options: Any) -> Any:
    given = {"--batches": None, "--published-code": [], "--no-rivals": False, "compiled": None, **options}
    return SimpleNamespace(getoption=given.__getitem__)


def fake_rival(name: str, model: torch.nn.Module, dtype: torch.dtype, device: torch.device, batch: int) -> Any:
    """timm under the rival's name; ONNX Runtime is not installed."""
    if name == "onnxruntime":
        raise RivalError("not installed")
    own = copy.deepcopy(model).to(dtype)
    return lambda images: own(images.to(dtype))


def test_who_takes_part() -> None:
    model = make_vit()

    def names(precision: str, choice: Choice) -> list[str]:
        return list(all_entries(model, METHOD, precision, choice))

    ours = ["tokcomp-uncompressed", "tokcomp-slice", "tokcomp"]
    quantised = ["tokcomp-int8-uncompressed", "tokcomp-int8"]
    graphs = [name.replace("tokcomp", "tokcomp-graph") for name in ours]
    alone = {"--no-rivals": True, "compiled": "none"}
    assert names("float32", Choice.of(config(**alone), CPU)) == ["published", "timm", *ours, *quantised]
    timm, others = ["timm", "timm-compiled"], ["onnxruntime", "onnxruntime-int8", "openvino"]
    assert names("float32", Choice.of(config(), CPU)) == ["published", *timm, *others, *ours, *quantised]
    half = ["published", "published-float32", *timm, "openvino", "openvino-float32", *ours]
    assert names("bfloat16", Choice.of(config(), CPU)) == half
    on_gpu = ["timm-cudnn", "onnxruntime", "tensorrt"]
    assert names("float16", Choice.of(config(), CUDA)) == ["published", *timm, *on_gpu, *ours, *graphs]
    assert names("float16", Choice.of(config(**alone), CUDA)) == ["published", "timm", *ours, *graphs]
    compiled = ["published", "published-compiled", *timm, "tokcomp-compiled", *ours, *quantised]
    assert names("float32", Choice.of(config(**{"--no-rivals": True, "compiled": "all"}), CPU)) == compiled


def test_options_are_checked(tmp_path: Path) -> None:
    assert batches(config(), (1, 16)) == (1, 16)
    assert batches(config(**{"--batches": "2, 64"}), (1, 16)) == [2, 64]
    for text in ("0", "1,", "a", "-1"):
        with pytest.raises(ValueError, match="--batches must be numbers from 1"):
            batches(config(**{"--batches": text}), (1,))
    with pytest.raises(ValueError, match="--published-code must be the folder of a clone"):
        Choice.of(config(**{"--published-code": [str(tmp_path)]}), CPU)


@pytest.mark.parametrize(("precision", "compiled"), [("float32", "all"), ("bfloat16", None)])
def test_rows_of_a_model(monkeypatch: pytest.MonkeyPatch, precision: str, compiled: str | None) -> None:
    """Every entry has a row with its figures, or a reason."""
    monkeypatch.setattr(entries_module, "build_rival", fake_rival)

    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no compiler")))
    monkeypatch.setattr(test_models, "create_model", lambda *args, **options: make_vit())
    monkeypatch.setattr(tokcomp.DiffRate, "published", lambda *args: METHOD)
    results = FakeResults(Choice.of(config(compiled=compiled), CPU))
    test_models.test_model(TOY, 2, precision, timed, results)
    rows = {row["name"]: row for row in results.rows}
    asked = all_entries(make_vit(), METHOD, precision, Choice.of(config(compiled="none"), CPU))
    assert list(rows) == [name for name in asked if name != "onnxruntime"]
    absent = {"timm-compiled", *(["onnxruntime"] if precision == "float32" else [])}
    absent |= {"published-compiled", "tokcomp-compiled"} if compiled else set()
    absent |= {"torchao-int8"} if compiled and precision == "float32" else set()
    assert {one.name for one in results.missing} == absent
    assert "RivalError: not installed" in {one.reason for one in results.missing} or precision != "float32"
    ours, whole = rows["tokcomp"], rows["tokcomp-uncompressed"]
    assert ours["suite"] == "models" and ours["budget"] == 1.0 and ours["precision"] == precision
    assert ours["efficiency"] == pytest.approx([ours["gflops"] / whole["gflops"]] * 3) and ours["tax"] == (0, 0, 0)
    assert rows["timm"]["efficiency"] is None and rows["timm"]["tax"] is None
    # Every time is one second: the first of the rivals is the best, in like precision and in a finer one.
    assert ours["best_rival"] == "timm" and ours["over_best_rival"] == ours["over_published"] == (1, 1, 1)
    assert ours["over_published_float32"] == (None if precision == "float32" else (1, 1, 1))
    if precision == "float32":
        quantised = rows["onnxruntime-int8"]
        assert quantised["precision"] == "int8" and quantised["same_answers"] == 1 and ours["same_answers"] is None
        assert quantised["over_published"] is None and quantised["share_of_ideal"] is None
    rates, dtype = results.rates_of(torch.float32), getattr(torch, precision)
    assert ours["share_of_ideal"] == pytest.approx(ideal_seconds(make_vit(), METHOD, 2, dtype, rates))
    assert ours["share_of_matrix_rate"] == pytest.approx(2e9 * ours["gflops"] * 2 / 1e12)


def test_rows_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_batch_sweep, "create_model", lambda *args, **options: make_vit())
    monkeypatch.setattr(tokcomp.DiffRate, "published", lambda *args: METHOD)
    results = FakeResults(Choice.of(config(compiled="none"), CPU))
    test_batch_sweep.test_batch(TOY, 4, "bfloat16", timed, results)
    assert [row["name"] for row in results.rows] == [
        "published",
        "published-float32",
        "timm",
        "tokcomp-uncompressed",
        "tokcomp",
    ]
    assert {row["batch"] for row in results.rows} == {4} and {row["suite"] for row in results.rows} == {"batch-sweep"}


def test_rows_of_table_1(monkeypatch: pytest.MonkeyPatch) -> None:
    paper = next(paper for paper in TABLE_1 if paper.title == "ViT-S (DeiT)")
    monkeypatch.setattr(test_models, "create_model", lambda *args, **options: make_vit())
    monkeypatch.setattr(
        test_models, "_method", lambda line, *rest: {"DiffRate": METHOD}.get(line.method, tokcomp.ToMe(2))
    )
    results = FakeResults(Choice.of(config(), CPU))
    test_models.test_table_1(paper, 2.9, 2, timed, results)
    lines = {row["name"]: row for row in results.rows}
    assert lines["timm"]["method"] == "baseline" and lines["timm"]["paper_images_per_second"] == 5039
    for method, gflops, rate in (("EViT", 3.0, 6807), ("ToMe", 2.9, 6712), ("DiffRate", 2.9, 6744)):
        for name in (method, f"published {method}"):
            row = lines[name]
            assert (row["method"], row["paper_gflops"], row["paper_images_per_second"]) == (method, gflops, rate)
    assert len(results.shown) == 4


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_against_r(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(test_tocom, "create_model", lambda *args, **options: make_vit())
    results = FakeResults(Choice.of(config(), CPU))
    test_tocom.test_inference(2, precision, timed, results)
    rows = {row["name"]: row for row in results.rows}
    assert set(rows) == {"timm", *(f"{who}-r{r}" for who in ("published", "tokcomp") for r in (0, 4, 8, 12, 16))}
    assert rows["tokcomp-r16"]["paper_speedup"] == 1.9 and rows["tokcomp-r16"]["r"] == 16
    assert rows["tokcomp-r8"]["paper_speedup"] is None and rows["timm"]["r"] is None
    assert rows["tokcomp-r4"]["speedup_over_r0"] == (1, 1, 1)


@pytest.mark.parametrize(("module", "test"), [(test_tocom, "test_training"), (test_training, "test_training_step")])
def test_rows_of_training(monkeypatch: pytest.MonkeyPatch, module: Any, test: str) -> None:
    """Steps run, gradients agree, ratios have the right rival; what does not compile is a reason."""

    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no compiler")))
    monkeypatch.setattr(module, "create_model", lambda *args, **options: make_vit())
    monkeypatch.setattr(tokcomp.DiffRate, "published", lambda *args: METHOD)
    results = FakeResults(Choice.of(config(compiled="all"), CPU))
    getattr(module, test)(2, "float32", timed, results)
    rows = {row["entry"]: row for row in results.rows}
    if module is test_tocom:
        assert list(rows) == ["timm", *(f"tokcomp-r{r}" for r in (0, 4, 8, 12, 16)), "published-r16"]
        assert rows["tokcomp-r12"]["paper_speedup"] == 1.5
    else:
        assert set(rows) == {"timm", "tokcomp-uncompressed"} | {
            f"{who}-{budget}G" for who in ("tokcomp", "published") for budget in (2.3, 2.9)
        }
        assert rows["tokcomp-2.9G"]["paper_speedup"] == 1.4
        assert {one.name for one in results.missing} == {"timm-compiled", "tokcomp-2.3G-compiled"}
    assert all(row["speedup_over_uncompressed"] == row["speedup_over_timm"] == (1, 1, 1) for row in results.rows)


def test_a_step_that_fails_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_steps, "step", lambda *args: lambda: torch.tensor(float("nan")))
    results = FakeResults(Choice.of(config(), CPU))
    with pytest.raises(AssertionError, match="timm: the loss is not finite"):
        training_steps.compare_training(
            make_vit(),
            {"timm": training_steps.Trainee()},
            2,
            "float32",
            timed,
            results,
            suite="a",
            table="b",
            name="c",
            shown="timm",
            uncompressed="timm",
            paper={},
        )


def test_the_papers_table_is_whole() -> None:
    """Every model of the paper's Table 1: two published budgets of three methods, for LV-ViT-S one of two methods."""
    assert [(paper.title, paper.gflops, paper.images_per_second) for paper in TABLE_1] == [
        ("ViT-S (DeiT)", 4.6, 5039),
        ("ViT-B (DeiT)", 17.6, 2130),
        ("ViT-B (MAE)", 17.6, 2130),
        ("ViT-L (MAE)", 61.6, 758),
        ("ViT-H (MAE)", 167.4, 299),
        ("LV-ViT-S", 6.6, 3630),
    ]
    published = published_budgets()
    for paper in TABLE_1:
        known = published.get(paper.name)
        assert len(paper.budgets) == (2 if known else 1) and set(paper.budgets) <= set(known or (3.9,))
        for budget, lines in paper.budgets.items():
            assert [line.method for line in lines] == ["EViT", *(["ToMe"] if known else []), "DiffRate"]
            assert lines[-1].gflops == budget
            assert all(paper.images_per_second < line.images_per_second for line in lines)
            assert all(0.93 * budget < line.gflops < 1.1 * budget for line in lines)
    assert all(subject.budget in published[subject.name] for subject in SUBJECTS.values())


def test_the_goals_come_first() -> None:
    assert [name for name, _ in test_models.CUDA[:4]] == ["deit-s", "deit-b", "vit-l", "vit-h"]
    assert all(256 <= batch <= 1024 for _, batch in test_models.CUDA)
    assert whole_model.STACKS[0] == "tokcomp"

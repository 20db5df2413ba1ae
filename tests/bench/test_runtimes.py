"""The benchmarks of attentions and of files in other runtimes, on toy models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tokcomp
import torch
from tokcomp.bench import entries as entries_module
from tokcomp.bench.rivals import RivalError
from tokcomp.bench.transformers_twin import as_transformers, build_transformers

from benchmarks import test_runtimes
from benchmarks.page.tables import suite_table
from benchmarks.shapes import SUBJECTS
from benchmarks.whole_model import Choice
from tests.bench.toys import CPU, METHOD, FakeResults, make_vit, timed


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> FakeResults:
    """The toy in DeiT-S's place."""
    monkeypatch.setattr(test_runtimes, "create_model", lambda *args, **options: make_vit())
    monkeypatch.setattr(tokcomp.DiffRate, "published", lambda *args: METHOD)
    monkeypatch.setattr(test_runtimes, "tome_for_budget", lambda *args: tokcomp.ToMe(3))
    return FakeResults(Choice(CPU, "timm"))


def shown(results: FakeResults) -> dict[str, dict[str, Any]]:
    assert {(row["model"], row["budget"]) for row in results.rows} == {(SUBJECTS["deit-s"].name, 2.3)}
    return {row["name"]: row for row in results.rows}


@torch.no_grad()
def test_a_twin_of_transformers_computes_the_same() -> None:
    pytest.importorskip("transformers")
    model, images = make_vit(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(as_transformers(model, "sdpa")(images).logits, model(images))
    want = tokcomp.compress(copy.deepcopy(model), METHOD)(images)
    for name in ("tokcomp-transformers", "tokcomp-transformers-sdpa"):
        torch.testing.assert_close(build_transformers(name, copy.deepcopy(model), METHOD)(images), want)
    with pytest.raises(RuntimeError, match="ls1"):
        as_transformers(make_vit(init_values=0.1), "sdpa")


def test_rows_of_attentions(monkeypatch: pytest.MonkeyPatch, results: FakeResults) -> None:
    def twin(name: str, model: torch.nn.Module, method: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        if name.endswith("-flex"):
            raise RuntimeError("does not compile")
        return tokcomp.compress(model, method)

    monkeypatch.setattr(entries_module, "build_transformers", twin)
    test_runtimes.test_attention(2, timed, results)
    rows = shown(results)
    ours = [name for name in test_runtimes.ATTENDING if not name.endswith("-flex")]
    assert list(rows) == ["timm", *(one for name in ours for one in (f"{name}-uncompressed", name))]
    assert [one.name for one in results.missing] == [
        "tokcomp-transformers-flex-uncompressed",
        "tokcomp-transformers-flex",
    ]
    stock = rows["tokcomp-stock"]
    assert stock["suite"] == "stock-attention" and stock["speedup"] == stock["over_itself"] == (1, 1, 1)
    assert stock["efficiency"] == pytest.approx([stock["gflops"] / rows["timm"]["gflops"]] * 3)
    assert rows["timm"]["over_itself"] is rows["tokcomp-stock-uncompressed"]["over_itself"] is None
    whole = test_runtimes.attention_entries(make_vit(), METHOD, Choice(CPU, "none"))
    assert not any("flex" in name for name in whole)


def test_rows_of_files(monkeypatch: pytest.MonkeyPatch, results: FakeResults) -> None:
    def run(name: str, model: torch.nn.Module, *args: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        if "openvino" in name:
            raise RivalError("not installed")
        return copy.deepcopy(model)

    monkeypatch.setattr(entries_module, "build_rival", run)
    monkeypatch.setattr(entries_module, "build_exported", run)
    test_runtimes.test_files(2, timed, results)
    rows = shown(results)
    asked = test_runtimes.file_entries(make_vit(), {"DiffRate": METHOD, "ToMe": METHOD})
    assert list(rows) == [name for name in asked if "openvino" not in name]
    assert [one.name for one in results.missing] == [name for name in asked if "openvino" in name]
    assert {one.precision for one in results.missing} == {"float32", "int8"}
    for name, twin in (("tokcomp-onnx", "onnxruntime"), ("tokcomp-int8", "tokcomp-int8-uncompressed")):
        for method in ("DiffRate", "ToMe"):
            row = rows[f"{name}, {method}"]
            assert row["over_itself"] == (1, 1, 1) and row["precision"] == rows[twin]["precision"]
            assert row["efficiency"] == pytest.approx([row["gflops"] / rows[twin]["gflops"]] * 3)
    head = suite_table("runtimes", results.rows).splitlines()[0]
    assert "over timm | same answers | over itself, whole | efficiency" in head

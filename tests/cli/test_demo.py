from __future__ import annotations

import json
import re
from unittest.mock import Mock

import pytest
from tokcomp import demo


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    from tokcomp.cli import main

    folder = tmp_path_factory.mktemp("demo") / "report"
    status = main(["demo", "--output", str(folder), "--batch-size", "1", "--rounds", "1", "--device", "cpu"])
    return status, folder


@pytest.mark.slow
def test_writes_two_files_and_nothing_else(outcome):
    status, folder = outcome
    assert status == 0
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "results.json"]


@pytest.mark.slow
def test_methods_cost_the_same_and_keep_the_accuracy(outcome):
    _, folder = outcome
    rows = json.loads((folder / "results.json").read_text())["digits"]
    assert [row["method"] for row in rows] == ["uncompressed", "DiffRate", "ToMe", "EViT"]
    dense, diffrate, tome, evit = rows
    assert dense["top1"] >= 97.0 and dense["agreement"] == 100.0 and set(dense["tokens"]) == {65}
    for row in (diffrate, tome, evit):
        assert row["mflops"] == pytest.approx(diffrate["mflops"], rel=0.03)
        assert row["mflops"] < 0.6 * dense["mflops"]
        assert row["tokens"][-1] < 30
        # 97.5 to 98.1 on the machine that trained the model; rounding elsewhere may turn an image or two.
        assert row["top1"] >= 96.0 and row["agreement"] >= 97.0


@pytest.mark.slow
def test_speeds_are_there(outcome):
    _, folder = outcome
    rows = json.loads((folder / "results.json").read_text())["deit_small_patch16_224"]["speed"]
    assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
    assert all(row["uncompressed"] > 0 and row["compressed"] > 0 and row["speed_up"] > 0 for row in rows)


@pytest.mark.slow
def test_report_is_self_contained(outcome):
    _, folder = outcome
    html = (folder / "report.html").read_text()
    assert len(html) < 2_000_000
    assert html.count("data:image/png;base64,") == 4 and html.count("<svg") == 3
    assert not re.search(r'(?:src|href)="(?!data:)', html) and "<script" not in html and "@import" not in html
    assert "random weights" in html


def test_output_is_checked_first(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "digits_model", lambda: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    err = refused("demo", "--output", tmp_path / "file")
    assert "--output must be a folder" in err and "is a file; choose another name" in err


def test_interrupt_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "evaluate_digits", Mock(side_effect=KeyboardInterrupt))
    status, _, err = run("demo", "--output", tmp_path / "out", "--device", "cpu")
    assert status == 130 and "interrupted" in err
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named(refused, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "photo_model", Mock(side_effect=OSError("no network")))
    err = refused("demo", "--pretrained", "--output", tmp_path / "out", "--device", "cpu")
    assert "--pretrained: the weights of deit_small_patch16_224 could not be loaded (OSError: no network)" in err


def test_missing_scikit_learn_is_named(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("tokcomp.cli.demo.find_spec", lambda name: None)
    err = refused("demo", "--output", tmp_path / "out")
    assert "demo needs scikit-learn for its images; pip install 'tokcomp[demo]'" in err

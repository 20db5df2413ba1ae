"""tokcomp compare, end to end on the digits."""

from __future__ import annotations

import json
import re
from functools import partial
from xml.etree import ElementTree

import pytest
from tokcomp.compare import run as comparison

DIGITS = ("compare", "--dataset", "digits", "-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0", "--images", "24")
FAST = ("--gflops", "0.012", "--speed-batch", "0", "--pictures", "0")
SEARCH = ("--steps", "1", "--search-batch-size", "4", "--search-images", "8", "--mixup", "0", "--cutmix", "0")


@pytest.mark.slow
def test_one_command_compares_and_goes_on(run, ran, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "images_per_second", partial(comparison.images_per_second, rounds=1))
    folder = tmp_path / "out"
    argv = (*DIGITS, "--pretrained", *FAST[:2], "--speed-batch", "2", "--pictures", "1", *SEARCH, "-o", folder)
    argv += ("--refine-candidates", "6", "--refine-images", "8")
    methods = ("--methods", "search", "tome", "refine", "random:2", "published")
    out, err = ran(*argv, *methods)
    assert "compare step 1/7: uncompressed: top-1" in err and "random, median of 2" in out
    results = json.loads((folder / "results.json").read_text())
    assert results["finished"] and results["num_images"] == 24
    (budget,) = results["budgets"]
    rows = {row["name"]: row for row in budget["rows"]}
    assert list(rows) == ["search", "tome", "refine", "random, median of 2"] and list(budget["impossible"]) == [
        "published"
    ]
    for row in rows.values():
        assert row["gflops"] == pytest.approx(0.012, rel=0.02) and 80 <= row["top1"] <= 100 and row["same"] > 80
    assert budget["recommended"]["name"] in rows and f"Recommended: {budget['recommended']['name']}" in out
    assert rows["tome"]["images_per_second"] > 0 and any(row["less_best"] == [0, 0] for row in rows.values())
    page = (folder / "compare.html").read_text()
    assert "<script" not in page and re.findall(r'(?:src|href)="(?!data:)([^"]+)', page) == ["explore.html"]
    explorer = json.loads(re.search(r'id="data">(.*?)</script>', (folder / "explore.html").read_text())[1])
    assert [one["method"] for one in explorer["choices"]] == ["search", "tome", "refine"]
    assert explorer["choices"][1]["images_per_second"] == rows["tome"]["images_per_second"]
    plots = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(plots) == 2 and all(ElementTree.fromstring(plot) is not None for plot in plots)
    assert page.count("data:image/png;base64,") == 1
    # The schedule that was found is one for 'tokcomp evaluate'.
    evaluate = ("evaluate", *DIGITS[1:-2], "--pretrained", "--num-samples", "24", "--json", "--method", "diffrate")
    found = json.loads(run(*evaluate, "--schedule", folder / rows["search"]["schedule"])[1])
    assert found["gflops"] == pytest.approx(rows["search"]["gflops"], abs=1e-6)
    # The same command computes nothing, another method only itself. What a killed one left goes.
    drafts = [folder / part / ".x.tmp" for part in (".", "cells", "schedules")]
    for draft in drafts:
        draft.touch()
    asked = []
    answer = comparison.answer
    monkeypatch.setattr(comparison, "answer", lambda *a, **k: asked.append(1) or answer(*a, **k))
    assert run(*argv, *methods)[0] == 0 and asked == []
    assert not any(draft.exists() for draft in drafts)
    assert json.loads((folder / "results.json").read_text())["budgets"] == results["budgets"]
    status, out, err = run(*argv, *methods, "--quantize", "int8")
    assert status == 0 and len(asked) == 4 and "int8: top-1" in out, err
    quantised = json.loads((folder / "results.json").read_text())
    (budget,) = quantised["budgets"]
    for row in (quantised["uncompressed"], *(row for row in budget["rows"] if row["name"] != "random, median of 2")):
        assert row["int8"]["top1"] >= 80 and row["int8"]["same"] > 90 and row["int8"]["over_float32"] > 0
    asked.clear()
    moved = ("--schedule-of", folder, folder / rows["search"]["schedule"])
    status, out, err = run(*argv, *methods, "--json", *moved)
    assert status == 0 and len(asked) == 2, err
    names = [row["name"] for row in json.loads(out)["budgets"][0]["rows"]]
    assert names[-3:-1] == ["schedule of out", "schedule of search-0.012"]


@pytest.mark.slow
def test_counts_that_differ_from_image_to_image_cost_their_mean(ran, tmp_path):
    folder = tmp_path / "out"
    argv = (*DIGITS, "--pretrained", "--gflops", "0.009", "--speed-batch", "0", "--pictures", "1", "--methods", "dtome")
    ran(*argv, "-o", folder)
    (row,) = json.loads((folder / "results.json").read_text())["budgets"][0]["rows"]
    assert row["gflops"] == pytest.approx(0.009, rel=0.02) and row["method"].startswith("DToMe(thresholds=(0.")
    assert row["kept"] == sorted(row["kept"], reverse=True) and row["kept"][-1] < 30 and "schedule" not in row


def test_time_that_is_up_ends_it_between_cells(run, tmp_path, monkeypatch):
    argv = (*DIGITS, *FAST, "--methods", "tome", "evit", "-o", tmp_path)
    status, _, err = run(*argv, "--minutes", "1e-9")
    assert status == 1 and not (tmp_path / "results.json").exists()
    answer = comparison.answer
    monkeypatch.setattr(comparison.time, "monotonic", iter([0.0, 0.0, 61.0]).__next__)
    status, _, err = run(*argv, "--minutes", "1")
    assert status == 1 and "stopped after 1 of 3 cells; the same command goes on from here" in err
    assert not json.loads((tmp_path / "results.json").read_text())["finished"]
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(comparison, "answer", lambda *a, **k: asked.append(1) or answer(*a, **k))
    assert run(*argv)[0] == 0 and len(asked) == 2
    assert json.loads((tmp_path / "results.json").read_text())["finished"]


def test_a_backbone_gets_a_head(run, ran, tmp_path):
    argv = (*DIGITS, "--pretrained", *FAST, "--methods", "tome", "--json", "-o", tmp_path)
    assert json.loads(run(*argv)[1])["uncompressed"]["top1"] > 90
    out, _ = ran(*argv, "--probe", "60")
    found = json.loads(out)
    # The trunk is trained, and sixty drawings tell its features apart; the model's own head is not used.
    assert found["uncompressed"]["top1"] > 60 and "head fitted on 60 images" in found["facts"]["weights"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--methods", "tomo"),
            "--methods: must be diffrate, search, refine, published, tome, pitome, evit, visionzip",
        ),
        (("--gflops", "9"), "--gflops must be below the uncompressed model's 0.02261, got 9"),
        (("--metrics", "size"), "--metrics must be among cls_attn, image_attn, cls_attn_v, random, got 'size'"),
        (("--steps", "3", "--epochs", "1"), "--steps and --epochs both set the length of the searches, got both"),
        (("--schedule-of", "nowhere"), "--schedule-of must be a file or a folder, got 'nowhere', which does not exist"),
        (("--probe", "20", "--num-classes", "10"), "--probe and --num-classes exclude each other, got both"),
        (("--probe", "5"), "--probe: labels must be 0 to "),
        (("--images", "0"), "argument --images: must be a whole number above 0"),
    ],
)
def test_mistakes_are_named(run, tmp_path, options, message):
    status, out, err = run(*DIGITS, *FAST, *options, "-o", tmp_path / "out")
    assert status == 2 and message in err and out == ""
    assert not (tmp_path / "out").exists()

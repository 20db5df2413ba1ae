"""Published code of other methods beside ours: what cannot be imported is named, what answers otherwise is no row."""

from __future__ import annotations

import json

import pytest
import torch
from tokcomp.bench.published_code import PublishedCodeError

from benchmarks import published_methods
from benchmarks.published_methods import Pair, main, measured, table


def test_a_clone_that_does_not_import_is_named(tmp_path, capsys):
    folder = tmp_path / "PiToMe"
    folder.mkdir()
    assert main(["--published-code", str(folder), "-o", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["rows"] == [] and record["left_out"] == {"PiToMe": "PiToMe has no algo"}
    assert "PiToMe is left out: PiToMe has no algo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--published-code", str(tmp_path / "ToMe"), "-o", str(tmp_path / "out.json")])
    assert "must be clones named DynamicViT, SPViT, Evo-ViT, PiToMe, got ToMe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--published-code", str(folder), "-o", str(tmp_path)])
    assert f"--output must be a file, got the folder '{tmp_path}'; add a file name" in capsys.readouterr().err


def test_only_what_answers_alike_is_timed(tmp_path, monkeypatch, capsys):
    def flat(images):
        return images.flatten(1)[:, :8]

    def other(images):
        return flat(images) + 1

    with pytest.raises(PublishedCodeError, match=r"the logits differ by .* of the largest"):
        measured(Pair(other, flat, 1.0), 1, 1)
    monkeypatch.setattr(
        published_methods,
        "PAIRS",
        {
            "SPViT": lambda folder: Pair(other, flat, 1.5, agrees=False, batches=(1,)),
            "PiToMe": lambda folder: Pair(flat, flat, 2.5),
        },
    )
    folders = [str(tmp_path / name) for name in ("SPViT", "PiToMe")]
    assert (
        main(["--published-code", *folders, "--batches", "1", "2", "--rounds", "1", "-o", str(tmp_path / "o.json")])
        == 0
    )
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert [(row["name"], row["batch"], row["difference"]) for row in rows] == [
        ("SPViT", 1, None),
        ("PiToMe", 1, 0.0),
        ("PiToMe", 2, 0.0),
    ]
    assert all(row["speedup"][1] <= row["speedup"][0] <= row["speedup"][2] for row in rows)
    assert "drawn at random" in table({"rows": rows}) and "| PiToMe | 2 | 2.50 | " in capsys.readouterr().out
    assert torch.is_grad_enabled()

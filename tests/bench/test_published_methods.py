"""Published code of other methods beside ours: what cannot run is named, what answers otherwise is no row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokcomp.bench.published_code import PublishedCodeError

from benchmarks.published_methods import __main__ as command
from benchmarks.published_methods.__main__ import drawn, main, table
from benchmarks.published_methods.clones import functions, imported
from benchmarks.published_methods.pair import Pair, measured
from benchmarks.published_methods.selections import KEPT, divprune

ROOT = Path(__file__).resolve().parents[2]


def flat(images):
    return images.flatten(1)[:, :8]


def other(images):
    return flat(images) + 1


def test_a_clone_that_does_not_import_is_named(tmp_path, capsys):
    folder = tmp_path / "PiToMe"
    folder.mkdir()
    assert main(["--published-code", str(folder), "-o", str(tmp_path / "out.json")]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["rows"] == [] and record["left_out"] == {"PiToMe": "PiToMe has no algo"}
    assert "PiToMe is left out: PiToMe has no algo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--published-code", str(tmp_path / "ToMe"), "-o", str(tmp_path / "out.json")])
    assert "must be clones named A-ViT, ATS, CDPruner, DynamicViT, Evo-ViT, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--published-code", str(folder), "--only", "SPViT", "-o", str(tmp_path / "out.json")])
    assert "--only must name clones of --published-code, got SPViT" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--published-code", str(folder), "-o", str(tmp_path)])
    assert f"--output must be a file, got the folder '{tmp_path}'; add a file name" in capsys.readouterr().err


def test_only_what_answers_alike_is_timed(tmp_path, monkeypatch, capsys):
    with pytest.raises(PublishedCodeError, match=r"the answers differ by .* of the largest"):
        measured(Pair("", other, flat), 1, 1)
    pairs = {
        "SPViT": lambda folder: [Pair("DeiT-S", other, flat, 1.5, differs=None, batches=(1,))],
        "ATS": lambda folder: [Pair("DeiT-S", flat, flat), Pair("DeiT-S", other, flat)],
        "dymu": lambda folder: [Pair("DeiT-S", lambda images: images.gone, flat)],
        "A-ViT": lambda folder: 1 / 0,
        "PiToMe": lambda folder: [Pair("DeiT-S", lambda one: flat(one) + (len(one) > 1), flat, 2.5, alone=True)],
    }
    monkeypatch.setattr(command, "PAIRS", pairs)
    folders = [str(tmp_path / name) for name in pairs]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}\nold\n{command.END}\n")
    options = ["--batches", "1", "2", "--rounds", "1", "-o", str(tmp_path / "o.json"), "--page", str(page)]
    assert main(["--published-code", *folders, *options]) == 0
    record = json.loads((tmp_path / "o.json").read_text())
    rows = record["rows"]
    assert [(row["name"], row["batch"], row["difference"]) for row in rows] == [
        ("SPViT", 1, None),
        ("ATS", 1, 0.0),
        ("ATS", 2, 0.0),
        ("PiToMe", 1, 0.0),
        ("PiToMe", 2, 0.0),
    ]
    assert record["left_out"]["A-ViT"] == "A-ViT cannot be set up: ZeroDivisionError: division by zero"
    assert record["left_out"]["dymu"].startswith("the published code fails here: ")
    assert record["left_out"]["ATS"].startswith("the answers differ by ")
    assert all(row["speedup"][1] <= row["speedup"][0] <= row["speedup"][2] for row in rows)
    assert page.read_text() == f"before\n{command.BEGIN}\n{table(record)}\n{command.END}\n"
    assert "drawn at random" in table({"rows": rows}) and "| PiToMe | DeiT-S | 2 | 2.50 | " in capsys.readouterr().out
    assert main(["--published-code", *folders, "--only", "PiToMe", *options]) == 0
    assert {row["name"] for row in json.loads((tmp_path / "o.json").read_text())["rows"]} == {"PiToMe"}


def test_the_table_of_the_page_is_the_record_s():
    record = json.loads((ROOT / "benchmarks/results/published-methods/amd-epyc.json").read_text())
    page = (ROOT / "docs/methods.md").read_text()
    assert drawn(page, record) == page


CLONE = """
import nowhere

class LlavaMetaForCausalLM(nowhere.Base):
    def pairwise_cosine_similarity(self, matrix):
        unit = matrix / matrix.norm(dim=1, keepdim=True)
        return unit @ unit.t()

    def DivPrune(self, vectors, length, cosine_matrix=None, threshold_ratio=0.1):
        apart = 1 - self.pairwise_cosine_similarity(vectors)
        chosen = [int(apart.fill_diagonal_(9).min(0).values.argmax())]
        while len(chosen) < round(threshold_ratio * length):
            chosen.append(int(apart.fill_diagonal_(0)[chosen].min(0).values.argmax()))
        return torch.tensor(chosen), apart
"""


def test_functions_of_a_file_that_does_not_import(tmp_path):
    path = tmp_path / "LLaVA/llava/model/llava_arch.py"
    path.parent.mkdir(parents=True)
    path.write_text(CLONE)
    with pytest.raises(PublishedCodeError, match="LLaVA does not import: ModuleNotFoundError: No module named 'nowhe"):
        imported(tmp_path / "LLaVA", "llava.model.llava_arch")
    for pair, kept in zip(divprune(tmp_path), KEPT, strict=True):
        case = pair.inputs(1, torch.Generator().manual_seed(0))
        theirs, ours = pair.published(*case), pair.ours(*case)
        assert theirs.shape == ours.shape == (1, kept) and pair.differs(theirs, ours) == 0
        assert pair.differs(theirs.roll(1, 1), ours) > 0.9
    with pytest.raises(PublishedCodeError, match=r"llava_arch.py has no LlavaMetaForCausalLM with encode_images"):
        functions(path, "LlavaMetaForCausalLM", ("encode_images",))
    with pytest.raises(PublishedCodeError, match=r"gone.py cannot be read"):
        functions(tmp_path / "gone.py", "A", ("b",))

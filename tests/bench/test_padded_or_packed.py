"""Forms of a batch whose images have different numbers of tokens: they agree before any is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import padded_or_packed
from benchmarks.padded_or_packed import lengths, main


def test_forms_agree_and_are_timed(monkeypatch, capsys):
    assert lengths(1, 0.5) == [104] and lengths(3, 0.5) == [52, 104, 156]
    for name, value in {"MODEL": "vit_tiny_patch16_224", "MEAN": 12, "SPREADS": (0.5,)}.items():
        monkeypatch.setattr(padded_or_packed, name, value)
    assert main(["--batches", "3", "--rounds", "1"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:2] == ["| 3", "6 - 18"] and all("x (" in cell for cell in row[3:]) and len(row) == 5
    forms = (padded_or_packed.padded, lambda blocks, tokens: torch.zeros(len(tokens), 192))
    forms[1].__name__ = "nothing"
    monkeypatch.setattr(padded_or_packed, "FORMS", forms)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        main(["--batches", "3", "--rounds", "1"])

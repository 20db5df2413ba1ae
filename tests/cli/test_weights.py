"""--checkpoint FILE: weights of every usual kind, and nothing that a file would like to run."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokcomp.cli.weights import load_weights, read_weights

EVALUATE = ("evaluate", "--dataset", "digits", "-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0")


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "wrap", [lambda bad: bad, lambda bad: {"state_dict": {}, "epoch": bad}], ids=["alone", "beside"]
)
@pytest.mark.parametrize("archive", [True, False], ids=["torch.save", "pickle"])
def test_a_checkpoint_runs_nothing(run, tmp_path, monkeypatch, wrap, archive):
    def as_old_timm_does(model, path, *args, **kwargs):
        torch.load(path, weights_only=False)

    monkeypatch.setattr("timm.models.load_checkpoint", as_old_timm_does)
    file, made = tmp_path / "hostile.pth", tmp_path / "made"
    content = wrap(Hostile(made))
    if archive:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    status, _, err = run(*EVALUATE, "--checkpoint", file)
    assert status == 2 and not made.exists()
    assert "must be only tensors and plain data" in err and "weights_only" not in err


def test_what_training_scripts_write_is_read(tmp_path):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    averaged = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save(
        {"state_dict": other.state_dict(), "state_dict_ema": averaged, "args": argparse.Namespace(lr=1.0), "epoch": 3},
        tmp_path / "training.pth.tar",
    )
    torch.save({"model": {f"_orig_mod.{n}": v for n, v in model.state_dict().items()}}, tmp_path / "compiled.pth")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name in ("training.pth.tar", "compiled.pth", "plain.pt", "plain.safetensors"):
        found = torch.nn.Linear(3, 2)
        load_weights(found, tmp_path / name)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items()), name


@pytest.mark.parametrize("content", [{}, {"state_dict": {"weight": 3}}, [torch.zeros(2)], {"epoch": 3}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="it must hold tensors by name"):
        read_weights(tmp_path / "odd.pt")

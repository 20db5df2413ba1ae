"""tokcomp export: what it refuses before any work, and what it hands on. tests/deploy and tests/building
run the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import tokcomp
from tokcomp.deploy import exported
from torch import nn


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-b", 9, "--max-batch", 8, "-o", "m.pt2"], "--batch-size must be at most --max-batch, 8, got 9"),
        (["-o", "."], "--output must be a file, got the folder '.'; add a file name"),
        (["-o", "m.pt2", "--quantize", "int8"], "quantize must be 'int8', for format='onnx' alone"),
        (["-o", "m.pt2", "--method", "tome"], "--method tome needs --r or --gflops or --schedule, got none of them"),
        (
            ["-m", "resnet18", "-o", "m.pt2", "--method", "tome", "--r", 3],
            "--model 'resnet18': a timm.models.resnet.ResNet is not a model",
        ),
    ],
)
def test_refusals(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", "--device", "cpu", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, said",
    [
        (["--max-batch", 16, "-o", "m.pt2"], "m.pt2 (0.0 MB, pretrained weights; 1 to 16 images, cpu)"),
        (["-b", 4, "--static-batch", "-o", "m.pt2"], "pretrained weights; 4 images, cpu)"),
        (["--quantize", "int8", "-o", "m.onnx"], "m.onnx (0.0 MB, pretrained weights; any number of images)"),
    ],
)
def test_what_is_handed_on(ran, tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    calls = []

    def export(model: nn.Module, path: Path, **settings: object) -> None:
        calls.append((tokcomp.flops(model), model.training, settings))
        path.write_bytes(b"")

    monkeypatch.setattr(exported, "export", export)
    model = ["-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "--method", "tome", "--r", 8]
    out, _ = ran("export", *model, *options)
    assert said in out.splitlines()[0] and "run it:" in out
    ((flops, training, settings),) = calls
    expected = tokcomp.compress(timm.create_model("tokcomp_digits_vit").eval(), tokcomp.ToMe(8))
    assert flops == tokcomp.flops(expected) and not training
    static = "--static-batch" in options
    asked = {"batch": 4 if static else 8, "dynamic_batch": not static, "max_batch": 16 if 16 in options else 1024}
    assert asked.items() <= settings.items() and settings["quantize"] == ("int8" if "int8" in options else None)

"""tokcomp export: what it refuses before any work. tests/build runs a package that it wrote."""

from __future__ import annotations

import pytest


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
def test_refusals(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run("export", "--device", "cpu", *arguments)
    assert status == 2 and message in err
    assert not list(tmp_path.iterdir())

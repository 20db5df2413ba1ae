from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokcomp.cli import main


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of three 40 x 32 pictures, in timm's layout: root/validation/CLASS/*.png."""
    generator = torch.Generator().manual_seed(0)
    for label in ("cat", "dog"):
        folder = tmp_path / "data" / "validation" / label
        folder.mkdir(parents=True)
        for index in range(3):
            pixels = torch.randint(0, 256, (32, 40, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def picture(image_folder: Path) -> Path:
    return image_folder / "validation" / "cat" / "0.png"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command line; returns (exit status, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run

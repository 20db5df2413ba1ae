from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokcomp.cli import main


def write_pictures(root: Path, **counts: int) -> Path:
    """Two classes of 40 x 32 pictures, so many of each per part, in timm's layout: root/PART/CLASS/*.png."""
    generator = torch.Generator().manual_seed(0)
    for part, count in counts.items():
        for label in ("cat", "dog"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(0, 256, (32, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Pictures to validate on."""
    return write_pictures(tmp_path / "data", validation=3)


@pytest.fixture
def training_folder(tmp_path: Path) -> Path:
    """Pictures to train on and to validate on."""
    return write_pictures(tmp_path / "data", train=8, validation=2)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validate on 20 digits, so that a test spends its time on training."""
    from tokcomp.runs import batches
    from tokcomp.runs.data import Part

    whole = batches.held_out_batches
    monkeypatch.setattr(
        batches, "held_out_batches", lambda dataset, *args, **kw: whole(Part(dataset, range(20)), *args, **kw)
    )


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


@pytest.fixture
def ran(run):
    """Run a command line that has to succeed; returns (stdout, stderr)."""

    def ran(*argv: object) -> tuple[str, str]:
        status, out, err = run(*argv)
        assert status == 0, err
        return out, err

    return ran


@pytest.fixture
def refused(run):
    """Run a command line that has a mistake; returns what is said of it."""

    def refused(*argv: object) -> str:
        status, _, err = run(*argv)
        assert status == 2, err
        return err

    return refused


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def goes_on_exactly(request, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """goes_on_exactly(cls, command, names, other): a signal during the second of three steps of ``cls`` stops the
    command after it; the folder is then refused to another run; resumed, the run writes the files ``names`` to the bit
    as if it had not been stopped, and is not resumed with the options ``other``. Returns what is said of those."""

    def check(cls: type, command: tuple[str, ...], names: tuple[str, ...], *other: str) -> str:
        def interrupted(self: Any, *batch: torch.Tensor) -> Any:
            if self.step_number == 1:
                signal.raise_signal(request.param)
            return step(self, *batch)

        assert run(*command, "-o", tmp_path / "whole")[0] == 0
        step, command = cls.step, (*command, "-o", tmp_path / "parts")
        with monkeypatch.context() as patch:
            patch.setattr(cls, "step", interrupted)
            status, _, err = run(*command)
        assert status == 128 + request.param
        assert "stopped after step 2 of 3; the same command with --resume continues from there" in err
        again, _, err = run(*command)
        assert again == 2 and "must not hold another run, got '" in err
        assert "continue that run with --resume, or choose another folder" in err
        status, _, err = run(*command, "--resume")
        assert status == 0, err
        for name in names:
            assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        status, _, err = run(*command, "--resume", *other)
        assert status == 2
        return err

    return check

"""Pictures from anywhere: each is drawn, or named and left out; the command goes on."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokcomp.cli import main

from tests.attack.parts import Part
from tests.attack.test_files import damaged

COMMAND = ("visualize", "-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "--method", "tome", "--r", "8")
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I", "F", "I;16")


def picture(rng: random.Random) -> tuple[str, bytes]:
    mode, kind = rng.choice(MODES), rng.choice(["png", "jpeg", "gif", "bmp", "tiff", "webp"])
    size = rng.choice([(1, 1), (1, 3000), (33, 47), (200, 3)])
    pixels = np.random.default_rng(rng.randrange(2**31)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    try:
        image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
        image.save(file, kind)
    except (OSError, ValueError, KeyError):  # a mode that this kind of file has not
        return "png", b"\x89PNG\r\n\x1a\n" + rng.randbytes(50)
    return kind, file.getvalue()


def test_pictures(tmp_path: Path, capsys: Any) -> None:
    def check(rng: random.Random) -> str:
        folder = tmp_path / str(rng.randrange(2**40))
        folder.mkdir()
        for number in range(4):
            kind, content = picture(rng)
            (folder / f"{number}.{kind}").write_bytes(damaged(rng, content) if rng.random() < 0.6 else content)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 10**5)  # a bomb at a size that is quickly made
            try:
                status = main([*COMMAND, str(folder), "-o", str(folder / "drawn")])
            except SystemExit as end:
                status = int(end.code or 0)
        err = capsys.readouterr().err
        assert status in (0, 1, 2) and "Traceback" not in err, err
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        drawn = len(list((folder / "drawn").glob("*"))) if (folder / "drawn").is_dir() else 0
        missing = [name for name in before if name not in err]
        assert drawn >= len(missing), f"{drawn} drawn, and no word of {missing}: {err}"
        return f"{drawn} of 4 drawn"

    Part("pictures", share=0.04, few=2).each(check)

"""Pictures that the commands draw: marked as theirs, so that no other picture is ever overwritten."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from tokcomp.cli.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

#: The PNG text field that marks a drawing, and its content.
_FIELD, _MARK = "Software", "tokcomp visualize"


def png_bytes(drawing: Image) -> bytes:
    """A drawing as PNG, marked."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_FIELD, _MARK)
    buffer = io.BytesIO()
    drawing.save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def check_overwrites(argument: str, targets: Iterable[Path]) -> None:
    """Refuse, before any work, existing files that were not drawn by these commands."""
    for target in targets:
        if target.exists() and not _is_drawing(target):
            raise UserError(
                f"{argument} must not overwrite what tokcomp did not draw, got '{target}'; name another folder or file"
            )


def drawing_names(pictures: Sequence[Path]) -> list[str]:
    """A file name for the drawing of each picture, all different, even if upper and lower case are the same."""
    stems = [path.stem.casefold() for path in pictures]
    taken: set[str] = set()
    names = []
    for path, stem in zip(pictures, stems, strict=True):
        alone = [path.stem] if stems.count(stem) == 1 else []
        bases = chain(alone, [path.name], (f"{path.name}-{number}" for number in count(2)))
        name = next(f"{base}.png" for base in bases if f"{base}.png".casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def _is_drawing(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.format == "PNG" and image.info.get(_FIELD) == _MARK
    except Exception:  # not a picture, or one too odd to be ours
        return False

"""The explorer's page: its template, style and script, with the data of pictures and methods in it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files

import numpy as np
from PIL import Image
from torch import Tensor

from tokcomp.explore.record import Block

#: In every page, so that commands overwrite no other.
MARK = '<meta name="generator" content="tokcomp explorer">'


@dataclass(frozen=True)
class Figure:
    """A picture: its name, and its pixels [3, H, W] in 0..1 as the model sees them."""

    name: str
    pixels: Tensor


@dataclass(frozen=True)
class Choice:
    """One method at one cost, on every picture of the page.

    Attributes:
        method: its name for the switch.
        strength: how much it compresses, for the second switch, such as "2.3 GFLOPs".
        gflops: 1e9 multiply-adds per image; None where the family's are not known.
        images_per_second: measured or predicted; None if unknown.
        settings: the method in full.
        pictures: for each picture, its blocks.
    """

    method: str
    strength: str
    gflops: float | None
    images_per_second: float | None
    settings: str
    pictures: Sequence[Sequence[Block]]


def render(
    title: str,
    lead: str,
    figures: Sequence[Figure],
    choices: Sequence[Choice],
    *,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    gflops: float | None,
    images_per_second: float | None = None,
    speed: str = "measured",
) -> str:
    """The page.

    Args:
        title: of the page.
        lead: a sentence or two below it.
        figures: the pictures, all cut into the same grid.
        choices: what to switch between; the first is shown first.
        grid: patches down and across.
        num_prefix_tokens: tokens that are no patches, counted with the others.
        gflops: of the uncompressed model; None where unknown.
        images_per_second: of the uncompressed model; None where unknown.
        speed: where images per second come from: "measured" or "predicted".

    Raises:
        ValueError: there is no picture or no choice, or a choice does not have every picture.
    """
    if not figures or not choices:
        raise ValueError(f"figures and choices must not be empty, got {len(figures)} and {len(choices)}")
    for choice in choices:
        if len(choice.pictures) != len(figures):
            raise ValueError(
                f"choices must have all {len(figures)} pictures, got {len(choice.pictures)} for {choice.method}"
            )
    data = {
        "grid": list(grid),
        "prefix": num_prefix_tokens,
        "gflops": gflops,
        "speed": images_per_second,
        "speedKind": speed,
        "images": [{"name": figure.name, "src": _data_uri(figure.pixels)} for figure in figures],
        "choices": [asdict(choice) for choice in choices],
    }
    # "<" could end the script element; JSON may escape any character.
    parts = {
        "TITLE": escape(title),
        "LEAD": escape(lead),
        "MARK": MARK,
        "STYLE": _part("page.css"),
        "SCRIPT": _part("page.js"),
        "DATA": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    page = _part("page.html")  # the data last: what is in it is not looked at again
    for name, value in parts.items():
        page = page.replace(f"@{name}@", value)
    return page


def _part(name: str) -> str:
    return files("tokcomp.explore").joinpath(name).read_text("utf-8")


def _data_uri(pixels: Tensor) -> str:
    values = pixels.expand(3, *pixels.shape[-2:]).float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    image, buffer = Image.fromarray(np.ascontiguousarray(values.numpy())), io.BytesIO()
    if min(image.size) < 128:
        image.save(buffer, "PNG", optimize=True)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

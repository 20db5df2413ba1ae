"""The model card: what a folder or repository holds, how to use it, its figures and a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokcomp.files import write_whole

README, PICTURE = "README.md", "tokens.png"
#: In every card, so that one that somebody wrote is kept.
_MARK = "<!-- written by tokcomp -->"
#: Names of figures in provenances, and how a card calls them; in this order, before any others.
_NAMES = {
    "source": "from",
    "model": "model",
    "weights": "weights",
    "data": "data",
    "gflops": "GFLOPs per image",
    "uncompressed_gflops": "uncompressed GFLOPs",
    "top1": "top-1, %",
    "uncompressed_top1": "uncompressed top-1, %",
    "images_per_second": "images per second",
    "speedup": "times the uncompressed speed",
}
_INK, _PAPER, _BAR, _LINE = (32, 36, 44), (255, 255, 255), (11, 107, 203), (217, 222, 230)


@dataclass(frozen=True)
class Bars:
    """A picture of one number for each block, say, counted from ``first``; ``top`` is the height of the picture."""

    caption: str
    values: Sequence[float]
    top: float
    first: int = 0


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: its heading.
        tag: what the hub files it under, beside "tokcomp".
        lead: a sentence or two.
        use: Python.
        facts: figures by name; those of :data:`_NAMES` come first. What is no text or number is left out.
        bars: its picture.
        rows: a table, its header first.
        command: that made it.
    """

    title: str
    tag: str
    lead: str
    use: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    bars: Bars | None = None
    rows: Sequence[Sequence[Any]] = ()
    command: str | None = None


def write_card(folder: Path, card: Card) -> None:
    """Write the card and its picture into a folder, unless somebody's own README is there."""
    readme = folder / README
    if readme.exists() and _MARK not in readme.read_text(encoding="utf-8", errors="replace"):
        return
    if card.bars is not None:
        write_whole(folder / PICTURE, drawn(card.bars))
    write_whole(readme, written(card))


def written(card: Card) -> str:
    """The card in Markdown, with the hub's metadata before it."""
    facts = {name: card.facts[name] for name in (*_NAMES, *card.facts) if name in card.facts}
    figures = [(_NAMES.get(name, name), value) for name, value in facts.items() if _is_figure(value)]
    parts = [
        f"---\nlibrary_name: tokcomp\ntags:\n- tokcomp\n- token-compression\n- vision-transformer\n- {card.tag}\n---",
        f"# {_cell(card.title)}",
        card.lead,
    ]
    if card.bars is not None:
        parts.append(f"![{card.bars.caption}]({PICTURE})")
    parts += ["## Use", f"```python\n{card.use.strip()}\n```"]
    if figures:
        parts += ["## Figures", _table([("", ""), *figures])]
    if card.rows:
        parts.append(_table(card.rows))
    if card.command:
        parts += ["Made by", "\n".join(f"    {line}" for line in card.command.splitlines())]
    return "\n\n".join([*parts, _MARK]) + "\n"


def drawn(bars: Bars) -> bytes:
    """The picture as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    left, top, height, foot = 56, 40, 220, 34
    step = max(12, min(44, 640 // len(bars.values)))
    width = max(left + step * len(bars.values) + 16, 420)
    image = Image.new("RGB", (width, top + height + foot), _PAPER)
    pen = ImageDraw.Draw(image)
    try:
        font: ImageFont.ImageFont | ImageFont.FreeTypeFont = ImageFont.load_default(13)
    except (TypeError, OSError):  # Pillow before 10.1, or without FreeType
        font = ImageFont.load_default()
    pen.text((left, 12), bars.caption, fill=_INK, font=font)
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        pen.line((left, y, width - 16, y), fill=_LINE)
        pen.text((left - 8, y), f"{share * bars.top:.3g}", fill=_INK, font=font, anchor="rm")
    every = -(-24 // step)  # a number needs 24 pixels
    for index, value in enumerate(bars.values):
        x, high = left + step * index, height * min(max(value / bars.top, 0.0), 1.0) if bars.top > 0 else 0.0
        pen.rectangle((x + 2, top + height - high, x + step - 3, top + height), fill=_BAR)
        if index % every == 0:
            pen.text((x + step / 2, top + height + 16), str(index + bars.first), fill=_INK, font=font, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _is_figure(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    header, *others = [" | ".join(map(_cell, row)) for row in rows]
    return "\n".join([f"| {header} |", "|" + " --- |" * len(rows[0]), *(f"| {row} |" for row in others)])


def _cell(value: Any) -> str:
    """Text that stays in its cell and is no markup, whoever wrote it."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    for letter in "\\|<>[]`":
        text = text.replace(letter, f"&#{ord(letter)};")
    return " ".join(text.split())

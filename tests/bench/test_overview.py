"""README's picture: bars as long as what they stand for, cells in rows."""

from __future__ import annotations

import numpy as np
from PIL import Image

from benchmarks.reproduce import overview


def bar_lengths(sheet: Image.Image, colour: str) -> list[int]:
    """Pixels of a colour in each run of rows that has any, in the middle of the run."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    counts = (np.asarray(sheet) == wanted).all(-1).sum(1)
    starts = np.flatnonzero((counts[1:] > 0) & (counts[:-1] == 0)) + 1
    return [int(counts[start + 5]) for start in starts]


def test_bars_are_in_proportion():
    sheet = overview.draw_bars({"all tokens": 10.0, "one": 40.0, "other": 20.0}, "images/s")
    assert sheet.size == (overview.SIZE, overview.SIZE)
    (base,) = bar_lengths(sheet, overview.BASE)
    one, other = bar_lengths(sheet, overview.BAR)
    # Each bar has the pixel that it starts from beside its length, which is rounded: by half a pixel.
    assert abs((one - 1) - 4 * (base - 1)) <= 2.5 and abs((other - 1) - 2 * (base - 1)) <= 1.5


def test_cells_stand_in_rows():
    colours = ("red", "green", "blue", "black")
    cells = [(name, Image.new("RGB", (overview.SIZE, overview.SIZE), name)) for name in colours]
    sheet = overview.table(cells, 2)
    middle, down = overview.SIZE // 2, overview.SIZE + overview.TITLE + overview.GAP
    places = [(middle, down - middle), (middle + overview.SIZE + overview.GAP, down - middle)]
    places += [(x, y + down) for x, y in places]
    seen = [sheet.getpixel(place) for place in places]
    assert seen == [Image.new("RGB", (1, 1), name).getpixel((0, 0)) for name in colours]

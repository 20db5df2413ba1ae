"""A plugin's gain in accuracy by source and target degree, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokcomp.files import write_whole


def draw_gains(cells: Sequence[Mapping[str, Any]], path: Path, *, title: str = "") -> None:
    """A heat map as PNG: rows are source degrees, columns target degrees, colours the gain in points of accuracy.

    Args:
        cells: each with ``source``, ``target``, ``without`` and ``with_tocom``, top-1 in per cent.
        path: the file.
        title: over the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(cell["source"] for cell in cells))
    targets = list(dict.fromkeys(cell["target"] for cell in cells))
    gains = {(cell["source"], cell["target"]): cell["with_tocom"] - cell["without"] for cell in cells}
    reach = max([0.1, *(abs(gain) for gain in gains.values())])
    figure = Figure(figsize=(2.2 + 1.3 * len(targets), 1.8 + 0.8 * len(sources)), layout="constrained")
    axes = figure.add_subplot()
    grid = [[gains[source, target] for target in targets] for source in sources]
    picture = axes.imshow(grid, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    for cell in cells:
        gain = gains[cell["source"], cell["target"]]
        text = f"{cell['without']:.2f}"
        if cell["source"] != cell["target"]:
            text += f"\n{cell['with_tocom']:.2f}"
        place = targets.index(cell["target"]), sources.index(cell["source"])
        axes.text(*place, text, ha="center", va="center", color="white" if abs(gain) > 0.6 * reach else "black")
    axes.set_xticks(range(len(targets)), [str(target) for target in targets])
    axes.set_yticks(range(len(sources)), [str(source) for source in sources])
    axes.set(xlabel="target degree", ylabel="source degree", title=title or "top-1 without and with ToCom, %")
    figure.colorbar(picture, ax=axes, label="gain, points")
    drawing = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawing)
    write_whole(path, drawing.getvalue())

"""How the kept tokens of each block moved during a search, as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from tokcomp.files import write_whole


def plot_kept(rows: Sequence[Mapping[str, float]], path: Path, *, title: str = "") -> bool:
    """Draw ``kept_0``, ``kept_1``, ... of a search's log over its steps as PNG; one line per block.

    Returns:
        False, with nothing written, if matplotlib is not installed or there are no rows.
    """
    if not rows or find_spec("matplotlib") is None:
        return False
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depth = sum(name.startswith("kept_") for name in rows[0])
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    for block in range(depth):
        colour = colormaps["viridis"](block / max(1, depth - 1))
        kept = [row[f"kept_{block}"] for row in rows]
        axes.plot(steps, kept, color=colour, drawstyle="steps-post", linewidth=1.5)
        axes.annotate(
            str(block), (steps[-1], kept[-1]), xytext=(4, 0), textcoords="offset points", va="center", color=colour
        )
    axes.set(xlabel="step", ylabel="tokens after the block", ylim=(0, None), title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    drawing = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawing)
    write_whole(path, drawing.getvalue())
    return True

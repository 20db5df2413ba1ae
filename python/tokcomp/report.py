"""A self-contained HTML page: text, tables, plots as inline SVG, pictures as data URIs. No network, no scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

#: Colours distinct for colour-blind readers and on light and dark pages (Okabe and Ito, slightly darkened).
SERIES_COLOURS = ("#6b7280", "#0072b2", "#c2570c", "#018a66", "#a0437e")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --dim: #5b6675; --line: #d9dee6; --page: #ffffff; --box: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --dim: #9aa6b6; --line: #343d4a; --page: #14181f; --box: #1c222c; }
}
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
.dim, figcaption { color: var(--dim); font-size: .9rem; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .65rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--dim); font-size: .85rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
figure { margin: 1.25rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; padding: 8px; box-sizing: border-box;
  border: 1px solid var(--line); }
.plots { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.plots figure { flex: 1 1 24rem; max-width: 30rem; margin: .75rem 0; }
svg { width: 100%; height: auto; font: 12px system-ui, "DejaVu Sans", sans-serif; }
svg text { fill: var(--ink); } svg .dim { fill: var(--dim); } svg .grid { stroke: var(--line); }
svg .ring { stroke: var(--ink); stroke-width: 1.8; fill: none; }
code, pre { background: var(--box); font-size: .88rem; border-radius: 4px; }
code { padding: .1rem .3rem; } pre { padding: .8rem 1rem; overflow-x: auto; }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The whole page; ``sections`` are headings with ready HTML parts."""
    body = "".join(f"<h2>{escape(heading)}</h2>{''.join(parts)}" for heading, parts in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{paragraph(lead)}{body}</body></html>\n"
    )


def paragraph(text: str, *, dim: bool = False) -> str:
    return f"<p{' class=' + chr(34) + 'dim' + chr(34) if dim else ''}>{escape(text)}</p>"


def link(text: str, file: str) -> str:
    """A paragraph that leads to a file beside the page."""
    return f'<p><a href="{escape(file)}">{escape(text)}</a></p>'


def code(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    # Short cells stay on one line, so that a figure keeps its unit.
    lines = [[escape(cell).replace(" ", "&nbsp;") if len(cell) < 18 else escape(cell) for cell in row] for row in rows]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def side_by_side(figures: Sequence[str]) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def bars(
    values: Mapping[str, float], *, caption: str, unit: str, digits: int = 1, colours: Sequence[str] = SERIES_COLOURS
) -> str:
    """Horizontal bars starting at 0, in the order given; the colours repeat."""
    label, chart, row = 120, 250, 34
    top = max(values.values())
    parts = []
    for index, (name, value) in enumerate(values.items()):
        length = chart * value / top
        y = index * row + 6
        colour = colours[index % len(colours)]
        parts.append(
            f'<text x="{label - 10}" y="{y + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{label}" y="{y}" width="{length:.1f}" height="{row - 10}" rx="3" fill="{colour}"/>'
            f'<text x="{label + length + 8:.1f}" y="{y + 16}">{value:.{digits}f}{escape(unit)}</text>'
        )
    height = len(values) * row + 2
    axis = f'<line class="grid" x1="{label}" x2="{label}" y1="0" y2="{height}"/>'
    return _figure(f'<svg viewBox="0 0 480 {height}" role="img">{axis}{"".join(parts)}</svg>', caption)


def steps(series: Mapping[str, Sequence[float]], *, caption: str, x_label: str, y_label: str) -> str:
    """One step line per series: entry 0 is before the first block, entry i after block i - 1."""
    left, top, width, height = 44, 18, 410, 200
    columns = max(len(values) for values in series.values())
    peak = max(max(values) for values in series.values())

    def x_at(position: float) -> float:
        return left + width * position / (columns - 1)

    def y_at(value: float) -> float:
        return top + height * (1 - value / peak)

    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = y_at(share * peak)
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="dim" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{share * peak:.0f}</text>')
    for block in range(columns - 1):
        middle = (x_at(block) + x_at(block + 1)) / 2
        parts.append(f'<text class="dim" x="{middle:.1f}" y="{top + height + 17}" text-anchor="middle">{block}</text>')
    legend = []
    x = float(left)
    for index, (name, values) in enumerate(series.items()):
        colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
        # Attention sees what the previous block kept, so a level lasts through its block.
        path = f"M{x_at(0):.1f},{y_at(values[0]):.1f}"
        path += "".join(f"H{x_at(i):.1f}V{y_at(value):.1f}" for i, value in enumerate(values) if i)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        legend.append(f'<rect x="{x:.1f}" y="{top + height + 43}" width="14" height="4" fill="{colour}"/>')
        legend.append(f'<text x="{x + 19:.1f}" y="{top + height + 49}">{escape(name)}</text>')
        x += 43 + 7.2 * len(name)
    middle = left + width / 2
    parts.append(
        f'<text class="dim" x="{middle}" y="{top + height + 33}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="dim" x="{left}" y="{top - 9}">{escape(y_label)}</text>')
    svg = f'<svg viewBox="0 -8 480 {top + height + 64}" role="img">{"".join(parts)}{"".join(legend)}</svg>'
    return _figure(svg, caption)


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    caption: str,
    x_label: str,
    y_label: str,
    rings: Sequence[tuple[float, float]] = (),
) -> str:
    """Points (x, y) of each series, joined in the order of x; a series of more than five is dashed.

    ``rings``: points with a ring around them, which the legend calls recommended.
    """
    left, top, width, height = 52, 18, 402, 230
    points = [point for values in series.values() for point in values]
    (x_least, x_most), (y_least, y_most) = (_padded([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (point[0] - x_least) / (x_most - x_least), (point[1] - y_least) / (y_most - y_least)
        return left + width * x, top + height * (1 - y)

    parts = []
    for step in range(5):
        x_value, y_value = x_least + (x_most - x_least) * step / 4, y_least + (y_most - y_least) * step / 4
        x, y = place((x_value, y_value))
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="dim" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{y_value:.4g}</text>')
        parts.append(f'<text class="dim" x="{x:.1f}" y="{top + height + 17}" text-anchor="middle">{x_value:.4g}</text>')
    row = top + height + 54
    for index, (name, values) in enumerate(series.items()):
        colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
        dash = ' stroke-dasharray="5 4"' if index >= len(SERIES_COLOURS) else ""
        places = [place(point) for point in sorted(values)]
        path = "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        x, y = left + (index % 2) * 205, row + (index // 2) * 18
        parts.append(f'<path d="M{x},{y - 4}h18" stroke="{colour}" stroke-width="3"{dash}/>')
        parts.append(f'<text x="{x + 24}" y="{y}">{escape(name)}</text>')
    bottom = row + (len(series) + 1) // 2 * 18
    places = [place(point) for point in rings]
    if rings:
        places.append((left + 9, bottom - 4))
        parts.append(f'<text x="{left + 24}" y="{bottom}">recommended</text>')
        bottom += 18
    parts += [f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="7.5"/>' for x, y in places]
    middle = left + width / 2
    parts.append(
        f'<text class="dim" x="{middle}" y="{top + height + 34}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="dim" x="{left}" y="{top - 9}">{escape(y_label)}</text>')
    return _figure(f'<svg viewBox="0 -8 486 {bottom}" role="img">{"".join(parts)}</svg>', caption)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that these values lie well within."""
    margin = 0.06 * (max(values) - min(values)) or max(abs(values[0]), 1.0) * 0.05
    return min(values) - margin, max(values) + margin

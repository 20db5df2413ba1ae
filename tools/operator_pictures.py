"""A picture of what each operator does, drawn from its own outputs on nine tokens: docs/images/operators/<op>.svg.

    python -m tools.operator_pictures

The class token is c; colours are the tokens' features, so that tokens alike in colour are alike to the operator.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import tokcomp_kernels as ops

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images" / "operators"
#: Directions of the patches' features in degrees, and their importance; the class token is first.
ANGLES = (0, 10, 20, 200, 205, 100, 95, 300, 312)
IMPORTANCE = torch.tensor([[0.0, 0.9, 0.5, 0.8, 0.3, 0.6, 0.2, 0.15, 0.1]])
MASK = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 0, 0]])
SIDE, STEP, LEFT = 40, 62, 30
WIDTH = 2 * LEFT + 8 * STEP + SIDE


def tokens() -> Tensor:
    """[1, 9, 2]; the class token is like none of the others."""
    radians = torch.tensor(ANGLES) * math.pi / 180
    x = torch.stack([radians.cos(), radians.sin()], -1)[None]
    x[0, 0] = 0
    return x


class Drawing:
    def __init__(self, title: str, height: int) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            f'font-family="system-ui, sans-serif" font-size="14" fill="currentColor"><title>{title}</title>'
        ]

    def add(self, part: str) -> None:
        self._parts.append(part)

    def text(self, x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> None:
        self.add(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" {extra}>{text}</text>')

    def token(self, place: float, y: float, label: str, colour: str, *, dashed: bool = False) -> None:
        x = LEFT + place * STEP
        edge = 'stroke="currentColor" stroke-dasharray="3 3" fill-opacity="0.25"' if dashed else ""
        self.add(f'<rect x="{x:g}" y="{y}" width="{SIDE}" height="{SIDE}" rx="6" fill="{colour}" {edge}/>')
        size = 14 if len(label) < 4 else 10
        ink = "currentColor" if dashed else "#111"  # a pale square shows the page, which may be dark
        self.text(x + SIDE / 2, y + 20 + size * 0.4, label, extra=f'fill="{ink}" font-size="{size}"')

    def line(self, start: float, top: float, end: float, bottom: float, *, merged: bool) -> None:
        x, to = (LEFT + place * STEP + SIDE / 2 for place in (start, end))
        look = 'stroke="#c2570c" stroke-width="2.5"' if merged else 'stroke="currentColor" stroke-opacity="0.45"'
        middle = (top + bottom) / 2
        self.add(f'<path d="M{x:g},{top}C{x:g},{middle:g} {to:g},{middle:g} {to:g},{bottom}" fill="none" {look}/>')

    def bar(self, place: int, foot: int, value: float, most: float) -> None:
        x, high = LEFT + place * STEP + 12, 34 * value / most
        self.add(f'<rect x="{x}" y="{foot - high:.1f}" width="16" height="{high:.1f}" fill="#0072b2"/>')

    def done(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"


def colour_of(feature: Tensor) -> str:
    """Hue by direction, saturation by length: a mean of unlike tokens is grey."""
    if not feature.any():
        return "#d0d5dd"
    red, green, blue = colorsys.hls_to_rgb(
        (math.atan2(float(feature[1]), float(feature[0])) / (2 * math.pi)) % 1,
        0.72,
        min(1.0, float(feature.norm())) * 0.8,
    )
    return "#" + "".join(f"{round(255 * part):02x}" for part in (red, green, blue))


def label_of(position: int) -> str:
    return "c" if position == 0 else str(position)


def flow(
    title: str,
    source: Sequence[int],
    outputs: Sequence[tuple[str, str, str]],
    *,
    bars: Sequence[float] | None = None,
    note: str = "",
) -> str:
    """Tokens above, what became of them below: outputs are label, colour and what stands under them."""
    drawing, above, below = Drawing(title, 262), 62, 178
    x = tokens()[0]
    for position, slot in enumerate(source):
        if bars is not None and position > 0:
            drawing.bar(position, above - 8, bars[position], max(bars))
        drawing.token(position, above, label_of(position), colour_of(x[position]), dashed=slot < 0)
    for position, slot in enumerate(source):
        if slot >= 0:
            drawing.line(position, above + SIDE, slot, below, merged=source.count(slot) > 1)
    for place, (label, colour, under) in enumerate(outputs):
        drawing.token(place, below, label, colour)
        drawing.text(LEFT + place * STEP + SIDE / 2, below + SIDE + 18, under, extra='font-size="12"')
    drawing.text(LEFT, 14, note, "start", 'font-size="12" fill-opacity="0.75"')
    return drawing.done()


def merged(title: str, x: Tensor, size: Tensor, source: Tensor, note: str, bars: Sequence[float] | None = None) -> str:
    """A flow of an operator that gives x, size and source."""
    where = source[0].tolist()
    outputs = []
    for slot in range(x.shape[1]):
        members = [label_of(position) for position, own in enumerate(where) if own == slot]
        outputs.append(("+".join(members), colour_of(x[0, slot]), f"size {float(size[0, slot]):.3g}"))
    return flow(title, where, outputs, bars=bars, note=note)


def heat(title: str, rows: Tensor, note: str, *, first_row: bool = False, below: Tensor | None = None) -> str:
    """Attention [9, 9] as squares, queries down and keys across."""
    cell, left, top = 26, 150, 44
    drawing = Drawing(title, top + 9 * cell + (66 if below is not None else 24))
    drawing.text(LEFT, 14, note, "start", 'font-size="12" fill-opacity="0.75"')
    for position in range(9):
        drawing.text(left + position * cell + cell / 2, top - 8, label_of(position), extra='font-size="12"')
        drawing.text(left - 12, top + position * cell + 18, label_of(position), extra='font-size="12"')
    most = float(rows.max())
    for query in range(9):
        for key in range(9):
            x, y = left + key * cell, top + query * cell
            share = float(rows[query, key]) / most
            drawing.add(
                f'<rect x="{x}" y="{y}" width="{cell - 2}" height="{cell - 2}" rx="3" fill="#0072b2" '
                f'fill-opacity="{0.06 + 0.94 * share:.2f}"/>'
            )
    if first_row:
        drawing.add(
            f'<rect x="{left - 3}" y="{top - 3}" width="{9 * cell + 4}" height="{cell + 4}" rx="5" fill="none" '
            'stroke="#c2570c" stroke-width="2.5"/>'
        )
        drawing.text(left + 9 * cell + 12, top + 18, "cls_attn", "start")
    if below is not None:
        for key in range(9):
            high = 34 * float(below[key]) / float(below.max())
            x, y = left + key * cell + 4, top + 9 * cell + 46 - high
            drawing.add(f'<rect x="{x}" y="{y:.1f}" width="{cell - 10}" height="{high:.1f}" fill="#c2570c"/>')
        drawing.text(left + 9 * cell + 12, top + 9 * cell + 40, "mean of each column", "start")
    return drawing.done()


def boxes(title: str, names: Sequence[str]) -> str:
    """Steps from left to right that one operator takes in one pass."""
    drawing, wide = Drawing(title, 110), (WIDTH - 2 * LEFT) / len(names)
    for index, name in enumerate(names):
        x, edge = LEFT + index * wide, 0 < index < len(names) - 1
        if edge:
            drawing.add(
                f'<rect x="{x + 4:.1f}" y="34" width="{wide - 20:.1f}" height="44" rx="8" fill="#0072b2" '
                'fill-opacity="0.18" stroke="#0072b2"/>'
            )
        drawing.text(x + (wide - 12) / 2, 60, name, extra='font-size="12"')
        if index + 1 < len(names):
            drawing.add(f'<path d="M{x + wide - 14:.1f},56h12m-5,-5l5,5l-5,5" fill="none" stroke="currentColor"/>')
    return drawing.done()


def _prune_merge() -> tuple[Tensor, Tensor, Tensor]:
    return ops.prune_merge(tokens(), IMPORTANCE, 7, 5)


def pictures() -> dict[str, Callable[[], str]]:
    """Operator -> what draws it."""
    x, bars = tokens(), IMPORTANCE[0].tolist()
    scaled = 2 * x
    scores = scaled[0] @ scaled[0].T * 2**-0.5
    every = scaled[:, None]  # [B, H, N, D]

    def class_attention_sort() -> str:
        # A class token that looks towards token 1.
        query = torch.tensor([[[2.0, 0.3]]])
        attention, order = ops.class_attention_sort(query, every)
        source = [order[0].tolist().index(position) for position in range(9)]
        outputs = [(label_of(position), colour_of(x[0, position]), "") for position in order[0].tolist()]
        note = "bars: cls_attn; below: token_order"
        return flow("class_attention_sort", source, outputs, bars=attention[0].tolist(), note=note)

    def select_diverse() -> str:
        chosen = ops.select_diverse(x, 5)[0].tolist()
        source = [chosen.index(position) if position in chosen else -1 for position in range(9)]
        outputs = [(label_of(position), colour_of(x[0, position]), f"{n}.") for n, position in enumerate(chosen)]
        return flow("select_diverse", source, outputs, note="num_kept = 5, in the order in which they were chosen")

    def unmerge() -> str:
        short, _, source = _prune_merge()
        where, drawing = source[0].tolist(), Drawing("unmerge", 190)
        drawing.text(
            LEFT, 14, "5 tokens and the source map of prune_merge; dashed: pruned, filled in", "start", 'font-size="12"'
        )
        for slot in range(5):
            drawing.token(slot, 30, "", colour_of(short[0, slot]))
        for position, slot in enumerate(where):
            if slot >= 0:
                drawing.line(slot, 70, position, 130, merged=where.count(slot) > 1)
            colour = colour_of(short[0, slot]) if slot >= 0 else "#d0d5dd"
            drawing.token(position, 130, label_of(position), colour, dashed=slot < 0)
        return drawing.done()

    def masked_merge() -> str:
        out, size, _, destination = ops.masked_merge(x, IMPORTANCE, MASK, torch.tensor([7, 5]))
        where, drawing = destination[0].tolist(), Drawing("masked_merge", 178)
        note = "7 are alive and 5 kept: two merge in place; dashed: masked before"
        drawing.text(LEFT, 14, note, "start", 'font-size="12" fill-opacity="0.75"')
        for position, to in enumerate(where):
            drawing.token(position, 100, label_of(position), colour_of(out[0, position]), dashed=not MASK[0, position])
            middle, end = (LEFT + place * STEP + SIDE / 2 for place in (position, to))
            drawing.text(middle, 160, f"size {float(size[0, position]):.3g}", extra='font-size="12"')
            if to != position:
                drawing.add(
                    f'<path d="M{middle:g},98C{middle:g},48 {end:g},48 {end:g},96m-5,-8l5,8l6,-7" fill="none" '
                    'stroke="#c2570c" stroke-width="2.5"/>'
                )
        return drawing.done()

    def masked(title: str) -> Callable[[], str]:
        rows = ops.masked_softmax(scores[None, None], MASK)[0, 0]
        return lambda: heat(title, rows, "tokens 7 and 8 are masked: only they themselves see them")

    tome = ops.tome_merge(x, x, 3)
    role = torch.tensor([[0, 2, 2, 2, 2, 1, 1, 1, 1]])
    either = ops.bipartite_merge(x, x, role, 2)
    softmax = scores.softmax(-1)
    received = ops.attention_received(every, every)[0]
    kept = "num_prune_kept = 7, num_merge_kept = 5; bars: importance; dashed: pruned"
    return {
        "class_attention_sort": class_attention_sort,
        "attention_received": lambda: heat("attention_received", softmax, "queries down, keys across", below=received),
        "prune_merge": lambda: merged("prune_merge", *_prune_merge(), kept, bars),
        "prune_merge_norm": lambda: boxes(
            "prune_merge_norm", ["x, branch", "sum", "prune_merge", "LayerNorm", "x, normalized"]
        ),
        "add_layer_norm": lambda: boxes("add_layer_norm", ["x, branch", "sum", "LayerNorm", "x, normalized"]),
        "tome_merge": lambda: merged("tome_merge", *tome, "r = 3; even positions (2, 4, 6, 8) go to odd ones"),
        "bipartite_merge": lambda: merged("bipartite_merge", *either, "role: 5 to 8 may leave, 1 to 4 receive; r = 2"),
        "select_diverse": select_diverse,
        "unmerge": unmerge,
        "attention": lambda: heat("attention", softmax, "queries down, keys across", first_row=True),
        "masked_attention": masked("masked_attention"),
        "masked_softmax": masked("masked_softmax"),
        "masked_merge": masked_merge,
        "linear_gelu": lambda: boxes("linear_gelu", ["x [N, K]", "x W^T + b", "GELU", "[N, F]"]),
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures().items():
        (FOLDER / f"{name}.svg").write_text(draw(), "utf-8")


if __name__ == "__main__":
    main()

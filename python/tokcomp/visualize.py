"""Pictures of what a method did to an image's patches, after Fig. 5 of the DiffRate paper."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.api import trace

_PAGE = (255, 255, 255)
_INK = (32, 36, 44)
_GOLDEN_RATIO = 0.6180339887498949


def paint_groups(
    image: Tensor,
    source: Tensor,
    grid: tuple[int, int],
    *,
    cell: int = 24,
    outline: int = 2,
    detail: bool = False,
) -> Image.Image:
    """Every patch in the mean colour of its group; each merged group is outlined in its own colour.

    Args:
        image: [3, H, W] in 0..1, or [1, H, W].
        source: [P] the group (slot) of each patch in row order, -1 = pruned: painted black.
        grid: patches down and across; H and W are multiples of these.
        cell: side of a patch in the picture, in pixels.
        outline: width of the outlines, in the same pixels.
        detail: patches that stand for themselves show the image itself, without an edge, instead of their mean colour.

    Raises:
        ValueError: the source does not have one entry per patch.
    """
    rows, columns = grid
    if source.shape != (rows * columns,):
        raise ValueError(f"source must be [{rows * columns}], one entry per patch, got {list(source.shape)}")
    height, width = image.shape[-2:]
    patches = F.avg_pool2d(image.expand(3, height, width).float().cpu(), (height // rows, width // columns))
    colours = patches.flatten(1).T  # [P, 3]
    source = source.cpu()
    members = source.clamp(min=0)
    groups = int(members.max()) + 1
    kept = (source >= 0).float()
    totals = torch.zeros(groups, 3).index_add_(0, members, colours * kept.unsqueeze(1))
    counts = torch.zeros(groups).index_add_(0, members, kept).clamp(min=1)
    painted = (totals / counts.unsqueeze(1))[members] * kept.unsqueeze(1)
    labels = source.view(rows, columns).numpy()
    pixels = painted.view(rows, columns, 3).mul(255).round().byte().numpy()
    pixels = np.ascontiguousarray(pixels.repeat(cell, 0).repeat(cell, 1))
    if detail:
        size = torch.bincount(source[source >= 0], minlength=groups)
        alone = ((size[members] == 1) & (source >= 0)).view(rows, columns).numpy()
        whole = np.asarray(_as_picture(image, (columns * cell, rows * cell)))
        pixels = np.where(alone.repeat(cell, 0).repeat(cell, 1)[..., None], whole, pixels)
    if outline > 0:
        _outline(pixels, labels, cell, outline, hairlines=not detail)
    return Image.fromarray(pixels)


def _as_picture(image: Tensor, size: tuple[int, int]) -> Image.Image:
    """[3, H, W] or [1, H, W] in 0..1 as a picture of another size, given as width and height."""
    shown = image.expand(3, *image.shape[-2:]).float().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(shown.numpy())).resize(size, Image.Resampling.LANCZOS)


def _outline(pixels: np.ndarray, labels: np.ndarray, cell: int, width: int, *, hairlines: bool) -> None:
    """Draw the inner edges of every group, in place."""
    padded = np.pad(labels, 1, constant_values=-2)
    sides = {
        "top": padded[:-2, 1:-1] != labels,
        "bottom": padded[2:, 1:-1] != labels,
        "left": padded[1:-1, :-2] != labels,
        "right": padded[1:-1, 2:] != labels,
    }
    # A group keeps its colour from block to block because its first patch names it.
    slots, first, counts = np.unique(labels, return_index=True, return_counts=True)
    palette = {
        int(slot): _group_colour(int(index)) if count > 1 else None
        for slot, index, count in zip(slots, first, counts, strict=True)
    }
    for row, column in np.ndindex(*labels.shape):
        slot = int(labels[row, column])
        if slot < 0:
            continue
        square = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        colour = palette[slot]
        if colour is None:
            # A patch that stands for itself needs no colour to be recognised: a hairline marks its edge.
            if hairlines:
                square[:1] = square[:, :1] = square[-1, -1] // 4 * 3 + 32
            continue
        for side, edge in (
            ("top", np.s_[:width]),
            ("bottom", np.s_[-width:]),
            ("left", np.s_[:, :width]),
            ("right", np.s_[:, -width:]),
        ):
            if sides[side][row, column]:
                square[edge] = colour


def _group_colour(first_patch: int) -> tuple[int, int, int]:
    hue = (first_patch * _GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75 + 0.25 * (first_patch % 2), 1.0 - 0.2 * (first_patch % 3 == 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def choose_blocks(sources: Sequence[Tensor], shares: Sequence[float] = (3 / 4, 1 / 2, 1 / 3, 1 / 6)) -> list[int]:
    """For each share, the first block that keeps at most that share of the tokens; the last block if none does."""
    counts = [_num_groups(source[0]) for source in sources]
    total = sources[0].shape[1]
    chosen = {next((block for block, count in enumerate(counts) if count <= share * total), None) for share in shares}
    return sorted(block for block in chosen if block is not None) or [len(sources) - 1]


def _num_groups(source: Tensor) -> int:
    return len(torch.unique(source[source >= 0]))


def draw_blocks(
    model: nn.Module,
    image: Tensor,
    picture: Tensor,
    *,
    blocks: Sequence[int] | None = None,
    cell: int | None = None,
    outline: int = 2,
    label: str | None = None,
) -> Image.Image:
    """One row: the input, then one column per block showing what became of the patches.

    Args:
        model: compressed, or plain.
        image: [3, H, W], as the model takes it.
        picture: the same image as people see it, [3, H, W] in 0..1.
        blocks: blocks to draw, from 0; by default those of :func:`choose_blocks`.
        cell: side of a patch in pixels; by default chosen so that a column is about 320 pixels wide.
        outline: width of the outlines in pixels.
        label: title of the first column, instead of "input".

    Raises:
        ValueError: a block that the model does not have.
    """
    adapter = find_adapter(model)
    prefix = adapter.geometry(model).num_prefix_tokens
    sources = trace(model, image.unsqueeze(0))
    chosen = choose_blocks(sources) if blocks is None else list(blocks)
    for block in chosen:
        if not 0 <= block < len(sources):
            raise ValueError(f"blocks must be between 0 and {len(sources) - 1}, got {block}")
    grid = adapter.grid(model, *image.shape[-2:])
    cell = cell or max(8, 320 // grid[1])
    size = (grid[1] * cell, grid[0] * cell)
    columns = [(label or "input", _as_picture(picture, size))]
    for block in chosen:
        source = sources[block][0]
        painted = paint_groups(picture, source[prefix:], grid, cell=cell, outline=outline, detail=True)
        columns.append((f"block {block}: {_num_groups(source)} tokens", painted))
    return join_columns(columns)


def join_columns(columns: Sequence[tuple[str, Image.Image]], *, gap: int = 10) -> Image.Image:
    """Titled pictures of one height side by side."""
    font = _font(15)
    bar = 26
    width = sum(picture.width for _, picture in columns) + gap * (len(columns) - 1)
    sheet = Image.new("RGB", (width, bar + columns[0][1].height), _PAGE)
    draw = ImageDraw.Draw(sheet)
    left = 0
    for title, picture in columns:
        draw.text((left, 4), title, fill=_INK, font=font)
        sheet.paste(picture, (left, bar))
        left += picture.width + gap
    return sheet


def join_rows(rows: Sequence[Image.Image], *, gap: int = 14) -> Image.Image:
    """Pictures one below another."""
    sheet = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows) + gap * (len(rows) - 1)), _PAGE
    )
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):
        # Pillow before 10.1, or one without FreeType, has a single small font.
        return ImageFont.load_default()

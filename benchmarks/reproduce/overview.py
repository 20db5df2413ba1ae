"""README's picture: what three methods leave of a photograph in a pretrained DINOv2 ViT-S/14, and what that saves.

    python -m benchmarks.reproduce.overview vit_s_focus.onnx photograph.png docs/images/overview.webp [--measure]

The weights are those of ``benchmarks/reproduce/pretrained/weights.py``. README shows ``flower.jpg`` from
scikit-learn (dany13, CC BY 2.0). Needs the package ``onnx``. With --measure, on an idle machine, the bars are images
per second of one image at a time, timm's model and the compressed ones in turns, and ``results/overview.json`` keeps
them for the next drawing; until there is such a record they are multiply-adds.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import numpy as np
import tokcomp
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tokcomp import equal_cost
from tokcomp.measure.provenance import provenance
from tokcomp.measure.timing import interleave, stopwatch
from tokcomp.visualize import paint_groups
from torch import Tensor, nn

from benchmarks.reproduce.pretrained.weights import load_backbone

SIZE = 336  # 24 x 24 patches of 14 pixels
SHARES = (0.6, 0.45)  # of the uncompressed model's multiply-adds; a row each
WHOLE = "all tokens"
RECORD = Path(__file__).with_name("results") / "overview.json"
ROUNDS = 15
GAP, TITLE = 12, 30
INK, PAGE, BAR, BASE = "#1f2430", "#ffffff", "#0a7d6e", "#9aa3b2"


def read_square(path: Path) -> Tensor:
    """The middle square of a picture, [3, SIZE, SIZE] in 0..1."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def compressed_models(model: nn.Module) -> dict[str, nn.Module]:
    """A compressed copy for every method and share, by what its bar is called."""
    whole, ruler = tokcomp.flops(model), equal_cost.Ruler(model)
    makers = {
        "DiffRate": lambda budget: equal_cost.uniform(ruler, budget),
        "ToMe": lambda budget: equal_cost.tome_for_budget(model, budget, ruler=ruler),
        "EViT": lambda budget: equal_cost.evit_for_budget(model, budget, ruler=ruler),
    }
    return {
        f"{name} {share:.0%}".replace("%", " %"): tokcomp.compress(copy.deepcopy(model), make(share * whole))
        for share in SHARES
        for name, make in makers.items()
    }


@torch.inference_mode()
def measure(models: dict[str, nn.Module], image: Tensor) -> dict[str, float]:
    """Images per second of each model, one image at a time, medians of rounds in turns."""
    calls = {name: lambda model=model: model(image) for name, model in models.items()}
    samples = interleave(calls, stopwatch(torch.device("cpu")), rounds=ROUNDS)
    return {name: 1 / taken.median for name, taken in samples.items()}


def draw_bars(values: dict[str, float], title: str) -> Image.Image:
    """A square with a titled bar for each value, the first one pale, and how many times the first each is."""
    sheet = Image.new("RGB", (SIZE, SIZE), PAGE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(21)
    draw.text((0, 0), title, fill=INK, font=font)
    step, start = (SIZE - 40) // len(values), 140
    first, most = next(iter(values.values())), max(values.values())
    for index, (name, value) in enumerate(values.items()):
        top = 40 + index * step
        end = start + round((SIZE - start - 62) * value / most)
        draw.text((0, top + step // 2 - 14), name, fill=INK, font=font)
        draw.rectangle((start, top + 5, end, top + step - 5), fill=BASE if index == 0 else BAR)
        text = f"{value:.3g}" if index == 0 else f"{value / first:.1f}x" if value > first else f"{value:.1f}"
        draw.text((end + 6, top + step // 2 - 14), text, fill=INK, font=font)
    return sheet


@torch.inference_mode()
def draw(model: nn.Module, photograph: Path, speeds: dict[str, float] | None) -> Image.Image:
    """The photograph and the bars in the first column, then a column for each method and a row for each share."""
    picture = read_square(photograph)
    image = normalized(picture)
    feature = F.normalize(model(image), dim=-1)
    grid = model.patch_embed.grid_size
    costs = {WHOLE: tokcomp.flops(model) / 1e9}
    cells = []
    for name, compressed in compressed_models(model).items():
        costs[name] = tokcomp.flops(compressed) / 1e9
        source = tokcomp.trace(compressed, image)[-1][0]  # [1 + patches], the class token first
        likeness = float((F.normalize(compressed(image), dim=-1) * feature).sum())
        title = f"{name.split()[0]}: {int(source.max())} tokens, cos {likeness:.2f}"
        cells.append((title, paint_groups(picture, source[1:], grid, cell=SIZE // grid[0], detail=True)))
    shown = Image.fromarray(picture.mul(255).round().byte().permute(1, 2, 0).numpy())
    bars = draw_bars(speeds, "images/s on a CPU") if speeds else draw_bars(costs, "GFLOPs an image")
    columns = len(cells) // len(SHARES)
    cells.insert(0, (f"{grid[0] * grid[1]} patches", shown))
    cells.insert(columns + 1, ("", bars))
    return table(cells, columns + 1)


def table(cells: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Titled squares of SIZE pixels in rows."""
    rows = len(cells) // columns
    sheet = Image.new("RGB", (columns * (SIZE + GAP) - GAP, rows * (SIZE + TITLE + GAP) - GAP), PAGE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    for index, (title, cell) in enumerate(cells):
        left, top = index % columns * (SIZE + GAP), index // columns * (SIZE + TITLE + GAP)
        draw.text((left, top), title, fill=INK, font=font)
        sheet.paste(cell, (left, top + TITLE))
    return sheet


def normalized(picture: Tensor) -> Tensor:
    """[3, H, W] in 0..1 as the model takes it, [1, 3, H, W]."""
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((picture - mean) / std).unsqueeze(0)


def main() -> None:
    """Draw the picture into the file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce.overview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weights", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("photograph", type=Path, help="a picture; its middle square is drawn")
    parser.add_argument("output", type=Path, help="the file to write, .webp or .png")
    parser.add_argument("--measure", action="store_true", help=f"measure the speeds first, and write {RECORD.name}")
    args = parser.parse_args()
    model = load_backbone(args.weights, SIZE)
    if args.measure:
        models = {WHOLE: model, **compressed_models(model)}
        speeds = measure(models, normalized(read_square(args.photograph)))
        record = {"images_per_second": speeds, "provenance": provenance(torch.device("cpu"))}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    speeds = json.loads(RECORD.read_text(encoding="utf-8"))["images_per_second"] if RECORD.exists() else None
    draw(model, args.photograph, speeds).save(args.output, quality=88)


if __name__ == "__main__":
    main()

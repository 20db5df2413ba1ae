"""README's picture: what three methods leave of a photograph in a pretrained DINOv2 ViT-S/14, budget by budget.

    python -m benchmarks.reproduce.overview vit_s_focus.onnx photograph.png docs/images/overview.webp

The weights are those of ``benchmarks/reproduce/pretrained/weights.py``. README shows ``flower.jpg`` from
scikit-learn (dany13, CC BY 2.0). Needs the package ``onnx``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tokcomp
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from tokcomp import equal_cost
from tokcomp.visualize import join_columns, join_rows, paint_groups
from torch import Tensor

from benchmarks.reproduce.pretrained.weights import load_backbone

SIZE = 336  # 24 x 24 patches of 14 pixels
SHARES = (0.75, 0.6, 0.45)  # of the uncompressed model's multiply-adds


def read_square(path: Path) -> Tensor:
    """The middle square of a picture, [3, SIZE, SIZE] in 0..1."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


@torch.inference_mode()
def draw(weights: Path, photograph: Path) -> Image.Image:
    """One row for each method: the photograph, then what its last block is left with at each budget."""
    picture = read_square(photograph)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    image = ((picture - mean) / std).unsqueeze(0)
    model = load_backbone(weights, SIZE)
    whole = tokcomp.flops(model)
    feature = F.normalize(model(image), dim=-1)
    ruler = equal_cost.Ruler(model)
    makers = {
        "DiffRate": lambda budget: equal_cost.uniform(ruler, budget),
        "ToMe": lambda budget: equal_cost.tome_for_budget(model, budget, ruler=ruler),
        "EViT": lambda budget: equal_cost.evit_for_budget(model, budget, ruler=ruler),
    }
    grid = model.patch_embed.grid_size
    shown = Image.fromarray(picture.mul(255).round().byte().permute(1, 2, 0).numpy())
    rows = []
    for label, make in makers.items():
        columns = [(f"{label}: {grid[0] * grid[1]} patches, {whole / 1e9:.1f} GFLOPs", shown)]
        for share in SHARES:
            tokcomp.compress(model, make(share * whole))
            source = tokcomp.trace(model, image)[-1][0]  # [1 + patches], the class token first
            likeness = float((F.normalize(model(image), dim=-1) * feature).sum())
            title = f"{int(source.max())} tokens, {tokcomp.flops(model) / 1e9:.1f} GFLOPs, cosine {likeness:.3f}"
            tokcomp.restore(model)
            columns.append((title, paint_groups(picture, source[1:], grid, cell=SIZE // grid[0], detail=True)))
        rows.append(join_columns(columns))
    return join_rows(rows)


def main() -> None:
    """Draw the picture into the file that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduce.overview", description=__doc__)
    parser.add_argument("weights", type=Path, help="vit_s_focus.onnx")
    parser.add_argument("photograph", type=Path, help="a picture; its middle square is drawn")
    parser.add_argument("output", type=Path, help="the file to write, .webp or .png")
    args = parser.parse_args()
    draw(args.weights, args.photograph).save(args.output, quality=88)


if __name__ == "__main__":
    main()

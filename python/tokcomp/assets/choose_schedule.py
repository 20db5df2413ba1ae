"""Chooses the DiffRate schedule of the digits model that comes with the package.

    python -m tokcomp.assets.choose_schedule --output digits_schedule.json

A plain random search, not the gradient search of the paper: of many random schedules of equal cost, the one with the
lowest cross entropy on the digits that the model was trained on. The held-out digits are not looked at.
Takes some three minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokcomp.api import compress, flops, restore
from tokcomp.assets import DIGITS_MODEL
from tokcomp.assets.train_digits import normalize
from tokcomp.data import digits_split, render_digits
from tokcomp.methods import DiffRate
from tokcomp.schedule import CompressionSchedule


def random_schedule(model: VisionTransformer, budget: float, generator: torch.Generator) -> CompressionSchedule:
    """A schedule of falling counts that costs about ``budget`` multiply-adds; block 0 keeps all."""
    depth, num_patches = len(model.blocks), model.patch_embed.num_patches
    shape = (
        torch.rand(depth - 1, generator=generator).sort(descending=True).values
    )  # share of patches kept, blocks 1 ..
    merged = torch.rand(depth, generator=generator)  # share of the dropped tokens that merge rather than vanish

    def at(power: float) -> CompressionSchedule:
        kept = [1 + num_patches, *(1 + max(2, round(num_patches * float(share) ** power)) for share in shape)]
        before = [1 + num_patches, *kept[:-1]]
        pruned = [
            after + round((arriving - after) * float(share))
            for arriving, after, share in zip(before, kept, merged, strict=True)
        ]
        return CompressionSchedule(pruned, kept)

    low, high = 0.0, 20.0
    for _ in range(20):
        middle = (low + high) / 2
        cost = flops(compress(model, DiffRate(at(middle))))
        low, high = (middle, high) if cost > budget else (low, middle)
    restore(model)
    return at(high)


@torch.inference_mode()
def loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    parts = zip(images.split(100), labels.split(100), strict=True)
    return sum(float(F.cross_entropy(model(normalize(x)), y, reduction="sum")) for x, y in parts) / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("digits_schedule.json"), help="file to write")
    parser.add_argument("--share", type=float, default=0.5, help="cost as a share of the uncompressed model's")
    parser.add_argument("--candidates", type=int, default=200, help="random schedules to try")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(args.seed)
    model: Any = timm.create_model(DIGITS_MODEL, pretrained=True).eval()
    dense = flops(model)
    (ink, labels), _ = digits_split()
    images = render_digits(ink, generator)
    scored = []
    for index in range(args.candidates):
        schedule = random_schedule(model, args.share * dense, generator)
        compress(model, DiffRate(schedule))
        # A quarter of the digits sorts the candidates; all of them decide between the best ten.
        scored.append((loss(model, images[::4], labels[::4]), index, flops(model), schedule))
        restore(model)
        if (index + 1) % 20 == 0:
            print(f"{index + 1:4d} schedules, lowest cross entropy {min(scored)[0]:.4f}", flush=True)
    finalists = []
    for _, index, cost, schedule in sorted(scored)[:10]:
        finalists.append((loss(compress(model, DiffRate(schedule)), images, labels), index, cost, schedule))
    value, _, cost, schedule = min(finalists)
    schedule.provenance.update(
        {
            "model": DIGITS_MODEL,
            "gflops": cost / 1e9,
            "source": f"best of {args.candidates} random schedules of equal cost on the training digits",
            "command": f"python -m tokcomp.assets.choose_schedule --share {args.share} --candidates {args.candidates} "
            f"--seed {args.seed}",
        }
    )
    schedule.save(args.output)
    print(
        f"{args.output}: {schedule}\ncross entropy {value:.4f}, {cost / 1e6:.2f} of {dense / 1e6:.2f} M multiply-adds"
    )


if __name__ == "__main__":
    main()

"""Searches the DiffRate schedule of the digits model that comes with the package.

    python -m tools.assets.choose_schedule --output digits_schedule.json

The gradient search of the paper (Alg. 1) with its recipe shrunk to digits, on the digits that the model was trained on;
the held-out ones are not looked at. Takes a quarter of a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from tokcomp.api import compress, restore
from tokcomp.assets import DIGITS_MODEL
from tokcomp.cost import flops
from tokcomp.data import digits_split, render_digits
from tokcomp.search.model import DiffRateSearch
from torch import Tensor, nn

from tools.assets.train_digits import normalize

#: Weight of (F - T)^2 with F and T as shares of the uncompressed cost: what the paper's weight of 5, with F and T in
#: GFLOPs, comes to for its smallest model, DeiT-T of 1.2538 GFLOPs.
FLOPS_WEIGHT = 5 * 1.2538**2
#: The paper makes 3750 updates of 0.01. Here 3 epochs are 135, and each has to go further.
LEARNING_RATE = 0.1
#: AdamW's memory of squared gradients is 40 updates, as 1000 are to 3750 in the paper. A longer one would remember, to
#: the end of so short a search, how far from the budget it began.
BETAS = (0.9, 0.975)


@dataclass(frozen=True)
class LogLine:
    """The search after some update: cross entropy of its batch, cost as a share of the uncompressed model's."""

    step: int
    cross_entropy: float
    share: float
    num_prune_kept: list[int] | None
    num_merge_kept: list[int] | None


def draw(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Digits as the model saw them in training: [n, 1, 8, 8] -> [n, 3, 32, 32]."""
    return normalize(render_digits(ink, generator, augment=True))


def search_digits(
    model: nn.Module,
    share: float,
    *,
    epochs: float = 3.0,
    batch_size: int = 32,
    lr: float = LEARNING_RATE,
    flops_weight: float = FLOPS_WEIGHT,
    num_pictures: int = 0,
    metric: str = "cls_attn",
    pipeline: str = "prune_merge",
    match_inference: bool = False,
    seed: int = 0,
    log_every: int = 15,
) -> tuple[DiffRateSearch, list[LogLine]]:
    """Search on training digits: AdamW without decay, a cosine from ``lr`` to a tenth of it.

    The classification loss is the one that the model was trained by, label smoothing of 0.05 included: under another,
    the gradient would first of all want other confidence.

    Args:
        model: a plain digits ViT; it is frozen.
        share: the target, as a share of the model's own multiply-adds.
        epochs: passes over the 1437 digits, or as many updates where there are fewer pictures.
        flops_weight: of the squared difference between the cost and the target, both as shares.
        num_pictures: search on that many pictures alone, drawn once; 0 draws every digit anew each time.
        metric, pipeline, match_inference: as in :class:`DiffRateSearch`.
    """
    generator = torch.Generator().manual_seed(seed)
    (ink, labels), _ = digits_split()
    dense = flops(model)
    search = DiffRateSearch(model, metric=metric, pipeline=pipeline, match_inference=match_inference, seed=seed).eval()
    steps = max(1, math.ceil(epochs * len(labels) / batch_size))
    trainable = [parameter for parameter in search.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, betas=BETAS)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr / 10)
    pictures: Tensor | None = None
    if num_pictures:
        chosen = torch.randperm(len(labels), generator=generator)[:num_pictures]
        labels, pictures = labels[chosen], draw(ink[chosen], generator)
    queue = torch.empty(0, dtype=torch.int64)
    log = []
    for step in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(len(labels), generator=generator)])
        batch, queue = queue[:batch_size], queue[batch_size:]
        images = draw(ink[batch], generator) if pictures is None else pictures[batch]
        logits, cost = search(images)
        cross_entropy = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
        loss = cross_entropy + flops_weight * (cost / dense - share).square()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % log_every == 0 or step + 1 == steps:
            schedule = search.schedule()
            counts = schedule.num_prune_kept, schedule.num_merge_kept
            log.append(LogLine(step + 1, cross_entropy.item(), (cost / dense).item(), *counts))
    return search, log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("digits_schedule.json"), help="file to write")
    parser.add_argument("--share", type=float, default=0.4, help="cost as a share of the uncompressed model's")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model: Any = timm.create_model(DIGITS_MODEL, pretrained=True).eval()
    dense = flops(model)
    search, log = search_digits(model, args.share, epochs=args.epochs, seed=args.seed)
    for line in log:
        print(
            f"step {line.step:4d}  cross entropy {line.cross_entropy:.4f}  cost {100 * line.share:.1f} %  "
            f"kept {line.num_merge_kept}"
        )
    schedule = search.schedule()
    cost = flops(compress(model, search.method()))
    restore(model)
    schedule.provenance.update(
        {
            "model": DIGITS_MODEL,
            "gflops": cost / 1e9,
            "source": f"gradient search (DiffRate, Alg. 1) on the training digits, {log[-1].step} updates",
            "command": f"python -m tools.assets.choose_schedule --share {args.share} --epochs {args.epochs} "
            f"--seed {args.seed}",
        }
    )
    schedule.save(args.output)
    print(f"{args.output}: {schedule}\n{cost / 1e6:.2f} of {dense / 1e6:.2f} M multiply-adds")


if __name__ == "__main__":
    main()

"""Trains the digits model that comes with the package.

    python -m tools.assets.train_digits --output digits_vit.safetensors

Takes some eight minutes on one CPU core; a seed gives the same weights again on the same machine and torch version.

Two things let so small a set teach a ViT: the position embedding starts as sines and cosines as strong as the patches
themselves, and the digits lie in the middle of the canvas at first and wander off it over the first half of the epochs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tokcomp.assets import DIGITS_MODEL
from tokcomp.data import digits_split, held_out_digits, render_digits
from torch import Tensor


def normalize(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.5


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        int((model(normalize(part)).argmax(-1) == answers).sum())
        for part, answers in zip(images.split(60), labels.split(60), strict=True)
    )
    return right / len(labels)


def train(epochs: int, batch_size: int, seed: int, **model_options: Any) -> torch.nn.Module:
    """The digits model, or with ``model_options`` (``embed_dim``, ``num_heads`` ...) a variant of it."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (ink, labels), _ = digits_split()
    test_images, test_labels = held_out_digits()
    model: Any = timm.create_model(DIGITS_MODEL, drop_path_rate=0.05, weight_init="jax", **model_options)
    positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, model.embed_dim, temperature=100.0)  # [P, C]
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = positions
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    scheduler, epochs = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=3, warmup_lr=1e-5, min_lr=1e-5
    )
    started = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        total, spread = 0.0, min(1.0, 2 * epoch / epochs)
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):
            images = render_digits(ink[chosen], generator, augment=True, spread=spread)
            loss = F.cross_entropy(model(normalize(images)), labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        scheduler.step(epoch + 1)
        seconds = time.perf_counter() - started
        line = f"epoch {epoch + 1:3d}/{epochs}  loss {total / len(labels):.4f}  {seconds:5.0f} s"
        if (epoch + 1) % 5 == 0 or epoch + 1 == epochs:
            line += f"  held-out accuracy {accuracy(model, test_images, test_labels):.4f}"
        print(line, flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("digits_vit.safetensors"), help="file to write")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = train(args.epochs, args.batch_size, args.seed)
    # Accuracy is stated of what is stored: half precision keeps the file small.
    model.half().float()
    correct = accuracy(model, *held_out_digits())
    settings = f"--epochs {args.epochs} --batch-size {args.batch_size} --seed {args.seed}"
    facts = {
        "model": DIGITS_MODEL,
        "data": "sklearn.datasets.load_digits, 1437 digits trained on, 360 held out",
        "held_out_accuracy": correct,
        "command": f"python -m tools.assets.train_digits {settings}",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.output, metadata={"tokcomp": json.dumps(facts)})
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, held-out accuracy {correct:.4f}")


if __name__ == "__main__":
    main()

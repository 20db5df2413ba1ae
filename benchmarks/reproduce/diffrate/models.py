"""The models of a run: small digits ViTs, trained here."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from tokcomp.assets import DIGITS_MODEL
from tokcomp.files import write_whole

from benchmarks.reproduce.diffrate.plan import BUNDLED, SHAPES, Model
from tools.assets.train_digits import train

_FIRST_SEED = 100  # the bundled model is seed 0


def path_of(folder: Path, model: Model) -> Path:
    return folder / "models" / f"{model.name}.safetensors"


def train_model(folder: Path, model: Model, epochs: int) -> None:
    """Train and store; another seed is another initialization and another order and drawing of the digits."""
    if model.shape == BUNDLED:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        trained: Any = train(epochs, 32, _FIRST_SEED + model.seed, **SHAPES[model.shape])
    weights = {name: value.contiguous() for name, value in trained.state_dict().items()}
    write_whole(path_of(folder, model), save(weights))


def load_model(folder: Path, model: Model) -> VisionTransformer:
    loaded: Any = timm.create_model(DIGITS_MODEL, pretrained=model.shape == BUNDLED, **SHAPES[model.shape])
    if model.shape != BUNDLED:
        loaded.load_state_dict(load_file(path_of(folder, model)))
    torch.nn.Module.requires_grad_(loaded, False)
    return loaded.eval()

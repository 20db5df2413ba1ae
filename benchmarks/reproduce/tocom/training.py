"""Training: a model on one half of the digits, a plugin on that model, the model on the other half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm
import tokcomp
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from tokcomp import ToCom
from tokcomp.assets import DIGITS_MODEL
from tokcomp.finetune.tuner import FineTuner
from tokcomp.methods import Method
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.recipe import Recipe
from tokcomp.tocom.distill import Distiller
from torch import Tensor

from benchmarks.reproduce.tocom.data import Drawing
from benchmarks.reproduce.tocom.plan import PluginSettings

CPU = torch.device("cpu")


def new_model(seed: int, num_classes: int, drop_path: float) -> VisionTransformer:
    """The digits ViT, untrained, its position embedding starting as the bundled model's did."""
    torch.manual_seed(seed)
    model: Any = timm.create_model(DIGITS_MODEL, num_classes=num_classes, drop_path_rate=drop_path, weight_init="jax")
    positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, model.embed_dim, temperature=100.0)  # [P, C]
    with torch.no_grad():
        model.pos_embed[:, model.num_prefix_tokens :] = positions
    return model


def train_classifier(
    model: VisionTransformer, digits: tuple[Tensor, Tensor], recipe: Recipe, method: Method, seed: int, *, wander: bool
) -> None:
    """Train under a method; with ``wander`` the digits leave the centre in the course of the first half."""
    ink, labels = digits
    drawing = Drawing()
    batches = TensorBatches(ink, labels, recipe.batch_size, seed, augment=drawing)
    steps = round(recipe.epochs * batches.steps_per_epoch)
    tokcomp.compress(model, method)
    tuner = FineTuner(
        model,
        recipe,
        num_classes=int(labels.max()) + 1,
        total_steps=steps,
        steps_per_epoch=batches.steps_per_epoch,
        device=CPU,
        seed=seed,
    )
    drawing.spread = 0.0 if wander else 1.0
    for images, answers in batches.iterate(0, steps):
        tuner.step(images, answers)
        drawing.spread = min(1.0, 2 * tuner.step_number / steps) if wander else 1.0
    tokcomp.restore(model)
    model.eval()


def train_plugin(
    model: VisionTransformer,
    digits: tuple[Tensor, Tensor],
    settings: PluginSettings,
    recipe: Recipe,
    method_at: Callable[[int], Method],
    max_degree: int,
    seed: int,
) -> tuple[ToCom, float]:
    """A plugin for a frozen model, as the settings say, and its mean loss in the last tenth of the steps."""
    ink, labels = digits
    recipe = replace(recipe, lr=settings.lr, epochs=settings.epochs)
    batches = TensorBatches(ink, labels, recipe.batch_size, seed, augment=Drawing())
    steps = round(recipe.epochs * batches.steps_per_epoch)
    torch.manual_seed(seed)
    plugin = ToCom(model, settings.rank, max_degree, settings.arithmetic)
    distiller = Distiller(
        model,
        plugin,
        method_at,
        recipe,
        total_steps=steps,
        steps_per_epoch=batches.steps_per_epoch,
        device=CPU,
        scale=settings.scale,
        seed=seed,
        loss=settings.loss,
    )
    losses = []
    for images, answers in batches.iterate(0, steps):
        losses.append(distiller.step(images, answers))
    return plugin, float(torch.stack(losses[-max(1, steps // 10) :]).mean())

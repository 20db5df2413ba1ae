"""Small searches for the tests of runs."""

from __future__ import annotations

from dataclasses import replace

import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer
from tokcomp.budgets import FlopsBudget
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.checkpoint import load_checkpoint
from tokcomp.runs.recipe import SEARCH_RECIPE
from tokcomp.runs.steps import StopRequest
from tokcomp.search.run import run_search
from tokcomp.search.settings import SearchSettings

RECIPE = replace(SEARCH_RECIPE, batch_size=8, lr=0.3, min_lr=0.03)
SETTINGS = SearchSettings(recipe=RECIPE, steps=6, granularity=1, log_interval=2, eval_interval=3, checkpoint_interval=2)
WEIGHT = 1e8  # these models cost some 5e-4 GFLOPs


def model_of(seed: int = 0, *, drop_path: float = 0.1, dtype: torch.dtype = torch.float32) -> VisionTransformer:
    torch.manual_seed(seed)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    model = VisionTransformer(**shape, drop_path_rate=drop_path).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3)
    return model


def images_of(count: int = 20, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 5


def batches_of(batch_size: int = 8, **options) -> TensorBatches:
    return TensorBatches(*images_of(), batch_size, 0, **options)


def held_out():
    images, labels = images_of(12, seed=2)
    return zip(images.split(6), labels.split(6), strict=True)


def budget_of(model, share: float = 0.6, weight: float = WEIGHT) -> FlopsBudget:
    return FlopsBudget(model, share * tokcomp.flops(model) / 1e9, weight)


class StopAfter(StopRequest):
    """As if a signal came during a step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    @property
    def wanted(self) -> bool:
        self.left -= 1  # asked once a step, as it ends
        return self.left <= 0


def search(output=None, *, steps=6, settings=SETTINGS, model=None, share=0.6, **options):
    model = model_of() if model is None else model
    return run_search(
        model, batches_of(), budget_of(model, share), replace(settings, steps=steps), output=output, **options
    )


def logits_in(folder) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "checkpoint.pt", "search")["targets"][0]["logits"]


def same_logits(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)

"""Small models, and what the published code computes on one of them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import tokcomp
import torch
from timm.models.vision_transformer import VisionTransformer

from tests.drawn import recorded
from tests.library.small_caformer import HEIGHT, WIDTH


class Published:
    """Outputs of the published DiffRate, ToMe and EViT code on a ViT whose weights come from a seed."""

    def __init__(self) -> None:
        self.tensors, self.settings = recorded("small")
        shape = (4, 3, 64, 64)
        self.images = torch.randn(shape, generator=torch.Generator().manual_seed(174))

    def model(self) -> VisionTransformer:
        model = VisionTransformer(**self.settings["cfg"]).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                noise = torch.randn(parameter.shape, generator=generator)
                if name.startswith("patch_embed") and name.endswith("weight"):
                    parameter.copy_(noise / 24)
                elif "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.1 * noise)
                elif name.endswith("qkv.weight"):
                    parameter.copy_(0.08 * noise)
                else:
                    parameter.copy_((0.1 if name == "head.weight" else 0.02) * noise)
        return model


@pytest.fixture(scope="session")
def published() -> Published:
    return Published()


@pytest.fixture
def meta_model():
    """Build a model by its timm name without its memory: meta_model(name, **options)."""

    def make(name: str, **options: Any) -> torch.nn.Module:
        try:
            with torch.device("meta"):
                return timm.create_model(name, **options)
        except RuntimeError as error:
            pytest.skip(f"timm {timm.__version__} cannot build {name} on the meta device: {error}")

    return make


@pytest.fixture
def make_vit():
    """Build a small ViT with lively random weights: make_vit(seed, cls, **arguments of cls)."""

    def make(seed: int = 0, cls: type[VisionTransformer] = VisionTransformer, **kwargs: Any) -> VisionTransformer:
        defaults = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=5)
        accepted = inspect.signature(VisionTransformer.__init__).parameters
        for option in kwargs.keys() - accepted.keys():
            pytest.skip(f"timm {timm.__version__} has no {option}")
        torch.manual_seed(seed)
        model = cls(**{**defaults, **kwargs}).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3 if "token" in name or "embed" in name else parameter.shape[-1] ** -0.5)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return model

    return make


SCHEDULE = tokcomp.CompressionSchedule([17, 14, 11, 11], [17, 12, 11, 6])
METHODS = {
    "diffrate": tokcomp.DiffRate(SCHEDULE),
    "diffrate-image_attn": tokcomp.DiffRate(SCHEDULE, metric="image_attn"),
    "diffrate-cls_attn_v": tokcomp.DiffRate(SCHEDULE, metric="cls_attn_v", pipeline="merge"),
    "diffrate-random": tokcomp.DiffRate(SCHEDULE, metric="random", pipeline="prune"),
    "tome": tokcomp.ToMe(3),
    "evit": tokcomp.EViT(0.6, blocks=(1, 2)),
}


@pytest.fixture
def methods() -> dict[str, tokcomp.Method]:
    """One of each kind, for a model of 4 blocks and 17 tokens."""
    return METHODS


@pytest.fixture(params=METHODS)
def method(request) -> tokcomp.Method:
    return METHODS[request.param]


@pytest.fixture
def images_for():
    """Random images of a ViT's own size, or of the small CAFormers': images_for(model, batch, seed)."""

    def make(model: torch.nn.Module, batch: int = 3, seed: int = 0) -> torch.Tensor:
        size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (HEIGHT, WIDTH)
        return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))

    return make

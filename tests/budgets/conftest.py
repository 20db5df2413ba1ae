"""Small models to hold to a budget."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer


@pytest.fixture(scope="session")
def make_vit():
    """Build a small ViT of 4 blocks and 17 tokens: make_vit(seed, **arguments of VisionTransformer)."""

    def make(seed: int = 0, **options: Any) -> VisionTransformer:
        torch.manual_seed(seed)
        defaults = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=3, num_classes=5)
        return VisionTransformer(**{**defaults, **options}).eval()

    return make


@pytest.fixture(scope="module")
def deit_small() -> torch.nn.Module:
    """DeiT-S without its memory."""
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224")

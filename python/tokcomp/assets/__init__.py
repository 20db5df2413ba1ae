"""The digits model that comes with the package, so that everything can be tried without a download.

Importing this module registers ``tokcomp_digits_vit`` with timm; ``pretrained=True`` reads the weights beside this
file, which ``python -m tools.assets.train_digits`` made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

__all__ = ["DIGITS_MODEL", "DIGITS_SCHEDULE", "DIGITS_WEIGHTS"]

DIGITS_MODEL = "tokcomp_digits_vit"
DIGITS_WEIGHTS = Path(__file__).with_name("digits_vit.safetensors")
DIGITS_SCHEDULE = Path(__file__).with_name("digits_schedule.json")

default_cfgs = generate_default_cfgs(
    {
        f"{DIGITS_MODEL}.digits": {
            "file": str(DIGITS_WEIGHTS),
            "custom_load": False,
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def tokcomp_digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 32x32 pictures of handwritten digits: patch 4 (64 patches), width 64, depth 6, 2 heads, class token."""
    config = {"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 10}
    return build_model_with_cfg(
        VisionTransformer,
        DIGITS_MODEL,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**config, **kwargs},
    )

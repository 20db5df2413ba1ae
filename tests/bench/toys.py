"""What tests of the measuring share: a small model, entries whose times are made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import timm
import tokcomp
import torch
from tokcomp.bench.timing import Samples

CPU = torch.device("cpu")
METHOD = tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 13, 9], [17, 11, 7]))


def make_vit(**options: Any) -> Any:
    """Three blocks of 17 tokens; random weights large enough that every block matters."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5, **options
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def seconds(**named: float) -> Callable[[Mapping[str, Callable[[], Any]]], dict[str, Samples]]:
    """A ``measure`` that runs each call once and answers made-up seconds, 1 for those not named."""

    def measure(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Samples]:
        for call in calls.values():
            call()
        return {name: Samples((named.get(name.replace("-", "_"), 1.0),) * 3) for name in calls}

    return measure

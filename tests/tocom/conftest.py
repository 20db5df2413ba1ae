"""The small models of the library's tests, and plugins with something in them."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from torch import nn

from tests.library.conftest import images_for, make_vit, meta_model, published  # noqa: F401

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def lively_plugin(model: nn.Module, seed: int = 0, std: float = 0.5, **kwargs: int | str) -> tokcomp.ToCom:
    """A plugin for a model with random matrices, as if trained; ``kwargs`` are arguments of ToCom."""
    plugin = tokcomp.ToCom(model, **{"rank": 2, "max_degree": 4, **kwargs})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return plugin


@pytest.fixture
def make_plugin():
    return lively_plugin


def qkv_weights(model: nn.Module) -> list[torch.Tensor]:
    """Copies of the packed weights."""
    return [block.attn.qkv.weight.detach().clone() for block in model.blocks]


def same_bits(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))

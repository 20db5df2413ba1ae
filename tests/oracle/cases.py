"""Random small models, images and schedules, each from one seed."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tests.oracle.plain_vit import PlainViT

CLASSES = 5
PATCH = 4
FAMILIES: dict[str, dict[str, Any]] = {
    "class token": {},
    "pooled": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "distilled": {},
    "layer scale, q and k norm": {"init_values": 0.5, "qk_norm": True},
}


class Case:
    """A ViT of random shape and lively random weights in float64, timm's and the plain one, and two images.

    Args:
        seed: of everything.
        family: one of :data:`FAMILIES`; drawn where None.
        shape: (depth, grid, heads, head width); drawn where None.
        still: "q" or "k" makes these zero in every block, so that every score that hangs on them is tied.
    """

    def __init__(
        self, seed: int, family: str | None = None, shape: tuple[int, int, int, int] | None = None, still: str = ""
    ) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.family = self.rng.choice(list(FAMILIES)) if family is None else family
        if shape is None:
            shape = self.rng.randint(2, 5), self.rng.randint(3, 6), self.rng.randint(1, 3), self.rng.choice((4, 8, 12))
        self.depth, grid, heads, width = shape
        self.num_patches, self.channels = grid**2, heads * width
        cls = VisionTransformerDistilled if self.family == "distilled" else VisionTransformer
        self.model = cls(
            img_size=PATCH * grid,
            patch_size=PATCH,
            embed_dim=self.channels,
            depth=self.depth,
            num_heads=heads,
            num_classes=CLASSES,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            **FAMILIES[self.family],
        )
        self.model.double().eval()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                noise = self.randn(*parameter.shape)
                if "norm" in name and name.endswith("weight"):
                    parameter.copy_(1 + 0.1 * noise)
                elif parameter.ndim == 2:
                    parameter.copy_(noise * (1.5 if "qkv" in name else 0.7) / parameter.shape[1] ** 0.5)
                else:
                    parameter.copy_(noise * 0.3)
                if still and "qkv" in name:
                    parameter[: self.channels] *= still != "q"
                    parameter[self.channels : 2 * self.channels] *= still != "k"
        self.images = self.randn(2, 3, PATCH * grid, PATCH * grid)
        self.labels = torch.randint(0, CLASSES, (2,), generator=self.generator)
        self.num_prefix: int = self.model.num_prefix_tokens
        self.plain = PlainViT(
            {name: value.clone() for name, value in self.model.state_dict().items()},
            self.depth,
            heads,
            self.num_prefix,
            self.model.global_pool == "avg",
        )

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def falling_counts(self) -> list[int]:
        """Tokens to keep in each block; now and then more than there are, or than the block before."""
        counts, tokens = [], self.num_patches + self.num_prefix
        for _ in range(self.depth):
            least = self.num_prefix + 1 + int(0.6 * (tokens - self.num_prefix))
            above = self.rng.random() < 0.15
            counts.append(self.rng.randint(least, max(least, tokens) + 3 * above))
            tokens = min(tokens, counts[-1])
        return counts

    def falling_logits(self, granularity: int, share: float) -> list[Tensor]:
        """Of one step's proxies: each block keeps about ``share`` of what the one before did; some know, some doubt."""
        logits, left = [], 1.0
        last = self.depth - 1
        for block in range(self.depth):
            fixed = block == 0 or (block == last and self.plain.pools_patches)
            places = torch.arange(1 if fixed else -(-self.num_patches // granularity), dtype=torch.float64)
            left *= share + (1 - share) * self.rng.random() if block else 1.0
            centre = (1 - left) * self.num_patches / granularity
            doubt = self.rng.choice((0.5, 2.0, 8.0))
            logits.append(self.randn(len(places)) - (places - centre).abs() / doubt)
        return logits

"""LV-ViT, registered with timm by tokcomp.lvvit: a VisionTransformer whose head reads the patches that are left."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokcomp.adapters.base import Cost
from tokcomp.adapters.layout import linear_cost
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.swap import original_class
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.lvvit import LVViT


class TimmLVViT(TimmVisionTransformer):
    """tokcomp's LVViT class."""

    family = "LV-ViT"
    models = (LVViT,)

    def head(self, model: Any, x: Tensor, weights: Weights | None, pre_logits: bool = False) -> Tensor:
        """Sizes do not matter to a maximum; what a search has masked does."""
        if pre_logits or weights is None or weights.mask is None:
            return original_class(model).forward_head(model, x, pre_logits=pre_logits)  # type: ignore[attr-defined]
        logits, of_patches = model.token_logits(x)
        return logits + 0.5 * weights.without(model.num_prefix_tokens).max(of_patches)

    def cost(self, model: Any, img_size: tuple[int, int] | None = None) -> Cost:
        cost, per_patch = super().cost(model, img_size), linear_cost(model.aux_head)
        head = cost.head - model.num_prefix_tokens * per_patch
        return cost._replace(head_per_token=cost.head_per_token + per_patch, head=head)

    def reads_patches(self, model: Any) -> bool:
        return True

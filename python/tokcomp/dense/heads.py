"""Segmentation heads on patch tokens: a linear layer, and Segmenter's mask transformer (ICCV 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn


class LinearHead(nn.Module):
    """One linear layer for every patch token.

    Args:
        width: C of the encoder's tokens.
        num_classes: K.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, P, C] -> logits [B, P, K]."""
        logits: Tensor = self.classifier(tokens)
        return logits


class MaskTransformerHead(nn.Module):
    """Transformer blocks over patch tokens and one embedding per class; a patch's logit is their scalar product.

    Both are projected and normalised to length 1 before the product; a LayerNorm scales its K values.

    Args:
        width: C of the encoder's tokens.
        num_classes: K.
        depth: number of blocks.
        num_heads: heads of their attention; by default of 64 channels each if the width allows, otherwise one head.
    """

    def __init__(self, width: int, num_classes: int, depth: int = 2, num_heads: int | None = None) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = width // 64 if width % 64 == 0 else 1
        self.project = nn.Linear(width, width)
        self.class_tokens = nn.Parameter(torch.zeros(1, num_classes, width))
        self.blocks = nn.Sequential(*(Block(width, num_heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.project_patches = nn.Linear(width, width, bias=False)
        self.project_classes = nn.Linear(width, width, bias=False)
        self.mask_norm = nn.LayerNorm(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_tokens, std=0.02)
        for layer in (self.project_patches, self.project_classes):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, P, C] -> logits [B, P, K]."""
        classes = self.class_tokens.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
        x = self.norm(self.blocks(torch.cat((self.project(tokens), classes), dim=1)))
        patches = F.normalize(self.project_patches(x[:, : tokens.shape[1]]), dim=-1)  # [B, P, C]
        classes = F.normalize(self.project_classes(x[:, tokens.shape[1] :]), dim=-1)  # [B, K, C]
        logits: Tensor = self.mask_norm(patches @ classes.transpose(1, 2))
        return logits


#: The heads by the names that Segmenter takes.
HEADS: dict[str, type[LinearHead] | type[MaskTransformerHead]] = {
    "linear": LinearHead,
    "mask_transformer": MaskTransformerHead,
}

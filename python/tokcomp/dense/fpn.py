"""Semantic FPN: a segmentation head on the feature maps of a hierarchical encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn


class SemanticFPN(nn.Module):
    """A feature pyramid (Lin et al., CVPR 2017) under the semantic branch of Panoptic FPN (Kirillov et al., CVPR 2019).

    Every map is normalised over its channels and projected to one width; each coarser one is added to the next finer
    one. Then each is doubled in size, with a 3 x 3 convolution, group norm and ReLU before every doubling, until all
    are as fine as the first. A pixel's classes are a linear layer of their sum.

    Args:
        widths: channels of the encoder's maps, the finest first, each half as high and wide as the one before.
        num_classes: K.
        width: channels of the pyramid.
        head_width: channels of the semantic branch, a multiple of 32.
        dropout: share of the sum's channels that training leaves out.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        width: int = 256,
        head_width: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm2d(channels) for channels in widths)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in widths)
        self.scales = nn.ModuleList(
            nn.ModuleList(_convolution(width if step == 0 else head_width, head_width) for step in range(max(1, level)))
            for level in range(len(widths))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(head_width, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_i, h_i, w_i], the finest first -> logits [B, K, h_0, w_0]."""
        levels = [
            lateral(norm(x)) for lateral, norm, x in zip(self.lateral, self.norms, maps, strict=True)
        ]  # [B, width, h_i, w_i]
        for level in range(len(levels) - 2, -1, -1):
            levels[level] = levels[level] + F.interpolate(levels[level + 1], size=levels[level].shape[-2:])
        total: Tensor | None = None
        for level, (smooth, convolutions) in enumerate(zip(self.smooth, self.scales, strict=True)):
            x = smooth(levels[level])
            for step, convolution in enumerate(cast("nn.ModuleList", convolutions)):
                x = convolution(x)
                if level:
                    finer = levels[level - step - 1].shape[-2:]
                    x = F.interpolate(x, size=finer, mode="bilinear", align_corners=False)
            total = x if total is None else total + x
        logits: Tensor = self.classifier(self.dropout(total))
        return logits


def _convolution(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.GroupNorm(32, width), nn.ReLU())

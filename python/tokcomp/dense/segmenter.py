"""Semantic segmentation with a vision transformer, plain or hierarchical: encoder, head, bilinear upsampling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.metaformer import MetaFormer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokcomp.adapters import UnsupportedModelError, find_adapter
from tokcomp.blocks.state import compose_sources
from tokcomp.dense.fpn import SemanticFPN
from tokcomp.dense.heads import HEADS


def heads_for(hierarchical: bool) -> tuple[str, ...]:
    """The names of the heads that read such an encoder, the default last."""
    return ("semantic_fpn",) if hierarchical else tuple(HEADS)


def position_tokens(encoder: nn.Module, images: Tensor) -> Tensor:
    """Normalised tokens of an encoder, one per position: [B, P + prefix, C] in the order of the patches.

    Plain models and models compressed by ``ToMeMLP`` or ``EvoViT`` have them. If a method drops tokens for good, each
    position takes the token that it was merged into, or zeros if it was pruned.

    Raises:
        TypeError: (UnsupportedModelError) the encoder is not understood, or is hierarchical.
    """
    adapter = find_adapter(encoder)
    if adapter.geometry(encoder).spreads_tokens:
        raise UnsupportedModelError(
            f"encoder must be a plain vision transformer, with tokens of one grid, got a {type(encoder).__name__}; its "
            "maps are encoder.forward_intermediates(images), with every position in them"
        )
    method = adapter.method(encoder)
    model: Any = encoder
    if method is None or method.unmerges or method.keeps_all:
        tokens: Tensor = model.forward_features(images)
        return tokens
    x, sources = adapter.sources(encoder, images)
    x = model.norm(x)
    positions: Tensor | None = None
    for source in sources:
        if source is not None:
            positions = source if positions is None else compose_sources(positions, source)
    if positions is not None:
        x = torch.ops.tokcomp.unmerge(x, positions)
    return x


def pyramid_maps(encoder: Any, images: Tensor) -> list[Tensor]:
    """A hierarchical encoder's maps [B, C_i, h_i, w_i] of images [B, 3, H, W], the finest first."""
    maps: list[Tensor] = encoder.forward_intermediates(images, intermediates_only=True)
    return maps


class Segmenter(nn.Module):
    """A vision transformer and a head that classifies every pixel (Segmenter, ICCV 2021; Semantic FPN, CVPR 2019).

    The encoder is any plain timm VisionTransformer, or a CAFormer, pre-trained or not; ``num_classes=0`` leaves out its
    classifier. It may be compressed before or after: ``tokcomp.compress(segmenter.encoder, tokcomp.ToMeMLP(r))``.

    Args:
        encoder: images [B, 3, H, W] -> tokens, or a CAFormer. A VisionTransformer takes only its own image size, unless
            it was created with ``dynamic_img_size=True``.
        num_classes: K.
        head: "linear" or "mask_transformer", "semantic_fpn" for a CAFormer; or a module that turns patch tokens
            [B, P, C] into logits [B, P, K], a CAFormer's maps [B, C_i, h_i, w_i] into [B, K, h, w].

    Raises:
        TypeError: (UnsupportedModelError) the encoder is not understood; or the head is neither a name nor a module.
        ValueError: the head is unknown or not for this encoder, or there are fewer than two classes.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, head: str | nn.Module = "mask_transformer") -> None:
        super().__init__()
        if not isinstance(encoder, (VisionTransformer, MetaFormer)):
            raise UnsupportedModelError(
                f"encoder must be a timm VisionTransformer or CAFormer, got {type(encoder).__name__}"
            )
        find_adapter(encoder)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be a whole number, 2 or more, got {num_classes!r}")
        self.hierarchical = isinstance(encoder, MetaFormer)
        names = heads_for(self.hierarchical)
        if not isinstance(head, (str, nn.Module)):
            raise TypeError(f"head must be {' or '.join(names)} or a module, got {type(head).__name__}")
        if isinstance(head, str):
            if head not in names:
                cls = type(encoder).__name__
                raise ValueError(f"head must be {' or '.join(names)} for a {cls}, got {head!r}")
            head = self._head(encoder, head, num_classes)
        self.encoder, self.num_classes, self.head = encoder, num_classes, head

    @staticmethod
    def _head(encoder: Any, name: str, num_classes: int) -> nn.Module:
        if name in HEADS:
            return HEADS[name](encoder.embed_dim, num_classes)
        return SemanticFPN([info["num_chs"] for info in encoder.feature_info], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel: images [B, 3, H, W] -> [B, K, H, W].

        Raises:
            ValueError: images of a size that the encoder does not take.
        """
        return self.upsample(self.patch_logits(images), images.shape[-2:])

    def patch_logits(self, images: Tensor) -> Tensor:
        """Logits of every patch: images [B, 3, H, W] -> [B, K, h, w]. Raises as :meth:`forward`.

        A hierarchical encoder's are those of its finest map, a quarter of the image's sides.
        """
        if self.hierarchical:
            if images.dim() != 4:
                raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
            logits: Tensor = self.head(pyramid_maps(self.encoder, images))
            return logits
        grid = self._grid(images)
        return self.read(position_tokens(self.encoder, images), grid)

    def read(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The head's logits [B, K, h, w] for normalised tokens [B, h w + prefix, C], prefix first."""
        encoder: Any = self.encoder
        logits = self.head(tokens[:, encoder.num_prefix_tokens :])  # [B, P, K]
        return logits.transpose(1, 2).unflatten(2, grid)

    def patch_answers(self, tokens: Any) -> Tensor:
        """Logits [B P, K], one row per patch, for the encoder's normalised tokens [B, P + prefix, C].

        For a hierarchical encoder's :func:`pyramid_maps`, a row per position of the finest.
        """
        encoder: Any = self.encoder
        if self.hierarchical:
            logits: Tensor = self.head(tokens)  # [B, K, h, w]
            return logits.flatten(2).transpose(1, 2).flatten(0, 1)
        answers: Tensor = self.head(tokens[:, encoder.num_prefix_tokens :]).flatten(0, 1)
        return answers

    @staticmethod
    def upsample(logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        """Patches' logits [B, K, h, w] -> pixels' [B, K, H, W], bilinear."""
        return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The class of every pixel: images [B, 3, H, W] -> int64 [B, H, W]."""
        return self(images).argmax(1)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        encoder: Any = self.encoder
        if images.dim() != 4:
            raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
        size = tuple(images.shape[-2:])
        patch = encoder.patch_embed.patch_size
        if any(side == 0 or side % step for side, step in zip(size, patch, strict=True)):
            raise ValueError(
                f"the sides of images must be multiples of the patch, {patch[0]} x {patch[1]}, got {size[0]} x "
                f"{size[1]}; resize or pad them"
            )
        own = encoder.patch_embed.img_size
        if not getattr(encoder, "dynamic_img_size", False) and own is not None and size != tuple(own):
            raise ValueError(
                f"images must be of the encoder's own size, {own[0]} x {own[1]}, got {size[0]} x {size[1]}; make the "
                "encoder with img_size=..., or dynamic_img_size=True for any size"
            )
        return size[0] // patch[0], size[1] // patch[1]

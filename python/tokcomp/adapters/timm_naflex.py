"""timm's NaFlexVit on images of one size: its embedding knows any grid, its blocks are those of ViT or of Eva."""

from __future__ import annotations

from typing import Any

from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from tokcomp.adapters.layout import Layout
from tokcomp.adapters.timm_eva import TimmEva
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.adapters.timm_vit.modules import CompressedModel
from tokcomp.blocks.places import Places
from tokcomp.methods.base import Geometry


class CompressedNaFlexVit(CompressedModel):
    """timm's NaFlexVit that compresses the tokens of images; NaFlex's own batches pad, and padding is refused."""

    # The arguments are timm's, and not those of its VisionTransformer.
    def forward(  # type: ignore[override]
        self, x: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
    ) -> Tensor:
        _refuse_patches(x, patch_coord, patch_valid)
        return super().forward(x, attn_mask)

    def forward_features(  # type: ignore[override]
        self, patches: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
    ) -> Tensor:
        """Normalised tokens [B, M, C] after the last block, of images [B, C, H, W]."""
        _refuse_patches(patches, patch_coord, patch_valid)
        return super().forward_features(patches, attn_mask)

    def forward_head(self, patches: Tensor, pre_logits: bool = False, patch_valid: Any = None) -> Tensor:
        _refuse_patches(patches, None, patch_valid)
        return super().forward_head(patches, pre_logits)

    def forward_intermediates(
        self, x: Any, *args: Any, patch_coord: Any = None, patch_valid: Any = None, **kwargs: Any
    ) -> Any:
        _refuse_patches(x, patch_coord, patch_valid)
        return super().forward_intermediates(x, *args, **kwargs)


class TimmNaFlexVit(TimmEva):
    """timm's NaFlexVit class."""

    family = "timm NaFlexVit"
    compressed_tower = CompressedNaFlexVit
    models: tuple[type[nn.Module], ...] = (NaFlexVit,)
    model_methods = ("forward", "forward_features", "forward_head", "_pool", "forward_intermediates", "_forward_embeds")

    def layout_of_block(self, block: Any) -> Layout:
        return _family_of(block).layout_of_block(self, block)

    def check_block(self, block: Any, name: str) -> None:
        _family_of(block).check_block(self, block, name)

    def entry(self, model: Any) -> nn.Module:
        return model.embeds

    def place(self, model: Any, x: Any) -> tuple[Tensor, Places | None]:
        tokens, grid = x
        return tokens, None if model.rope is None else Places(model.rope.get_embed(shape=grid))

    def pools_prefix(self, model: Any) -> bool:
        return model.pool_include_prefix

    def geometry(self, model: Any) -> Geometry:
        return Geometry(len(model.blocks), model.num_prefix_tokens, model.has_class_token, num_tokens=None)

    def embedding_cost(self, model: Any, img_size: tuple[int, int] | None) -> tuple[int, int]:
        return model.embeds.proj.weight.numel(), 0

    def num_tokens(self, model: Any) -> int:
        rows, columns = self.grid(model, *self.image_shape(model)[1:])
        return rows * columns + model.num_prefix_tokens

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        embeds, config = model.embeds, getattr(model, "pretrained_cfg", None) or {}
        size = embeds.default_img_size or config.get("input_size", ())[-2:]
        if not size:  # as the position embeddings have it
            size = [cells * side for cells, side in zip(embeds.pos_embed_grid_size, embeds.patch_size, strict=True)]
        height, width = size
        return embeds.in_chans, int(height), int(width)


def _family_of(block: Any) -> type[TimmVisionTransformer]:
    """Whose blocks these are."""
    return TimmEva if isinstance(block, EvaBlock) else TimmVisionTransformer


def _refuse_patches(x: Any, patch_coord: Any, patch_valid: Any) -> None:
    if isinstance(x, dict) or patch_coord is not None or patch_valid is not None:
        raise ValueError(
            "a compressed NaFlexVit takes images [B, C, H, W] of one size, any size, got patches with patch_coord or "
            "patch_valid, whose padding would be merged into tokens; call it once for each size of image"
        )

"""timm's NaFlexVit: its embedding knows any grid, its blocks are those of ViT or of Eva, its batches may be padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from tokcomp.adapters.images import refuse_symbols
from tokcomp.adapters.layout import Layout
from tokcomp.adapters.naflex_batches import Group, Patches, filled_sources, read_patches, rotary_places, together
from tokcomp.adapters.timm_eva import TimmEva
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.adapters.timm_vit.modules import SIZE_ATTRIBUTE, CompressedModel
from tokcomp.adapters.tower import run_blocks
from tokcomp.blocks.places import Places
from tokcomp.methods.base import Geometry
from tokcomp.methods.learned import PassageMethod
from tokcomp.methods.varying import without_padding
from tokcomp_kernels.product_types import unless_emulated, widened


class CompressedNaFlexVit(CompressedModel):
    """timm's NaFlexVit that compresses the tokens of images, or of NaFlex's own batches without their padding."""

    def traced(
        self,
        sources: list[Tensor | None] | None,
        *args: Any,
        maps: list[Tensor] | None = None,
        depth: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As every tower's. Of a batch of patches, padding has size 0, source -1 and zeros in maps.

        In place of padding, the tokens are the image's last.
        """
        batch = args[0] if isinstance(args[0], Patches) else read_patches(self.embeds, args[0])
        if batch is None:
            return super().traced(sources, *args, maps=maps, depth=depth)
        groups, parts = batch.groups(), list(self.by_group(batch, sources is not None, maps is not None, depth))
        if sources is not None:
            sources.extend(
                together(one, groups, fill=-1) for one in zip(*(part.sources for part in parts), strict=True)
            )
        if maps is not None:
            whole = self.num_prefix_tokens + batch.patches.shape[1]
            maps.extend(together(one, groups, whole) for one in zip(*(part.maps for part in parts), strict=True))
        size = together([part.size_or_ones for part in parts], groups)
        return without_padding(together([part.x for part in parts], groups), size), size

    def by_group(
        self, batch: Patches, with_sources: bool = False, with_maps: bool = False, depth: int | None = None
    ) -> Iterator[Group]:
        """Run the blocks on each group of images with as many patches."""
        adapter, prefix = self._tokcomp_adapter, self.num_prefix_tokens
        with unless_emulated(batch.patches.device.type):
            with widened(batch.patches):
                everything, places = adapter.embed_patches(self, batch)
            for count, images in batch.groups().items():
                num_tokens, here = prefix + count, places
                if places is not None:
                    here = places._replace(origin=places.origin[images, :num_tokens])
                method = self._tokcomp_method.for_tokens(num_tokens, prefix)
                method.check_tokens(num_tokens, prefix)
                x = everything[images, :num_tokens]
                sources: list[Tensor | None] = []
                maps: list[Tensor] = []
                found = run_blocks(
                    adapter,
                    self,
                    method,
                    x,
                    here,
                    sources=sources if with_sources else None,
                    maps=maps if with_maps else None,
                    depth=depth,
                )
                from_start = isinstance(method, PassageMethod) and method.maps_positions
                yield Group(*found, filled_sources(sources, x.shape[:2], x.device, from_start), maps)

    # The arguments are timm's, and not those of its VisionTransformer.
    def forward(  # type: ignore[override]
        self, x: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
    ) -> Tensor:
        """Logits of images [B, C, H, W], or of a batch of patches as timm's collator pads it."""
        refuse_symbols(x)
        if patch_coord is not None and patch_valid is None and not isinstance(x, dict):
            raise ValueError("patch_valid must come with patch_coord, got no patch_valid")
        batch = read_patches(self.embeds, x, patch_coord, patch_valid, attn_mask)
        if batch is None:
            return super().forward(x)
        return together([self.logits(part.x, part.size) for part in self.by_group(batch)], batch.groups())

    def forward_features(  # type: ignore[override]
        self, patches: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
    ) -> Any:
        """Normalised tokens [B, M, C] after the last block; of a batch of patches, in a dict as timm's.

        ``patches`` are then the tokens that are left, and ``patch_valid`` [B, M - prefix] says which of those after the
        prefix are no padding.
        """
        batch = read_patches(self.embeds, patches, patch_coord, patch_valid, attn_mask)
        if batch is None:
            return super().forward_features(patches)
        x, size = self.traced(None, batch)
        assert size is not None
        x = self.norm(x)
        if not torch.compiler.is_compiling():
            setattr(x, SIZE_ATTRIBUTE, size)
        return {"patches": x, "patch_valid": size[:, self.num_prefix_tokens :] > 0}

    def forward_head(self, patches: Tensor, pre_logits: bool = False, patch_valid: Any = None) -> Tensor:
        """Logits of what :meth:`forward_features` returned, whose sizes say what is padding."""
        return super().forward_head(patches, pre_logits)

    def forward_intermediates(
        self, x: Any, *args: Any, patch_coord: Any = None, patch_valid: Any = None, **kwargs: Any
    ) -> Any:
        """timm's: a batch of patches has NLC maps, with zeros for padding, and ``patch_valid`` in a dict of results."""
        batch = read_patches(self.embeds, x, patch_coord, patch_valid)
        if batch is None:
            return super().forward_intermediates(x, *args, **kwargs)
        output_fmt = args[4] if len(args) > 4 else kwargs.get("output_fmt", "NCHW")
        if output_fmt != "NLC":
            raise ValueError(f"output_fmt must be 'NLC' for a batch of patches, whose grids differ, got {output_fmt!r}")
        found = super().forward_intermediates(batch, *args, **kwargs)  # type: ignore[arg-type]
        return {**found, "patch_valid": batch.valid} if isinstance(found, dict) else found


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

    def embed_patches(self, model: Any, batch: Patches) -> tuple[Tensor, Places | None]:
        """Tokens [B, prefix + P, C] that enter block 0, padding included, and their places."""
        x, _ = model.embeds(batch.patches, patch_coord=batch.coord, patch_valid=batch.valid)
        places = None if model.rope is None else rotary_places(model.rope, batch, model.num_prefix_tokens, x.dtype)
        return self.enter(model, x), places

    def tokens_of_batch(self, model: Any, batch: Any) -> list[int]:
        patches = read_patches(model.embeds, batch)
        return (
            super().tokens_of_batch(model, batch)
            if patches is None
            else [count + model.num_prefix_tokens for count in patches.counts]
        )

    def sources(self, model: Any, images: Any) -> tuple[Tensor, list[Tensor | None]]:
        batch = read_patches(model.embeds, images)
        if batch is None or isinstance(model, CompressedNaFlexVit):
            return super().sources(model, images)
        tokens = model.forward_features(batch.patches, batch.coord, batch.valid)["patches"]
        valid = F.pad(batch.valid, (model.num_prefix_tokens, 0), value=True)
        stays = torch.arange(valid.shape[1], device=valid.device).expand_as(valid).masked_fill(~valid, -1)
        return tokens, [stays] * len(model.blocks)

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

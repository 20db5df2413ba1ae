"""The mixins that turn timm's VisionTransformer (Eva too) and its Block into compressing ones."""

from __future__ import annotations

from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from tokcomp.adapters.blocks import CompressedBlock, refuse_mask, require_state
from tokcomp.adapters.images import check_images, refuse_symbols
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.timm_vit import entry, fast
from tokcomp.adapters.timm_vit.head import WEIGHTED
from tokcomp.adapters.tower import CompressedTower, run_blocks
from tokcomp.blocks.places import Places
from tokcomp.blocks.state import BlockState
from tokcomp.fastpath import Products, fused_embedding, has_hooks
from tokcomp_kernels.product_types import unless_emulated, widened

#: Attribute of a feature tensor that carries its tokens' sizes from forward_features to forward_head.
SIZE_ATTRIBUTE = "_tokcomp_size"


class CompressedTimmBlock(CompressedBlock):
    """timm's Block with the tokens reduced between attention and MLP."""

    def forward(self, x: Tensor, *args: Any, state: BlockState | None = None, **kwargs: Any) -> Tensor:
        state = require_state(state, args, kwargs)
        if state.products is not None:
            return fast.run_block(self, x, state, state.products)
        return super().forward(x, state=state)


class CompressedModel(CompressedTower):
    """timm's VisionTransformer that compresses its tokens by ``_tokcomp_method``."""

    _tokcomp_adapter: Any

    def traced(
        self,
        sources: list[Tensor | None] | None,
        *args: Any,
        maps: list[Tensor] | None = None,
        depth: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        (images,) = args
        check_images(self._tokcomp_adapter.entry(self), images)
        with unless_emulated(images.device.type):
            return self._traced(images, sources, maps, depth)

    def _traced(
        self,
        images: Tensor,
        sources: list[Tensor | None] | None,
        maps: list[Tensor] | None,
        depth: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        adapter, method = self._tokcomp_adapter, self._tokcomp_method
        products = adapter.products_of(self, images)
        x, places, normalized = self._enter(images, products)
        if products is None or sources is not None or maps is not None or has_hooks(self.blocks):
            return run_blocks(
                adapter,
                self,
                method,
                x,
                places,
                products=products,
                normalized=normalized,
                sources=sources,
                maps=maps,
                depth=depth,
            )
        # Groups of images would be padded to the longest of each.
        groups = (x,) if method.varies else fast.split(x, products)
        norms: Any = [None] * len(groups)
        if normalized is not None:
            norms = normalized.split([len(part) for part in groups])
        parts = [
            run_blocks(adapter, self, method, part, places, products=products, normalized=own)
            for part, own in zip(groups, norms, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        tokens, sizes = zip(*parts, strict=True)
        return torch.cat(tokens), None if sizes[0] is None else torch.cat(sizes)

    def _enter(self, images: Tensor, products: Products | None) -> tuple[Tensor, Places | None, Tensor | None]:
        """As :meth:`embed`, and block 0's first norm of the tokens where that comes of itself."""
        if products is not None and fused_embedding(images.device):
            found = entry.embed_normed(self, images, products)
            if found is not None:
                self._tokcomp_method.check_tokens(found[0].shape[1], self.num_prefix_tokens)
                return found[0], None, found[1]
        return *self.embed(images, products), None

    def embed(self, images: Tensor, products: Products | None) -> tuple[Tensor, Places | None]:
        """Tokens [B, N, C] that enter block 0 and their places; ``products``: of these images, by fast.products_of."""
        if products is not None and self.patch_embed.proj in products:
            x = fast.embed_patches(self.patch_embed, images, products)
        else:
            with widened(images):
                x = self._tokcomp_adapter.entry(self)(images)
        x, places = self._tokcomp_adapter.place(self, x)
        # Before patches are dropped in training: that leaves fewer tokens of an image that has the right size.
        self._tokcomp_method.check_tokens(x.shape[1], self.num_prefix_tokens)
        return self._tokcomp_adapter.enter(self, x), places

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        refuse_symbols(x)
        refuse_mask(attn_mask, is_causal)
        x, size = self.traced(None, x)
        return self.logits(x, size)

    def logits(self, x: Tensor, size: Tensor | None) -> Tensor:
        """What follows the last block: x [B, M, C] and the tokens' sizes [B, M] to logits."""
        with widened(x):
            return self._head(self.norm(x), size)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised tokens [B, M, C] after the last block."""
        refuse_mask(attn_mask, is_causal)
        x, size = self.traced(None, x)
        x = self.norm(x)
        if not torch.compiler.is_compiling():
            setattr(x, SIZE_ATTRIBUTE, size)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what :meth:`forward_features` returned.

        Raises:
            RuntimeError: this model pools over patch tokens and x does not carry their sizes.
        """
        if self.global_pool in WEIGHTED and not hasattr(x, SIZE_ATTRIBUTE):
            raise RuntimeError(
                f"global_pool={self.global_pool!r} needs the tokens' sizes: pass the very tensor that forward_features "
                "returned, or call the model"
            )
        with widened(x):
            return self._head(x, getattr(x, SIZE_ATTRIBUTE, None), pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Any = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's: feature maps after chosen blocks, of the plain model's shapes.

        A merged position has the token that it was merged into, a pruned one keeps the value with which it entered the
        block that pruned it. The final features, too, have a token for every position.
        """
        refuse_mask(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.blocks), indices)
        maps: list[Tensor] = []
        self.traced(None, x, maps=maps, depth=last + 1 if stop_early else None)
        prefix, chosen = self.num_prefix_tokens, [maps[index + 1] for index in taken]
        with widened(maps[0]):
            chosen = [self.norm(one) if norm else one for one in chosen]
            final = None if intermediates_only else self.norm(maps[-1])
        heads, chosen = [one[:, :prefix] for one in chosen], [one[:, prefix:] for one in chosen]
        if output_fmt == "NCHW":
            grid = self._tokcomp_adapter.entry(self).dynamic_feat_size(x.shape[2:])
            chosen = [one.transpose(1, 2).unflatten(2, grid).contiguous() for one in chosen]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": chosen}
            if prefix and return_prefix_tokens:
                result["image_intermediates_prefix"] = heads
            return result if final is None else {**result, "image_features": final}
        found = list(zip(chosen, heads, strict=True)) if prefix and return_prefix_tokens else chosen
        return found if final is None else (final, found)

    def _head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        return self._tokcomp_adapter.head(self, x, None if size is None else Weights(size), pre_logits)

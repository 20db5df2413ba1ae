"""The mixins that turn timm's VisionTransformer (Eva too) and its Block into compressing ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp.adapters.blocks import CompressedBlock, refuse_mask, require_state
from tokcomp.adapters.images import check_images, refuse_symbols
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.timm_vit import fast
from tokcomp.adapters.timm_vit.head import WEIGHTED
from tokcomp.adapters.tower import CompressedTower, run_blocks
from tokcomp.blocks.places import Places
from tokcomp.blocks.state import BlockState
from tokcomp.fastpath import Products, has_hooks
from tokcomp_kernels.product_types import unless_emulated, widened

#: Attribute of a feature tensor that carries its tokens' sizes from forward_features to forward_head.
_SIZE_ATTRIBUTE = "_tokcomp_size"


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

    def traced(self, sources: list[Tensor | None] | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        (images,) = args
        check_images(self.patch_embed, images)
        with unless_emulated(images.device.type):
            return self._traced(images, sources)

    def _traced(self, images: Tensor, sources: list[Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
        adapter, method = self._tokcomp_adapter, self._tokcomp_method
        products = adapter.products_of(self, images)
        x, places = self.embed(images, products)
        if products is None or sources is not None or has_hooks(self.blocks):
            return run_blocks(adapter, self, method, x, places, products=products, sources=sources)
        parts = [run_blocks(adapter, self, method, part, places, products=products) for part in fast.split(x, products)]
        if len(parts) == 1:
            return parts[0]
        tokens, sizes = zip(*parts, strict=True)
        return torch.cat(tokens), None if sizes[0] is None else torch.cat(sizes)

    def embed(self, images: Tensor, products: Products | None) -> tuple[Tensor, Places | None]:
        """Tokens [B, N, C] that enter block 0 and their places; ``products``: of these images, by fast.products_of."""
        if products is not None and self.patch_embed.proj in products:
            x = fast.embed_patches(self.patch_embed, images, products)
        else:
            with widened(images):
                x = self.patch_embed(images)
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
            setattr(x, _SIZE_ATTRIBUTE, size)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what :meth:`forward_features` returned.

        Raises:
            RuntimeError: this model pools over patch tokens and x does not carry their sizes.
        """
        if self.global_pool in WEIGHTED and not hasattr(x, _SIZE_ATTRIBUTE):
            raise RuntimeError(
                f"global_pool={self.global_pool!r} needs the tokens' sizes: pass the very tensor that forward_features "
                "returned, or call the model"
            )
        with widened(x):
            return self._head(x, getattr(x, _SIZE_ATTRIBUTE, None), pre_logits)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a compressed model has no token per position, so it has no intermediate feature maps; use tokcomp.trace "
            "and torch.ops.tokcomp.unmerge, or tokcomp.restore the model first"
        )

    def _head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        return self._tokcomp_adapter.head(self, x, None if size is None else Weights(size), pre_logits)

"""timm's VisionTransformer (DeiT, MAE, DINOv2, CLIP image towers, registers, ...) and VisionTransformerDistilled."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from tokcomp.adapters.base import BlockCost, Cost, UnsupportedModelError
from tokcomp.adapters.images import check_images
from tokcomp.adapters.isotropic import IsotropicAdapter
from tokcomp.adapters.layout import Layout, linear_cost
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.swap import Swapped, original_class, swap_class
from tokcomp.adapters.timm_vit import fast, search_fast
from tokcomp.adapters.timm_vit.embedding import counted_embedding, image_shape, is_plain_projection
from tokcomp.adapters.timm_vit.head import attention_pool, head, reads_patches
from tokcomp.adapters.timm_vit.layouts import LAYOUTS
from tokcomp.adapters.timm_vit.modules import CompressedModel, CompressedTimmBlock
from tokcomp.adapters.timm_vit.search import run_search
from tokcomp.adapters.timm_vit.unmerging import Place, UnmergingBlock, UnmergingModel
from tokcomp.blocks.places import Places
from tokcomp.blocks.search import BlockSearch
from tokcomp.fastpath import PackedWeights, Products
from tokcomp.methods.base import Geometry, Method, Norm


class TimmVisionTransformer(IsotropicAdapter):
    """Isotropic pre-norm vision transformers of timm >= 1.0.26."""

    family = "timm VisionTransformer"
    compressed_tower = CompressedModel
    compressed_block: type[Swapped] = CompressedTimmBlock
    #: The classes that this was written against: models, their blocks and attention.
    models: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled)
    #: Of the model, what compression replaces or relies on; a subclass with its own version is not understood.
    model_methods: tuple[str, ...] = (
        *("forward", "forward_features", "forward_head", "pool", "forward_intermediates", "_pos_embed"),
    )
    block: type[nn.Module] = Block
    attention: tuple[type[nn.Module], ...] = (Attention,)

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, self.models)

    def check(self, model: Any) -> None:
        cls = original_class(model)
        for name in self.model_methods:
            known = {getattr(base, name, None) for base in self.models}
            if getattr(cls, name, None) not in known or name in vars(model):
                raise UnsupportedModelError(f"{cls.__name__} is not understood: it has a {name} of its own")
        if not isinstance(model.blocks, (nn.Sequential, nn.ModuleList)):
            raise UnsupportedModelError(
                f"{cls.__name__} is not understood: its blocks are a {type(model.blocks).__name__}"
            )
        for index, block in enumerate(model.blocks):
            self.check_block(block, f"blocks.{index}")
            if self.layout_of_block(block) is not self.layout_of(model):
                kinds = [original_class(one).__name__ for one in (model.blocks[0], block)]
                raise UnsupportedModelError(f"blocks.{index}: a {kinds[1]} after a {kinds[0]} is not understood")

    def check_block(self, block: Any, name: str) -> None:
        """Raise UnsupportedModelError naming the first part of a block that is not understood."""
        known = next((one for one in LAYOUTS if isinstance(block, one)), self.block)
        self.layout_of_block(block).check(block, known, self.attention[0], name)

    def layout_of_block(self, block: Any) -> Layout:
        """Where this block keeps its parts."""
        return next((layout for known, layout in LAYOUTS.items() if isinstance(block, known)), self.layout)

    def layout_of(self, tower: Any) -> Layout:
        return self.layout_of_block(tower.blocks[0])

    def entry(self, model: Any) -> nn.Module:
        """The module that images enter; what it makes of them goes to :meth:`place`."""
        return model.patch_embed

    def place(self, model: Any, x: Any) -> tuple[Tensor, Places | None]:
        """A token for every position, [B, N, C], of embedded patches x, and their places if attention uses them."""
        return model._pos_embed(x), None

    def enter(self, model: Any, x: Tensor) -> Tensor:
        """What of the positions' tokens x [B, N, C] enters block 0: fewer of them where training drops patches."""
        return model.norm_pre(x if model.patch_drop is None else model.patch_drop(x))

    def head(self, model: Any, x: Tensor, weights: Weights | None, pre_logits: bool = False) -> Tensor:
        """Logits of normalised tokens x [B, M, C]."""
        return head(model, x, weights, pre_logits, self.pools_prefix(model))

    def pools_prefix(self, model: Any) -> bool:
        """Whether the head pools over prefix tokens too."""
        return getattr(model, "pool_include_prefix", False)

    def products_of(self, model: Any, images: Tensor) -> Products | None:
        """The products of those of the model's parts that the fast path can run, None where none can."""
        return fast.products_of(model, images)

    def check_int8(self, model: Any) -> None:
        if type(self).products_of is not TimmVisionTransformer.products_of:
            super().check_int8(model)
        why = fast.int8_refusal(model)
        if why is not None:
            raise ValueError(f"model cannot be quantised to int8: {why}")

    def pack_search(self, model: Any, images: Tensor) -> PackedWeights | None:
        """Packed weights for a search, None where the fast path cannot run every block."""
        return search_fast.pack(model, images)

    def has_products(self, block: Any, products: Products) -> bool:
        return fast.has_products(block, products)

    def first_norm(self, block: Any, x: Tensor) -> Norm | None:
        return fast.as_norm(block._modules["norm1"], x)

    def num_prefix_tokens(self, tower: Any) -> int:
        return tower.num_prefix_tokens

    def validate(self, model: Any, method: Method) -> None:
        if method.unmerges and not self.layout_of(model).has_mlp:
            raise UnsupportedModelError(
                f"{type(method).__name__} reduces tokens for the MLP, which {type(model.blocks[0]).__name__} computes "
                "beside its attention; use ToMe"
            )
        if model.global_pool not in ("", "token", "avg", "avgmax", "max", "map"):
            raise UnsupportedModelError(f"global_pool={model.global_pool!r} cannot be compressed")
        pool = attention_pool(model)
        if pool is None:
            return
        if getattr(pool, "pos_embed", None) is not None:
            raise UnsupportedModelError(f"{type(pool).__name__} with position embeddings cannot be compressed")
        takes_sizes = "attn_mask" in inspect.signature(pool.forward).parameters and (
            hasattr(model, "pool_include_prefix") or not isinstance(model, VisionTransformer)
        )
        if (method.proportional_attention or method.varies) and not takes_sizes:
            raise UnsupportedModelError(
                f"this timm's {type(pool).__name__} takes no attn_mask, so sizes cannot reach it"
            )

    def geometry(self, model: Any) -> Geometry:
        prefix = model.num_prefix_tokens
        patches = None if getattr(model, "dynamic_img_size", False) else getattr(model.patch_embed, "num_patches", None)
        return Geometry(
            depth=len(model.blocks),
            num_prefix_tokens=prefix,
            has_class_token=model.cls_token is not None,
            num_tokens=None if patches is None else patches + prefix,
        )

    def cost(self, model: Any, img_size: tuple[int, int] | None = None) -> Cost:
        blocks = tuple(BlockCost(*self.layout_of_block(block).costs(block)) for block in model.blocks)
        head_per_token, head = 0, linear_cost(model.head)
        if isinstance(model, VisionTransformerDistilled):
            head += linear_cost(model.head_dist)
        pool = attention_pool(model)
        if pool is not None:
            head_per_token = linear_cost(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            head += pool.latent_len * (linear_cost(pool) - linear_cost(pool.kv))
            head -= 0 if self.pools_prefix(model) else head_per_token * model.num_prefix_tokens
        elif model.global_pool == "":
            head_per_token, head = head, 0
        embed, fixed = self.embedding_cost(model, img_size)
        return Cost(embed, blocks, head_per_token, head + fixed)

    def embedding_cost(self, model: Any, img_size: tuple[int, int] | None) -> tuple[int, int]:
        """Multiply-adds of the patch embedding, per token and besides."""
        if is_plain_projection(model.patch_embed):
            return model.patch_embed.proj.weight.numel(), 0
        return 0, counted_embedding(model, img_size)

    def num_tokens(self, model: Any) -> int:
        patches = getattr(model.patch_embed, "num_patches", None)
        if patches is None:
            raise ValueError("the model has no image size of its own, so its tokens cannot be counted")
        return patches + model.num_prefix_tokens

    def grid(self, model: Any, height: int, width: int) -> tuple[int, int]:
        embed: Any = self.entry(model)
        patch = getattr(embed, "patch_size", (1, 1))
        if not getattr(embed, "dynamic_img_pad", False) and (height % patch[0] or width % patch[1]):
            raise ValueError(
                f"images must be whole patches of {patch[0]} x {patch[1]} pixels, got {height} x {width}; resize them"
            )
        rows, columns = embed.dynamic_feat_size((height, width))
        return rows, columns

    def patch(self, model: Any, method: Method) -> None:
        super().patch(model, method)
        if not method.unmerges:
            return
        for index, block in enumerate(model.blocks):
            swap_class(block, UnmergingBlock)
            block._tokcomp_place = Place(method, index, model.num_prefix_tokens, self.layout_of_block(block))
        swap_class(model, UnmergingModel)

    def unpatch(self, model: Any) -> None:
        super().unpatch(model)
        for block in model.blocks:
            vars(block).pop("_tokcomp_place", None)

    def plain_tokens(self, model: Any, images: Tensor) -> Tensor:
        check_images(self.entry(model), images)
        return model.forward_features(images)

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        return image_shape(model)

    @torch.no_grad()
    def warm_up(self, model: Any) -> None:
        if isinstance(model, CompressedModel):
            weight = next(model.parameters())
            self.products_of(model, torch.empty(0, dtype=weight.dtype, device=weight.device))

    def check_search(self, model: Any) -> None:
        if model.global_pool == "" and attention_pool(model) is None:
            raise UnsupportedModelError("global_pool='' leaves the tokens unpooled, so a search has no logits to go by")

    def reads_patches(self, model: Any) -> bool:
        return reads_patches(model)

    def search(self, model: nn.Module, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
        return run_search(self, model, images, blocks)

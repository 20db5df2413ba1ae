"""timm's VisionTransformer (DeiT, MAE, DINOv2, CLIP image towers, registers, ...) and VisionTransformerDistilled."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from tokcomp import fastpath
from tokcomp.adapters.base import Adapter, BlockCost, Cost, UnsupportedModelError
from tokcomp.adapters.images import check_images
from tokcomp.adapters.swap import original_class, restore_class, swap_class
from tokcomp.adapters.timm_vit import fast
from tokcomp.adapters.timm_vit.embedding import counted_embedding, image_shape, is_plain_projection
from tokcomp.adapters.timm_vit.modules import CompressedAttention, CompressedBlock, CompressedModel
from tokcomp.adapters.timm_vit.search import check_search, reads_patches, run_search
from tokcomp.adapters.timm_vit.unmerging import Place, UnmergingBlock, UnmergingModel
from tokcomp.blocks.search import BlockSearch
from tokcomp.methods.base import Geometry, Method

#: Methods of the model that compression replaces or relies on; a subclass with its own version is not understood.
_MODEL_METHODS = ("forward", "forward_features", "forward_head", "pool", "forward_intermediates", "_pos_embed")
_ATTENTION_PARTS = ("num_heads", "head_dim", "scale", "qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop")
_BLOCK_PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
_TOKEN_MIXERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)


class TimmVisionTransformer(Adapter):
    """Isotropic pre-norm vision transformers of timm >= 1.0.8."""

    family = "timm VisionTransformer"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def check(self, model: nn.Module) -> None:
        cls = original_class(model)
        for name in _MODEL_METHODS:
            known = {getattr(base, name, None) for base in (VisionTransformer, VisionTransformerDistilled)}
            if getattr(cls, name, None) not in known or name in vars(model):
                raise UnsupportedModelError(f"{cls.__name__} is not understood: it has a {name} of its own")
        if not isinstance(model.blocks, (nn.Sequential, nn.ModuleList)):
            raise UnsupportedModelError(
                f"{cls.__name__} is not understood: its blocks are a {type(model.blocks).__name__}"
            )
        block: Any
        for index, block in enumerate(model.blocks):
            _require(block, Block, _BLOCK_PARTS, f"blocks.{index}")
            _require(block.attn, Attention, _ATTENTION_PARTS, f"blocks.{index}.attn")
            for name, module in block.mlp.named_modules(prefix=f"blocks.{index}.mlp"):
                if isinstance(module, _TOKEN_MIXERS):
                    raise UnsupportedModelError(
                        f"{name}: a {type(module).__name__} mixes tokens, so it is not understood"
                    )

    def validate(self, model: Any, method: Method) -> None:
        if model.global_pool not in ("", "token", "avg", "avgmax", "max", "map"):
            raise UnsupportedModelError(f"global_pool={model.global_pool!r} cannot be compressed")
        pool = model.attn_pool
        if pool is None:
            return
        if getattr(pool, "pos_embed", None) is not None:
            raise UnsupportedModelError(f"{type(pool).__name__} with position embeddings cannot be compressed")
        takes_sizes = "attn_mask" in inspect.signature(pool.forward).parameters and hasattr(
            model, "pool_include_prefix"
        )
        if method.proportional_attention and not takes_sizes:
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
        blocks = tuple(
            BlockCost(_linear_cost(block.attn), block.attn.num_heads * block.attn.head_dim, _linear_cost(block.mlp))
            for block in model.blocks
        )
        head_per_token, head = 0, _linear_cost(model.head)
        if isinstance(model, VisionTransformerDistilled):
            head += _linear_cost(model.head_dist)
        if model.attn_pool is not None:
            pool = model.attn_pool
            head_per_token = _linear_cost(pool.kv) + 2 * pool.latent_len * pool.num_heads * pool.head_dim
            head += pool.latent_len * (_linear_cost(pool) - _linear_cost(pool.kv))
        elif model.global_pool == "":
            head_per_token, head = head, 0
        embed = 0
        if is_plain_projection(model.patch_embed):
            embed = model.patch_embed.proj.weight.numel()
        else:
            head += counted_embedding(model, img_size)
        return Cost(embed, blocks, head_per_token, head)

    def num_tokens(self, model: Any) -> int:
        patches = getattr(model.patch_embed, "num_patches", None)
        if patches is None:
            raise ValueError("the model has no image size of its own, so its tokens cannot be counted")
        return patches + model.num_prefix_tokens

    def grid(self, model: Any, height: int, width: int) -> tuple[int, int]:
        embed = model.patch_embed
        patch = getattr(embed, "patch_size", (1, 1))
        if not getattr(embed, "dynamic_img_pad", False) and (height % patch[0] or width % patch[1]):
            raise ValueError(
                f"images must be whole patches of {patch[0]} x {patch[1]} pixels, got {height} x {width}; resize them"
            )
        rows, columns = embed.dynamic_feat_size((height, width))
        return rows, columns

    def patch(self, model: Any, method: Method) -> None:
        for index, block in enumerate(model.blocks):
            swap_class(block, UnmergingBlock if method.unmerges else CompressedBlock)
            swap_class(block.attn, CompressedAttention)
            if method.unmerges:
                block._tokcomp_place = Place(method, index, model.num_prefix_tokens)
        swap_class(model, UnmergingModel if method.unmerges else CompressedModel)
        model._tokcomp_method = method

    def unpatch(self, model: nn.Module) -> None:
        if not isinstance(model, CompressedModel):
            return
        for block in model.blocks:
            restore_class(block)
            restore_class(block.attn)
            vars(block).pop("_tokcomp_place", None)
        restore_class(model)
        del model._tokcomp_method
        fastpath.forget(model)

    def method(self, model: nn.Module) -> Method | None:
        return model._tokcomp_method if isinstance(model, CompressedModel) else None

    def sources(self, model: Any, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        if isinstance(model, CompressedModel):
            sources: list[Tensor | None] = []
            x, _ = model.tokens(images, sources)
            return x, sources
        check_images(model.patch_embed, images)
        return model.forward_features(images), [None] * len(model.blocks)

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        return image_shape(model)

    def qkv_layers(self, model: Any) -> list[nn.Linear]:
        return [block.attn.qkv for block in model.blocks]

    @torch.no_grad()
    def warm_up(self, model: Any) -> None:
        if isinstance(model, CompressedModel):
            weight = next(model.parameters())
            fast.products_of(model, torch.empty(0, dtype=weight.dtype, device=weight.device))

    def check_search(self, model: nn.Module) -> None:
        check_search(model)

    def reads_patches(self, model: nn.Module) -> bool:
        return reads_patches(model)

    def search(self, model: nn.Module, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
        return run_search(model, images, blocks)


def _require(module: nn.Module, known: type[nn.Module], parts: tuple[str, ...], name: str) -> None:
    cls = original_class(module)
    if getattr(cls, "forward", None) is not known.forward or "forward" in vars(module):
        raise UnsupportedModelError(f"{name}: {cls.__name__} is not understood, only timm's {known.__name__}")
    missing = [part for part in parts if not hasattr(module, part)]
    if missing:
        raise UnsupportedModelError(f"{name}: {cls.__name__} has no {missing[0]}, so it is not understood")


def _linear_cost(module: nn.Module) -> int:
    """Multiply-adds per token of the linear layers in a module."""
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))

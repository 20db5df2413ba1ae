"""Families whose blocks are all alike: the adapter says where things are, the rest is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters.base import Adapter, BlockCost, Cost, UnsupportedModelError
from tokcomp.adapters.blocks import CompressedAttention, CompressedBlock
from tokcomp.adapters.layout import Layout
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.projections import Projection
from tokcomp.adapters.swap import Swapped, restore_class, swap_class
from tokcomp.adapters.tower import CompressedTower, SearchTower
from tokcomp.adapters.twins import twin_model
from tokcomp.blocks.places import Places
from tokcomp.blocks.search import BlockSearch
from tokcomp.fastpath import Products, forget, is_int8, set_int8
from tokcomp.methods.base import Geometry, Method, Norm, TokenShape
from tokcomp.methods.learned import LearnedMethod, PassageMethod
from tokcomp.methods.tome import ToMe


class IsotropicAdapter(Adapter):
    """A family of vision transformers whose blocks are all alike.

    The *tower* is the module that embeds images and runs the blocks: the model itself, or a part of it.
    """

    layout = Layout()
    #: What goes in front of the classes of the tower and its blocks.
    compressed_tower: type[Swapped] = CompressedTower
    compressed_block: type[Swapped] = CompressedBlock

    def tower(self, model: Any) -> Any:
        """The module of ``model`` that embeds images and runs the blocks; a tower's is itself."""
        return model

    def blocks(self, tower: Any) -> Sequence[Any]:
        """The tower's blocks, in running order."""
        return tower.blocks

    def layout_of(self, tower: Any) -> Layout:
        """Where the tower's blocks keep their parts."""
        return self.layout

    def embed(self, tower: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Places | None]:
        """Tokens [B, N, C] that enter block 0 for the arguments of the tower's forward; and their places, where
        attention goes by them."""
        raise self._missing("embed")

    def finish(self, tower: Any, x: Tensor, weights: Weights | None, **kwargs: Any) -> Any:
        """What the tower's forward returns for tokens x [B, M, C] after the last block.

        Args:
            tower: plain, compressed or under a search.
            x: the tokens.
            weights: what each counts for in pooling; None: all the same.
            kwargs: of the tower's forward.
        """
        raise self._missing("finish")

    def num_prefix_tokens(self, tower: Any) -> int:
        """Class token and registers, which always stay."""
        return 1

    def has_class_token(self, tower: Any) -> bool:
        """Whether token 0 is a class token."""
        return True

    def patch_projection(self, tower: Any) -> nn.Conv2d:
        """The convolution without overlap that turns images into patches."""
        raise self._missing("patch_projection")

    def image_size(self, tower: Any) -> tuple[int, int]:
        """Height and width of the tower's own images."""
        raise self._missing("image_size")

    def head_cost(self, model: Any) -> int:
        """Multiply-adds of one image after the last block."""
        return 0

    def checkpoints(self, tower: Any) -> bool:
        """Whether the blocks are to be run again in the backward pass, now."""
        return bool(getattr(tower, "grad_checkpointing", False)) and torch.is_grad_enabled()

    def has_products(self, block: Any, products: Products) -> bool:
        """Whether the fast path runs this block by ``products``; of a family that has one."""
        return False

    def first_norm(self, block: Any, x: Tensor) -> Norm | None:
        """A packed block's first norm for tokens x, None where it has none."""
        return None

    def outer(self, model: Any) -> dict[nn.Module, type[Swapped]]:
        """Modules around the tower that pool over its tokens, and the mixins that make them do so by weight."""
        return {}

    def geometry(self, model: Any) -> Geometry:
        tower = self.tower(model)
        prefix = self.num_prefix_tokens(tower)
        return Geometry(len(self.blocks(tower)), prefix, self.has_class_token(tower), self.num_tokens(model))

    def num_tokens(self, model: Any) -> int:
        tower = self.tower(model)
        rows, columns = self.grid(model, *self.image_size(tower))
        return rows * columns + self.num_prefix_tokens(tower)

    def grid(self, model: Any, height: int, width: int) -> tuple[int, int]:
        patch = self.patch_projection(self.tower(model)).stride
        if height % patch[0] or width % patch[1]:
            raise ValueError(
                f"images must be whole patches of {patch[0]} x {patch[1]} pixels, got {height} x {width}; resize them"
            )
        return height // patch[0], width // patch[1]

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        tower = self.tower(model)
        return (self.patch_projection(tower).in_channels, *self.image_size(tower))

    def cost(self, model: Any, img_size: tuple[int, int] | None = None) -> Cost:
        tower = self.tower(model)
        layout = self.layout_of(tower)
        blocks = tuple(BlockCost(*layout.costs(block)) for block in self.blocks(tower))
        embed = self.patch_projection(tower).weight.numel()
        return Cost(embed, blocks, self.head_cost_per_token(model), self.head_cost(model))

    def head_cost_per_token(self, model: Any) -> int:
        """Multiply-adds after the last block per token, of attention pooling, say."""
        return 0

    def validate(self, model: Any, method: Method) -> None:
        if method.unmerges:
            raise UnsupportedModelError(f"{self.family}: {type(method).__name__} is for timm's VisionTransformer alone")

    def holder(self, model: Any) -> nn.Module:
        tower: nn.Module = self.tower(model)
        return tower

    def token_shape(self, model: Any) -> TokenShape:
        tower = self.tower(model)
        layout, block = self.layout_of(tower), self.blocks(tower)[0]
        attn = layout.attention_of(block)
        return TokenShape(layout.projection(attn, "block 0").width, layout.heads(attn))

    def check_passage(self, model: Any, method: PassageMethod) -> None:
        name = type(method).__name__
        if self.reads_patches(model) and not method.keeps_all:
            raise UnsupportedModelError(
                f"{self.family}: {name} needs a model that answers by its class token alone; use ToMe or DiffRate"
            )
        if not isinstance(method, LearnedMethod):
            return
        parts = self.tower(model)._modules.get(method.name)
        if parts is None:
            raise ValueError(
                f"model must have the trained parts of {name}, got one without: load a checkpoint that has them "
                "(--checkpoint, tokcomp.learned.load), or train new ones (tokcomp finetune, tokcomp.learned.attach)"
            )
        geometry, weight = self.geometry(model), next(self.tower(model).parameters())
        method.check_parts(parts, self.token_shape(model), geometry.depth)
        for key, tensor in parts.state_dict().items():
            if (tensor.device, tensor.dtype) != (weight.device, weight.dtype):
                raise ValueError(
                    f"{method.name}.{key} must be {weight.dtype} on {weight.device} as the model is, got "
                    f"{tensor.dtype} on {tensor.device}; convert the whole model by .to()"
                )

    def check_search(self, model: Any) -> None:
        """Nothing: the family's models end in logits or pooled features, unless an adapter says otherwise."""

    def reads_patches(self, model: Any) -> bool:
        return not self.has_class_token(self.tower(model))

    def patch(self, model: Any, method: Method) -> None:
        tower = self.tower(model)
        layout = self.layout_of(tower)
        for block in self.blocks(tower):
            swap_class(block, self.compressed_block)
            if layout.attention_of(block) is not block:
                swap_class(layout.attention_of(block), CompressedAttention)
        for module, mixin in self.outer(model).items():
            swap_class(module, mixin)
        swap_class(tower, self.compressed_tower)
        tower._tokcomp_adapter, tower._tokcomp_method = self, method

    def check_attention(self, model: Any, method: Method) -> None:
        """Nothing: the layout says how the family attends, and sizes are a mask."""

    def keep_attention(self, model: Any) -> None:
        self.tower(model)._tokcomp_keeps_attention = True

    def keeps_attention(self, model: Any) -> bool:
        return getattr(self.tower(model), "_tokcomp_keeps_attention", False)

    def use_int8(self, model: Any) -> None:
        set_int8(self.tower(model), True)

    def uses_int8(self, model: Any) -> bool:
        return is_int8(self.tower(model))

    def unpatch(self, model: Any) -> None:
        tower = self.tower(model)
        if not isinstance(tower, CompressedTower):
            return
        layout = self.layout_of(tower)
        for block in self.blocks(tower):
            restore_class(block)
            restore_class(layout.attention_of(block))
        for module in self.outer(model):
            restore_class(module)
        restore_class(tower)
        del tower._tokcomp_adapter, tower._tokcomp_method
        vars(tower).pop("_tokcomp_keeps_attention", None)
        set_int8(tower, False)
        forget(tower)

    def method(self, model: Any) -> Method | None:
        tower = self.tower(model)
        return tower._tokcomp_method if isinstance(tower, CompressedTower) else None

    def sources(self, model: Any, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        tower = self.tower(model)
        if isinstance(tower, CompressedTower):
            sources: list[Tensor | None] = []
            x, _ = tower.traced(sources, images)
            return x, sources
        return self.plain_tokens(model, images), [None] * len(self.blocks(tower))

    def plain_tokens(self, model: Any, images: Tensor) -> Tensor:
        """The last block's tokens [B, N, C] of a plain model."""
        tower = self.tower(model)
        layout = self.layout_of(tower)
        twin, _ = twin_model(model, [layout.attention_of(block) for block in self.blocks(tower)])
        self.patch(twin, ToMe(0))
        x, _ = self.tower(twin).traced(None, images)
        return x

    def projections(self, model: Any) -> list[Projection]:
        tower = self.tower(model)
        layout = self.layout_of(tower)
        return [
            layout.projection(layout.attention_of(block), f"block {index}")
            for index, block in enumerate(self.blocks(tower))
        ]

    def search(self, model: Any, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
        tower = self.tower(model)
        outer = self.outer(model)
        root, twins = twin_model(model, [*outer, tower])
        for module, mixin in zip(twins, outer.values(), strict=False):
            swap_class(module, mixin)
        swap_class(twins[-1], SearchTower)
        vars(twins[-1]).update(_tokcomp_adapter=self, _tokcomp_search=blocks)
        return self.logits(root(images))

    def _missing(self, name: str) -> NotImplementedError:
        return NotImplementedError(f"{type(self).__name__} must define {name}")

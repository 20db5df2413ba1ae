"""The parts of a compressed ViT as calls that can be timed one by one, at any token count."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokcomp.adapters import UnsupportedModelError, find_adapter
from tokcomp.adapters.base import BlockCost
from tokcomp.adapters.timm_vit import fast as timm_vit_fast
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.adapters.timm_vit.embedding import image_shape
from tokcomp.api import compress, restore
from tokcomp.blocks.state import BlockState
from tokcomp.methods import DiffRate, Method
from tokcomp.methods.base import Evidence
from tokcomp.schedule import CompressionSchedule

#: Share of its tokens that a block drops while its parts are timed, half of them pruned and half merged.
DROPPED = 0.08
#: The parts of a model that depend on a token count.
PARTS = ("attention", "reduce", "mlp", "head")


def uniform_blocks(model: nn.Module) -> BlockCost:
    """The shape that all blocks of a model share.

    Raises:
        TypeError: (UnsupportedModelError) the blocks differ, so that one table of block times cannot serve them all.
    """
    kinds = set(find_adapter(model).cost(model).blocks)
    if len(kinds) != 1:
        raise UnsupportedModelError(
            f"measured latency needs blocks of one shape, got {len(kinds)} shapes in a {type(model).__name__}"
        )
    return kinds.pop()


class VitParts:
    """A copy of a ViT on a device, cut where the token count changes.

    It times what a compressed model runs: the packed path on CPUs that take it, proportional attention with its class
    row, the reduction operator. Every call moves on to the next block's weights, so that they are as cold in the caches
    as in a model, and splits the batch into the same groups of images as the model does.

    Args:
        model: a timm VisionTransformer, compressed or not; it is not changed.
        batch_size: images per batch.
        dtype: type of weights and images.
        device: the device to run on.
    """

    def __init__(self, model: nn.Module, batch_size: int, dtype: torch.dtype, device: torch.device) -> None:
        adapter = find_adapter(model)
        if not isinstance(model, VisionTransformer):
            raise UnsupportedModelError(
                f"measured latency supports timm's VisionTransformer, not a {type(model).__name__}"
            )
        uniform_blocks(model)
        self._layout = TimmVisionTransformer.layout
        geometry = adapter.geometry(model)
        self.depth, self.num_tokens = geometry.depth, adapter.num_tokens(model)
        self.num_prefix_tokens = geometry.num_prefix_tokens
        self.metric = "cls_attn" if geometry.has_class_token else "image_attn"
        own: Any = restore(copy.deepcopy(model)).to(device=device, dtype=dtype).eval()
        self._model = compress(own, self._method(self.num_tokens))
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randn(batch_size, *image_shape(own), generator=generator).to(device, dtype)
        self._products = timm_vit_fast.products_of(own, self._images)
        x, _ = own.embed(self._images, self._products)
        if self._products is not None:
            x = x.to(self._products.dtype)
        parts = (x,) if self._products is None else timm_vit_fast.split(x, self._products)
        self._tokens = [part.contiguous().view(-1) for part in parts]
        self._groups = [part.shape[0] for part in parts]
        self._width = x.shape[-1]
        self._cls_attn = torch.rand(batch_size, self.num_tokens, generator=generator).to(device)
        self._size = torch.ones(batch_size, self.num_tokens, device=device)
        self._blocks = itertools.cycle(enumerate(own.blocks))

    def _method(self, num_tokens: int) -> DiffRate:
        dropped = max(1, round(DROPPED * num_tokens))
        most = max(self.num_prefix_tokens + 1, num_tokens - dropped)
        schedule = CompressionSchedule([most + (num_tokens - most) // 2] * self.depth, [most] * self.depth)
        return DiffRate(schedule, metric=self.metric)

    def _state(self, index: int, num_tokens: int, size: torch.Tensor) -> BlockState:
        method = self._method(num_tokens)
        prefix, sizes = self.num_prefix_tokens, size[:, :num_tokens]
        return BlockState(method, index, num_tokens, prefix, sizes, self._products, self._layout)

    def _each(self, num_tokens: int) -> Any:
        """Each group's tokens [B, N, C], sizes [B, N0] and class attention [B, N0]."""
        start = 0
        for flat, images in zip(self._tokens, self._groups, strict=True):
            rows = slice(start, start + images)
            x = flat[: images * num_tokens * self._width].view(images, num_tokens, self._width)
            yield x, self._size[rows], self._cls_attn[rows]
            start += images

    def whole(self, method: Method) -> Callable[[], Any]:
        """The whole model, compressed by a method, on a batch of images."""
        return partial(compress(restore(copy.deepcopy(self._model)), method), self._images)

    def embed(self) -> None:
        """From images to tokens, and everything else that a forward pass does outside its blocks."""
        products = timm_vit_fast.products_of(self._model, self._images)
        self._model.embed(self._images, products)

    def attention(self, num_tokens: int) -> None:
        """A block up to its reduction."""
        index, block = next(self._blocks)
        for x, size, _ in self._each(num_tokens):
            state = self._state(index, num_tokens, size)
            if self._products is None:
                block.attention_half(x, state)
            else:
                timm_vit_fast.attention_half(block, x, state, self._products)

    def reduce(self, num_tokens: int) -> None:
        """The reduction of ``num_tokens`` tokens by the share :data:`DROPPED`; does nothing if none can be dropped."""
        for x, size, cls_attn in self._each(num_tokens):
            state = self._state(0, num_tokens, size)
            importance = cls_attn[:, :num_tokens]
            state.evidence = Evidence(cls_attn=importance, image_attn=importance)
            state.reduce(x)

    def mlp(self, num_tokens: int) -> None:
        """A block from its reduction on."""
        _, block = next(self._blocks)
        for x, _, _ in self._each(num_tokens):
            if self._products is None:
                self._layout.add_mlp(block, x)
            else:
                timm_vit_fast.mlp_half(block, x, self._products)

    def head(self, num_tokens: int) -> None:
        """From the last block's tokens to logits."""
        tokens = [x for x, _, _ in self._each(num_tokens)]
        x = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
        self._model.logits(x.to(self._images.dtype), self._size[:, :num_tokens])

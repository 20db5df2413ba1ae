"""Families on nn.MultiheadAttention: torchvision's VisionTransformer, open_clip's with or without a CLIP around it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.images import check_images
from tokcomp.adapters.isotropic import IsotropicAdapter
from tokcomp.adapters.layout import Layout, linear_cost
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.projections import Projection, packed
from tokcomp.adapters.swap import original_class
from tokcomp.blocks.places import Places


class MultiheadLayout(Layout):
    """q, k and v from nn.MultiheadAttention's one packed parameter."""

    def split(self, attn: Any, x: Tensor) -> tuple[Tensor, ...]:
        batch, num_tokens, _ = x.shape
        qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        return qkv.view(batch, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, attn: Any, out: Tensor, x: Tensor) -> Tensor:
        # As nn.MultiheadAttention does it, which never calls the layer.
        return F.linear(out.transpose(1, 2).flatten(2), attn.out_proj.weight, attn.out_proj.bias)

    def score_scale(self, attn: Any) -> float:
        return float(attn.head_dim**-0.5)

    def projection(self, attn: Any, name: str) -> Projection:
        return packed(attn, name, name="in_proj_weight", read_past=True)

    def check(self, block: Any, known: type, known_attention: type, name: str) -> None:
        super().check(block, known, known_attention, name)
        attn = self.attention_of(block)
        if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or not attn.batch_first:
            raise UnsupportedModelError(
                f"{name}.{self.attention}: nn.MultiheadAttention must have one packed projection, batch first and no "
                "added keys"
            )


def _layout(**names: Any) -> MultiheadLayout:
    return MultiheadLayout(
        qkv="in_proj_weight",
        scale="head_dim",
        dropout="dropout",
        norms=None,
        out_norm=None,
        out="out_proj",
        out_dropout=None,
        **names,
    )


class TorchvisionViT(IsotropicAdapter):
    """torchvision.models.VisionTransformer (vit_b_16, ...)."""

    family = "torchvision VisionTransformer"
    layout = _layout(
        norm1="ln_1",
        attention="self_attention",
        scale1=None,
        drop1="dropout",
        norm2="ln_2",
        scale2=None,
        drop2=None,
    )

    def claims(self, model: nn.Module) -> bool:
        return _is_from(model, "torchvision.models.vision_transformer", "VisionTransformer")

    def check(self, model: Any) -> None:
        source = sys.modules["torchvision.models.vision_transformer"]
        _require_own_forward(model, source.VisionTransformer)
        _require_own_forward(model.encoder, source.Encoder)
        if not isinstance(model.conv_proj, nn.Conv2d):
            raise UnsupportedModelError(f"conv_proj: a stem of several convolutions ({type(model.conv_proj).__name__})")
        for index, block in enumerate(model.encoder.layers):
            self.layout.check(
                block, source.EncoderBlock, nn.MultiheadAttention, f"encoder.layers.encoder_layer_{index}"
            )

    def blocks(self, tower: Any) -> Sequence[Any]:
        return tower.encoder.layers

    def embed(self, tower: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Places | None]:
        images = args[0] if args else kwargs["x"]
        check_images(tower.conv_proj, images)
        x = tower._process_input(images)
        x = _with_token(tower.class_token, x)
        return tower.encoder.dropout(x + tower.encoder.pos_embedding), None

    def finish(self, tower: Any, x: Tensor, weights: Weights | None, **kwargs: Any) -> Any:
        return tower.heads(tower.encoder.ln(x)[:, 0])

    def patch_projection(self, tower: Any) -> nn.Conv2d:
        return tower.conv_proj

    def image_size(self, tower: Any) -> tuple[int, int]:
        return tower.image_size, tower.image_size

    def head_cost(self, model: Any) -> int:
        return linear_cost(model.heads)


class OpenClipViT(IsotropicAdapter):
    """open_clip's VisionTransformer, alone or as the ``visual`` of a CLIP."""

    family = "open_clip VisionTransformer"
    layout = _layout(norm1="ln_1", scale1="ls_1", drop1=None, norm2="ln_2", scale2="ls_2", drop2=None)

    def claims(self, model: nn.Module) -> bool:
        return _is_visual(model) or (
            any(_is_from(model, "open_clip.model", name) for name in ("CLIP", "CustomTextCLIP"))
            and _is_visual(model.visual)  # type: ignore[arg-type]
        )

    def tower(self, model: Any) -> Any:
        return model if _is_visual(model) else model.visual

    def check(self, model: Any) -> None:
        source = sys.modules["open_clip.transformer"]
        tower = self.tower(model)
        path = "" if tower is model else "visual."
        _require_own_forward(tower, source.VisionTransformer)
        if tower.attn_pool is not None or tower.pool_type not in ("tok", "avg"):
            raise UnsupportedModelError(f"{path}attn_pool: attentional pooling is not understood, only 'tok' and 'avg'")
        if not isinstance(tower.patch_dropout, nn.Identity):
            raise UnsupportedModelError(f"{path}patch_dropout: {type(tower.patch_dropout).__name__} is not understood")
        for index, block in enumerate(self.blocks(tower)):
            name = f"{path}transformer.resblocks.{index}"
            self.layout.check(block, source.ResidualAttentionBlock, nn.MultiheadAttention, name)

    def blocks(self, tower: Any) -> Sequence[Any]:
        return tower.transformer.resblocks

    def embed(self, tower: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Places | None]:
        images = args[0] if args else kwargs["x"]
        check_images(tower.conv1, images)
        return tower._embeds(images), None

    def finish(self, tower: Any, x: Tensor, weights: Weights | None, **kwargs: Any) -> Any:
        if not tower.final_ln_after_pool:
            x = tower.ln_post(x)
        pooled = x[:, 0]
        if tower.pool_type == "avg":
            pooled = x[:, 1:].mean(1) if weights is None else weights.without(1).mean(x[:, 1:])
        if tower.final_ln_after_pool:
            pooled = tower.ln_post(pooled)
        if tower.proj is not None:
            pooled = pooled @ tower.proj
        return (pooled, x[:, 1:]) if tower.output_tokens else pooled

    def patch_projection(self, tower: Any) -> nn.Conv2d:
        return tower.conv1

    def image_size(self, tower: Any) -> tuple[int, int]:
        return tower.image_size

    def head_cost(self, model: Any) -> int:
        tower = self.tower(model)
        return 0 if tower.proj is None else tower.proj.numel()

    def logits(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def reads_patches(self, model: Any) -> bool:
        return self.tower(model).pool_type == "avg"

    def check_search(self, model: Any) -> None:
        if not _is_visual(model):
            raise UnsupportedModelError(
                f"a {original_class(model).__name__} needs texts as well, so a search has no logits to go by; pass "
                "model.visual"
            )

    def checkpoints(self, tower: Any) -> bool:
        return super().checkpoints(tower.transformer)


def _is_visual(module: nn.Module) -> bool:
    return _is_from(module, "open_clip.transformer", "VisionTransformer")


def _is_from(module: nn.Module, library: str, name: str) -> bool:
    """Whether a module is of a library's class of this name, which may never have been imported, or a subclass."""
    return any((cls.__module__, cls.__name__) == (library, name) for cls in original_class(module).__mro__)


def _require_own_forward(module: nn.Module, known: type) -> None:
    cls = original_class(module)
    if cls.forward is not known.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        raise UnsupportedModelError(f"{cls.__name__} is not understood: it has a forward of its own")


def _with_token(token: Tensor, x: Tensor) -> Tensor:
    """x [B, P, C] with a token [1, 1, C] before it."""
    return torch.cat((token.expand(x.shape[0], -1, -1), x), dim=1)

"""timm's Eva: EVA02, DINOv3, Perception Encoder, the rope ViTs. Rotary places follow their tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.blocks import CompressedBlock
from tokcomp.adapters.layout import Layout, PostNormLayout
from tokcomp.adapters.projections import Projection, packed, separate
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.blocks.places import Places
from tokcomp.fastpath.rows import Rows
from tokcomp.methods.base import Method


class EvaLayout(Layout):
    """q, k and v from one layer or three, fewer heads of k and v perhaps, turned by their tokens' places."""

    def project(
        self, attn: Any, x: Tensor, places: Places | None = None, block: int = 0, rows: Rows | None = None
    ) -> tuple[Tensor, ...]:
        q, k, v = super().project(attn, x, places, block, rows)
        groups = q.shape[1] // k.shape[1]
        return (q, k, v) if groups == 1 else (q, *(part.repeat_interleave(groups, dim=1) for part in (k, v)))

    def split(self, attn: Any, x: Tensor) -> tuple[Tensor, ...]:
        width = attn.head_dim
        if attn.qkv is None:
            return tuple(_heads(layer(x), width) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        if getattr(attn, "q_bias", None) is None:
            qkv = attn.qkv(x)
        else:  # as timm does it, whose layer has no bias of its own
            qkv = F.linear(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
        return tuple(_heads(part, width) for part in qkv.chunk(3, dim=-1))

    def rotate(self, attn: Any, x: Tensor, places: Places, block: int) -> Tensor:
        prefix = attn.num_prefix_tokens
        table = places.table[block] if places.table.ndim == 4 else places.table  # [P, 2D], or [H, P, 2D] if learnt
        if places.origin is not None:
            table = table[..., places.origin[:, prefix:] - prefix, :]  # [B, P', 2D], or [H, B, P', 2D]
            table = table.transpose(0, 1) if table.ndim == 4 else table.unsqueeze(1)  # [B, H or 1, P', 2D]
        turned = apply_rot_embed_cat(x[:, :, prefix:], table, half=getattr(attn, "rotate_half", False))
        return torch.cat((x[:, :, :prefix], turned), dim=2).to(x.dtype)

    def projection(self, attn: Any, name: str) -> Projection:
        if attn.qkv is None:
            return separate(attn.q_proj, attn.v_proj, name)
        return packed(attn.qkv, name, read_past=getattr(attn, "q_bias", None) is not None)


class EvaPostNormLayout(PostNormLayout, EvaLayout):
    """The same, with norms after attention and MLP."""


_PRE_NORM = EvaLayout(scale1="gamma_1", scale2="gamma_2")
_POST_NORM = EvaPostNormLayout(scale1=None, scale2=None)


class TimmEva(TimmVisionTransformer):
    """timm's Eva class."""

    family = "timm Eva (EVA02, DINOv3, PE, rope ViTs)"
    compressed_block = CompressedBlock
    models: tuple[type[nn.Module], ...] = (Eva,)

    def layout_of_block(self, block: Any) -> Layout:
        return _POST_NORM if isinstance(block, EvaBlockPostNorm) else _PRE_NORM

    def check_block(self, block: Any, name: str) -> None:
        known = EvaBlockPostNorm if isinstance(block, EvaBlockPostNorm) else EvaBlock
        attention = AttentionRope if isinstance(getattr(block, "attn", None), AttentionRope) else EvaAttention
        self.layout_of_block(block).check(block, known, attention, name)

    def validate(self, model: Any, method: Method) -> None:
        if model.patch_drop is not None:
            raise UnsupportedModelError(f"patch_drop: {type(model.patch_drop).__name__} cannot be compressed")
        if method.unmerges:
            raise UnsupportedModelError(f"{self.family}: {type(method).__name__} is for timm's VisionTransformer alone")
        super().validate(model, method)

    def place(self, model: Any, x: Tensor) -> tuple[Tensor, Places | None]:
        x, table = model._pos_embed(x)
        return x, None if table is None else Places(table)

    def pools_prefix(self, model: Any) -> bool:
        return model.attn_pool is not None

    def products_of(self, model: Any, images: Tensor) -> None:
        """Nothing: the fast path is for timm's VisionTransformer."""

    def pack_search(self, model: Any, images: Tensor) -> None:
        """Nothing, likewise."""


def _heads(x: Tensor, width: int) -> Tensor:
    """x [B, N, H * D] by heads of this width: [B, H, N, D]."""
    return x.unflatten(2, (x.shape[2] // width, width)).transpose(1, 2)

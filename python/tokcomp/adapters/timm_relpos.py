"""timm's BEiT, BEiT v2 and relative-position ViTs: a bias for each pair of places, looked up by the tokens' own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosMlp
from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor

from tokcomp.adapters.base import Cost, UnsupportedModelError
from tokcomp.adapters.blocks import CompressedBlock
from tokcomp.adapters.layout import Layout, PostNormLayout, linear_cost
from tokcomp.adapters.projections import Projection, packed
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.blocks.places import Places
from tokcomp.methods.base import Method


class BiasLayout(Layout):
    """Attention with a bias per pair of places, its own, the model's for all blocks, or both."""

    def rotate(self, attn: Any, x: Tensor, places: Places, block: int) -> Tensor:
        return x

    def own_bias(self, attn: Any) -> Tensor | None:
        """The attention's own bias of every pair of places, [1, H, P, P]."""
        return None if attn.rel_pos is None else attn.rel_pos.get_bias()

    def pair_bias(self, attn: Any, places: Places | None) -> Tensor | None:
        assert places is not None
        parts = [part for part in (self.own_bias(attn), places.table) if part is not None]
        if not parts:
            return None
        bias = sum(parts[1:], parts[0])  # [1, H, P, P]
        origin = places.origin
        if origin is None:
            return bias
        return bias[0][:, origin.unsqueeze(2), origin.unsqueeze(1)].transpose(0, 1)  # [B, H, N, N]


class BeitLayout(BiasLayout):
    """BEiT's: the biases of q and v are parameters beside the layer, that of k a buffer."""

    def own_bias(self, attn: Any) -> Tensor | None:
        return None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()

    def split(self, attn: Any, x: Tensor) -> tuple[Tensor, ...]:
        if attn.q_bias is None:
            qkv = attn.qkv(x)
        else:  # as timm does it, whose layer has no bias of its own
            qkv = F.linear(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
        return qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def projection(self, attn: Any, name: str) -> Projection:
        return packed(attn.qkv, name, read_past=attn.q_bias is not None)


class RelPosPostNormLayout(PostNormLayout, BiasLayout):
    """The same, with norms after attention and MLP."""


class _Biased(TimmVisionTransformer):
    """What both families share: no attention pooling, no dropped patches, and places that the bias is looked up by."""

    compressed_block = CompressedBlock

    def validate(self, model: Any, method: Method) -> None:
        if method.unmerges:
            raise UnsupportedModelError(f"{self.family}: {type(method).__name__} is for timm's VisionTransformer alone")
        super().validate(model, method)

    def enter(self, model: Any, x: Tensor) -> Tensor:
        return x

    def products_of(self, model: Any, images: Tensor) -> None:
        """Nothing: the fast path is for timm's VisionTransformer."""

    def pack_search(self, model: Any, images: Tensor) -> None:
        """Nothing, likewise."""


class TimmBeit(_Biased):
    """timm's Beit class."""

    family = "timm BEiT"
    models = (beit.Beit,)
    block, attention = beit.Block, (beit.Attention,)
    layout = BeitLayout(scale1="gamma_1", scale2="gamma_2", norms=None)

    def place(self, model: Any, x: Tensor) -> tuple[Tensor, Places | None]:
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if model.pos_embed is not None:
            x = x + model.pos_embed
        shared = None if model.rel_pos_bias is None else model.rel_pos_bias().unsqueeze(0)
        return model.pos_drop(x), Places(shared)


_RELPOS = BiasLayout()
_RELPOS_POST_NORM = RelPosPostNormLayout(scale1=None, scale2=None)


class TimmRelPos(_Biased):
    """timm's VisionTransformerRelPos class."""

    family = "timm VisionTransformerRelPos"
    models = (relpos.VisionTransformerRelPos,)
    attention = (relpos.RelPosAttention,)

    def layout_of_block(self, block: Any) -> Layout:
        return _RELPOS_POST_NORM if isinstance(block, relpos.ResPostRelPosBlock) else _RELPOS

    def check_block(self, block: Any, name: str) -> None:
        known = relpos.ResPostRelPosBlock if isinstance(block, relpos.ResPostRelPosBlock) else relpos.RelPosBlock
        self.layout_of_block(block).check(block, known, self.attention[0], name)
        if not isinstance(block.attn.rel_pos, (RelPosBias, RelPosMlp, type(None))):
            kind = type(block.attn.rel_pos).__name__
            raise UnsupportedModelError(f"{name}.attn.rel_pos: {kind} is not understood, only RelPosBias and RelPosMlp")

    def place(self, model: Any, x: Tensor) -> tuple[Tensor, Places | None]:
        if model.cls_token is not None:
            x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        return x, Places(None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias())

    def cost(self, model: Any, img_size: tuple[int, int] | None = None) -> Cost:
        cost = super().cost(model, img_size)
        tables: list[Any] = [model.shared_rel_pos, *(block.attn.rel_pos for block in model.blocks)]
        # An MLP makes the bias of every distance, once a batch: counted for a batch of one image.
        mlps = [one for one in tables if isinstance(one, RelPosMlp)]
        bias = sum(linear_cost(one.mlp) * math.prod(2 * side - 1 for side in one.window_size) for one in mlps)
        return cost._replace(head=cost.head + bias)

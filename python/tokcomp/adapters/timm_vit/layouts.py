"""timm's other blocks for its VisionTransformer: post-norm, and those that run their parts in parallel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.layout import (
    Layout,
    PostNormLayout,
    linear_cost,
    require,
    require_tokenwise,
    require_unwatched,
)
from tokcomp.adapters.projections import Projection, joined, packed
from tokcomp.blocks.places import Places
from tokcomp.fastpath.rows import Rows


class ParallelScalingLayout(Layout):
    """Attention and MLP side by side on the same tokens: the block's tokens are reduced once both have been added.

    The block itself holds the attention's layers: one product gives the MLP's hidden channels, q, k and v.
    """

    def attention_of(self, block: Any) -> Any:
        return block

    def split(self, attn: Any, x: Tensor) -> tuple[Tensor, ...]:
        hidden, layer = attn.in_split[0], attn.in_proj
        qkv = F.linear(x, layer.weight[hidden:], None if layer.bias is None else layer.bias[hidden:])
        return qkv.unflatten(2, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, attn: Any, out: Tensor, x: Tensor) -> Tensor:
        width, layer = attn.in_split[0], attn.in_proj
        out = out.transpose(1, 2).flatten(2)
        bias = attn.mlp_bias if layer.bias is None else layer.bias[:width]
        hidden = attn.mlp_drop(attn.mlp_act(F.linear(x, layer.weight[:width], bias)))
        if attn.out_proj is not None:
            return attn.out_proj(torch.cat((out, hidden), dim=-1))
        return attn.attn_out_proj(out) + attn.mlp_out_proj(hidden)

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        return block.in_norm(x)

    def add_attention(self, block: Any, x: Tensor, branch: Tensor) -> Tensor:
        return x + block.drop_path(block.ls(branch))

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        return x

    def costs(self, block: Any) -> tuple[int, int, int]:
        return linear_cost(block), self.width(block), 0

    def width(self, attn: Any) -> int:
        return attn.num_heads * attn.head_dim

    def projection(self, attn: Any, name: str) -> Projection:
        return packed(attn.in_proj, name, slice(attn.in_split[0], sum(attn.in_split)), read_past=True)

    def check(self, block: Any, known: type, known_attention: type, name: str) -> None:
        require(block, known, ("in_norm", "in_proj", "in_split", "ls", "mlp_act", "attn_drop"), name)
        require(block.in_proj, nn.Linear, ("weight", "bias"), f"{name}.in_proj")
        require_unwatched(block.in_proj, f"{name}.in_proj")
        require_tokenwise(block, name)


class ParallelThingsLayout(Layout):
    """Several attentions side by side, then several MLPs: one attention over all of their heads."""

    def attention_of(self, block: Any) -> Any:
        return block

    def project(
        self, attn: Any, x: Tensor, places: Places | None = None, block: int = 0, rows: Rows | None = None
    ) -> tuple[Tensor, ...]:
        project = super().project
        parts = [project(one.attn, one.norm(x), rows=rows) for one in attn.attns]
        return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def join(self, attn: Any, out: Tensor, x: Tensor) -> Tensor:
        parts = zip(attn.attns, out.split([one.attn.num_heads for one in attn.attns], dim=1), strict=True)
        join = super().join
        return torch.stack([one.drop_path(one.ls(join(one.attn, heads, x))) for one, heads in parts]).sum(0)

    def heads(self, attn: Any) -> int:
        return super().heads(attn.attns[0].attn)  # of one attention: it is these that divide the channels

    def score_scale(self, attn: Any) -> float:
        return super().score_scale(attn.attns[0].attn)

    def dropout_p(self, attn: Any) -> float:
        return super().dropout_p(attn.attns[0].attn)

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        return x

    def add_attention(self, block: Any, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch

    def mlp_branch(self, block: Any, x: Tensor) -> Tensor:
        return torch.stack([one(x) for one in block.ffns]).sum(0)

    def costs(self, block: Any) -> tuple[int, int, int]:
        attentions = [one.attn for one in block.attns]
        return linear_cost(block.attns), sum(map(self.width, attentions)), linear_cost(block.ffns)

    def projection(self, attn: Any, name: str) -> Projection:
        return joined(super(ParallelThingsLayout, self).projection(one.attn, name) for one in attn.attns)

    def check(self, block: Any, known: type, known_attention: type, name: str) -> None:
        require(block, known, ("attns", "ffns"), name)
        for index, one in enumerate(block.attns):
            require(one, nn.Sequential, ("norm", "attn", "ls", "drop_path"), f"{name}.attns.{index}")
            for part, path in ((one, ""), (one.attn, ".attn")):
                require_unwatched(part, f"{name}.attns.{index}{path}")
            require(one.attn, Attention, ("qkv", "q_norm", "k_norm", "proj", "scale"), f"{name}.attns.{index}.attn")
            if (one.attn.num_heads, one.attn.scale) != (block.attns[0].attn.num_heads, block.attns[0].attn.scale):
                raise UnsupportedModelError(f"{name}.attns.{index}.attn: its heads differ from those beside it")
        require_tokenwise(block, name)


#: What a VisionTransformer's blocks may be besides timm's Block.
LAYOUTS: dict[type[nn.Module], Layout] = {
    ResPostBlock: PostNormLayout(scale1=None, scale2=None),
    ParallelScalingBlock: ParallelScalingLayout(has_mlp=False),
    ParallelThingsBlock: ParallelThingsLayout(),
}

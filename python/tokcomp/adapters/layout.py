"""Where a family's block keeps its parts. What is done with them stands in blocks.py, once for every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters.base import UnsupportedModelError
from tokcomp.adapters.projections import Projection, packed, separate
from tokcomp.adapters.swap import original_class
from tokcomp.blocks.places import Places
from tokcomp.fastpath import has_hooks
from tokcomp.fastpath.rows import Rows

#: Modules that are no function of one token alone; nn.InstanceNorm is a _NormBase too.
TOKEN_MIXERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True)
class Layout:
    """Names of a block's and its attention's parts, timm's unless told otherwise; None where there is no such part.

    The block computes ``x + drop1(scale1(attention(norm1(x))))`` and then ``x + drop2(scale2(mlp(norm2(x))))``. A scale
    is a module or a parameter to multiply by. A family that differs otherwise overrides a method or two. :meth:`split`,
    :meth:`join` and :meth:`add_mlp` take each token for itself: they may get those of all images as [1, T, C].
    """

    norm1: str = "norm1"
    attention: str = "attn"
    scale1: str | None = "ls1"
    drop1: str | None = "drop_path1"
    norm2: str = "norm2"
    mlp: str = "mlp"
    scale2: str | None = "ls2"
    drop2: str | None = "drop_path2"
    #: Of the attention: one layer for q, k and v (their rows in this order), or the names of three.
    qkv: str | tuple[str, str, str] = "qkv"
    num_heads: str = "num_heads"
    scale: str = "scale"
    dropout: str = "attn_drop"
    norms: tuple[str, str] | None = ("q_norm", "k_norm")
    out_norm: str | None = "norm"
    out: str = "proj"
    out_dropout: str | None = "proj_drop"
    #: Whether the block has an MLP after its attention, for which tokens can be reduced.
    has_mlp: bool = True

    def project(
        self, attn: Any, x: Tensor, places: Places | None = None, block: int = 0, rows: Rows | None = None
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values [B, H, N, D] of normalised tokens x [B, N, C], views of packed ones where possible.

        Args:
            attn: the block's attention.
            x: the tokens.
            places: theirs, where the family's attention goes by them.
            block: index of the block, for a family whose blocks read ``places`` differently.
            rows: those to compute; what is made of the others is of no account. None: all.
        """
        if rows is None:
            q, k, v = self.split(attn, x)
        else:
            q, k, v = map(rows.padded_heads, self.split(attn, rows.packed(x)[None]))
        if self.norms is not None:
            q, k = (getattr(attn, name)(part) for name, part in zip(self.norms, (q, k), strict=True))
        if places is not None:
            q, k = self.rotate(attn, q, places, block), self.rotate(attn, k, places, block)
        if q.dtype != v.dtype:  # a norm that stays in float32 under autocast
            q, k = q.to(v.dtype), k.to(v.dtype)
        return q, k, v

    def split(self, attn: Any, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [B, H, N, D] of x [B, N, C] before any norm of theirs."""
        batch, num_tokens, _ = x.shape
        heads = getattr(attn, self.num_heads)
        if isinstance(self.qkv, str):
            qkv = getattr(attn, self.qkv)(x)
            qkv = qkv.reshape(batch, num_tokens, 3, heads, qkv.shape[2] // (3 * heads))
            return qkv.permute(2, 0, 3, 1, 4).unbind(0)
        parts = (getattr(attn, name)(x) for name in self.qkv)
        return tuple(part.reshape(batch, num_tokens, heads, part.shape[2] // heads).transpose(1, 2) for part in parts)

    def rotate(self, attn: Any, x: Tensor, places: Places, block: int) -> Tensor:
        """Queries or keys x [B, H, N, D] turned by their tokens' places; for families that have any."""
        raise NotImplementedError(f"{type(self).__name__} says nothing of places")

    def pair_bias(self, attn: Any, places: Places | None) -> Tensor | None:
        """What is added to the scores for each pair of tokens, [B or 1, H, N, N]; None: nothing."""
        return None

    def stock_attention(
        self, attn: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
    ) -> Tensor:
        """The attention [B, H, N, D] that the family itself runs; mask [B, 1, 1, N] is added to the scores."""
        scale = self.score_scale(attn)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)

    def score_scale(self, attn: Any) -> float:
        """The factor on q k^T."""
        return float(getattr(attn, self.scale))

    def dropout_p(self, attn: Any) -> float:
        """Dropout on the attention map as it is now: 0 outside training."""
        if not attn.training:
            return 0.0
        dropout = getattr(attn, self.dropout)
        return float(getattr(dropout, "p", dropout))

    def join(self, attn: Any, out: Tensor, x: Tensor) -> Tensor:
        """What the attention makes of its heads' outputs [B, H, M, D], for its normalised input x [B, M, C]."""
        out = out.transpose(1, 2).flatten(2)
        norm = None if self.out_norm is None else getattr(attn, self.out_norm, None)
        if norm is not None:
            out = norm(out)
        gate = getattr(attn, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        out = getattr(attn, self.out)(out)
        return out if self.out_dropout is None else getattr(attn, self.out_dropout)(out)

    def attention_of(self, block: Any) -> Any:
        """The block's attention module; the block itself where that holds the attention's layers."""
        return getattr(block, self.attention)

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        """What the attention gets of the residual stream x [B, N, C]."""
        return getattr(block, self.norm1)(x)

    def add_attention(self, block: Any, x: Tensor, branch: Tensor) -> Tensor:
        """The residual stream once the attention's result has joined it."""
        return x + _optional(block, self.drop1, _scaled(block, self.scale1, branch))

    def mlp_branch(self, block: Any, x: Tensor) -> Tensor:
        """What the MLP adds to tokens x [B, M, C]."""
        branch = getattr(block, self.mlp)(getattr(block, self.norm2)(x))
        return _optional(block, self.drop2, _scaled(block, self.scale2, branch))

    def add_mlp(self, block: Any, x: Tensor) -> Tensor:
        """The residual stream x [B, M, C] once the MLP's result has joined it."""
        return x + self.mlp_branch(block, x)

    def costs(self, block: Any) -> tuple[int, int, int]:
        """Multiply-adds per token of the attention's layers, its width over all heads, and those of the MLP."""
        attn = self.attention_of(block)
        return linear_cost(attn), self.width(attn), linear_cost(getattr(block, self.mlp))

    def width(self, attn: Any) -> int:
        """Channels of all heads' values together."""
        return int(getattr(attn, self.out).in_features)

    def heads(self, attn: Any) -> int:
        """The attention's heads."""
        return int(getattr(attn, self.num_heads))

    def projection(self, attn: Any, name: str) -> Projection:
        """Where the weights are that make q and v.

        Raises:
            UnsupportedModelError: they come from something else than layers.
        """
        if isinstance(self.qkv, str):
            return packed(getattr(attn, self.qkv), name)
        return separate(getattr(attn, self.qkv[0]), getattr(attn, self.qkv[2]), name)

    def check(self, block: Any, known: type, known_attention: type, name: str) -> None:
        """Raise UnsupportedModelError, with its path, for the first part of a block that is not understood.

        Args:
            block: the block.
            known, known_attention: the library's classes whose forward functions this layout was written against.
            name: the block's path in the model.
        """
        attention = f"{name}.{self.attention}"
        named = (self.scale1, self.drop1, self.scale2, self.drop2)
        main = (self.norm1, self.attention, self.norm2, self.mlp)
        require(block, known, (*main, *filter(None, named)), name)
        absent = [part for part in main if getattr(block, part) is None]
        if absent:
            raise UnsupportedModelError(f"{name}: its {absent[0]} is None, so it is not understood")
        parts = [self.num_heads, self.scale, self.dropout, self.out, *(self.norms or ())]
        parts += [self.qkv] if isinstance(self.qkv, str) else self.qkv
        parts += filter(None, [self.out_dropout])
        require(self.attention_of(block), known_attention, tuple(filter(None, parts)), attention)
        require_tokenwise(block, name)


class PostNormLayout(Layout):
    """A block that normalises what its attention and its MLP give, not what they get."""

    def attention_input(self, block: Any, x: Tensor) -> Tensor:
        return x

    def add_attention(self, block: Any, x: Tensor, branch: Tensor) -> Tensor:
        return x + block.drop_path1(block.norm1(branch))

    def mlp_branch(self, block: Any, x: Tensor) -> Tensor:
        return block.drop_path2(block.norm2(block.mlp(x)))


def require(module: nn.Module, known: type, parts: tuple[str, ...], name: str) -> None:
    """Raise UnsupportedModelError unless ``module`` runs ``known``'s forward and has these parts."""
    cls = original_class(module)
    if getattr(cls, "forward", None) is not known.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        library = known.__module__.split(".")[0]
        raise UnsupportedModelError(f"{name}: {cls.__name__} is not understood, only {library}'s {known.__name__}")
    missing = [part for part in parts if not hasattr(module, part)]
    if missing:
        raise UnsupportedModelError(f"{name}: {cls.__name__} has no {missing[0]}, so it is not understood")


def require_unwatched(module: nn.Module, name: str) -> None:
    """Raise UnsupportedModelError where a module has hooks, which would not run."""
    if has_hooks([module]):
        raise UnsupportedModelError(
            f"{name}: its hooks would not run, because a compressed block computes it together with others; remove them"
        )


def require_tokenwise(module: nn.Module, name: str) -> None:
    """Raise UnsupportedModelError naming the first module in ``module`` that mixes tokens."""
    for inner, part in module.named_modules(prefix=name):
        if isinstance(part, TOKEN_MIXERS):
            raise UnsupportedModelError(f"{inner}: a {type(part).__name__} mixes tokens, so it is not understood")


def linear_cost(module: nn.Module) -> int:
    """Multiply-adds per token of the linear layers in a module, nn.MultiheadAttention's packed one included."""
    cost = 0
    for part in module.modules():
        if isinstance(part, nn.Linear):
            cost += part.in_features * part.out_features
        elif isinstance(part, nn.MultiheadAttention):
            cost += 3 * part.embed_dim**2
    return cost


def _scaled(block: Any, name: str | None, branch: Tensor) -> Tensor:
    scale = None if name is None else getattr(block, name)
    if scale is None:
        return branch
    return scale * branch if isinstance(scale, torch.Tensor) else scale(branch)


def _optional(block: Any, name: str | None, branch: Tensor) -> Tensor:
    return branch if name is None else getattr(block, name)(branch)

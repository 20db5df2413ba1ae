"""A vision transformer written out as plain functions of one image's tokens x [N, C] and a dict of weights.

No timm and no tokcomp: the weights bear timm's names, and that is all. float64 throughout; nothing is batched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Added to the numerator (shared among the N keys) and to the denominator of the masked softmax.
MASK_EPS = 1e-6


class PlainViT(NamedTuple):
    """A model: its weights, and what they do not say of themselves."""

    weights: dict[str, Tensor]
    depth: int
    num_heads: int
    num_prefix: int = 1  # class, distillation and register tokens
    pools_patches: bool = False  # the classifier reads the mean of the patch tokens, not the class token

    @property
    def num_tokens(self) -> int:
        return self.weights["pos_embed"].shape[1]


class Attended(NamedTuple):
    """What attention made of one image."""

    out: Tensor  # [N, C]
    map: Tensor  # [H, N, N]
    keys: Tensor  # [H, N, D]
    values: Tensor  # [H, N, D]


def linear(vit: PlainViT, name: str, x: Tensor) -> Tensor:
    return x @ vit.weights[f"{name}.weight"].T + vit.weights[f"{name}.bias"]


def layer_norm(vit: PlainViT, name: str, x: Tensor) -> Tensor:
    """The identity where the model has no such norm."""
    if f"{name}.weight" not in vit.weights:
        return x
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * vit.weights[f"{name}.weight"] + vit.weights[f"{name}.bias"]


def layer_scale(vit: PlainViT, name: str, x: Tensor) -> Tensor:
    return x * vit.weights.get(f"{name}.gamma", torch.ones((), dtype=x.dtype))


def embed(vit: PlainViT, image: Tensor) -> Tensor:
    """image [3, S, S] -> [N, C]: the prefix tokens, then the patches row by row, each with its position."""
    kernel = vit.weights["patch_embed.proj.weight"]  # [C, 3, p, p]
    side = kernel.shape[-1]
    squares = image.unfold(1, side, side).unfold(2, side, side)  # [3, S/p, S/p, p, p]
    squares = squares.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)  # [P, 3 p p]
    patches = squares @ kernel.flatten(1).T + vit.weights["patch_embed.proj.bias"]
    prefix = [vit.weights[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in vit.weights]
    return torch.cat([*prefix, patches]) + vit.weights["pos_embed"][0]


def attention(
    vit: PlainViT,
    block: int,
    x: Tensor,
    size: Tensor | None,
    mask: Tensor | None = None,
    *,
    hold_maximum: bool = True,
) -> Attended:
    """Proportional attention where there are sizes [N]; masked as in Eq. 11-12 where there is a mask [N].

    The maximum of a row is a factor of numerator and denominator, constant here. The published code differentiates it
    (``hold_maximum=False``), which MASK_EPS does not quite cancel.
    """
    name = f"blocks.{block}.attn"
    num_tokens, channels = x.shape
    width = channels // vit.num_heads

    def heads(part: Tensor) -> Tensor:  # [N, C] -> [H, N, D]
        return part.reshape(num_tokens, vit.num_heads, width).transpose(0, 1)

    y = layer_norm(vit, f"blocks.{block}.norm1", x)
    q, k, v = (heads(part) for part in linear(vit, f"{name}.qkv", y).split(channels, dim=1))
    q, k = layer_norm(vit, f"{name}.q_norm", q), layer_norm(vit, f"{name}.k_norm", k)
    scores = q @ k.transpose(1, 2) / width**0.5
    if size is not None:
        scores = scores + size.log()
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - (largest.detach() if hold_maximum else largest)).exp()
    if mask is None:
        chances = weights / weights.sum(-1, keepdim=True)
    else:
        own = torch.eye(num_tokens, dtype=torch.bool)
        weights = weights * torch.where(own, torch.ones_like(mask), mask)
        chances = (weights + MASK_EPS / num_tokens) / (weights.sum(-1, keepdim=True) + MASK_EPS)
    out = (chances @ v).transpose(0, 1).reshape(num_tokens, channels)
    return Attended(layer_scale(vit, f"blocks.{block}.ls1", linear(vit, f"{name}.proj", out)), chances, k, v)


def mlp(vit: PlainViT, block: int, x: Tensor) -> Tensor:
    name = f"blocks.{block}.mlp"
    hidden = F.gelu(linear(vit, f"{name}.fc1", layer_norm(vit, f"blocks.{block}.norm2", x)))
    return layer_scale(vit, f"blocks.{block}.ls2", linear(vit, f"{name}.fc2", hidden))


def classify(vit: PlainViT, x: Tensor, size: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """[N, C] -> [classes]. Pooling weighs a patch token by its size; a mask's gradient goes by the numerator alone."""
    x = layer_norm(vit, "norm", x)
    if vit.pools_patches:
        weight = torch.ones(len(x), dtype=x.dtype) if size is None else size
        weight = (weight if mask is None else weight * mask)[vit.num_prefix :]
        pooled = weight @ x[vit.num_prefix :] / weight.detach().sum()
        return linear(vit, "head", layer_norm(vit, "fc_norm", pooled))
    logits = linear(vit, "head", x[0])
    return (logits + linear(vit, "head_dist", x[1])) / 2 if "head_dist.weight" in vit.weights else logits

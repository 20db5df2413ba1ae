"""What became of every patch of an image in every block, and how important its token was there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.api import compress, restore, trace
from tokcomp.methods import Evidence, Method


@dataclass(frozen=True)
class Block:
    """The patches of one image, in row order, after one block.

    Attributes:
        source: [P], the token that each patch is in, -1 if it was pruned.
        importance: [P], the attention that each patch's token got in this block, before it dropped any, over the mean
            of all patch tokens; 0 where the patch was pruned earlier. None if the block drops nothing.
    """

    source: list[int]
    importance: list[float] | None


@torch.no_grad()
def watch(model: nn.Module, images: Tensor, method: Method) -> list[list[Block]]:
    """Run ``images`` through ``model`` under ``method``: for each image, its blocks in order.

    Importance is the class token's attention, or the attention received from all tokens where the model has no class
    token, under every method alike, whatever it goes by itself.

    Args:
        model: plain, in evaluation mode; it is left so.
        images: [n, 3, H, W] as the model takes them.
        method: what to watch.

    Raises:
        ValueError, TypeError: as :func:`tokcomp.compress`.
    """
    geometry = find_adapter(model).geometry(model)
    prefix, kind = geometry.num_prefix_tokens, "cls_attn" if geometry.has_class_token else "image_attn"
    told, heard = _overheard(method.fitted(geometry), kind)
    try:
        compress(model, told)
        maps = trace(model, images)
    finally:
        restore(model)
    entering = torch.arange(maps[0].shape[1], device=maps[0].device).expand(len(images), -1)
    found: list[list[Block]] = [[] for _ in images]
    for number, leaving in enumerate(maps):
        importance = _of_patches(heard[number], entering, prefix) if number in heard else None
        for index, blocks in enumerate(found):
            shares = None if importance is None else [round(share, 2) for share in importance[index].tolist()]
            blocks.append(Block(leaving[index, prefix:].tolist(), shares))
        entering = leaving
    return found


def _of_patches(score: Tensor, entering: Tensor, prefix: int) -> Tensor | None:
    """The importance [B, P] of each patch's token, over the mean, of the scores [B, N] of tokens entering a block."""
    if score.shape[1] <= int(entering.max()):
        return None  # this block saw other tokens than the map says: every position has its own again
    score = score.float().nan_to_num(0.0)
    # Only tokens that patches are in: where images keep different numbers of them, the others fill the batch.
    alive = torch.zeros_like(score).scatter(1, entering.clamp(min=0), (entering >= 0).float())
    alive[:, :prefix] = 0
    mean = (score * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp(min=1)
    score = score / mean.clamp(min=1e-12)
    return score.gather(1, entering.clamp(min=0)).masked_fill(entering < 0, 0.0)[:, prefix:]


def _overheard(method: Method, kind: str) -> tuple[Method, dict[int, Tensor]]:
    """A copy of ``method`` that is told one more kind of evidence, and what it was told, by block."""
    told, heard = copy.copy(method), dict[int, Tensor]()
    score = told.score

    def listening(evidence: Evidence, block: int, x: Tensor) -> Tensor:
        heard[block] = evidence.require(kind)
        return score(evidence, block, x)

    told.needs = method.needs | {kind}
    told.score = listening  # type: ignore[method-assign]
    return told, heard

"""Methods under which the number of tokens left differs from image to image.

A batch is padded to its longest image. Padding comes last, has size 0 and source -1, and nobody attends to it, so that
an image's logits do not depend on what else is in the batch. How long the longest image is, the host must know: such a
method waits for the device once in every block, and cannot be captured or exported.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from tokcomp.methods.base import Assignment, Geometry, Method


class Packed(NamedTuple):
    """Tokens that stay, packed in the order of position in front of the padding."""

    slot: Tensor  # [B, N] int64: where each token that stays goes
    kept: Tensor  # [B, M] int64: which token each slot has; any token for padding
    alive: Tensor  # [B, M] bool: whether a slot is no padding

    @classmethod
    def of(cls, stay: Tensor) -> Packed:
        """Of the tokens that stay, [B, N] bool."""
        count = stay.sum(1, keepdim=True)  # [B, 1]
        longest = int(count.max()) if len(count) else stay.shape[1]
        kept = stay.to(torch.int32).sort(dim=1, descending=True, stable=True).indices[:, :longest]
        return cls(stay.cumsum(1) - 1, kept, torch.arange(longest, device=stay.device) < count)


class VaryingMethod(Method):
    """A method that leaves each image as many tokens as it needs. :meth:`assign` says what is to be expected."""

    varies = True

    def validate(self, geometry: Geometry) -> None:
        if geometry.spreads_tokens:
            name = type(self).__name__
            raise ValueError(f"{name} needs a plain vision transformer, got a hierarchical model; use ToMe or DiffRate")

    @abstractmethod
    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        """What :func:`tokcomp.flops` counts, or None for a block that drops nothing from any image."""


def alive_tokens(x: Tensor, size: Tensor | None) -> Tensor:
    """[B, N] bool: which of the tokens x [B, N, C] are no padding."""
    return x.new_ones(x.shape[:2], dtype=torch.bool) if size is None else size > 0


def without_padding(x: Tensor, size: Tensor) -> Tensor:
    """x [B, M, C] with the image's last token in place of padding, so that pooling by the largest value is right."""
    last = (size > 0).sum(1, keepdim=True) - 1  # [B, 1]
    place = torch.arange(x.shape[1], device=x.device).minimum(last)
    return x.gather(1, place[:, :, None].expand_as(x))

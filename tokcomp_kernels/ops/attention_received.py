"""attention_received: what all tokens together pay attention to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.ops._register import register


def attention_received(
    q: Tensor, k: Tensor, *, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 0
) -> Tensor:
    """The attention that each token receives from all tokens: importance for a model without a class token (DiffRate).

    Never holds the [B, H, N, N] map.

    Args:
        q, k: [B, H, N, D], any strides: views of a packed QKV tensor are read in place.
        size: Patches in each token, [B, N]; adds log size to the scores. No bias where None.
        scale: Factor of the scores; D ** -0.5 where None.
        num_prefix_tokens: Tokens in front that a ranking leaves where they are. They attend and receive like all
            others, so it changes nothing here.

    Returns:
        [B, N] float32 (float64 for float64 input): softmax(q k^T * scale + log size), averaged over heads and over all
        N query rows, so each image's entries sum to 1. Without a gradient.

    Raises:
        ValueError: Wrong shapes or devices, no token, num_prefix_tokens outside 0 .. N.
        TypeError: A dtype that is not floating, or not the same for q and k.
    """
    return torch.ops.tokcomp.attention_received(q, k, size=size, scale=scale, num_prefix_tokens=num_prefix_tokens)


def _fake(q: Tensor, *rest: Any, **options: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=accumulate_dtype(q))


register(
    "attention_received",
    fake=_fake,
    autocast=("q", "k"),
)

"""class_attention_sort: the class token's attention and the order it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.ops._register import register


def class_attention_sort(
    q_cls: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """Rank tokens by class attention (DiffRate Eq. 6, EViT).

    Args:
        q_cls: The class token's query, [B, H, D].
        k: Keys, [B, H, N, D], any strides.
        size: Patches in each token, [B, N]; adds log size to the scores. No bias where None.
        scale: Factor of the scores; D ** -0.5 where None.
        num_prefix_tokens: Tokens that stay in front, whatever their attention.

    Returns:
        cls_attn [B, N] float32: softmax(q_cls k^T * scale + log size), averaged over heads; token_order [B, N] int64:
        the prefix, then the others by descending cls_attn, ties by lower index, NaN last. Neither carries a gradient.

    Raises:
        ValueError: Wrong shapes or devices, num_prefix_tokens outside 0 .. N.
        TypeError: A dtype that is not floating, or not the same for q_cls and k.
    """
    return torch.ops.tokcomp.class_attention_sort(q_cls, k, size, scale, num_prefix_tokens)


def _fake(q_cls: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, _, num_tokens, _ = k.shape
    cls_attn = k.new_empty(batch, num_tokens, dtype=accumulate_dtype(k))
    return cls_attn, k.new_empty(batch, num_tokens, dtype=torch.int64)


register(
    "class_attention_sort",
    fake=_fake,
    autocast=("q_cls", "k"),
)

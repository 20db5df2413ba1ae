"""transformers' FlexAttention where tokens have sizes: a mask by key, not by pair.

Given the mask [B, 1, 1, N] itself, transformers reads a number for each pair of tokens. Compiled for a CPU, PyTorch
2.14's FlexAttention does not survive that; nor does it compile a mask by key for lengths that vary, only for each anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Lengths that are compiled for a CPU in one process.
_MOST_LENGTHS = 256


def flex_attention_by_key(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout_p: float) -> Tensor:
    """softmax(q k^T * scale + mask) v, [B, H, N, D], as FlexAttention computes it.

    Raises:
        ValueError: dropout is asked for, which FlexAttention does not have.
    """
    if dropout_p > 0:
        raise ValueError(f"attention dropout must be 0 for flex_attention, which has none, got {dropout_p}")
    bias = mask[:, 0, 0]  # [B, N]

    def by_key(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[image, key]

    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        with torch._dynamo.config.patch(recompile_limit=_MOST_LENGTHS, accumulated_recompile_limit=_MOST_LENGTHS):
            out: Any = _for_each_length()(q, k, v, score_mod=by_key, scale=scale)
            return out
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    found: Any = compile_friendly_flex_attention(q, k, v, score_mod=by_key, scale=scale)
    return found


@functools.cache
def _for_each_length() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)

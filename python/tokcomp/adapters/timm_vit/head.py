"""Pooling and classifier of timm's VisionTransformer and Eva, for tokens that do not all count the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.swap import original_class

#: Values of global_pool whose result depends on what each token counts for.
WEIGHTED = ("avg", "avgmax", "map")


def reads_patches(model: Any) -> bool:
    """Whether the head reads patch tokens, so that the last block's compression would cost what it saves no one."""
    return attention_pool(model) is not None or model.global_pool != "token"


def attention_pool(model: Any) -> Any:
    """The module that pools by attention; None for a model without."""
    return getattr(model, "attn_pool", None)


def head(model: Any, x: Tensor, weights: Weights | None, pre_logits: bool = False, with_prefix: bool = False) -> Tensor:
    """Logits of normalised tokens x [B, M, C]; ``with_prefix``: this model pools over prefix tokens too."""
    weighted = (*WEIGHTED, "max") if weights is not None and weights.mask is not None else WEIGHTED
    pool = attention_pool(model)
    if weights is None or (model.global_pool not in weighted and pool is None):
        return original_class(model).forward_head(model, x, pre_logits=pre_logits)  # type: ignore[attr-defined]
    if not with_prefix:
        x, weights = x[:, model.num_prefix_tokens :], weights.without(model.num_prefix_tokens)
    if pool is not None:
        pooled = pool(x, attn_mask=weights.log(x.dtype))
    elif model.global_pool == "max":
        pooled = weights.max(x)
    else:
        pooled = weights.mean(x)
        if model.global_pool == "avgmax":
            pooled = 0.5 * (weights.max(x) + pooled)
    pooled = model.head_drop(model.fc_norm(pooled))
    return pooled if pre_logits else model.head(pooled)

"""Checks of values, which cost a device synchronisation and so run only under TOKCOMP_CHECK=1 (read once at import).

Without them nothing is read or written out of bounds and sizes stay above zero whatever the values: NaN scores rank
last, a non-positive or NaN size counts as the floor, a source index out of range counts as pruned. With them each is an
error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _refuse_where(op: str, argument: str, bad: Tensor, rule: str, values: Tensor) -> None:
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {argument} must {rule}, got {values[tuple(index)].item()} at {index} (TOKCOMP_CHECK=1)"
        )


def _finite(op: str, **tensors: Tensor) -> None:
    for argument, values in tensors.items():
        _refuse_where(op, argument, ~values.isfinite(), "be finite", values)


def _positive_size(op: str, size: Tensor | None) -> None:
    if size is not None:
        _refuse_where(op, "size", ~((size > 0) & size.isfinite()), "be positive and finite", size)


def _mask(op: str, token_mask: Tensor) -> None:
    _refuse_where(op, "token_mask", ~((token_mask >= 0) & (token_mask <= 1)), "be between 0 and 1", token_mask)


def _class_attention_sort(q_cls: Tensor, k: Tensor, size: Tensor | None = None, *_: Any) -> None:
    _finite("class_attention_sort", q_cls=q_cls, k=k)
    _positive_size("class_attention_sort", size)


def _prune_merge(x: Tensor, importance: Tensor, *_: Any, size: Tensor | None = None, **__: Any) -> None:
    _finite("prune_merge", x=x)
    _refuse_where("prune_merge", "importance", importance.isnan(), "not be NaN", importance)
    _positive_size("prune_merge", size)


def _prune_merge_norm(
    x: Tensor, branch: Tensor, importance: Tensor, *_: Any, size: Tensor | None = None, **__: Any
) -> None:
    _finite("prune_merge_norm", x=x, branch=branch)
    _refuse_where("prune_merge_norm", "importance", importance.isnan(), "not be NaN", importance)
    _positive_size("prune_merge_norm", size)


def _add_layer_norm(x: Tensor, branch: Tensor, *_: Any, **__: Any) -> None:
    _finite("add_layer_norm", x=x, branch=branch)


def _masked_softmax(scores: Tensor, token_mask: Tensor, *_: Any) -> None:
    _refuse_where("masked_softmax", "scores", scores.isnan(), "not be NaN", scores)
    _mask("masked_softmax", token_mask)


def _masked_attention(
    q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, *, size: Tensor | None = None, **_: Any
) -> None:
    _finite("masked_attention", q=q, k=k, v=v)
    _mask("masked_attention", token_mask)
    _positive_size("masked_attention", size)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, **_: Any) -> None:
    _finite("attention", q=q, k=k, v=v)
    _positive_size("attention", size)


def _tome_merge(x: Tensor, metric: Tensor, *_: Any, size: Tensor | None = None, **__: Any) -> None:
    _finite("tome_merge", x=x, metric=metric)
    _positive_size("tome_merge", size)


def _unmerge(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> None:
    in_range = (source >= -1) & (source < x.shape[1])
    _refuse_where("unmerge", "source", ~in_range, f"be between -1 and {x.shape[1] - 1}", source)
    if torch.is_tensor(pruned_fill):
        _finite("unmerge", pruned_fill=pruned_fill)


def _masked_merge(
    x: Tensor, importance: Tensor, token_mask: Tensor, counts: Tensor, *, size: Tensor | None = None, **_: Any
) -> None:
    _finite("masked_merge", x=x)
    _mask("masked_merge", token_mask)
    # A dead token is ranked by its place: its importance is not looked at.
    _refuse_where("masked_merge", "importance", importance.isnan() & (token_mask > 0), "not be NaN", importance)
    _positive_size("masked_merge", size)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    _finite("linear_gelu", x=x, weight=weight)
    if bias is not None:
        _finite("linear_gelu", bias=bias)


VALUE_CHECKS: dict[str, Callable[..., None]] = {
    "class_attention_sort": _class_attention_sort,
    "prune_merge": _prune_merge,
    "masked_softmax": _masked_softmax,
    "masked_attention": _masked_attention,
    "attention": _attention,
    "tome_merge": _tome_merge,
    "unmerge": _unmerge,
    "masked_merge": _masked_merge,
    "prune_merge_norm": _prune_merge_norm,
    "add_layer_norm": _add_layer_norm,
    "linear_gelu": _linear_gelu,
}

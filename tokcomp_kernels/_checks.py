"""What each operator refuses, and in which words: by shapes, dtypes, devices and counts, never by values.

``csrc/common/checks.h`` says the same for compiled kernels; one table of wrong inputs tests all. Values: _value_checks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refuse(op: str, argument: str, rule: str, got: object, error: type[Exception] = ValueError) -> None:
    raise error(f"{op}: {argument} must {rule}, got {got}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(sizes: Sequence[object]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def _require_tensor(op: str, argument: str, tensor: Tensor | None) -> None:
    # The dispatcher takes None for a tensor that the schema demands.
    if tensor is None:
        refuse(op, argument, "be a tensor", None, TypeError)


def _require_dim(op: str, argument: str, tensor: Tensor, letters: str) -> None:
    _require_tensor(op, argument, tensor)
    if tensor.dim() != letters.count(",") + 1:
        refuse(op, argument, f"be {letters}", f"a tensor of shape {_shape(tensor.shape)}")


def _require_shape(op: str, argument: str, tensor: Tensor, letters: str, sizes: Sequence[int]) -> None:
    _require_tensor(op, argument, tensor)
    if tensor.dim() != len(sizes) or any(have != want for have, want in zip(tensor.shape, sizes, strict=True)):
        refuse(op, argument, f"be {letters} = {_shape(sizes)}", f"a tensor of shape {_shape(tensor.shape)}")


def _require_floating(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        refuse(op, argument, "be float16, bfloat16, float32 or float64", _dtype(tensor), TypeError)


def _require_floats(op: str, argument: str, tensor: Tensor, letters: str) -> None:
    _require_dim(op, argument, tensor, letters)
    _require_floating(op, argument, tensor)


def _require_like(op: str, argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype != other.dtype:
        refuse(op, argument, f"have the dtype of {other_name} ({_dtype(other)})", _dtype(tensor), TypeError)
    _require_device(op, argument, tensor, other_name, other)


def _require_device(op: str, argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        refuse(op, argument, f"be on the device of {other_name} ({other.device})", tensor.device)


def _require_per_token(
    op: str, argument: str, tensor: Tensor, other_name: str, other: Tensor, sizes: Sequence[int]
) -> None:
    """A floating value per token, [B, N], such as size, token_mask or importance."""
    _require_shape(op, argument, tensor, "[B, N]", sizes)
    _require_floating(op, argument, tensor)
    _require_device(op, argument, tensor, other_name, other)


def _require_size(op: str, size: Tensor | None, other_name: str, other: Tensor, sizes: Sequence[int]) -> None:
    if size is not None:
        _require_per_token(op, "size", size, other_name, other, sizes)


def _require_importance(op: str, importance: Tensor, x: Tensor) -> None:
    """A value per token, [B, N], or several whose mean counts, [B, H, N]."""
    batch, num_tokens, _ = x.shape
    if importance is None or importance.dim() != 3:
        _require_per_token(op, "importance", importance, "x", x, (batch, num_tokens))
        return
    heads = importance.shape[1]
    if heads < 1:
        refuse(op, "importance", "have at least one head", f"a tensor of shape {_shape(importance.shape)}")
    _require_shape(op, "importance", importance, "[B, H, N]", (batch, heads, num_tokens))
    _require_floating(op, "importance", importance)
    _require_device(op, "importance", importance, "x", x)


def _require_match(
    op: str, argument: str, tensor: Tensor, letters: str, sizes: Sequence[int], other_name: str, other: Tensor
) -> None:
    _require_shape(op, argument, tensor, letters, sizes)
    _require_like(op, argument, tensor, other_name, other)


def _require_metric(op: str, metric: Tensor, x: Tensor) -> None:
    """Features of each token to compare, [B, N, K]."""
    _require_dim(op, "metric", metric, "[B, N, K]")
    _require_shape(op, "metric", metric, "[B, N, K]", (*x.shape[:2], metric.shape[2]))
    _require_floating(op, "metric", metric)
    _require_device(op, "metric", metric, "x", x)


def _require_places(op: str, argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """A whole number per token of ``other``, [B, N]."""
    _require_shape(op, argument, tensor, "[B, N]", other.shape[:2])
    _require_int64(op, argument, tensor)
    _require_device(op, argument, tensor, other_name, other)


def _require_int64(op: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        refuse(op, argument, "be int64", _dtype(tensor), TypeError)


def _require_source(op: str, source: Tensor, other_name: str, other: Tensor) -> None:
    _require_dim(op, "source", source, "[B, N]")
    _require_int64(op, "source", source)
    _require_device(op, "source", source, other_name, other)
    if source.shape[0] != other.shape[0]:
        refuse(op, "source", f"have the batch size of {other_name} ({other.shape[0]})", source.shape[0])


def _require_prefix(op: str, num_prefix_tokens: int, num_tokens: int) -> None:
    if num_prefix_tokens < 0 or num_prefix_tokens > num_tokens:
        refuse(op, "num_prefix_tokens", f"be between 0 and the number of tokens ({num_tokens})", num_prefix_tokens)


def _require_width(op: str, argument: str, tensor: Tensor) -> None:
    """Heads [B, H, N, D] that are no numbers wide have no scale of their own, D ** -0.5."""
    if tensor.shape[3] < 1:
        refuse(op, argument, "have heads of at least one number (D >= 1)", f"a tensor of shape {_shape(tensor.shape)}")


def _require_qkv(op: str, q: Tensor, size: Tensor | None, **others: Tensor) -> None:
    """Queries, the ``others`` like them (k, v), and sizes."""
    _require_floats(op, "q", q, "[B, H, N, D]")
    if q.shape[2] < 1:
        refuse(op, "q", "hold at least one token", f"a tensor of shape {_shape(q.shape)}")
    _require_width(op, "q", q)
    for name, tensor in others.items():
        _require_match(op, name, tensor, "[B, H, N, D]", q.shape, "q", q)
    _require_size(op, size, "q", q, (q.shape[0], q.shape[2]))


def check_class_attention_sort(
    q_cls: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 1
) -> None:
    op = "class_attention_sort"
    _require_floats(op, "k", k, "[B, H, N, D]")
    _require_width(op, "k", k)
    batch, heads, num_tokens, width = k.shape
    _require_match(op, "q_cls", q_cls, "[B, H, D]", (batch, heads, width), "k", k)
    _require_size(op, size, "k", k, (batch, num_tokens))
    _require_prefix(op, num_prefix_tokens, num_tokens)


def check_prune_merge(
    x: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    op: str = "prune_merge",
) -> None:
    _require_floats(op, "x", x, "[B, N, C]")
    batch, num_tokens, _ = x.shape
    _require_importance(op, importance, x)
    _require_size(op, size, "x", x, (batch, num_tokens))
    _require_prefix(op, num_prefix_tokens, num_tokens)
    if num_prune_kept < num_prefix_tokens:
        refuse(op, "num_prune_kept", f"be at least num_prefix_tokens ({num_prefix_tokens})", num_prune_kept)
    pruned = num_prune_kept if num_prune_kept < num_tokens else num_tokens
    if num_merge_kept < pruned and num_merge_kept <= num_prefix_tokens:
        refuse(
            op,
            "num_merge_kept",
            f"be more than num_prefix_tokens ({num_prefix_tokens}) where tokens merge, which need a destination",
            num_merge_kept,
        )


def check_prune_merge_norm(
    x: Tensor,
    branch: Tensor,
    importance: Tensor,
    num_prune_kept: int,
    num_merge_kept: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    norm_eps: float = 1e-6,
) -> None:
    op = "prune_merge_norm"
    counts = (num_prune_kept, num_merge_kept)
    check_prune_merge(x, importance, *counts, size=size, num_prefix_tokens=num_prefix_tokens, op=op)
    _require_branch_and_norm(op, x, "[B, N, C]", branch, weight, bias, norm_eps)


def _require_branch_and_norm(
    op: str, x: Tensor, letters: str, branch: Tensor, weight: Tensor | None, bias: Tensor | None, norm_eps: float
) -> None:
    """What is added to x, and the LayerNorm over its last dimension."""
    _require_match(op, "branch", branch, letters, x.shape, "x", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _require_match(op, name, tensor, "[C]", x.shape[-1:], "x", x)
    if not norm_eps >= 0:
        refuse(op, "norm_eps", "be at least 0", norm_eps)


def check_masked_softmax(scores: Tensor, token_mask: Tensor, eps: float = 1e-6) -> None:
    _check_scores("masked_softmax", scores, token_mask, eps)


def check_masked_softmax_backward(grad: Tensor, scores: Tensor, token_mask: Tensor, eps: float = 1e-6) -> None:
    op = "_masked_softmax_backward"
    _check_scores(op, scores, token_mask, eps)
    _require_match(op, "grad", grad, "[B, H, N, N]", scores.shape, "scores", scores)


def _check_scores(op: str, scores: Tensor, token_mask: Tensor, eps: float) -> None:
    _require_dim(op, "scores", scores, "[B, H, N, N]")
    batch, heads, _, num_tokens = scores.shape
    _require_shape(op, "scores", scores, "[B, H, N, N]", (batch, heads, num_tokens, num_tokens))
    _require_floating(op, "scores", scores)
    _require_per_token(op, "token_mask", token_mask, "scores", scores, (batch, num_tokens))
    _require_eps(op, eps)


def _require_eps(op: str, eps: float) -> None:
    if not eps > 0:
        refuse(op, "eps", "be positive", eps)


def check_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> None:
    _check_masked_attention("masked_attention", q, k, v, token_mask, size, eps)


def check_masked_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> None:
    op = "_masked_attention_backward"
    _check_masked_attention(op, q, k, v, token_mask, size, eps)
    _require_match(op, "grad_out", grad_out, "[B, H, N, D]", q.shape, "q", q)


def _check_masked_attention(
    op: str, q: Tensor, k: Tensor, v: Tensor, token_mask: Tensor, size: Tensor | None, eps: float
) -> None:
    _require_qkv(op, q, size, k=k, v=v)
    _require_per_token(op, "token_mask", token_mask, "q", q, (q.shape[0], q.shape[2]))
    _require_eps(op, eps)


def check_attention(q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None) -> None:
    _require_qkv("attention", q, size, k=k, v=v)


def check_attention_heads(
    q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> None:
    _require_qkv("_attention_heads", q, size, k=k, v=v)


def check_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, size: Tensor | None = None, scale: float | None = None
) -> None:
    op = "_attention_backward"
    _require_qkv(op, q, size, k=k, v=v)
    _require_match(op, "grad_out", grad_out, "[B, H, N, D]", q.shape, "q", q)


def check_attention_received(
    q: Tensor, k: Tensor, *, size: Tensor | None = None, scale: float | None = None, num_prefix_tokens: int = 0
) -> None:
    op = "attention_received"
    _require_qkv(op, q, size, k=k)
    _require_prefix(op, num_prefix_tokens, q.shape[2])


def check_tome_merge(
    x: Tensor, metric: Tensor, r: int, *, size: Tensor | None = None, num_prefix_tokens: int = 1
) -> None:
    op = "tome_merge"
    _require_floats(op, "x", x, "[B, N, C]")
    batch, num_tokens, _ = x.shape
    _require_metric(op, metric, x)
    _require_size(op, size, "x", x, (batch, num_tokens))
    _require_prefix(op, num_prefix_tokens, num_tokens)
    if r < 0:
        refuse(op, "r", "be at least 0", r)


def check_unmerge(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> None:
    op = "unmerge"
    _require_floats(op, "x", x, "[B, M, C]")
    _require_source(op, source, "x", x)
    if pruned_fill is not None:
        _require_match(op, "pruned_fill", pruned_fill, "[B, N, C]", (x.shape[0], source.shape[1], x.shape[2]), "x", x)


def check_masked_merge(
    x: Tensor,
    importance: Tensor,
    token_mask: Tensor,
    counts: Tensor,
    *,
    size: Tensor | None = None,
    num_prefix_tokens: int = 1,
    similarity_weighted_size: bool = True,
    min_weighted_size: float | None = None,
) -> None:
    op = "masked_merge"
    _require_floats(op, "x", x, "[B, N, C]")
    batch, num_tokens, _ = x.shape
    _require_per_token(op, "importance", importance, "x", x, (batch, num_tokens))
    _require_per_token(op, "token_mask", token_mask, "x", x, (batch, num_tokens))
    _require_tensor(op, "counts", counts)
    if counts.dim() != 1 or counts.shape[0] != 2:
        refuse(op, "counts", "be [num_before_merge, num_merge_kept]", f"a tensor of shape {_shape(counts.shape)}")
    _require_int64(op, "counts", counts)
    _require_device(op, "counts", counts, "x", x)
    _require_size(op, size, "x", x, (batch, num_tokens))
    _require_prefix(op, num_prefix_tokens, num_tokens)
    if min_weighted_size is not None and min_weighted_size != min_weighted_size:
        refuse(op, "min_weighted_size", "be a number", "nan")


def check_masked_merge_backward(grad: Tensor, destination: Tensor) -> None:
    op = "_masked_merge_backward"
    _require_floats(op, "grad", grad, "[B, N, C]")
    _require_places(op, "destination", destination, "grad", grad)


def check_merge_backward(grad: Tensor, source: Tensor, size: Tensor | None = None) -> None:
    op = "_merge_backward"
    _require_floats(op, "grad", grad, "[B, M, C]")
    _require_source(op, source, "grad", grad)
    _require_size(op, size, "grad", grad, (source.shape[0], source.shape[1]))


def check_unmerge_backward(grad: Tensor, source: Tensor, num_tokens: int) -> None:
    op = "_unmerge_backward"
    _require_floats(op, "grad", grad, "[B, N, C]")
    _require_source(op, source, "grad", grad)
    if source.shape[1] != grad.shape[1]:
        refuse(op, "source", f"have the tokens of grad ({grad.shape[1]})", source.shape[1])
    if num_tokens < 0:
        refuse(op, "num_tokens", "be at least 0", num_tokens)

"""Attention that also tells a method what it needs, without holding the [B, H, N, N] map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.methods.base import Evidence
from tokcomp_kernels import native_kernels
from tokcomp_kernels._numbers import MIN_SIZE, accumulate_dtype

#: On CPU the compiled kernel takes a third of the time of scaled_dot_product_attention (docs/performance-log.md).
_COMPILED_ON_CPU = "attention" in native_kernels()["cpu"]
#: masked_attention's eps where the mask is that of padding: it must be positive, and less than any rounding.
NO_EPS = 1e-30
#: The same where the mask is learned, as published with DynamicViT and DiffRate.
MASK_EPS = 1e-6


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    size: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    stock: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] | None = None,
    mask: Tensor | None = None,
    eps: float = NO_EPS,
    by_heads: bool = False,
) -> tuple[Tensor, Evidence]:
    """softmax(q k^T * scale + bias + log size) v, and the evidence that ``needs`` names.

    Args:
        q, k, v: [B, H, N, D], any strides.
        scale: factor on the scores.
        size: [B, N] patches per token, or None for no bias.
        needs: names of :class:`~tokcomp.methods.Evidence` fields to fill in.
        dropout_p: dropout on the map, in training; this one case computes the map explicitly.
        bias: [B or 1, H, N, N] added to the scores, or None; no operator of ours takes one, PyTorch's attention does.
        stock: the model's own attention, for q, k, v, a mask [B, 1, 1, N] to add to the scores or None, and dropout_p.
            The evidence then takes one more pass over the keys.
        mask: [B, N] 1 for tokens and 0 for padding, to which nobody attends; None: no padding. It may have a gradient.
        eps: of the softmax under a mask.
        by_heads: leave cls_attn by heads, [B, H, N], where our own attention computes it; nothing has a gradient then.

    Returns:
        out [B, H, N, D] and the evidence; evidence carries no gradient.

    Raises:
        RuntimeError: dropout is asked for where there is padding.
    """
    if mask is not None:
        if dropout_p > 0:
            raise RuntimeError("attention dropout must be 0 where tokens are masked: images keep different ones")
        return masked_attend(q, k, v, mask, scale=scale, size=size, needs=needs, bias=bias, eps=eps)
    if bias is not None:
        return _attend_with_bias(q, k, v, scale, size, needs, dropout_p, bias)
    if stock is not None:
        return _attend_by(stock, q, k, v, scale, size, needs, dropout_p)
    cls_attn = None
    own_kernel = _COMPILED_ON_CPU and q.device.type == "cpu"
    if dropout_p > 0 and (size is not None or "cls_attn" in needs):
        out, cls_attn = _attend_with_dropout(q, k, v, scale, size, dropout_p)
    elif size is not None or "cls_attn" in needs or (own_kernel and dropout_p == 0):
        attention = torch.ops.tokcomp._attention_heads if by_heads else torch.ops.tokcomp.attention
        out, cls_attn = attention(q, k, v, size=size, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    received = partial(torch.ops.tokcomp.attention_received, q, k, size=size, scale=scale)
    return out, _evidence(needs, k, v, lambda: cls_attn, received)


def attend_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Sequence[int],
    *,
    scale: float,
    size: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = NO_EPS,
) -> tuple[Tensor, Evidence]:
    """:func:`attend` for each image of a padded batch alone, over its first tokens, as many as ``counts`` says.

    A mask is only needed where nobody attends to some of these. What belongs to padding is zero in the result. Nothing
    has a gradient.
    """
    batch, heads, num_tokens, width = q.shape
    out = q.new_zeros(batch, num_tokens, heads, width).transpose(1, 2)
    computed = needs & {"cls_attn", "image_attn"}
    rows = {name: q.new_zeros(batch, num_tokens, dtype=accumulate_dtype(q)) for name in computed}
    for image, count in enumerate(counts):
        one = slice(image, image + 1)
        own_size = None if size is None else size[one, :count]
        own_bias = None if bias is None else bias[one if len(bias) > 1 else slice(1), :, :count, :count]
        own_mask = None if mask is None else mask[one, :count]
        if own_mask is not None and bool(own_mask.all()):
            own_mask = None
        parts = (part[one, :, :count] for part in (q, k, v))
        own, seen = attend(*parts, scale=scale, size=own_size, needs=computed, bias=own_bias, mask=own_mask, eps=eps)
        out[one, :, :count] = own
        for name, row in rows.items():
            row[one, :count] = seen.require(name)
    return out, _evidence(needs, k, v, lambda: rows["cls_attn"], lambda: rows["image_attn"])


def masked_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    size: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    bias: Tensor | None = None,
    eps: float = MASK_EPS,
) -> tuple[Tensor, Evidence]:
    """:func:`attend` under a token mask [B, N] that has a gradient (DiffRate, Eq. 11-12); a token still sees itself.

    The attention a token receives is the mean over the queries that are alive, as in inference.
    """
    if bias is None:
        out, cls_attn = torch.ops.tokcomp.masked_attention(q, k, v, mask, size=size, scale=scale, eps=eps)
    else:
        attn = torch.ops.tokcomp.masked_softmax(_scores(q, k, scale, _with_log_size(bias, size)), mask, eps)
        out, cls_attn = attn.to(v.dtype) @ v, attn[:, :, 0].detach().mean(1)
    received = partial(_mean_received_under_mask, q, k, mask, scale=scale, size=size, bias=bias, eps=eps)
    return out, _evidence(needs, k, v, lambda: cls_attn, received)


def prefix_masked_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    size: Tensor | None = None,
    eps: float = MASK_EPS,
    bias: Tensor | None = None,
) -> Tensor:
    """The first rows of :func:`masked_attend` alone: q [B, H, P, D] of prefix tokens, which are never masked.

    Returns:
        out [B, H, P, D].
    """
    dtype = accumulate_dtype(q)
    if bias is not None:
        bias = bias[:, :, : q.shape[2]]
    scores = _scores(q, k, scale, _with_log_size(bias, size))  # [B, H, P, N]
    weight = (scores - scores.detach().amax(-1, keepdim=True)).exp() * mask[:, None, None].to(dtype)
    probabilities = (weight + eps / k.shape[2]) / (weight.sum(-1, keepdim=True) + eps)
    return probabilities.to(v.dtype) @ v


@torch.no_grad()
def _mean_received_under_mask(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    *,
    scale: float,
    size: Tensor | None,
    bias: Tensor | None = None,
    eps: float = MASK_EPS,
) -> Tensor:
    heads = q.shape[1]
    weight = (mask / mask.sum(1, keepdim=True)).unsqueeze(1)  # [B, 1, N] of each query
    total = q.new_zeros(mask.shape, dtype=accumulate_dtype(q))
    for head in range(heads):
        one = slice(head, head + 1)
        pairs = None if bias is None else bias[:, one]
        scores = _scores(q[:, one], k[:, one], scale, _with_log_size(pairs, size))  # [B, 1, N, N]
        total = total + (weight @ torch.ops.tokcomp.masked_softmax(scores, mask, eps)[:, 0])[:, 0]
    return total / heads


def _attend_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, scale: float, size: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    attn = _probabilities(q, k, scale, _with_log_size(None, size))  # [B, H, N, N]
    cls_attn = attn[:, :, 0].detach().mean(1)
    return F.dropout(attn, dropout_p).to(v.dtype) @ v, cls_attn


def _attend_by(
    stock: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    size: Tensor | None,
    needs: frozenset[str],
    dropout_p: float,
) -> tuple[Tensor, Evidence]:
    mask = _with_log_size(None, size)
    out = stock(q, k, v, None if mask is None else mask.to(q.dtype), dropout_p)
    with torch.no_grad():
        return out, _evidence(
            needs,
            k,
            v,
            lambda: torch.ops.tokcomp.class_attention_sort(q[:, :, 0], k, size=size, scale=scale)[0],
            partial(torch.ops.tokcomp.attention_received, q, k, size=size, scale=scale),
        )


def _attend_with_bias(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    size: Tensor | None,
    needs: frozenset[str],
    dropout_p: float,
    bias: Tensor,
) -> tuple[Tensor, Evidence]:
    whole = _with_log_size(bias, size)
    assert whole is not None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=whole.to(q.dtype), dropout_p=dropout_p, scale=scale)
    everyone = torch.ones(q.shape[0], q.shape[2], dtype=accumulate_dtype(q), device=q.device)
    with torch.no_grad():
        return out, _evidence(
            needs,
            k,
            v,
            lambda: _probabilities(q[:, :, :1], k, scale, whole[:, :, :1])[:, :, 0].mean(1),
            partial(_mean_received_under_mask, q, k, everyone, scale=scale, size=size, bias=bias),
        )


def _evidence(
    needs: frozenset[str],
    k: Tensor,
    v: Tensor,
    cls_attn: Callable[[], Tensor | None],
    image_attn: Callable[[], Tensor],
) -> Evidence:
    """The evidence that ``needs`` names; the other attention is not computed."""
    return Evidence(
        cls_attn() if "cls_attn" in needs else None,
        image_attn() if "image_attn" in needs else None,
        k if "keys" in needs else None,
        v if "values" in needs else None,
    )


def _probabilities(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return _scores(q, k, scale, bias).softmax(-1)


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).to(accumulate_dtype(q)) * scale
    return scores if bias is None else scores + bias


def _with_log_size(bias: Tensor | None, size: Tensor | None) -> Tensor | None:
    """bias [B, H, N, N] + log size, or [B, 1, 1, N] without a bias; sizes below MIN_SIZE, or NaN, count as that."""
    if size is None:
        return bias
    log_size = torch.where(size > MIN_SIZE, size, MIN_SIZE).log()[:, None, None]
    return log_size if bias is None else bias + log_size

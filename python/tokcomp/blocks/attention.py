"""Attention that also tells a method what it needs, without holding the [B, H, N, N] map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp.methods.base import Evidence
from tokcomp_kernels import native_kernels
from tokcomp_kernels._numbers import MIN_SIZE, accumulate_dtype

#: On CPU the compiled kernel takes a third of the time of scaled_dot_product_attention (docs/performance-log.md).
_COMPILED_ON_CPU = "attention" in native_kernels()["cpu"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    size: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    dropout_p: float = 0.0,
) -> tuple[Tensor, Evidence]:
    """softmax(q k^T * scale + log size) v, and the evidence that ``needs`` names.

    Args:
        q, k, v: [B, H, N, D], any strides.
        scale: factor on the scores.
        size: [B, N] patches per token, or None for no bias.
        needs: names of :class:`~tokcomp.methods.Evidence` fields to fill in.
        dropout_p: dropout on the map, in training; this one case computes the map explicitly.

    Returns:
        out [B, H, N, D] and the evidence; evidence carries no gradient.
    """
    cls_attn = image_attn = None
    own_kernel = _COMPILED_ON_CPU and q.device.type == "cpu"
    if dropout_p > 0 and (size is not None or "cls_attn" in needs):
        out, cls_attn = _attend_with_dropout(q, k, v, scale, size, dropout_p)
    elif size is not None or "cls_attn" in needs or (own_kernel and dropout_p == 0):
        out, cls_attn = torch.ops.tokcomp.attention(q, k, v, size=size, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    if "image_attn" in needs:
        image_attn = torch.ops.tokcomp.attention_received(q, k, size=size, scale=scale)
    evidence = Evidence(
        cls_attn if "cls_attn" in needs else None,
        image_attn,
        k if "keys" in needs else None,
        v if "values" in needs else None,
    )
    return out, evidence


def masked_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    size: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
) -> tuple[Tensor, Evidence]:
    """:func:`attend` under a token mask [B, N] that has a gradient (DiffRate, Eq. 11-12); a token still sees itself.

    The attention a token receives is the mean over the queries that are alive, as in inference.
    """
    out, cls_attn = torch.ops.tokcomp.masked_attention(q, k, v, mask, size=size, scale=scale)
    image_attn = None
    if "image_attn" in needs:
        image_attn = _mean_received_under_mask(q, k, mask, scale=scale, size=size)
    evidence = Evidence(
        cls_attn if "cls_attn" in needs else None,
        image_attn,
        k if "keys" in needs else None,
        v if "values" in needs else None,
    )
    return out, evidence


def prefix_masked_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    size: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The first rows of :func:`masked_attend` alone: q [B, H, P, D] of prefix tokens, which are never masked.

    Returns:
        out [B, H, P, D].
    """
    dtype = accumulate_dtype(q)
    scores = (q @ k.transpose(-2, -1)).to(dtype) * scale  # [B, H, P, N]
    bias = _log_size(size)
    if bias is not None:
        scores = scores + bias.unsqueeze(1)
    weight = (scores - scores.detach().amax(-1, keepdim=True)).exp() * mask[:, None, None].to(dtype)
    probabilities = (weight + eps / k.shape[2]) / (weight.sum(-1, keepdim=True) + eps)
    return probabilities.to(v.dtype) @ v


@torch.no_grad()
def _mean_received_under_mask(q: Tensor, k: Tensor, mask: Tensor, *, scale: float, size: Tensor | None) -> Tensor:
    heads = q.shape[1]
    bias = _log_size(size)
    weight = (mask / mask.sum(1, keepdim=True)).unsqueeze(1)  # [B, 1, N] of each query
    total = q.new_zeros(mask.shape, dtype=accumulate_dtype(q))
    for head in range(heads):
        scores = _scores(q[:, head], k[:, head], scale, bias).unsqueeze(1)  # [B, 1, N, N]
        total = total + (weight @ torch.ops.tokcomp.masked_softmax(scores, mask)[:, 0])[:, 0]
    return total / heads


def _attend_with_dropout(
    q: Tensor, k: Tensor, v: Tensor, scale: float, size: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    bias = _log_size(size)
    attn = _probabilities(q, k, scale, bias if bias is None else bias.unsqueeze(1))  # [B, H, N, N]
    cls_attn = attn[:, :, 0].detach().mean(1)
    return F.dropout(attn, dropout_p).to(v.dtype) @ v, cls_attn


def _probabilities(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return _scores(q, k, scale, bias).softmax(-1)


def _scores(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = (q @ k.transpose(-2, -1)).to(accumulate_dtype(q)) * scale
    return scores if bias is None else scores + bias


def _log_size(size: Tensor | None) -> Tensor | None:
    """[B, 1, N]; sizes that are not above MIN_SIZE (NaN too) count as MIN_SIZE, as in the operators."""
    if size is None:
        return None
    return torch.where(size > MIN_SIZE, size, MIN_SIZE).log().unsqueeze(1)

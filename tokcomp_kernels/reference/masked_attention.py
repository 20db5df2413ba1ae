"""Attention under a token mask that has a gradient: masked_softmax of scaled, size-biased scores, times v."""

from __future__ import annotations

from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype
from tokcomp_kernels.reference._common import log_size_bias, token_major
from tokcomp_kernels.reference.masked_softmax import masked_probabilities


def biased_scores(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    return (q @ k.mT) * scale + log_size_bias(size, q.dtype)


@checked
def masked_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    *,
    size: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    probabilities = masked_probabilities(biased_scores(q.to(dtype), k.to(dtype), size, scale), token_mask, eps)[0]
    out = (probabilities @ v.to(dtype)).to(q.dtype)
    return token_major(out), probabilities[:, :, 0].detach().mean(dim=1)

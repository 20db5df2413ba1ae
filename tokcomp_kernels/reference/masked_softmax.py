"""Softmax under a token mask that has a gradient (DiffRate Eq. 10-12)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcomp_kernels._checked import checked
from tokcomp_kernels._numbers import accumulate_dtype


@checked
def masked_softmax_reference(scores: Tensor, token_mask: Tensor, eps: float = 1e-6) -> Tensor:
    return masked_probabilities(scores, token_mask, eps)[0].to(scores.dtype).contiguous()


@checked
def masked_softmax_backward_reference(
    grad: Tensor, scores: Tensor, token_mask: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    grad_scores, grad_token_mask = masked_probabilities_backward(grad, scores, token_mask, eps)
    return grad_scores.to(scores.dtype).contiguous(), grad_token_mask.to(token_mask.dtype)


def masked_probabilities(scores: Tensor, token_mask: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, H, N, N], [B, N] -> P, e, e * M (all [B, H, N, N]) and its row sums Z [B, H, N, 1], accumulation type."""
    dtype = accumulate_dtype(scores)
    scores = scores.to(dtype)
    num_tokens = scores.shape[-1]
    if num_tokens == 0:
        return scores, scores, scores, scores.sum(-1, keepdim=True)
    # The maximum is over all keys, masked ones too, and is a constant to the gradient: its effect is of order eps.
    row_max = scores.detach().amax(-1, keepdim=True)
    e = (scores - torch.where(row_max == float("-inf"), 0.0, row_max)).exp()
    own = torch.eye(num_tokens, dtype=torch.bool, device=scores.device)
    masked = e * torch.where(own, 1.0, token_mask.to(dtype)[:, None, None, :])
    total = masked.sum(-1, keepdim=True) + eps
    return (masked + eps / num_tokens) / total, e, masked, total


def masked_probabilities_backward(
    grad: Tensor, scores: Tensor, token_mask: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients to scores [B, H, N, N] and token_mask [B, N]: also where the mask is 0, never on the diagonal."""
    grad = grad.to(accumulate_dtype(scores))
    probabilities, e, masked, total = masked_probabilities(scores, token_mask, eps)
    grad_masked = (grad - (grad * probabilities).sum(-1, keepdim=True)) / total
    own = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    return grad_masked * masked, torch.where(own, 0.0, e * grad_masked).sum((1, 2))

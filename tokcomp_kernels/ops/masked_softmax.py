"""masked_softmax: attention probabilities under a token mask that has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._register import Arguments, register


def masked_softmax(scores: Tensor, token_mask: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax in which a masked token is visible to itself alone (DiffRate Eq. 10-12).

    With e = exp(scores - maximum over all keys) and M_ij = token_mask_j off the diagonal and 1 on it:
    (e * M + eps / N) / (sum_j e * M + eps).

    Args:
        scores: Scaled scores with their biases, [B, H, N, N].
        token_mask: 0 .. 1 per token, [B, N].
        eps: Keeps a row finite whose tokens are all masked.

    Returns:
        [B, H, N, N], rows summing to 1. Differentiable in scores and in token_mask, also where the mask is 0;
        the maximum is held constant, which changes the gradient by the order of eps.

    Raises:
        ValueError: Wrong shapes or devices; eps not positive.
        TypeError: A dtype that is not floating.
    """
    return torch.ops.tokcomp.masked_softmax(scores, token_mask, eps)


def _fake(scores: Tensor, *rest: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _backward_fake(grad: Tensor, scores: Tensor, token_mask: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), token_mask.new_empty(token_mask.shape)


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class MaskedSoftmax(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> Tensor:
            scores, token_mask, ctx.eps = flat
            ctx.save_for_backward(scores, token_mask)
            return arguments.redispatch(keyset, flat)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            scores, token_mask = ctx.saved_tensors
            grads = torch.ops.tokcomp._masked_softmax_backward(grad, scores, token_mask, ctx.eps)
            return None, *grads, None

    return MaskedSoftmax


register(
    "_masked_softmax_backward",
    fake=_backward_fake,
)
register(
    "masked_softmax",
    fake=_fake,
    autograd=_autograd,
    autocast=("scores",),
    autocast_dtype=torch.float32,
)

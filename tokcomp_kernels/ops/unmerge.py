"""unmerge: give every original position the token its patch went into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._register import Arguments, register


def unmerge(x: Tensor, source: Tensor, *, pruned_fill: Tensor | None = None) -> Tensor:
    """Undo a compression: each position takes the token of its group.

    Args:
        x: Tokens, [B, M, C].
        source: The token of each position, [B, N] int64, as prune_merge and tome_merge return it; -1 (or any index
        outside
            0 .. M - 1) is a pruned position.
        pruned_fill: What a pruned position gets, [B, N, C]; zeros where None.

    Returns:
        [B, N, C]. Differentiable in x and pruned_fill.

    Raises:
        ValueError: Wrong shapes or devices.
        TypeError: source not int64, x not floating, pruned_fill of another dtype.
    """
    return torch.ops.tokcomp.unmerge(x, source, pruned_fill=pruned_fill)


def _fake(x: Tensor, source: Tensor, **options: Any) -> Tensor:
    return x.new_empty(x.shape[0], source.shape[1], x.shape[2])


def _backward_fake(grad: Tensor, source: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class Unmerge(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> Tensor:
            x, source, _pruned_fill = flat
            ctx.save_for_backward(source)
            ctx.num_tokens = x.shape[1]
            return arguments.redispatch(keyset, flat)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            (source,) = ctx.saved_tensors
            grad_x = grad_fill = None
            if ctx.needs_input_grad[1]:
                grad_x = torch.ops.tokcomp._unmerge_backward(grad, source, ctx.num_tokens)
            if ctx.needs_input_grad[3]:
                alive = (source >= 0) & (source < ctx.num_tokens)
                grad_fill = grad.masked_fill(alive[:, :, None], 0.0)
            return None, grad_x, None, grad_fill

    return Unmerge


register(
    "_unmerge_backward",
    fake=_backward_fake,
)
register("unmerge", fake=_fake, autograd=_autograd)

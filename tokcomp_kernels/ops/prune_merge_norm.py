"""prune_merge_norm: all that a compressing block does between attention's last product and the MLP's first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._fake import merged
from tokcomp_kernels.ops._register import Arguments, refuse_second_order, register
from tokcomp_kernels.ops.add_layer_norm import layer_norm_grads


def prune_merge_norm(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`prune_merge` of x + branch, and the LayerNorm of the tokens that are left.

    Args:
        x: The residual stream, [B, N, C], of any floating dtype and any strides.
        branch: What is added to it (attention's output), as x.
        importance: As for prune_merge, [B, N] or [B, H, N].
        num_prune_kept: As for prune_merge.
        num_merge_kept: As for prune_merge.
        weight: LayerNorm's scale, [C] in the dtype of x; ones where None.
        bias: LayerNorm's offset, [C] in the dtype of x; zeros where None.
        size: As for prune_merge, [B, N].
        num_prefix_tokens: As for prune_merge.
        similarity_weighted_size: As for prune_merge.
        norm_eps: Added to the variance.

    Returns:
        x [B, M, C], size [B, M] and source [B, N]: to the bit what prune_merge gives for x + branch rounded to the
        dtype of x; normalized [B, M, C], the LayerNorm over C of the x returned. The order is x, normalized, size,
        source. Differentiable in x, branch, weight and bias.

    Raises:
        ValueError: As prune_merge; shapes that do not match, norm_eps below 0. TypeError: Dtypes that differ or are
        not floating.
    """
    return torch.ops.tokcomp.prune_merge_norm(
        x,
        branch,
        importance,
        num_prune_kept,
        num_merge_kept,
        weight,
        bias,
        size=size,
        num_prefix_tokens=num_prefix_tokens,
        similarity_weighted_size=similarity_weighted_size,
        norm_eps=norm_eps,
    )


def _fake(
    x: Tensor, branch: Tensor, importance: Tensor, num_prune_kept: int, num_merge_kept: int, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept, size, source = merged(x, min(x.shape[1], num_prune_kept, num_merge_kept))
    return kept, kept.new_empty(kept.shape), size, source


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class PruneMergeNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            kept, normalized, size, source = arguments.redispatch(keyset, flat)
            weight, bias, ctx.norm_eps = flat[5], flat[6], flat[10]
            ctx.save_for_backward(kept, weight, bias, source)
            ctx.mark_non_differentiable(size, source)
            ctx.set_materialize_grads(False)
            return kept, normalized, size, source

        @staticmethod
        def backward(
            ctx: Any, grad: Tensor | None, grad_normalized: Tensor | None, *_: Any
        ) -> tuple[Tensor | None, ...]:
            kept, weight, bias, source = ctx.saved_tensors
            refuse_second_order("prune_merge_norm", grad, grad_normalized, kept, weight, bias)
            needs = ctx.needs_input_grad[1:]
            grad_weight = grad_bias = None
            if grad_normalized is not None:
                wanted = (needs[0] or needs[1], needs[5], needs[6])
                through, grad_weight, grad_bias = layer_norm_grads(
                    grad_normalized, kept, weight, bias, ctx.norm_eps, wanted
                )
                grad = through if grad is None else grad if through is None else grad + through
            if grad is not None and (needs[0] or needs[1]):
                grad = torch.ops.tokcomp._merge_backward(grad, source)
            return None, grad, grad, *[None] * 3, grad_weight, grad_bias, *[None] * 4

    return PruneMergeNorm


register(
    "prune_merge_norm",
    fake=_fake,
    autograd=_autograd,
    autocast=("x", "branch", "weight", "bias"),
    autocast_dtype=torch.float32,
)

"""add_layer_norm: a residual sum and its LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels.ops._register import Arguments, refuse_second_order, register


def add_layer_norm(
    x: Tensor, branch: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """A residual sum and its LayerNorm, in one pass.

    Args:
        x: The residual stream, [..., C], of any floating dtype and any strides.
        branch: What is added to it, as x.
        weight: LayerNorm's scale, [C] in the dtype of x; ones where None.
        bias: LayerNorm's offset, [C] in the dtype of x; zeros where None.
        norm_eps: Added to the variance.

    Returns:
        x + branch, rounded to the dtype of x, and the LayerNorm over C of that; both contiguous, in the shape of x.
        Differentiable in x, branch, weight and bias.

    Raises:
        ValueError: Shapes that do not match, norm_eps below 0. TypeError: Dtypes that differ or are not floating.
    """
    return torch.ops.tokcomp.add_layer_norm(x, branch, weight, bias, norm_eps)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def layer_norm_grads(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of a LayerNorm over the last dimension of x, in x, weight and bias; its statistics are recomputed."""
    shape = x.shape[-1:]
    _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, bias, eps)
    wanted = (wanted[0], wanted[1] and weight is not None, wanted[2] and bias is not None)
    grads = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, wanted)
    return tuple(one if want else None for one, want in zip(grads, wanted, strict=True))  # type: ignore[return-value]


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class AddLayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> tuple[Tensor, Tensor]:
            total, normalized = arguments.redispatch(keyset, flat)
            _, _, weight, bias, ctx.norm_eps = flat
            ctx.save_for_backward(total, weight, bias)
            ctx.set_materialize_grads(False)
            return total, normalized

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, grad_normalized: Tensor | None) -> tuple[Tensor | None, ...]:
            total, weight, bias = ctx.saved_tensors
            refuse_second_order("add_layer_norm", grad, grad_normalized, total, weight, bias)
            needs = ctx.needs_input_grad[1:]
            grad_weight = grad_bias = None
            if grad_normalized is not None:
                wanted = (needs[0] or needs[1], needs[2], needs[3])
                through, grad_weight, grad_bias = layer_norm_grads(
                    grad_normalized, total, weight, bias, ctx.norm_eps, wanted
                )
                grad = through if grad is None else grad if through is None else grad + through
            return None, grad, grad, grad_weight, grad_bias, None

    return AddLayerNorm


def _embed_fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    shape = (images.shape[0], *position.shape)
    return images.new_empty(shape), images.new_empty(shape)


# The sum and norm that come before the first block's.
register("_embed_patches", fake=_embed_fake)
register(
    "add_layer_norm",
    fake=_fake,
    autograd=_autograd,
    autocast=("x", "branch", "weight", "bias"),
    autocast_dtype=torch.float32,
)

"""Linear layers whose weights are frozen, on CPU: forward and the gradient to the input through packed weights.

With no gradient to any weight, a layer's input need not be kept; an MLP keeps only the values before its activation.
The gradient is the same kind of product with the transposed weight, which is packed as well: while a search runs, each
layer that carries a gradient has two packed copies (``PackedWeights.nbytes``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokcomp.fastpath import packing
from tokcomp.fastpath.packing import PackedWeights

#: Bytes of a group of images' hidden activations: few enough to stay in cache between the steps of an MLP.
_HIDDEN_BYTES = 10 * 2**20


def linear(packed: PackedWeights, layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, differentiable only in x [..., in]; x in ``packed.dtype``."""
    if not _wants_gradient(x):
        return packed.linear(layer, x)
    return _Linear.apply(x, None, packed, layer)


def linear_heads(packed: PackedWeights, layer: nn.Linear, x: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D]: views of ``layer(x)`` [B, N, 3 * H * D], differentiable only in x [B, N, C]."""
    if _wants_gradient(x):
        return _LinearHeads.apply(x, packed, layer, num_heads)
    return _split_heads(packed.linear(layer, x), num_heads)


def linear_add(packed: PackedWeights, layer: nn.Linear, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + layer(x)``, differentiable in x [..., in] and residual [..., out]; both in ``packed.dtype``."""
    if not _wants_gradient(x, residual):
        return packed.linear_add(layer, x, residual)
    return _Linear.apply(x, residual, packed, layer)


def gelu_mlp(
    packed: PackedWeights,
    first: nn.Linear,
    second: nn.Linear,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    approximate: str = "none",
) -> Tensor:
    """``second(F.gelu(first(x), approximate=approximate))``, plus the residual if there is one.

    Differentiable in x [B, N, in] and residual [B, N, out], both in ``packed.dtype``. Keeps only the values before the
    GELU, [B, N, hidden], and only if a gradient to x is wanted.
    """
    if _wants_gradient(x):
        return _GeluMlp.apply(x, residual, packed, first, second, approximate)
    hidden = packed.linear_gelu(first, x, approximate)
    return linear(packed, second, hidden) if residual is None else linear_add(packed, second, hidden, residual)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in tensors)


class _Linear(torch.autograd.Function):
    """layer(x), plus the residual if there is one. Nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, packed: PackedWeights, layer: nn.Linear) -> Tensor:
        ctx.transposed = packed.transposed(layer) if ctx.needs_input_grad[0] else None
        return packed.linear(layer, x) if residual is None else packed.linear_add(layer, x, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x = None if ctx.transposed is None else packing.product(grad, ctx.transposed)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None


class _LinearHeads(torch.autograd.Function):
    """The packed product for q, k and v; their gradients are concatenated in one pass. Nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeights, layer: nn.Linear, num_heads: int) -> tuple[Tensor, ...]:
        ctx.transposed = packed.transposed(layer)
        ctx.set_materialize_grads(False)
        return _split_heads(packed.linear(layer, x), num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        known = next((one for one in grads if one is not None), None)
        if known is None:
            return None, None, None, None
        batch, heads, num_tokens, width = known.shape
        packed = known.new_empty(batch, num_tokens, 3, heads, width)
        for part, grad in zip(packed.unbind(2), grads, strict=True):
            part.zero_() if grad is None else part.copy_(grad.transpose(1, 2))
        return packing.product(packed.view(batch, num_tokens, 3 * heads * width), ctx.transposed), None, None, None


class _GeluMlp(torch.autograd.Function):
    """Two layers with a GELU between them, a group of images at a time; saves the GELU's input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        packed: PackedWeights,
        first: nn.Linear,
        second: nn.Linear,
        approximate: str,
    ) -> Tensor:
        ctx.transposed = packed.transposed(first), packed.transposed(second)
        ctx.approximate = approximate
        images = _images_at_once(x, first.out_features)
        hidden = [packed.linear(first, group) for group in x.split(images)]
        ctx.save_for_backward(*hidden)
        outputs = []
        for index, before in enumerate(hidden):
            after = nn.functional.gelu(before, approximate=approximate)
            if residual is None:
                outputs.append(packed.linear(second, after))
            else:
                outputs.append(packed.linear_add(second, after, residual[index * images : (index + 1) * images]))
        return _join(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.transposed
        hidden = ctx.saved_tensors
        grads = []
        for group, before in zip(grad.split([len(before) for before in hidden]), hidden, strict=True):
            inner = packing.product(group, second)
            torch.ops.aten.gelu_backward.grad_input(inner, before, approximate=ctx.approximate, grad_input=inner)
            grads.append(packing.product(inner, first))
        return _join(grads), grad if ctx.needs_input_grad[1] else None, None, None, None, None


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, width = qkv.shape
    q, k, v = qkv.view(batch, num_tokens, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _images_at_once(x: Tensor, hidden: int) -> int:
    """How many images' hidden activations fit into ``_HIDDEN_BYTES``."""
    image_bytes = x[:1].numel() // max(x.shape[-1], 1) * hidden * x.element_size()
    return max(_HIDDEN_BYTES // max(image_bytes, 1), torch.get_num_threads())


def _join(groups: list[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups)

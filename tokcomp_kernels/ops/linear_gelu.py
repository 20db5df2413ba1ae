"""linear_gelu: the first half of an MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokcomp_kernels.ops._register import Arguments, refuse_second_order, register
from tokcomp_kernels.product_types import widened


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer and the exact (erf) GELU after it.

    PyTorch's own product and GELU, unless TOKCOMP_BACKEND=triton asks for the kernel that does both in one pass and
    rounds once.

    Args:
        x: [..., K], of any floating dtype and any strides.
        weight: [F, K] in the dtype of x.
        bias: [F] in the dtype of x; zeros where None.

    Returns:
        GELU(x @ weight.T + bias), [..., F], contiguous. Differentiable in x, weight and bias; the backward computes the
        values before the GELU again instead of keeping them. A row's last bits may depend on how many rows there are.

    Raises:
        ValueError: Shapes that do not match. TypeError: Dtypes that differ or are not floating.
    """
    return torch.ops.tokcomp.linear_gelu(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _autograd(arguments: Arguments) -> type[torch.autograd.Function]:
    class LinearGelu(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *flat: Any) -> Tensor:
            ctx.save_for_backward(*flat)
            return arguments.redispatch(keyset, flat)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, bias = ctx.saved_tensors
            refuse_second_order("linear_gelu", grad, x, weight, bias)
            needs_x, needs_weight, needs_bias = ctx.needs_input_grad[1:]
            with widened(x):
                before = torch.ops.aten.gelu_backward(grad, F.linear(x, weight, bias))  # [..., F]
                rows = before.reshape(-1, weight.shape[0])
                return (
                    None,
                    before @ weight if needs_x else None,
                    rows.T @ x.reshape(-1, weight.shape[1]) if needs_weight else None,
                    rows.sum(0) if needs_bias else None,
                )

    return LinearGelu


register(
    "linear_gelu",
    fake=_fake,
    autograd=_autograd,
    autocast=("x", "weight", "bias"),
)

"""Linear layers in training on CPU, float32: forward and both products of the backward pass through oneDNN.

F.linear goes through MKL, which on some CPUs reaches less than half of oneDNN's speed. Weights change with every step,
so nothing is packed ahead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

#: None if torch was built without oneDNN.
_product: Any = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
#: Below this many multiply-adds, calling oneDNN costs more than it gains.
_LEAST_WORK = 1 << 22


class FastLinear(TorchFunctionMode):
    """While open, F.linear of float32 tensors on CPU that needs a gradient uses oneDNN; all else is unchanged.

    Not for models that recompute blocks in the backward pass: the mode is closed by then, so the recomputed blocks
    would differ from the first computation.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _takes(*args):
            return _Linear.apply(*args, *(None,) * (3 - len(args)))
        return func(*args, **(kwargs or {}))


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        _product is not None
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad)
        and weight.dim() == 2
        and x.dim() >= 2
        and x.numel() * weight.shape[0] >= _LEAST_WORK
        and all(_is_plain(one) for one in (x, weight, bias) if one is not None)
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_mkldnn_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class _Linear(torch.autograd.Function):
    """x [..., in], weight [out, in], bias [out] -> [..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        rows = grad.flatten(0, -2)  # [M, out]
        # Operands laid out as the product reads them: oneDNN is slow on transposed views of the left one.
        grad_x = _product(grad, weight.t().contiguous(), None, "none", [], "") if wants_x else None
        grad_weight = None
        if wants_weight:
            grad_weight = _product(rows.t().contiguous(), x.flatten(0, -2).t(), None, "none", [], "")
        return grad_x, grad_weight, rows.sum(0) if wants_bias else None

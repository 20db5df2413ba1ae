"""Tensors that are no dense arrays: every operator refuses them by argument, before anything of it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokcomp_kernels._checks import refuse

#: Dispatch keys of such tensors. They stand above the dense backends', so a kernel here is asked first.
KEYS = ("MkldnnCPU", *(kind + device for kind in ("Sparse", "SparseCsr", "NestedTensor") for device in ("CPU", "CUDA")))


def refusal(op: str, names: Sequence[str]) -> Callable[..., Any]:
    """A kernel that names the first argument that is not dense; ``names`` are the operator's arguments in order."""

    def refuse_layout(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if isinstance(value, torch.Tensor):
                _require_dense(op, name, value)
        raise AssertionError(f"{op}: the dispatcher saw a tensor that is not dense among {', '.join(names)}")

    return refuse_layout


def _require_dense(op: str, argument: str, tensor: torch.Tensor) -> None:
    if tensor.is_nested:
        refuse(op, argument, "be one dense tensor", "a nested tensor; pad it, or call once per tensor", TypeError)
    if tensor.layout != torch.strided:
        got = f"one of layout {str(tensor.layout).removeprefix('torch.').lstrip('_')}; call .to_dense()"
        refuse(op, argument, "be a dense tensor", got, TypeError)

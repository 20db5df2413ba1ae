"""In which types PyTorch multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Multiplied(TorchDispatchMode):
    """Collects the types in which matrices are multiplied and convolved, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(part in func.__name__ for part in ("mm.", "convolution", "_scaled_dot")):
            self.dtypes.add(next(one.dtype for one in args if isinstance(one, torch.Tensor)))
        return func(*args, **(kwargs or {}))

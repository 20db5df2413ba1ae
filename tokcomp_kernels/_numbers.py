"""The type sums run in and the least size of a token, for all of Python; C++ has them in csrc/common."""

from __future__ import annotations

import torch
from torch import Tensor

#: Sizes are kept at or above this, so that their logarithm stays finite.
MIN_SIZE = 1e-6


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

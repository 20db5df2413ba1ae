"""Random inputs of the Triton tests, and what float32 arithmetic may lose."""

import numpy as np
import torch

from tokcomp_kernels._numbers import MIN_SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Relative rounding error of one float32 operation, and of storing a dtype.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Below this float16 rounds absolutely; the other dtypes reach far lower than any value here.
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}


def normal(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def uniform(seed, low, high, *shape):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * (high - low) + low).to(DEVICE)


def wide(tensor):
    return tensor.detach().cpu().double().numpy()


def sizes_of(size, shape):
    if size is None:
        return np.ones(shape)
    values = wide(size)
    return np.where(values > MIN_SIZE, values, np.float32(MIN_SIZE).astype(np.float64))

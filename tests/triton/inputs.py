"""Random inputs of the Triton tests, calls that are right, and what float32 arithmetic may lose."""

import torch

from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.testing import Sample

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


def launched(op, *args, exact=False, **options):
    """What an operator's Triton kernels give: the right answer, and the same one again."""
    function = IMPLEMENTATIONS[op].callable("triton")
    outputs, again = (function(*args, **options) for _ in range(2))
    assert_right(Sample(op, "here", args, options, exact), outputs)
    for have, want in zip(*(one if isinstance(one, tuple) else (one,) for one in (outputs, again)), strict=True):
        assert torch.equal(have.nan_to_num(), want.nan_to_num())
    return outputs

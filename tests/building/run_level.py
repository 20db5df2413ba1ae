"""``run_level.py FILE``: every CPU kernel against the reference, at the level that TOKCOMP_CPU_CAPABILITY names or else
the best; FILE gets the level and the outputs. A level is chosen once in a process, so each has one of its own."""

from __future__ import annotations

import sys

import torch

import tokcomp_kernels
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import samples

#: Elements of the largest argument: 197 tokens, but not their N x N scores.
LARGEST = 40_000


def main(file: str) -> None:
    assert tokcomp_kernels.load_error is None, tokcomp_kernels.load_error
    info = tokcomp_kernels.build_info()
    outputs = {}
    for op in info["operators"]["cpu"]:
        for dtype in (torch.float32, torch.bfloat16):
            for sample in samples(op, dtype):
                if max(t.numel() for t in sample.args if isinstance(t, torch.Tensor)) > LARGEST:
                    continue
                found = getattr(torch.ops.tokcomp_cpu, op)(*sample.args, **sample.kwargs)
                found = found if isinstance(found, tuple) else (found,)
                assert_right(sample, found)
                outputs[op, dtype, sample.id] = found
    torch.save({"built": info["cpu_levels"], "level": info["cpu_capability"], "outputs": outputs}, file)


if __name__ == "__main__":
    main(sys.argv[1])

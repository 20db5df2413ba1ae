"""Every operator in float16 and bfloat16: some calls against float64, and gradients.

``python -m tools.gpu_check.smoke``; TOKCOMP_BACKEND chooses who answers, and with ``cuda`` only the operators that have
compiled kernels are called. ``--part 2/4`` takes a quarter of the operators: several processes fill Triton's cache side
by side. Exit status 1 where anything is wrong, once all has run.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from tokcomp_kernels._schema import OPERATORS, Operator
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.ops._backends import requested_backend
from tokcomp_kernels.testing import Sample, samples

DTYPES = (torch.float16, torch.bfloat16)
CALLS = 20


def call(sample: Sample) -> tuple[Tensor, ...]:
    outputs = getattr(torch.ops.tokcomp, sample.op)(*sample.args, **sample.kwargs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_forward(sample: Sample) -> None:
    outputs = call(sample)
    assert_right(sample, outputs if len(outputs) > 1 else outputs[0])


def check_backward(operator: Operator, sample: Sample) -> None:
    """Through autograd: a gradient for every input that takes one, finite where the outputs are."""
    names = [argument.name for argument in getattr(torch.ops.tokcomp, sample.op).default._schema.arguments]
    given = dict(zip(names, sample.args, strict=False)) | sample.kwargs
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in given.items()
        if name in operator.differentiable and isinstance(value, Tensor)
    }
    outputs = [out for out in call(Sample(sample.op, sample.id, (), given | leaves)) if out.requires_grad]
    grads = torch.autograd.grad([out.float().sum() for out in outputs], list(leaves.values()), allow_unused=True)
    finite = all(bool(out.isfinite().all()) for out in outputs)
    for name, grad in zip(leaves, grads, strict=True):
        assert grad is not None, f"no gradient of {name}"
        assert grad.shape == leaves[name].shape, f"gradient of {name}: {tuple(grad.shape)}"
        assert not finite or bool(grad.isfinite().all()), f"gradient of {name} is not finite"


def checks(operator: Operator, dtype: torch.dtype, device: str) -> Iterator[str]:
    """What is wrong with an operator in a dtype."""
    for sample in islice(samples(operator.name, dtype, device), CALLS):
        for check in (check_forward, *([check_backward] if operator.differentiable else [])):
            try:
                check(sample) if check is check_forward else check_backward(operator, sample)
            except Exception as error:
                traceback.print_exc()
                what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                yield f"{operator.name} {str(dtype).removeprefix('torch.')} {sample.id}, {check.__name__}: {what}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", default="1/1", metavar="I/N")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    backends = {operator: IMPLEMENTATIONS[operator.name].backend(options.device) for operator in OPERATORS}
    if requested_backend() == "cuda":
        backends = {operator: backend for operator, backend in backends.items() if backend == "cuda"}
    wrong = [] if backends else ["no operator has a compiled kernel: the build has left them out"]
    for operator, backend in list(backends.items())[part - 1 :: parts]:
        for dtype in DTYPES:
            found = list(checks(operator, dtype, options.device))
            wrong += found
            print(f"{operator.name} {dtype} by {backend}: {'right' if not found else 'WRONG'}", flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("".join(f"FAILED {line}\n" for line in wrong), end="")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())

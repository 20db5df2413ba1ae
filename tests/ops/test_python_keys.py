"""csrc/python_keys.h: what stands above the compiled kernels runs no Python, and hands over what takes Python."""

from __future__ import annotations

import sys
from types import FrameType

import pytest
import torch

from tests.ops.backends import NAMES
from tests.ops.test_backend_choice import _python
from tokcomp_kernels import native_kernels
from tokcomp_kernels._library import NATIVE_KEYS
from tokcomp_kernels._schema import BY_NAME
from tokcomp_kernels.testing import samples

pytestmark = pytest.mark.skipif(NATIVE_KEYS is None, reason="no compiled kernels, or of an older build")


def _functions_called(overload: object, *args: object, **kwargs: object) -> list[str]:
    called = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and "tokcomp_kernels" in frame.f_code.co_filename:
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        overload(*args, **kwargs)  # type: ignore[operator]
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("op", [name for name in NAMES if name in native_kernels()["cpu"]])
def test_no_python_runs_unless_a_gradient_is_wanted(op: str) -> None:
    sample = next(s for s in samples(op, torch.float32, small=True) if s.args[0].numel())
    overload = getattr(torch.ops.tokcomp, op)
    wanting = [v.detach().requires_grad_() if i == 0 else v for i, v in enumerate(sample.args)]
    assert _functions_called(overload, *sample.args, **sample.kwargs) == []
    with torch.no_grad():
        assert _functions_called(overload, *wanting, **sample.kwargs) == []
    with torch.autocast("cpu", torch.bfloat16, enabled=not op.startswith("_")):
        assert _functions_called(overload, *sample.args, **sample.kwargs) == []
    if BY_NAME[op].differentiable:
        assert "forward" in _functions_called(overload, *wanting, **sample.kwargs)


@pytest.mark.slow
def test_a_compiled_kernel_that_owns_a_key_leaves_float64_to_the_reference() -> None:
    """As an earned CUDA kernel does; here the CPU's takes the part."""
    out = _python(
        """
import torch, tokcomp_kernels
from tokcomp_kernels._library import NATIVE_KEYS, PYTHON_LIBRARY
seen = []
def reference(x, branch, weight=None, bias=None, norm_eps=1e-6):
    seen.append(None if x is None else str(x.dtype))
    return x, x
PYTHON_LIBRARY.impl("add_layer_norm", reference, "CompositeExplicitAutograd")
NATIVE_KEYS.own_backend("add_layer_norm", "CPU", "tokcomp_cpu")
x = torch.randn(2, 8)
have, want = (getattr(torch.ops, name).add_layer_norm(x, x) for name in ("tokcomp", "tokcomp_cpu"))
assert all(torch.equal(a, b) for a, b in zip(have, want)), "not the kernel's own bits"
torch.ops.tokcomp.add_layer_norm(x.double(), x.double())
torch.ops.tokcomp.add_layer_norm(None, x)
print(seen)
"""
    )
    assert out == "['torch.float64', None]"


@pytest.mark.slow
def test_a_compiled_kernel_for_half_precision_leaves_the_rest_to_what_python_names() -> None:
    """float32, float64 and wide heads; as the CUDA kernel of attention does, whose part the CPU's takes."""
    out = _python(
        """
import torch, tokcomp_kernels
from tokcomp_kernels._library import NATIVE_KEYS, PYTHON_LIBRARY
seen = []
def others(q, k, v, *, size=None, scale=None):
    seen.append((str(q.dtype), q.shape[-1]))
    return q, q
PYTHON_LIBRARY.impl("attention", others, "CompositeExplicitAutograd")
NATIVE_KEYS.own_backend("attention", "CPU", "tokcomp_cpu", 80)
q = torch.randn(1, 2, 5, 88)
for call in (q.half()[..., :80], q.bfloat16()[..., :8], q[..., :8], q.half(), q.double()[..., :8]):
    torch.ops.tokcomp.attention(call, call, call)
try:
    torch.ops.tokcomp.attention(q.half()[0, 0, 0, 0], q, q)
except ValueError as error:
    print(error)
print(seen)
"""
    ).splitlines()
    assert out[0].startswith("attention: q must be [B, H, N, D], got a tensor of shape []")
    assert out[1] == "[('torch.float32', 8), ('torch.float16', 88), ('torch.float64', 8)]"


def test_python_routes_a_cuda_kernels_calls_alike() -> None:
    from tokcomp_kernels.ops import _backends

    q = torch.zeros(1, 1, 2, 88)
    calls = [q.half()[..., :80], q.bfloat16()[..., :8], q[..., :8], q.half(), q.double()[..., :8], None, q.half().sum()]
    assert [_backends._takes(call, 80) for call in calls] == [True, True, False, False, False, False, True]
    assert [_backends._takes(call, 0) for call in calls] == [True, True, True, True, False, False, True]
    assert _backends.HALF_WIDTHS.keys() == {"attention", "_attention_heads"} == set(*_backends.SAME_KERNEL.items())

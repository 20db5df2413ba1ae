"""TOKCOMP_BACKEND, TOKCOMP_CHECK and what is optional, in fresh interpreters: they are read at import."""

from __future__ import annotations

import os
import subprocess
import sys
from inspect import getsource

import numpy as np
import pytest

from tokcomp_kernels import native_kernels


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TOKCOMP_") and k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=300
    )


def _python(code: str, **environment: str) -> str:
    done = _run(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BACKENDS_ON_CPU = """
from tokcomp_kernels._schema import BY_NAME
from tokcomp_kernels.ops import IMPLEMENTATIONS
everywhere = [i for i in IMPLEMENTATIONS.values() if BY_NAME[i.name].native]
print(",".join(sorted({i.backend("cpu") for i in everywhere})))
"""
CONTENDERS = """
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.ops._backends import TRITON_CONTENDERS
on_cuda = {name: i.backend("cuda") for name, i in IMPLEMENTATIONS.items()}
assert TRITON_CONTENDERS < on_cuda.keys()
others = {backend for name, backend in on_cuda.items() if name not in TRITON_CONTENDERS}
print(",".join(sorted({on_cuda[name] for name in TRITON_CONTENDERS})), "triton" in others)
"""
AGREE = """
import torch, tokcomp_kernels as tk
torch.manual_seed(0)
x, importance = torch.randn(2, 21, 8), torch.rand(2, 21)
out = tk.prune_merge(x, importance, 15, 9)
from tokcomp_kernels.reference.prune_merge import prune_merge_reference
want = prune_merge_reference(x, importance, 15, 9)
assert torch.equal(out[2], want[2]) and torch.allclose(out[0], want[0], atol=1e-6)
print("agree")
"""


@pytest.mark.slow
def test_auto_prefers_compiled_kernels_on_cpu() -> None:
    if not native_kernels()["cpu"]:
        pytest.skip("no compiled kernels in this build")
    assert _python(BACKENDS_ON_CPU) == "cpp"


@pytest.mark.slow
def test_reference_replaces_compiled_kernels() -> None:
    assert _python(BACKENDS_ON_CPU, TOKCOMP_BACKEND="reference") == "reference"
    assert _python(AGREE, TOKCOMP_BACKEND="reference") == "agree"


@pytest.mark.slow
def test_triton_interpreter_can_own_the_cpu() -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if tuple(map(int, np.__version__.split(".")[:2])) >= (2, 5) and "int(self.handle.data)" in getsource(interpreter):
        pytest.skip("this Triton's interpreter makes ints of one-element arrays, which this NumPy refuses")
    assert _python(BACKENDS_ON_CPU, TOKCOMP_BACKEND="triton", TRITON_INTERPRET="1") == "triton"
    assert _python(AGREE, TOKCOMP_BACKEND="triton", TRITON_INTERPRET="1") == "agree"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "contenders"),
    [({}, "reference"), ({"TOKCOMP_BACKEND": "cuda"}, "reference"), ({"TOKCOMP_BACKEND": "triton"}, "triton")],
)
def test_a_contender_runs_on_cuda_only_on_request(setting: dict[str, str], contenders: str) -> None:
    pytest.importorskip("triton")
    assert _python(CONTENDERS, **setting).split()[0] == contenders


@pytest.mark.slow
def test_an_unknown_backend_is_refused() -> None:
    done = _run("import tokcomp_kernels", TOKCOMP_BACKEND="fastest")
    assert "TOKCOMP_BACKEND must be one of auto, cuda, triton, reference, got 'fastest'" in done.stderr


@pytest.mark.slow
def test_importing_works_without_triton() -> None:
    block = "import sys; sys.modules['triton'] = None\n"
    assert _python(block + AGREE) == "agree"
    on_cuda = "from tokcomp_kernels.ops import IMPLEMENTATIONS as all; print({i.backend('cuda') for i in all.values()})"
    assert "triton" not in _python(block + on_cuda, TOKCOMP_BACKEND="triton")


@pytest.mark.slow
def test_importing_does_not_import_triton() -> None:
    code = "import torch, sys; sys.modules.pop('triton', None); import tokcomp_kernels; print('triton' in sys.modules)"
    assert _python(code) == "False"


REFUSED = {
    "tk.prune_merge(x, nan, 15, 9)": "prune_merge: importance must not be NaN, got nan at [1, 4]",
    "tk.prune_merge(x, one, 15, 9, size=-one)": "prune_merge: size must be positive and finite, got -1.0 at [0, 0]",
    "tk.unmerge(x, far)": "unmerge: source must be between -1 and 20, got 99 at [0, 0]",
    "tk.tome_merge(x / 0, x, 3)": "tome_merge: x must be finite, got",
    "tk.masked_attention(q, q, q, one * 2)": "masked_attention: token_mask must be between 0 and 1, got 2.0",
    "tk.masked_softmax(q @ q.mT * float('nan'), one)": "masked_softmax: scores must not be NaN, got nan",
    "tk.attention(q, q, q, size=one * 0)": "attention: size must be positive and finite, got 0.0",
    "tk.attention_received(q / 0, q)": "attention_received: q must be finite, got",
    "tk.class_attention_sort(q[:, :, 0], q, nan)": "class_attention_sort: size must be positive and finite, got nan",
}


@pytest.mark.slow
def test_value_checks_are_on_request() -> None:
    code = f"""
import torch, tokcomp_kernels as tk
x, one, q = torch.randn(2, 21, 8) + 5, torch.ones(2, 21), torch.randn(2, 3, 21, 8)
nan = one.clone(); nan[1, 4] = float("nan")
far = torch.full((2, 30), 99)
for call in {list(REFUSED)}:
    try:
        eval(call)
        print("no error")
    except ValueError as error:
        print(error)
"""
    assert _python(code).splitlines() == ["no error"] * len(REFUSED)
    found = _python(code, TOKCOMP_CHECK="1").splitlines()
    assert len(found) == len(REFUSED)
    for line, message in zip(found, REFUSED.values(), strict=True):
        assert line.startswith(message)


@pytest.mark.slow
def test_shapes_are_checked_before_values() -> None:
    """What is ill-shaped is refused in the same words with value checks as without."""
    code = """
import torch, tokcomp_kernels as tk
x, one = torch.randn(2, 21, 8), torch.ones(2, 21)
for call in (
    lambda: tk.masked_merge(x, one, torch.ones(2, 20), torch.tensor([15, 9])),
    lambda: tk.unmerge(torch.randn(8), torch.zeros(2, 30, dtype=torch.int64)),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""
    wanted = _python(code)
    assert wanted.count("got a tensor of shape") == 2
    assert _run(code, TOKCOMP_CHECK="1").stdout.strip() == wanted

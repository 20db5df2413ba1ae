"""What was built, as the module itself says it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokcomp_kernels
from tokcomp_kernels._schema import OPERATORS
from tokcomp_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not tokcomp_kernels.build_info(), reason=str(tokcomp_kernels.load_error))


def test_versions():
    info = tokcomp_kernels.build_info()
    assert tokcomp_kernels.load_error is None
    assert info["version"] == __version__
    assert info["torch"] == torch.__version__
    assert info["torch_cuda"] == torch.version.cuda
    assert info["compiler"]


def test_cpu():
    info = tokcomp_kernels.build_info()
    levels = ("default", "avx2", "avx512", "avx512_bf16")
    assert info["cpu_arch"] in ("native", "dispatch", "generic", *levels[1:])
    assert info["cpu_levels"] == [level for level in levels if level in info["cpu_levels"]]
    assert info["cpu_capability"] in info["cpu_levels"]
    assert {operator.name for operator in OPERATORS if operator.native} == set(info["operators"]["cpu"])


def test_cuda_is_whole_or_absent():
    info = tokcomp_kernels.build_info()
    assert bool(info["cuda"]) == bool(info["cuda_archs"]) == bool(info["operators"]["cuda"])
    if info["cuda"]:
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]


def test_the_dispatcher_agrees():
    listed = {device: frozenset(names) for device, names in tokcomp_kernels.build_info()["operators"].items()}
    assert tokcomp_kernels.native_kernels() == listed


def test_threads():
    from tokcomp_kernels import _C

    before = _C.get_num_threads()
    assert before == torch.get_num_threads()
    try:
        _C.set_num_threads(before + 1)
        assert _C.get_num_threads() == torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_one_openmp_runtime():
    """A second one would run twice the threads and not share torch's settings."""
    look = "import tokcomp_kernels; print({l.split()[-1] for l in open('/proc/self/maps') if 'libgomp' in l})"
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc")
    run = subprocess.run([sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(ast.literal_eval(run.stdout)) <= 1, run.stdout

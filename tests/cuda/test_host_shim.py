"""The CUDA kernels' own source, run on the host: no GPU, no nvcc (csrc/tests/cuda_shim)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda import shim_build
from tests.cuda.shim_build import ROOT


def compiler_library(name: str) -> str:
    path = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"g++ has no {name}")
    return path


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables under which Python runs with AddressSanitizer."""
    try:
        preload = f"{compiler_library('libasan.so')} {compiler_library('libstdc++.so.6')}"
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no g++ here: {error}")
    # What malloc gives reads as NaN. A GPU, where there is one, is none of this test's business.
    options = "print_legend=0:detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
    ours = {"LD_PRELOAD": preload, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables = {**os.environ, **ours}
    probe = subprocess.run([sys.executable, "-c", "import torch"], env=variables, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"torch does not run under AddressSanitizer here: {probe.stderr[-300:]}")
    return variables


@pytest.fixture(scope="module")
def library() -> Path:
    return shim_build.address_library()


@pytest.mark.slow
def test_kernels_agree_with_float64_on_the_host(environment: dict[str, str], library: Path) -> None:
    parts = ("suite", "attention", "select", "plans")
    suites = [str(Path(__file__).with_name(f"host_shim_{part}.py")) for part in parts]
    # Where AddressSanitizer ends the process, its report and the name of the test must have been written.
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-x", "--capture=sys", "-p", "no:cacheprovider"]
    command += [f"--rootdir={ROOT}", *suites]
    run = subprocess.run(
        command, env={**environment, "TOKCOMP_CUDA_SHIM": str(library)}, cwd=ROOT, capture_output=True, text=True
    )
    report = run.stdout[-3000:] + run.stderr[-3000:]
    assert run.returncode == 0, report
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 300, report

"""What a configuration decides and how it says so: CUDA or not, which torch, which instruction set."""

from __future__ import annotations

import platform
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.building.builds import ROOT

Configure = Callable[..., subprocess.CompletedProcess[str]]
FakeTorch = Callable[..., Path]


def said(run: subprocess.CompletedProcess[str]) -> str:
    """All output on one line: CMake wraps the messages of its errors."""
    return re.sub(r"\s+", " ", run.stdout + run.stderr)


def make_nvcc(folder: Path, release: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.0"\n')
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.mark.parametrize(
    ("cuda", "nvcc", "reason"),
    [
        ("13.2", None, "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"),
        (None, None, "torch 2.15.0 is built without CUDA"),
        (
            *("13.2", "12.9"),
            "nvcc is 12.9 but torch 2.15.0 is built for CUDA 13.2: the major versions must agree",
        ),
    ],
)
def test_without_cuda(
    configure: Configure, fake_torch: FakeTorch, tmp_path: Path, cuda: str | None, nvcc: str | None, reason: str
):
    settings = {"TOKCOMP_TORCH_ROOT": str(fake_torch("2.15.0", cuda))}
    env = {"CUDA_HOME": str(tmp_path / "nothing")} if nvcc is None else {"CUDACXX": make_nvcc(tmp_path, nvcc)}

    automatic = configure(env, **settings, TOKCOMP_BUILD_CUDA="auto")
    assert automatic.returncode == 0, automatic.stderr
    assert f"-- tokcomp: building the CPU kernels only: {reason}\n" in automatic.stdout

    demanded = configure(env, **settings, TOKCOMP_BUILD_CUDA="1")
    assert demanded.returncode != 0
    assert f"tokcomp: TOKCOMP_BUILD_CUDA=1, but {reason}" in said(demanded)


def test_an_nvcc_that_cannot_compile(configure: Configure, fake_torch: FakeTorch, tmp_path: Path):
    settings = {"TOKCOMP_TORCH_ROOT": str(fake_torch("2.15.0", "13.2"))}
    automatic = configure({"CUDACXX": make_nvcc(tmp_path, "13.0")}, **settings)
    assert automatic.returncode == 0, automatic.stderr
    assert "building the CPU kernels only" in automatic.stdout
    assert "cannot compile" in automatic.stdout


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("TOKCOMP_BUILD_CUDA", "yes", "TOKCOMP_BUILD_CUDA must be auto, 0 or 1, got yes"),
        ("TOKCOMP_CPU_ARCH", "sse9", "TOKCOMP_CPU_ARCH must be native, dispatch, avx512_bf16, avx512, avx2 or generic"),
        ("TOKCOMP_SANITIZE", "memory", "TOKCOMP_SANITIZE must be address,undefined or thread, got memory"),
        ("TORCH_CUDA_ARCH_LIST", "8.0;hopper", "TORCH_CUDA_ARCH_LIST must list versions such as 8.0 or 9.0+PTX"),
    ],
)
def test_wrong_settings(
    configure: Configure, fake_torch: FakeTorch, tmp_path: Path, setting: str, value: str, message: str
):
    env = {"CUDACXX": make_nvcc(tmp_path, "13.0")}
    run = configure(env, TOKCOMP_TORCH_ROOT=str(fake_torch("2.15.0", "13.2")), **{setting: value})
    assert run.returncode != 0
    assert message in said(run)


def test_an_old_torch(configure: Configure, fake_torch: FakeTorch):
    run = configure(TOKCOMP_TORCH_ROOT=str(fake_torch("2.9.1", None)))
    assert run.returncode != 0
    assert "tokcomp: torch must be at least 2.10, got 2.9.1" in said(run)


def test_libtokcomp_with_a_torch_below_the_sources(configure: Configure, fake_torch: FakeTorch):
    """As in .venv: CMake takes such a path for one that an installation will not have."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        torch = str(fake_torch("2.15.0", None, Path(folder) / "torch"))
        run = configure(TOKCOMP_TORCH_ROOT=torch, TOKCOMP_LIBTORCH="ON", TOKCOMP_BUILD_CUDA="0")
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 names")
def test_instruction_sets(configure: Configure, fake_torch: FakeTorch):
    torch = str(fake_torch("2.15.0", None))
    for arch, levels in {
        "avx512_bf16": "avx512_bf16",
        "avx512": "avx512",
        "avx2": "avx2",
        "generic": "default",
        "dispatch": "default, avx2, avx512, avx512_bf16",
    }.items():
        run = configure(TOKCOMP_TORCH_ROOT=torch, TOKCOMP_CPU_ARCH=arch)
        assert run.returncode == 0, run.stderr
        assert f"-- tokcomp: CPU kernels for {arch} ({levels})\n" in run.stdout


def test_dispatch_elsewhere_is_one_level(configure: Configure, fake_torch: FakeTorch):
    """What every CPU of the kind has."""
    system = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
    settings = {"TOKCOMP_TORCH_ROOT": str(fake_torch("2.15.0", None)), **system}
    run = configure(**settings, TOKCOMP_CPU_ARCH="dispatch")
    assert run.returncode == 0, run.stderr
    assert "-- tokcomp: CPU kernels for dispatch (default)\n" in run.stdout
    refused = configure(**settings, TOKCOMP_CPU_ARCH="avx2")
    assert "TOKCOMP_CPU_ARCH=avx2 needs an x86-64 machine, got aarch64" in said(refused)

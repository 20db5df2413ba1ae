"""csrc for 64-bit ARM: compiled against torch's own headers, whose vectors are NEON's there. Nothing is run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++: Debian's package g++-aarch64-linux-gnu")
def test_every_cpu_kernel_compiles(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    # One unit, as the build makes few: most of a compilation is torch's headers.
    sources = [*sorted((ROOT / "csrc/cpu").rglob("*.cpp")), ROOT / "csrc/cpu_level.cpp"]
    unit = tmp_path / "all.cpp"
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [str(COMPILER), "-fsyntax-only", "-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-Wno-psabi", "-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"]
    command += ['-DTOKCOMP_CPU_LEVEL="default"', f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    run = subprocess.run([*command, str(unit)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]

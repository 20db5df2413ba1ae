"""Importing without kernels that fit: operators all the same, and the reason in one line."""

from __future__ import annotations

import importlib.machinery
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokcomp_kernels._schema import digest

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]

LOOK = """
import torch, tokcomp_kernels as t
x = torch.randn(2, 9, 8)
kept, size, source = torch.ops.tokcomp.prune_merge(x, torch.randn(2, 9), 7, 5)
assert kept.shape == (2, 5, 8)
assert not any(t.native_kernels().values()), t.native_kernels()
assert t.build_info() == {}, t.build_info()
print(t.load_error)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without its compiled module."""
    folder = tmp_path / "tokcomp_kernels"
    shutil.copytree(ROOT / "tokcomp_kernels", folder, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    return folder


def put_module(package: Path, **facts: str) -> None:
    built = {"torch": torch.__version__, "schemas": digest(), "cpu_features": "", **facts}
    (package / f"_C{SUFFIX}").write_bytes(b"not a library")
    (package / f"_C{SUFFIX}").with_suffix(".json").write_text(json.dumps(built))


def load_error(package: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1
    error = run.stdout.strip()
    is_there = (package / f"_C{SUFFIX}").exists()
    assert (f"RuntimeWarning: tokcomp runs without its compiled kernels. {error}" in run.stderr) == is_there
    return error


def test_no_module(package: Path):
    assert load_error(package) == (
        f"no compiled kernels for this Python in {package}: build them with pip install -e . (or make build)"
    )


def test_broken_module(package: Path):
    put_module(package)
    error = load_error(package)
    assert error.startswith(f"_C{SUFFIX}: ImportError: ")
    assert error.endswith("rebuild with pip install -e . (or make build)")


def test_another_torch(package: Path):
    put_module(package, torch="2.9.0+cpu")
    assert load_error(package) == (
        f"_C{SUFFIX}: built for torch 2.9.0+cpu, running torch {torch.__version__}: "
        "pip install torch==2.9.0, or rebuild with pip install -e . (or make build)"
    )
    other = f"{torch.__version__.partition('+')[0]}+other"
    put_module(package, torch=other)
    assert f"built for torch {other}, running torch {torch.__version__}: rebuild with " in load_error(package)


def test_operators_that_have_changed_since(package: Path):
    put_module(package, schemas="of another day")
    assert load_error(package) == (
        f"_C{SUFFIX}: built from other sources, whose operators take other arguments: "
        "rebuild with pip install -e . (or make build)"
    )


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not Path("/proc/cpuinfo").exists(), reason="asks /proc/cpuinfo"
)
def test_another_cpu(package: Path):
    put_module(package, cpu_features="sse2 avx1024")
    assert "built for a CPU with avx1024, which this one lacks" in load_error(package)


def test_no_facts(package: Path):
    put_module(package)
    (package / f"_C{SUFFIX}").with_suffix(".json").unlink()
    assert "FileNotFoundError" in load_error(package)

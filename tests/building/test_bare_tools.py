"""What `make wheel-check` and `make test-no-compiler` take away, and what they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import wheel_check, without_compiler

TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


def test_the_newest_wheel_of_this_python(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=f"no wheel for {TAG} in .*: make wheel builds one"):
        wheel_check.newest_wheel(tmp_path)
    (tmp_path / "manylinux").mkdir()
    names = (
        f"{TAG}-{TAG}-linux_x86_64",
        f"manylinux/tokcomp-0.1.0-{TAG}-{TAG}-manylinux_2_34_x86_64",
        "cp27-cp27m-any",
    )
    for age, name in enumerate(reversed(names)):
        path = tmp_path / (f"{name}.whl" if "/" in name else f"tokcomp-0.1.0-{name}.whl")
        path.touch()
        os.utime(path, (age, age))
    assert wheel_check.newest_wheel(tmp_path).name == f"tokcomp-0.1.0-{TAG}-{TAG}-linux_x86_64.whl"


def test_a_wheel_older_than_its_sources_is_stale(tmp_path: Path):
    (tmp_path / "csrc").mkdir()
    source, other, wheel = tmp_path / "csrc" / "one.cpp", tmp_path / "csrc" / "one.o", tmp_path / "one.whl"
    for age, path in enumerate((source, wheel, other)):
        path.touch()
        os.utime(path, (age, age))
    assert not wheel_check.is_stale(wheel, tmp_path)
    os.utime(source, (5, 5))
    assert wheel_check.is_stale(wheel, tmp_path)


def test_compilers_alone_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hidden = {"cc", "c++", "gcc-12", "g++", "x86_64-linux-gnu-g++-12", "clang", "clang++-19", "nvcc", "cpp", "c99"}
    kept = {"git", "make", "cmake", "objdump", "gcc-ar", "clang-format", "ccache", "sh"}
    assert set(wheel_check.COMPILERS) - {"cmake", "ninja"} <= {
        name for name in wheel_check.COMPILERS if without_compiler.COMPILER.fullmatch(name)
    }
    there = tmp_path / "there"
    there.mkdir()
    for name in hidden | kept:
        (there / name).touch()
    monkeypatch.setenv("PATH", f"{there}{os.pathsep}{tmp_path / 'nowhere'}{os.pathsep}{there}")
    without_compiler.programs_but_compilers(tmp_path / "bin")
    assert {path.name for path in (tmp_path / "bin").iterdir()} == kept


def test_the_copied_tests_leave_out_what_reads_sources(tmp_path: Path):
    folder = wheel_check.copied_tests(tmp_path / "copied")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert {"tests/conftest.py", "tests/ops/test_agreement.py", "tests/ops/backends.py"} <= files
    for name in files:
        text = (folder / name).read_text(encoding="utf-8")
        assert "from tools" not in text and "ROOT = " not in text, name


def test_cuda_kernels_of_a_wheel_are_built_registered_and_chosen():
    def information(built: list[str], registered: list[str], chosen: str, archs: list[str]) -> dict[str, Any]:
        return {
            "built": {"cuda": "13.0" if archs else "", "cuda_archs": archs, "operators": {"cpu": ["a"], "cuda": built}},
            "native_kernels": {"cpu": ["a"], "cuda": registered},
            "backends": {"a": {"cpu": "cpp", "cuda": chosen}, "b": {"cpu": "cpp", "cuda": "triton"}},
        }

    assert wheel_check.cuda_kernels(information(["a", "_a"], ["_a", "a"], "cuda", ["9.0"])) == ["a", "_a"]
    assert wheel_check.cuda_kernels(information([], [], "triton", [])) == []
    for wrong in (
        information(["a"], [], "cuda", ["9.0"]),  # not registered
        information(["a"], ["a"], "triton", ["9.0"]),  # not chosen
        information([], [], "cuda", []),  # chosen where there is none
        information(["a"], ["a"], "cuda", []),  # for no architecture
    ):
        with pytest.raises(AssertionError):
            wheel_check.cuda_kernels(wrong)


def test_without_triton_no_process_finds_it(monkeypatch: pytest.MonkeyPatch):
    hide = Path(__file__).parents[1] / "without" / "triton"
    ask = "import importlib.util as u; print(u.find_spec('triton') is None, u.find_spec('json') is None)"
    monkeypatch.setenv("PYTHONPATH", str(hide))
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout == "True False\n"

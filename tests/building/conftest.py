"""What the tests of the build share: the repository, its build driver, and torches that exist as far as CMake looks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.building.builds import ROOT, Dispatched, build

sys.path.insert(0, str(ROOT / "build_backend"))


@pytest.fixture(scope="session")
def cmake() -> str:
    import native

    found = native.program("cmake")
    if found is None:
        pytest.skip("no CMake")
    if not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(scope="session")
def dispatched(cmake: str) -> Dispatched:
    if os.environ.get("TOKCOMP_TEST_BUILDS") != "1":
        pytest.skip("compiles the kernels for every level of CPU, some minutes: make test-builds")
    return build(cmake)


@pytest.fixture
def fake_torch(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder that looks like torch to a configuration, which compiles and links nothing."""

    def make(version: str, cuda: str | None, folder: Path = tmp_path / "torch") -> Path:
        (folder / "include").mkdir(parents=True)
        (folder / "lib").mkdir()
        (folder / "__init__.py").touch()
        (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
        return folder

    return make


@pytest.fixture
def configure(cmake: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs CMake's configuration for nothing but the decisions: ``configure(TOKCOMP_CPU_ARCH="avx2", env={...})``."""

    import native

    ninja = native.program("ninja")  # as the build driver does: a machine with a compiler need not have make
    generator = {"CMAKE_GENERATOR": "Ninja", "CMAKE_MAKE_PROGRAM": ninja} if ninja else {}

    def run(env: dict[str, str] | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        settings = {"TOKCOMP_PYTHON_MODULE": "OFF", "Python_EXECUTABLE": sys.executable, **generator, **settings}
        command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "configured")]
        command += [f"-D{name}={value}" for name, value in settings.items()]
        base = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "CUDA_HOME")}
        return subprocess.run(command, env={**base, **(env or {})}, capture_output=True, text=True)

    return run

"""The build serves the torch that the environment will run, not the one pip put beside the build tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FakeTorch = Callable[..., Path]


@pytest.fixture
def environment(tmp_path: Path) -> tuple[Path, Path]:
    """An empty virtual environment: its interpreter and its site-packages."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True)
    return python, Path(site.stdout.strip())


def facts(python: Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(python_path or "")}
    return subprocess.run([python, ROOT / "cmake/torch_facts.py"], env=env, capture_output=True, text=True)


def test_this_environment():
    run = facts(Path(sys.executable))
    found = json.loads(run.stdout)
    assert found["version"] == torch.__version__
    assert found["cuda"] == (torch.version.cuda or "")
    assert found["cxx11_abi"] == int(torch.compiled_with_cxx11_abi())
    assert Path(found["lib"], "libtorch_cpu.so").exists() or sys.platform != "linux"


def test_no_torch(environment: tuple[Path, Path]):
    run = facts(environment[0])
    assert run.returncode == 1
    assert run.stderr == "no torch in this environment: pip install torch\n"


def test_the_environment_comes_before_the_path(environment: tuple[Path, Path], fake_torch: FakeTorch, tmp_path: Path):
    python, site = environment
    overlay = fake_torch("2.15.0", None, tmp_path / "overlay" / "torch").parent
    assert json.loads(facts(python, overlay).stdout)["version"] == "2.15.0"
    fake_torch("2.11.0", "13.0", site / "torch")
    assert json.loads(facts(python, overlay).stdout)["version"] == "2.11.0"


def test_libtorch(tmp_path: Path):
    (tmp_path / "build-version").write_text("2.14.0+cu130\n")
    run = subprocess.run(
        [sys.executable, ROOT / "cmake/torch_facts.py", "--root", tmp_path], capture_output=True, text=True
    )
    found = json.loads(run.stdout)
    assert (found["version"], found["cuda"]) == ("2.14.0+cu130", "13.0")


def test_torch_is_a_build_requirement_only_where_there_is_none(environment: tuple[Path, Path]):
    pytest.importorskip("setuptools")
    ask = "import backend; print(backend.torch_requirements())"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend")}
    here = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
    assert here.stdout == "[]\n"

    import setuptools

    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "build_backend"), str(Path(setuptools.__file__).parents[1])])
    # That path holds torch too; only the question of what to require is asked without it.
    hide = "import native; native.torch_version = lambda: None; "
    bare = subprocess.run([environment[0], "-c", hide + ask], env=env, capture_output=True, text=True, check=True)
    assert bare.stdout == "['torch>=2.10', 'torchvision']\n"
    env["TOKCOMP_BUILD_KERNELS"] = "0"
    none = subprocess.run([environment[0], "-c", hide + ask], env=env, capture_output=True, text=True, check=True)
    assert none.stdout == "[]\n"

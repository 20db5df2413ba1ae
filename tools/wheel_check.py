"""What somebody gets who installs a wheel where there is neither a compiler nor a checkout.

    python -m tools.wheel_check [WHEEL] [--cuda] [--other-torch 2.11.0]    # or: make wheel-check, which may build one

pip installs the wheel into an empty environment, with the torch that it requires. There, with that environment's own
programs on PATH and nothing else, and no GPU even if the machine has one: every operator on every backend that needs
none, the operators' tests from a copy, ``tokcomp info``, ``tokcomp demo``. If the wheel has CUDA kernels, they must be
registered, be what ``tokcomp info`` names, and leave the CPU alone; with --cuda it must have them. With --other-torch,
pip must refuse that version beside the wheel; put there all the same, the kernels must stay out, say what to do, and
leave the work to the reference.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "ninja")
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}
#: What the operators' tests need beside themselves; test_table.py reads the sources of the checkout.
TESTS = ("__init__.py", "conftest.py", "multiplied.py", "ops")

OPERATORS = """
import os, torch, tokcomp_kernels as t
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.testing import samples

assert "site-packages" in t.__file__, t.__file__
assert t.load_error is None, t.load_error
used = {}
for name, implementation in IMPLEMENTATIONS.items():
    sample = next(one for one in samples(name, torch.float32, small=True) if one.args[0].numel())
    assert_right(sample, getattr(torch.ops.tokcomp, name)(*sample.args, **sample.kwargs))
    used.setdefault(implementation.backend("cpu"), []).append(name)
assert os.environ["EXPECTED"] in used, used
info = t.build_info()
print(f"torch {torch.__version__}, {info['cpu_capability']} of {', '.join(info['cpu_levels'])}:",
      "; ".join(f"{len(names)} operators by {backend}" for backend, names in used.items()))
"""

# Shapes on a device that is not there, which torch follows without touching one; then what a kernel of it is asked for.
CUDA_WITHOUT_GPU = """
import torch, tokcomp_kernels
from torch._subclasses.fake_tensor import FakeTensorMode

assert not torch.cuda.is_available()
with FakeTensorMode():
    x, importance = torch.empty(2, 10, 8, device="cuda"), torch.empty(2, 10, device="cuda")
    shapes = [(tuple(one.shape), one.device.type) for one in torch.ops.tokcomp.prune_merge(x, importance, 6, 4)]
assert shapes == [((2, 4, 8), "cuda"), ((2, 4), "cuda"), ((2, 10), "cuda")], shapes
try:
    torch.ops.tokcomp_cuda.prune_merge(torch.ones(1, 4, 2), torch.ones(1, 4), 3, 2)
except NotImplementedError as error:
    assert "'CPU' backend" in str(error), error
else:
    raise AssertionError("a CUDA kernel took tensors of the CPU")
assert not torch.cuda.is_initialized()
"""

ANOTHER_TORCH = """
import torch, tokcomp_kernels as t
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import samples

assert t.load_error and f"running torch {torch.__version__}: pip install torch==" in t.load_error, t.load_error
assert not any(t.native_kernels().values()) and t.build_info() == {}
sample = next(iter(samples("prune_merge", torch.float32, small=True)))
assert_right(sample, torch.ops.tokcomp.prune_merge(*sample.args, **sample.kwargs))
print(t.load_error)
"""


def newest_wheel(folder: Path) -> Path:
    """The last wheel made for this Python, under whatever tag of the system.

    Raises:
        FileNotFoundError: there is none.
    """
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.rglob(f"tokcomp-*-{tag}-{tag}-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no wheel for {tag} in {folder}: make wheel builds one")
    return found[-1]


def is_stale(wheel: Path, root: Path = ROOT) -> bool:
    """Whether something that goes into the wheel was changed after it was made: the tests here would not fit it."""
    folders = ("csrc", "tokcomp_kernels", "python/tokcomp")
    sources = (path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SOURCES)
    return max((path.stat().st_mtime for path in sources), default=0) > wheel.stat().st_mtime


def fresh_wheel() -> Path:
    """The newest wheel of ``dist``, built now if there is none or if it is stale."""
    folder = ROOT / "dist"
    try:
        wheel = newest_wheel(folder)
        why = f"{wheel.name} is older than its sources" if is_stale(wheel) else ""
    except FileNotFoundError:
        why = "no wheel in dist/"
    if why:
        print(f"{why}: building one, which takes minutes", flush=True)
        build = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(ROOT)]
        subprocess.run(build, check=True, cwd=ROOT)
    return newest_wheel(folder)


class Bare:
    """An environment of its own, whose programs are all that PATH holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        venv.create(self.folder, clear=True, with_pip=True)
        self.bin = self.folder / ("Scripts" if os.name == "nt" else "bin")
        ours = ("PYTHON", "TOKCOMP_", "TRITON_", "CUDA", "CC", "CXX", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment = {**kept, "PATH": str(self.bin), "CUDA_VISIBLE_DEVICES": ""}
        compilers = [name for name in COMPILERS if shutil.which(name, path=str(self.bin))]
        assert not compilers, compilers

    def run(self, *command: str | Path, fails: bool = False, cwd: Path | None = None, **variables: str) -> str:
        """A program of the environment, and what it printed; ``fails``: it must not succeed."""
        program, *rest = map(str, command)
        done = subprocess.run(
            [str(self.bin / program), *rest],
            env={**self.environment, **variables},
            cwd=cwd or self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if (done.returncode != 0) != fails:
            raise SystemExit(f"wheel-check: {program} {' '.join(rest)[:200]}\n{done.stdout[-6000:]}")
        return done.stdout

    def pip(self, *arguments: str | Path, fails: bool = False) -> str:
        return self.run("python", "-m", "pip", *arguments, fails=fails)


@contextmanager
def step(name: str) -> Iterator[list[str]]:
    """Says what is going on while it goes on, then how long it took and the last line put into the list."""
    print(f"{name} ...", end=" ", flush=True)
    said: list[str] = []
    begun = time.monotonic()
    try:
        yield said
    except BaseException:
        print("failed", flush=True)
        raise
    print(" ".join([said[-1].strip().splitlines()[-1] if said else "done", f"({time.monotonic() - begun:.0f} s)"]))


def copied_tests(folder: Path) -> Path:
    """The operators' tests in a folder without the packages, which are then the installed ones."""
    (folder / "tests").mkdir(parents=True)
    for name in TESTS:
        source, copy = ROOT / "tests" / name, folder / "tests" / name
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "test_table.py"))
        else:
            shutil.copyfile(source, copy)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nmarkers = slow\npythonpath = .\n")
    return folder


def cuda_kernels(information: dict[str, Any]) -> list[str]:
    """The operators with CUDA kernels, by ``tokcomp info --json`` under TOKCOMP_BACKEND=cuda; a CPU wheel has none.

    Raises:
        AssertionError: what was built, what is registered and what would run on CUDA do not agree.
    """
    built, registered = information["built"], information["native_kernels"]["cuda"]
    compiled = built["operators"].get("cuda", [])
    assert sorted(compiled) == sorted(registered), (compiled, registered)
    assert bool(compiled) == bool(built["cuda"]) == bool(built["cuda_archs"]), built
    chosen = {name: backends["cuda"] for name, backends in information["backends"].items()}
    assert {name for name, backend in chosen.items() if backend == "cuda"} == chosen.keys() & set(compiled), chosen
    assert all(backends["cpu"] != "cuda" for backends in information["backends"].values())
    return compiled


def check_cuda(bare: Bare, *, required: bool) -> None:
    """That CUDA kernels, where the wheel has any, are registered and named, though there is no GPU to run them."""
    with step("CUDA kernels, without a GPU") as said:
        information = json.loads(bare.run("tokcomp", "info", "--json", TOKCOMP_BACKEND="cuda"))
        compiled, built = cuda_kernels(information), information["built"]
        if not compiled:
            assert not required, f"the wheel has no CUDA kernels: {built}"
            said.append("none in this wheel")
            return
        bare.run("python", "-c", CUDA_WITHOUT_GPU)
        said.append(f"{len(compiled)} by CUDA {built['cuda']} for {', '.join(built['cuda_archs'])}")


def check(wheel: Path, bare: Bare, *, cuda: bool = False) -> None:
    """Everything that the wheel promises with its own torch; ``cuda``: it must have CUDA kernels."""
    with step("pip install, with the torch that it requires"):
        bare.pip("install", f"{wheel}[demo]", "pytest", "hypothesis")
    with step("pip check") as said:
        said.append(bare.pip("check"))
    for backend, expected in (("auto", "cpp"), ("reference", "reference"), ("triton", "triton")):
        settings = {"TOKCOMP_BACKEND": backend, "EXPECTED": expected, "TRITON_INTERPRET": "1"}
        with step(f"operators, {backend}") as said:
            said.append(bare.run("python", "-c", OPERATORS, **settings))
    # Above is enough of Triton's kernels, whose interpreter takes minutes. What is slow needs a compiler, for Inductor.
    tests = copied_tests(bare.folder / "copied")
    pytest = ("python", "-m", "pytest", "-q", "-m", "not slow", "tests/ops")
    with step("tests/ops") as said:
        said.append(bare.run(*pytest, cwd=tests, TRITON_INTERPRET="0"))
    with step("tokcomp info") as said:
        information = bare.run("tokcomp", "info")
        said.append(next(line for line in information.splitlines() if "cpu_capability" in line))
    check_cuda(bare, required=cuda)
    with step("tokcomp demo") as said:
        said.append(bare.run("tokcomp", "demo", "-o", "demo"))
    assert (bare.folder / "demo" / "report.html").stat().st_size > 100_000


def check_another_torch(wheel: Path, bare: Bare, version: str) -> None:
    """What happens beside a torch that the kernels were not built for."""
    with step(f"pip, wheel with torch {version}") as said:
        refused = bare.pip("install", "--dry-run", wheel, f"torch=={version}", fails=True)
        said.append(next(line for line in refused.splitlines() if "conflict" in line))
    with step(f"under torch {version}") as said:
        bare.pip("install", f"torch=={version}", "torchvision")
        said.append(bare.run("python", "-c", ANOTHER_TORCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="?", help="default: the newest in dist/, built if need be")
    parser.add_argument("--cuda", action="store_true", help="the wheel must have CUDA kernels")
    parser.add_argument("--other-torch", metavar="VERSION", help="also try it beside this torch")
    options = parser.parse_args()
    wheel = (options.wheel or fresh_wheel()).resolve()
    print(f"{wheel.name}, {sysconfig.get_platform()}, Python {sys.version.split()[0]}", flush=True)
    bare = Bare(ROOT / "build" / "wheel-check")
    check(wheel, bare, cuda=options.cuda)
    if options.other_torch:
        check_another_torch(wheel, bare, options.other_torch)
    shutil.rmtree(bare.folder)


if __name__ == "__main__":
    main()

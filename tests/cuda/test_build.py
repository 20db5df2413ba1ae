"""What nvcc made of the CUDA kernels: complete, nothing spilled, shared memory within the limits. Needs no GPU."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import tokcomp_kernels
from tokcomp_kernels import native_kernels

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90")
#: Kernels with more than one variant for each type: rows of up to two pieces a lane, and longer ones.
VARIANTS = {"add_layer_norm_kernel": 2}
#: Kernels that see scores and sums alone, whatever the type of the rows.
TYPELESS = ("rank_kernel", "mask_sum_kernel")
OPERATORS = sorted(
    re.findall(r"^TOKCOMP_REGISTER_CUDA\((\w+),", "\n".join(p.read_text() for p in CUDA.glob("*.cu")), re.MULTILINE)
)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    stack: int
    spills: int
    static_shared: int


def sources() -> list[Path]:
    return sorted([*CUDA.iterdir(), *(ROOT / "csrc" / "common").iterdir()])


def kernels_in(report: str) -> list[Kernel]:
    found = []
    for entry in ENTRY.finditer(report):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = int(entry["stores"]) + int(entry["loads"])
        static = int(shared[1]) if shared else 0
        found.append(Kernel(entry["name"], entry["architecture"], int(entry["stack"]), spills, static))
    return found


def installed_report() -> str | None:
    """ptxas' report beside the installed module, if it is of these sources and of both architectures."""
    for path in Path(tokcomp_kernels.__file__).parent.glob("_C.*.ptxas.txt"):
        text = path.read_text()
        newest = max(source.stat().st_mtime for source in sources())
        if path.stat().st_mtime > newest and {k.architecture for k in kernels_in(text)} >= set(ARCHITECTURES):
            return text
    return None


def compiled_report() -> str:
    """The same from a compilation of our own, kept for each state of the sources."""
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if nvcc is None:
        pytest.skip("no nvcc here, and no report of a build with it")
    state = hashlib.sha256(torch.__version__.encode())
    for source in sources():
        state.update(source.read_bytes())
    folder = ROOT / "build" / "ptxas" / state.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xcompiler=-fPIC", "-c"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += [f"-I{Path(nvcc).parent.parent / 'include'}", f"-isystem={include}"]
    command += [f"-isystem={include / 'torch/csrc/api/include'}"]
    for source in sorted(CUDA.glob("*.cu")):
        log = folder / f"{source.stem}.txt"
        if not log.exists():
            build = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True)
            assert build.returncode == 0, build.stderr[-4000:]
            log.write_text(build.stdout + build.stderr)
    return "".join(log.read_text() for log in folder.glob("*.txt"))


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    return kernels_in(installed_report() or compiled_report())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled(kernels: list[Kernel], architecture: str) -> None:
    names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
    defined = re.findall(
        r"__global__ void __launch_bounds__\([^)]*\) (\w+)\(", "".join(p.read_text() for p in CUDA.glob("*.cuh"))
    )
    assert len(defined) >= len(OPERATORS)
    for kernel in defined:
        found = [name for name in names if re.search(rf"\d{kernel}[IE]", name)]
        assert found, f"{kernel} is not built for sm_{architecture}"
        if kernel not in TYPELESS:
            want = 3 * VARIANTS.get(kernel, 1)
            assert len(found) == want, f"{kernel} is built {len(found)} times, not {want}: float16, bfloat16, float32"


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    assert not [kernel for kernel in kernels if kernel.spills or kernel.stack]


def test_shared_memory_is_within_the_limits(kernels: list[Kernel]) -> None:
    """All of a kernel's shared memory is its launch's, which asks for no more than the device has: the host shim
    refuses more, and tests what prune_merge asks for over all shapes. A kernel declares none beside it."""
    assert not [kernel for kernel in kernels if kernel.static_shared]


@pytest.mark.parametrize("op", OPERATORS)
def test_kernels_are_linked_and_loaded(op: str) -> None:
    built = native_kernels()["cuda"]
    if not built:
        pytest.skip("the installed module has no CUDA kernels")
    assert op in built
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tokcomp_cuda::{op}", "CUDA")

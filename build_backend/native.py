"""Drive CMake: configure and build ``tokcomp_kernels/_C``. ``python build_backend/native.py`` builds it in place.

Standard library only, so it also serves a machine with no setuptools and no network. Environment variables are handed
to CMakeLists.txt, which owns their meaning and defaults: TOKCOMP_BUILD_CUDA, TORCH_CUDA_ARCH_LIST, TOKCOMP_CPU_ARCH.
One default is set here: a wheel may go to another machine, so it is built for every CPU of its kind. MAX_JOBS bounds
the parallel compilations. TOKCOMP_BUILD_KERNELS=0 makes a distribution without any, for setup.py and the backend.
TOKCOMP_SANITIZE=address,undefined or thread builds a package of its own, in ``build``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = ("TOKCOMP_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "TOKCOMP_CPU_ARCH")
GIBIBYTES_PER_JOB = 2.5


def wanted() -> bool:
    """Whether a distribution gets compiled kernels; without them PyTorch and Triton run the operators.

    Raises:
        ValueError: TOKCOMP_BUILD_KERNELS is neither 0 nor 1.
    """
    value = os.environ.get("TOKCOMP_BUILD_KERNELS") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"TOKCOMP_BUILD_KERNELS must be 0 or 1, got {value!r}")
    return value == "1"


def program(name: str) -> str | None:
    """A tool of that name: from its Python package, which is recent, else from PATH."""
    spec = importlib.util.find_spec(name)
    if spec and spec.submodule_search_locations:
        found = getattr(importlib.import_module(name), {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name], None)
        if found and (path := shutil.which(name, path=found)):
            return path
    return shutil.which(name)


def default_jobs() -> int:
    """One per core, bounded by memory: a translation unit that includes torch takes up to 2.5 GiB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        gibibytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, int(gibibytes / GIBIBYTES_PER_JOB)))


def is_stale(cache: Path, ninja: str | None) -> bool:
    """Whether the folder of a cache has to be configured afresh, which loses every object in it.

    pip's temporary environments take their CMake and Ninja along. That alone is no reason: a configuration names both
    anew. Another kind of build tool is one.
    """
    text = cache.read_text()
    cached = dict(re.findall(r"^(CMAKE_GENERATOR|CMAKE_MAKE_PROGRAM):\w+=(.*)$", text, re.MULTILINE))
    if ninja:
        return cached.get("CMAKE_GENERATOR") != "Ninja"
    return not Path(cached.get("CMAKE_MAKE_PROGRAM", "")).exists()


def torch_version() -> str | None:
    """The version of the torch to build against, or None where there is none."""
    facts = subprocess.run([sys.executable, str(ROOT / "cmake/torch_facts.py")], capture_output=True, text=True)
    return json.loads(facts.stdout)["version"] if facts.returncode == 0 else None


def build(output: Path | None = None, *, sanitize: str | None = None) -> Path:
    """Build ``_C`` for a wheel into ``output``; without it, in place and for this machine. Returns the build folder.

    With ``sanitize``, the CPU kernels under these sanitizers, in a copy of ``tokcomp_kernels`` in the build folder, so
    that no other program meets them: they load where PYTHONPATH begins with that folder and LD_PRELOAD is what its
    ``preload.txt`` says.

    Each of the kinds has a build folder of its own and keeps it, so that the next build compiles what changed alone.

    Raises:
        RuntimeError: no CMake, or it failed; its own message has been printed.
    """
    cmake = program("cmake")
    if cmake is None:
        raise RuntimeError("tokcomp: CMake is needed to build the kernels: pip install cmake ninja")
    settings = {
        "TOKCOMP_OUTPUT_DIR": None,
        "TOKCOMP_SANITIZE": None,
        **{name: os.environ.get(name) for name in VARIABLES},
    }
    folder = ROOT / "build" / str(sys.implementation.cache_tag)
    if sanitize:
        folder = folder.with_name(f"{folder.name}-{sanitize.replace(',', '-')}")
        copy = shutil.ignore_patterns("_C.*", "__pycache__")
        shutil.copytree(ROOT / "tokcomp_kernels", folder / "tokcomp_kernels", ignore=copy, dirs_exist_ok=True)
        settings |= {
            "TOKCOMP_SANITIZE": sanitize,
            "TOKCOMP_BUILD_CUDA": "0",
            "TOKCOMP_OUTPUT_DIR": str(folder / "tokcomp_kernels"),
        }
    elif output is not None:
        folder = folder.with_name(f"{folder.name}-wheel")
        for old in output.glob("_C.*"):  # setuptools keeps this folder too, and packs what it finds there
            old.unlink()
        settings["TOKCOMP_OUTPUT_DIR"] = str(output)
        settings["TOKCOMP_CPU_ARCH"] = settings["TOKCOMP_CPU_ARCH"] or "dispatch"
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-D{name}={value}" if value else f"-U{name}" for name, value in settings.items()]
    ninja = program("ninja")
    if ninja:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    cache = folder / "CMakeCache.txt"
    if cache.exists() and is_stale(cache, ninja):
        configure.append("--fresh")
    jobs = os.environ.get("MAX_JOBS") or str(default_jobs())
    for command in (configure, [cmake, "--build", str(folder), "--target", "_C", "--parallel", jobs]):
        if subprocess.run(command).returncode:
            raise RuntimeError(f"tokcomp: the build failed, see above: {' '.join(command)}")
    return folder


if __name__ == "__main__":
    try:
        build(sanitize=os.environ.get("TOKCOMP_SANITIZE"))
    except RuntimeError as error:
        sys.exit(str(error))

"""Drive CMake: configure and build ``tokcomp_kernels/_C``. ``python build_backend/native.py`` builds it in place.

Standard library only, so it also serves a machine with no setuptools and no network. Environment variables are handed
to CMakeLists.txt, which owns their meaning and defaults: TOKCOMP_BUILD_CUDA, TORCH_CUDA_ARCH_LIST, TOKCOMP_CPU_ARCH.
MAX_JOBS bounds the parallel compilations.
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


def is_stale(cache: Path) -> bool:
    """Whether a cache names a build tool that is gone, as those of pip's temporary environments are."""
    tools = re.findall(r"^(?:CMAKE_MAKE_PROGRAM|CMAKE_COMMAND):\w+=(.+)$", cache.read_text(), re.MULTILINE)
    return not all(Path(tool).exists() for tool in tools)


def torch_version() -> str | None:
    """The version of the torch to build against, or None where there is none."""
    facts = subprocess.run([sys.executable, str(ROOT / "cmake/torch_facts.py")], capture_output=True, text=True)
    return json.loads(facts.stdout)["version"] if facts.returncode == 0 else None


def build(output: Path | None = None) -> None:
    """Build ``_C`` into ``output``, by default in place.

    Raises:
        RuntimeError: no CMake, or it failed; its own message has been printed.
    """
    cmake = program("cmake")
    if cmake is None:
        raise RuntimeError("tokcomp: CMake is needed to build the kernels: pip install cmake ninja")
    folder = ROOT / "build" / str(sys.implementation.cache_tag)
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    if output is not None:
        configure.append(f"-DTOKCOMP_OUTPUT_DIR={output}")
    else:
        configure.append("-UTOKCOMP_OUTPUT_DIR")
    if ninja := program("ninja"):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    for name in VARIABLES:
        configure.append(f"-D{name}={value}" if (value := os.environ.get(name)) else f"-U{name}")
    cache = folder / "CMakeCache.txt"
    if cache.exists() and is_stale(cache):
        configure.append("--fresh")
    jobs = os.environ.get("MAX_JOBS") or str(default_jobs())
    for command in (configure, [cmake, "--build", str(folder), "--target", "_C", "--parallel", jobs]):
        if subprocess.run(command).returncode:
            raise RuntimeError(f"tokcomp: the build failed, see above: {' '.join(command)}")


if __name__ == "__main__":
    try:
        build()
    except RuntimeError as error:
        sys.exit(str(error))

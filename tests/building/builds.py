"""A build with every part and every level of the CPU, for the tests that need another than the one in place."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    words, env = [str(part) for part in command], os.environ | (env or {})
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@dataclass(frozen=True)
class Dispatched:
    """A build with TOKCOMP_CPU_ARCH=dispatch: of the Python package, and of libtokcomp, which is installed."""

    build: Path
    package: Path  # a copy of tokcomp_kernels with these kernels
    prefix: Path  # where libtokcomp was installed
    ctest: Path


def build(cmake: str) -> Dispatched:
    """Kept from run to run, so that only changes are compiled."""
    folder = ROOT / "build" / f"tests-{sys.implementation.cache_tag}"
    built = Dispatched(folder / "cmake", folder / "tokcomp_kernels", folder / "prefix", Path(cmake).with_name("ctest"))
    # Without a GPU the CUDA half would only be compiled a second time.
    cuda = "auto" if torch.cuda.is_available() else "0"
    settings = {
        "Python_EXECUTABLE": sys.executable,
        "TOKCOMP_LIBTORCH": "ON",
        "TOKCOMP_CPU_ARCH": "dispatch",
        "TOKCOMP_BUILD_CUDA": cuda,
        "TOKCOMP_OUTPUT_DIR": built.package,
        "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability()) if cuda == "auto" else "8.0",
        "CMAKE_INSTALL_PREFIX": built.prefix,
        # Half the time. Sums keep their order at any level of optimisation; only what is fused may differ from -O3.
        "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",
    }
    jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of one test run share the folder
        shutil.copytree(
            ROOT / "tokcomp_kernels",
            built.package,
            ignore=shutil.ignore_patterns("_C.*", "__pycache__"),
            dirs_exist_ok=True,
        )
        run(cmake, "-S", ROOT, "-B", built.build, *(f"-D{name}={value}" for name, value in settings.items()))
        run(cmake, "--build", built.build, "--parallel", jobs)
        run(cmake, "--install", built.build)
    return built

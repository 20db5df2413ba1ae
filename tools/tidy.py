"""clang-tidy on the C++ of the compiled kernels, with .clang-tidy's checks: ``make tidy``. Any finding fails.

Only CMake's configuration is needed, in build/tidy. CUDA sources are left out: clang takes no CUDA 13.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))
import native  # noqa: E402

FOLDER = ROOT / "build" / "tidy"
#: The level with the most code.
LEVEL = "avx512_bf16" if platform.machine() in ("x86_64", "AMD64") else "generic"
#: What GCC alone knows; and OpenMP, whose header is GCC's own.
GCC_ONLY = ("-Wno-unknown-warning-option", "-Wno-ignored-optimization-argument", "-fno-openmp")


def units() -> list[Path]:
    """What is compiled, after configuring it: eight of the kernels' files each, and the others one by one."""
    cmake, ninja = native.program("cmake"), native.program("ninja")
    if cmake is None or ninja is None:
        raise SystemExit("make tidy needs CMake and Ninja: pip install cmake ninja")
    command = [cmake, "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DTOKCOMP_CPU_ARCH={LEVEL}", "-DTOKCOMP_BUILD_CUDA=0"]
    subprocess.run([*command, "-DTOKCOMP_LIBTORCH=ON"], check=True, stdout=subprocess.DEVNULL)
    compiled = json.loads((FOLDER / "compile_commands.json").read_text())
    files = {Path(one["directory"], one["file"]).resolve() for one in compiled}
    return sorted(file for file in files if file.exists())  # schemas.cpp is written by a build, and is a list


def check(unit: Path) -> tuple[Path, str]:
    """A unit's findings, in csrc alone, or nothing."""
    command = [Path(sys.executable).with_name("clang-tidy"), "-p", FOLDER, "--quiet", "--warnings-as-errors=*"]
    command += [f"--extra-arg={option}" for option in GCC_ONLY]
    done = subprocess.run([*map(str, command), str(unit)], capture_output=True, text=True)
    return unit, done.stdout + done.stderr if done.returncode else ""


def main() -> int:
    failed = False
    with ThreadPoolExecutor(native.default_jobs()) as pool:
        for unit, found in pool.map(check, units()):
            failed |= bool(found)
            print(f"{unit.relative_to(ROOT)}: {found or 'nothing found'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

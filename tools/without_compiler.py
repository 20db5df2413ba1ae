"""The fast tests where there is no compiler: ``make test-no-compiler``. Further arguments are pytest's.

    python -m tools.without_compiler [-n 2] [-k text]

Copies the sources to build/no-compiler and installs them there with TOKCOMP_BUILD_KERNELS=0, into an environment that
finds the packages of this one. PATH then leads to every program of this machine but the compilers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Names of compilers, with or without a target and a version: cc, g++-12, x86_64-linux-gnu-gcc, clang++.
COMPILER = re.compile(r"(?:.*-)?(?:cc|c\+\+|[cg]pp|gcc|g\+\+|clang|clang\+\+|icx|icpx|nvcc|c[89]9)(?:-[\d.]+)?")


def programs_but_compilers(folder: Path) -> None:
    """Links to the first program of each name on PATH."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in sorted(place.iterdir()) if place.is_dir() else []:
            if not COMPILER.fullmatch(program.name) and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)


def copied_sources(folder: Path) -> None:
    """What git knows or does not ignore: no compiled kernels."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def main() -> int:
    folder = ROOT / "build" / "no-compiler"
    shutil.rmtree(folder, ignore_errors=True)
    sources, programs, environment = folder / "sources", folder / "bin", folder / "venv"
    copied_sources(sources)
    programs_but_compilers(programs)
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # A path in a .pth file is searched last, and its own .pth files, which lead to the checkout, are not read.
    places = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    (Path(places) / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    named = ("CC", "CXX", "CUDACXX", "PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name not in named}
    variables |= {"PATH": f"{environment / 'bin'}{os.pathsep}{programs}", "CUDA_HOME": str(folder / "no-cuda")}
    install = [python, "-m", "pip", "install", "-q", "--no-deps", sources]
    subprocess.run(install, env=variables | {"TOKCOMP_BUILD_KERNELS": "0"}, check=True)
    tests = [python, "-m", "pytest", "-m", "not slow", *sys.argv[1:]]
    return subprocess.run(tests, env=variables, cwd=sources).returncode


if __name__ == "__main__":
    raise SystemExit(main())

"""Print, as JSON, what the build needs to know of a PyTorch, without importing it: a build machine may be unable to.

``torch_facts.py`` describes the torch of the running Python; ``torch_facts.py --root DIR`` an unpacked LibTorch.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path


def torch_root() -> Path | None:
    """The torch that programs of this environment will import.

    pip builds in an isolated environment, on PYTHONPATH, that may hold another torch than the environment it installs
    into: a child that ignores PYTHONPATH sees the latter. Only where that finds none is this process's path asked.
    """
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    child = subprocess.run([sys.executable, "-E", "-c", probe], capture_output=True, text=True, cwd=sys.prefix)
    if child.returncode == 0 and child.stdout.strip():
        return Path(child.stdout.strip())
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def read_version(root: Path) -> tuple[str, str]:
    """Version, and the CUDA version it was built for or ''."""
    version_file = root / "version.py"
    if version_file.exists():
        values: dict[str, object] = {}
        for node in ast.parse(version_file.read_text()).body:
            target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [None])[0]
            if isinstance(target, ast.Name) and isinstance(getattr(node, "value", None), ast.Constant):
                values[target.id] = node.value.value
        return str(values["__version__"]), str(values.get("cuda") or "")
    version = (root / "build-version").read_text().strip()
    cuda = re.search(r"\+cu(\d+)(\d)$", version)
    return version, f"{cuda[1]}.{cuda[2]}" if cuda else ""


def cxx11_abi(root: Path) -> int:
    config = root / "share/cmake/Torch/TorchConfig.cmake"
    found = re.search(r"_GLIBCXX_USE_CXX11_ABI=(\d)", config.read_text()) if config.exists() else None
    return int(found[1]) if found else 1


def openmp_library(root: Path) -> str:
    """The OpenMP runtime that ships with torch: a second one in the process would oversubscribe the cores."""
    for folder in (root / "lib", root.parent / "torch.libs"):
        for library in sorted(folder.glob("libgomp*.so*")):
            return str(library)
    return ""


def cuda_runtime(root: Path) -> str:
    """The CUDA runtime that ships with torch, or ''; a pip-installed one lies in its own package."""
    for folder in (root / "lib", *sorted(root.parent.glob("nvidia/*/lib"))):
        for library in sorted(folder.glob("libcudart*.so*")):
            return str(library)
    return ""


def facts(root: Path) -> dict[str, object]:
    version, cuda = read_version(root)
    return {
        "version": version,
        "cuda": cuda,
        "cxx11_abi": cxx11_abi(root),
        "include": [str(root / "include"), str(root / "include/torch/csrc/api/include")],
        "lib": str(root / "lib"),
        "openmp": openmp_library(root),
        "cudart": cuda_runtime(root) if cuda else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path)
    root = parser.parse_args().root or torch_root()
    if root is None:
        print("no torch in this environment: pip install torch", file=sys.stderr)
        return 1
    print(json.dumps(facts(root)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The instructions of the CUDA kernels' machine code, counted by kind. Needs cuobjdump and no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

#: What an instruction is counted as, by how it begins; of several the first. The others are not counted.
KINDS = {
    "shared_128": r"(LDS|STS)\.128\b",
    "shared_narrow": r"(LDS|STS)\b",
    "copies_128": r"LDGSTS\.\S*\b128\b",  # from device memory to shared memory, past the registers
    "copies_narrow": r"LDGSTS\b",
    "matrices": r"LDSM\b",
    "products": r"HMMA\b",
    "generic": r"(LD|ST)\.E\b",  # another block's shared memory, or a pointer whose memory the compiler does not know
    "local": r"(LDL|STL)\b",
    "fences": r"MEMBAR\.\w+\.(GPU|SYS)\b",
    "shuffles": r"SHFL\b",
    "block_barriers": r"BAR\.(SYNC|RED)\b",
    "grid_waits": r"ACQBULK\b",  # for the end of the grid before
    "cluster_barriers": r"UCGABAR_ARV\b",
}
_HEAD = re.compile(r"^\s*(?:code for sm_(\d+)a?|Function : (\S+))$")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def find_cuobjdump() -> Path | None:
    """On PATH, beside nvcc, or in Triton's package, which brings it along."""
    found = shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    if found:
        return Path(found)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return brought if brought.exists() else None


def disassemble(path: Path) -> str:
    """The SASS of every kernel in an object or a module, for all of its architectures."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise SystemExit("cuobjdump: neither on PATH, nor in /usr/local/cuda/bin, nor in an installed Triton")
    path_with_nvdisasm = os.pathsep.join([str(cuobjdump.parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [str(cuobjdump), "-sass", str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path_with_nvdisasm},
    )
    if done.returncode:
        raise SystemExit(f"{path}: cuobjdump failed:\n{done.stderr[-2000:]}")
    return done.stdout


def count(listing: str) -> dict[tuple[str, int], dict[str, int]]:
    """By (mangled name, architecture): how many instructions of each kind a kernel has."""
    kinds = [(kind, re.compile(pattern)) for kind, pattern in KINDS.items()]
    architecture, found, counts = 0, {}, Counter[str]()
    for line in listing.splitlines():
        if head := _HEAD.match(line):
            if head[1]:
                architecture = int(head[1])
            else:
                counts = found.setdefault((head[2], architecture), Counter())
        elif instruction := _INSTRUCTION.match(line):
            kind = next((kind for kind, pattern in kinds if pattern.match(instruction[1])), None)
            if kind:
                counts[kind] += 1
    return {key: {kind: counts[kind] for kind in KINDS} for key, counts in found.items()}

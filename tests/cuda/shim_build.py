"""Builds the CUDA operators for CPU tensors (csrc/tests/cuda_shim), once for each state of the kernels' source."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc/cuda", "csrc/common", "csrc/tests/cuda_shim")
COMMON = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas"),
    *("-fno-strict-aliasing", "-ffp-contract=off"),
)
ADDRESSES = (*COMMON, "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment")
#: The race detector has the instrumentation's functions itself: the runtime library that goes with it is not linked.
RACES = (*COMMON, "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-Wno-tsan")
NO_RUNTIME = ("-Wl,-Bsymbolic", "-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc")
BARRIER = re.compile(
    r"\b(__syncthreads\(\)|__syncwarp\(\)|sync_cluster\(slices\)|cluster_(?:arrive|arrive_relaxed|wait)\(\)"
    r"|wait_for_copies<\d>\(\));"
)


def address_library() -> Path:
    """Under AddressSanitizer, with a check of every vector's alignment."""
    return _library("addresses", (), ADDRESSES, ())


def race_library() -> tuple[Path, dict[str, int]]:
    """With the race detector; and what to do without, one at a time: the place in the source, and its bits for
    `shim_set_without`.

    Each barrier is one; of a cluster's arrival, that it hands memory on; and of a relaxed arrival, the whole of its
    barrier.
    """
    without: dict[str, int] = {}
    number = 0
    sources = {path: path.read_text() for path in (ROOT / "csrc/cuda").iterdir()}
    for path, text in sorted(sources.items()):
        lines = text.splitlines(keepends=True)
        relaxed = ""
        for at, line in enumerate(lines):
            if barrier := BARRIER.search(line):
                weaker = "else cluster_arrive_relaxed();" if barrier[1] == "cluster_arrive()" else ""
                kept = f"if (shim::with_barrier({number})) {barrier[0]} {weaker}"
                lines[at] = line[: barrier.start()] + kept + line[barrier.end() :]
                place = f"{path.name}:{at + 1}"
                without[place] = 1 << number
                if barrier[1] == "cluster_wait()" and relaxed:
                    without[f"{relaxed} and {at + 1}"] = without[relaxed] | without[place]
                relaxed = place if barrier[1] == "cluster_arrive_relaxed()" else relaxed
                number += 1
        sources[path] = "".join(lines)
    changed = tuple((str(path.relative_to(ROOT)), text) for path, text in sources.items())
    return _library("races", changed, RACES, ("races.cpp",)), without


def _library(name: str, changed: Sequence[tuple[str, str]], flags: Sequence[str], detector: Sequence[str]) -> Path:
    """``detector``: sources that the instrumentation would only make call themselves, as it would the shim's."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).iterdir())
    state = hashlib.sha256(f"{torch.__version__} {torch.__file__} {flags} {BARRIER.pattern}".encode())
    for path in paths:
        state.update(path.read_bytes())
    library = ROOT / "build" / "cuda_shim" / f"lib{name}-{state.hexdigest()[:16]}.so"
    if library.exists():
        return library
    partial = library.with_suffix(f".{os.getpid()}")
    source = partial.with_name(f"{partial.name}-source")
    for path in paths:
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    for relative, text in changed:
        (source / relative).write_text(text)
    shim = source / FOLDERS[-1]
    torch_root = Path(torch.__file__).parent
    include = torch_root / "include"
    includes = [f"-I{shim}", f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    plain = [flag for flag in flags if "thread" not in flag and "tsan" not in flag]
    objects = []
    for file in ("module.cpp", "shim.cpp", *detector):
        objects.append(str(shim / f"{file}.o"))
        own = flags if file == "module.cpp" else plain
        _compile(["g++", *own, *includes, "-c", str(shim / file), "-o", objects[-1]])
    link = ["g++", *plain, "-shared", *objects, "-o", str(partial), f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    _compile([*link, *(NO_RUNTIME if detector else ())])
    shutil.rmtree(source)
    partial.rename(library)
    return library


def _compile(command: list[str]) -> None:
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr[-4000:]
    assert "warning" not in build.stderr, build.stderr[-4000:]

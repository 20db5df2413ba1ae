"""What every GPU kernel takes, by its compilers: registers, spills, shared memory, for sm_80 and sm_90. Needs no GPU.

``python tools/kernel_report.py`` compiles all of them (ten minutes) and writes triton.json and cuda.json into
benchmarks/results/kernels; ``triton`` or ``cuda`` as an argument makes one of the two. Exit status 1 where a kernel
does not compile, spills in half precision, or takes more shared memory than the architecture has; a few bytes that a
float32 kernel spills are a figure, not a fault. The CUDA kernels need nvcc, and cuobjdump to count
their instructions (Triton brings one); ``--ptxas FILE`` reads the log of a build instead
(``tokcomp_kernels/_C*.ptxas.txt``), and the module beside it.

Triton's kernels are compiled as their launches would (``tokcomp_kernels/triton/_compile.py``), by the Triton that
Python finds: ``make triton-range`` runs this with each end of the supported range.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcomp_kernels.triton._cases import Case
    from tokcomp_kernels.triton._compile import Kernel

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results" / "kernels"
CUDA = ROOT / "csrc" / "cuda"
#: Those that tiles were chosen for; others need only compile.
ARCHITECTURES = (80, 90)
#: Bytes per thread that a float32 kernel may spill: 16 of a thread's 255 registers.
FLOAT32_SPILL = 64
#: As mangled names end: the first template argument of a kernel.
CUDA_TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\d+)\w*'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def problem(row: Mapping[str, Any]) -> str | None:
    """Why a kernel is not fit to ship, or None."""
    from tokcomp_kernels.triton._compile import SHARED_LIMIT

    allowed = FLOAT32_SPILL if row["dtype"] == "float32" else 0
    if row["architecture"] in ARCHITECTURES and row["spilled"] > allowed:
        return f"spills {row['spilled']} bytes"
    limit = SHARED_LIMIT[row["architecture"]]
    return f"takes {row['shared']} bytes of shared memory of {limit}" if row["shared"] > limit else None


def triton_kernels(
    cases: Iterable[Case], architecture: int, *, only_list: bool = False
) -> Iterator[tuple[Case, Kernel | Exception]]:
    """What the launches of ``cases`` compile, each kernel once, or why they do not. TRITON_INTERPRET must be unset."""
    from tokcomp_kernels.ops import IMPLEMENTATIONS
    from tokcomp_kernels.triton._compile import compiling

    seen = set()
    with compiling(architecture, only_list=only_list) as kernels:
        for case in cases:
            kernels.clear()
            try:
                IMPLEMENTATIONS[case.op].callable("triton")(*case.args, **case.kwargs)
            except Exception as error:  # whatever Triton's compiler ends in
                yield case, error
            for kernel in kernels:
                if kernel.identity not in seen:
                    seen.add(kernel.identity)
                    yield case, kernel


def triton_row(case: Case, kernel: Kernel) -> dict[str, Any]:
    registers, spilled = kernel.resources()
    return {
        "operator": case.op,
        "kernel": kernel.name,
        "case": case.name,
        "dtype": kernel.dtype,
        "architecture": kernel.capability,
        "registers": registers,
        "spilled": spilled,
        "shared": kernel.shared,
        "warps": kernel.num_warps,
    }


def triton_versions() -> dict[str, str]:
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return {"triton": triton.__version__, "ptxas": _release([str(ptxas) if ptxas.exists() else "ptxas", "--version"])}


def triton_report(cases: Sequence[Case], architectures: Sequence[int] = ARCHITECTURES) -> dict[str, Any]:
    """Rows of the kernels, and under ``failures`` the launches that did not compile."""
    rows, failures = [], []
    for architecture in architectures:
        for case, found in triton_kernels(cases, architecture):
            if isinstance(found, Exception):
                where = {"operator": case.op, "case": case.name, "architecture": architecture}
                failures.append({**where, "error": f"{type(found).__name__}: {found}".strip().splitlines()[0]})
            else:
                rows.append(triton_row(case, found))
    rows.sort(key=lambda row: (row["operator"].strip("_"), row["kernel"], row["architecture"]))
    return {"versions": triton_versions(), "failures": failures, "kernels": rows}


def cuda_rows(log: str, instructions: Mapping[tuple[str, int], Mapping[str, int]]) -> list[dict[str, Any]]:
    """The kernels in a log of ptxas -v. ``shared`` is what a kernel declares; a launch may ask for more.
    ``instructions``: of each kernel, by :func:`tools.sass.count`."""
    rows = []
    for entry in ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernel, dtype = kernel_name(entry["name"])
        rows.append(
            {
                "kernel": kernel,
                "symbol": entry["name"],
                "dtype": dtype,
                "architecture": int(entry["architecture"]),
                "registers": int(entry["registers"]),
                "spilled": int(entry["stack"]) + int(entry["stores"]) + int(entry["loads"]),
                "shared": int(shared[1]) if shared else 0,
                "instructions": dict(instructions[entry["name"], int(entry["architecture"])]),
            }
        )
    return sorted(rows, key=lambda row: (row["symbol"], row["architecture"]))


def kernel_name(symbol: str) -> tuple[str, str]:
    """A mangled kernel's own name and the dtype it is built for ("" where it has none)."""
    for length in re.finditer(r"\d+", symbol):
        end = length.end() + int(length[0])
        if symbol[length.end() : end].endswith("_kernel"):
            dtype = re.match(r"I(\d+__nv_bfloat16|6__half|[fd])", symbol[end:])
            return symbol[length.end() : end], CUDA_TYPES[dtype[1]] if dtype else ""
    return symbol, ""


def source_digests() -> dict[str, str]:
    """Of each source of the CUDA kernels, comments and spaces aside: tells whether a report is of these sources."""
    digests = {}
    for path in sorted(path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh", ".h")):
        code = re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        digests[path.name] = hashlib.sha256("".join(code.split()).encode()).hexdigest()[:16]
    return digests


def compile_cuda(folder: Path) -> tuple[str, list[Path]]:
    """ptxas' log of all CUDA kernels, and their machine code, for both architectures, as the build compiles them."""
    import torch

    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc: neither on PATH nor in /usr/local/cuda/bin; --ptxas FILE reads the log of a build")
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-cubin"]
    command += [f"-I{Path(nvcc).parent.parent / 'include'}", f"-isystem={include}"]
    command += [f"-isystem={include / 'torch/csrc/api/include'}"]
    logs, objects = [], []
    for source, architecture in itertools.product(sorted(CUDA.glob("*.cu")), ARCHITECTURES):
        print(f"compiling {source.name} for sm_{architecture}", file=sys.stderr, flush=True)
        objects.append(folder / f"{source.stem}.sm_{architecture}.cubin")
        own = [f"-gencode=arch=compute_{architecture},code=sm_{architecture}", str(source), "-o", str(objects[-1])]
        done = subprocess.run([*command, *own], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source.name} does not compile:\n{done.stderr[-4000:]}")
        logs.append(done.stdout + done.stderr)
    return "".join(logs), objects


def find_nvcc() -> str | None:
    return shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def cuda_versions() -> dict[str, str]:
    nvcc = find_nvcc()
    return {"nvcc": _release([nvcc, "--version"]) if nvcc else ""}


def cuda_report(log: str, objects: Iterable[Path]) -> dict[str, Any]:
    from tools.sass import count, disassemble

    instructions = {key: counts for path in objects for key, counts in count(disassemble(path)).items()}
    return {"versions": cuda_versions(), "sources": source_digests(), "kernels": cuda_rows(log, instructions)}


def _release(command: Sequence[str]) -> str:
    """The V13.0.48 of `ptxas --version` and of `nvcc --version`."""
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text)
    return found[1] if found else text.strip().splitlines()[-1]


def write(path: Path, report: Mapping[str, Any]) -> None:
    """One kernel per line, so that a change of one is a change of one line."""
    head = {key: value for key, value in report.items() if key != "kernels"}
    rows = ",\n  ".join(json.dumps(row) for row in report["kernels"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n  {rows}\n ]\n}}\n')


def unfit(report: Mapping[str, Any]) -> list[str]:
    """What did not compile, and the kernels that should not ship."""
    lines = [
        f"{row['operator']} {row['case']} sm_{row['architecture']}: {row['error']}"
        for row in report.get("failures", [])
    ]
    for row in report["kernels"]:
        name = f"{row['kernel']} {row['case']}" if "case" in row else row["symbol"]
        if problem(row):
            lines.append(f"{name} sm_{row['architecture']}: {problem(row)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=("triton", "cuda"), default=["triton", "cuda"])
    parser.add_argument("--ptxas", type=Path, metavar="FILE", help="log of a build with the CUDA kernels")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, help="Triton's (default: 80 90)")
    parser.add_argument("--every", action="store_true", help="Triton's kernels at every shape, not real blocks' alone")
    parser.add_argument("--only", type=re.compile, default="", metavar="REGEX", help="Triton's cases of such names")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    problems = []
    for which in options.which:
        if which == "triton":
            from tokcomp_kernels.triton._cases import block_cases, cases

            calls = cases() if options.every else block_cases()
            chosen = [case for case in calls if re.search(options.only, f"{case.op} {case.name}")]
            report = triton_report(chosen, options.architectures)
        elif options.ptxas:
            module = options.ptxas.with_name(options.ptxas.name.removesuffix(".ptxas.txt") + ".so")
            report = cuda_report(options.ptxas.read_text(), [module])
        else:
            with tempfile.TemporaryDirectory() as folder:
                report = cuda_report(*compile_cuda(Path(folder)))
        write(options.out / f"{which}.json", report)
        problems += unfit(report)
        print(f"{options.out / f'{which}.json'}: {len(report['kernels'])} kernels")
    print("\n".join(problems) if problems else "none is unfit")
    return int(bool(problems))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    raise SystemExit(main())

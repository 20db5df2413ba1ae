"""Compile every Triton kernel for a GPU that need not be there, and report what it takes.

Each ``triton/<op>.py`` lists its kernels in ``compile_cases()``; ``python -m tokcomp_kernels.triton._compile``
builds them for sm_80 and sm_90 and prints registers, spilled bytes and shared memory. TRITON_INTERPRET must be unset:
interpreted functions do not compile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokcomp_kernels.triton._configs import ENABLE_FP_FUSION

#: Shared memory a block may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
#: Triton's name of a pointer to each dtype.
POINTER_TYPES = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int64": "*i64", "int32": "*i32"}

#: What an entry of a table may say beside tile sizes.
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one set of types and constants.

    ``types`` gives Triton types (``"*fp16"``, ``"fp32"``) by argument name; arguments in neither ``types`` nor
    ``constexprs`` are ``i32``. ``divisible`` names the arguments known to be multiples of 16, as a launch would find
    them: by default every pointer and every ``stride_*``.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None
    divisible: Sequence[str] | None = None

    @classmethod
    def launched(
        cls, name: str, kernel: Any, types: Mapping[str, str], options: Mapping[str, object], **constexprs: object
    ) -> CompileCase:
        """From the keyword arguments of a launch: constants, and among them LAUNCH_OPTIONS."""
        constants = {key: value for key, value in options.items() if key in kernel.arg_names} | constexprs
        launch = {key: value for key, value in options.items() if key in LAUNCH_OPTIONS}
        return cls(name, kernel, types, constants, **launch)  # type: ignore[arg-type]

    def source(self) -> ASTSource:
        names = self.kernel.arg_names
        unknown = (set(self.types) | set(self.constexprs)) - set(names)
        if unknown:
            raise ValueError(f"{self.name}: {self.kernel.__name__} has no argument {', '.join(sorted(unknown))}")
        signature = {n: "constexpr" if n in self.constexprs else self.types.get(n, "i32") for n in names}
        divisible = self.divisible
        if divisible is None:
            strides = [n for n, t in signature.items() if t == "i32" and n.startswith("stride_")]
            divisible = [n for n, t in signature.items() if t.startswith("*")] + strides
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(n),): value for n, value in self.constexprs.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
        )


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers and spilled bytes per thread, bytes of shared memory per block."""

    op: str
    case: str
    capability: int
    registers: int
    spilled: int
    shared: int
    num_warps: int

    def problem(self) -> str | None:
        """Why this kernel is not fit to ship, or None."""
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_LIMIT[self.capability]:
            limit = SHARED_LIMIT[self.capability]
            return f"needs {self.shared} bytes of shared memory, sm_{self.capability} has {limit}"
        return None


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) per thread of the kernel in a cubin, as ``cuobjdump`` reads them."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [_find_cuobjdump(), "--dump-resource-usage", str(binary)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", log)
    if usage is None:
        raise RuntimeError(f"cuobjdump said nothing of registers: {log}")
    registers, stack, local = (int(value) for value in usage.groups())
    return registers, stack + local


@cache
def _find_cuobjdump() -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if bundled.exists():
        return str(bundled)
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("cuobjdump: neither in the triton package, nor on PATH, nor in /usr/local/cuda/bin")
    return found


def compile_case(op: str, case: CompileCase, capability: int) -> Resources:
    """Compile one case for one compute capability (80, 90)."""
    options = {name: getattr(case, name) for name in LAUNCH_OPTIONS} | {"enable_fp_fusion": ENABLE_FP_FUSION}
    compiled = triton.compile(case.source(), target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = resource_usage(compiled.asm["cubin"])
    return Resources(op, case.name, capability, registers, spilled, compiled.metadata.shared, case.num_warps)


def operators() -> list[str]:
    """Modules of this package that hold kernels."""
    package = importlib.import_module(__package__ or "tokcomp_kernels.triton")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))


def compile_cases(op: str) -> list[CompileCase]:
    return importlib.import_module(f"{__package__}.{op}").compile_cases()


def compile_all(ops: Sequence[str], capabilities: Sequence[int]) -> Iterator[Resources]:
    for op in ops:
        for case in compile_cases(op):
            for capability in capabilities:
                yield compile_case(op, case, capability)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel for sm_80 and sm_90; no GPU needed.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which of {', '.join(operators())} (default: all)")
    parser.add_argument("--capability", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)
    rows = []
    for row in compile_all(options.ops or operators(), options.capability):
        rows.append(row)
        note = row.problem()
        print(
            f"{row.op:24} {row.case:52} sm_{row.capability} {row.registers:4} registers {row.shared:7} B shared"
            f"{'  ' + note if note else ''}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) | {"problem": row.problem()} for row in rows], indent=1))
    return int(any(row.problem() for row in rows))


if __name__ == "__main__":
    sys.exit(main())

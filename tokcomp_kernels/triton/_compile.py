"""Launch Triton kernels on a machine without a GPU: what a launch would run is compiled, and nothing runs.

Triton asks its driver which GPU there is, to load a kernel's binary, and to launch it. ``compiling`` puts a driver in
its place that names any GPU, keeps the binaries and launches nothing, so that launchers called with CPU tensors compile
through Triton's own launch path: its specialisation by value and alignment, its options, its limits of shared memory.
``listing`` stops one step earlier and compiles nothing. TRITON_INTERPRET must be unset: interpreted functions do not
compile.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

#: Shared memory that a block may use, in bytes, by compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "i32": "int32", "i64": "int64"}


@dataclass(frozen=True)
class Kernel:
    """One specialisation of a kernel, as a launch asked for it; ``cubin`` is empty where nothing was compiled.

    ``signature`` gives the Triton type of each argument (``"*fp16"``, ``"i32"``, ``"constexpr"``) by name, and
    ``specialisation`` its constants and which arguments are multiples of 16: kernels of one ``identity`` are the same.
    """

    name: str
    signature: Mapping[str, str]
    specialisation: str
    capability: int
    num_warps: int
    shared: int = 0
    cubin: bytes = b""

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.name, str(self.signature), self.specialisation

    @property
    def dtype(self) -> str:
        """The tokens' dtype: that of the narrow or wide floating tensors, float32 where there is none."""
        pointers = [kind.removeprefix("*") for kind in self.signature.values() if kind.startswith("*")]
        unusual = [kind for kind in pointers if kind in ("fp16", "bf16", "fp64")]
        return _DTYPES[(unusual or [kind for kind in pointers if kind == "fp32"] or pointers)[0]]

    def resources(self) -> tuple[int, int]:
        """Registers and bytes of local memory (spills) per thread, as ``cuobjdump`` reads them in the binary."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [_find_cuobjdump(), "--dump-resource-usage", file.name]
            log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", log)
        if usage is None:
            raise RuntimeError(f"cuobjdump said nothing of registers: {log}")
        registers, stack, local = (int(value) for value in usage.groups())
        return registers, stack + local


def _specialisation(constants: Mapping[Any, object], attributes: Mapping[Any, object]) -> str:
    return str((sorted(constants.items()), sorted(attributes.items())))


@cache
def _find_cuobjdump() -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    found = found or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found is None:
        raise FileNotFoundError("cuobjdump: neither in the triton package, nor on PATH, nor in /usr/local/cuda/bin")
    return found


class _CompilingDriver:
    """What Triton's runtime asks of its driver, for one GPU that is not there; the device index is its capability."""

    def __init__(self) -> None:
        self.capability = 0
        self.kernels: list[Kernel] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[device]}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[object, bytes, int, int, int]:
        """Module, function, registers, spills, threads of a block: here the binary stands for the function."""
        return object(), cubin, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        capability = self.capability

        def launch(grid_0: int, grid_1: int, grid_2: int, stream: int, cubin: bytes, *_: object) -> None:
            self.kernels.append(
                Kernel(
                    source.fn.__name__,
                    dict(source.signature),
                    _specialisation(source.constants, source.attrs),
                    capability,
                    metadata.num_warps,
                    metadata.shared,
                    cubin,
                )
            )

        return launch

    def list_only(self, **launch: Any) -> bool:
        """Triton's hook before it compiles, which True keeps it from."""
        kernel = launch["compile"]
        name, types = launch["fn"].name.rpartition(".")[2], dict(kernel["signature"])
        special = _specialisation(kernel["constants"], kernel["configs"][0])
        self.kernels.append(Kernel(name, types, special, self.capability, kernel["num_warps"]))
        return True


#: One for all, for kernels that were compiled keep the launcher they were given.
_DRIVER = _CompilingDriver()


@contextmanager
def compiling(capability: int, *, only_list: bool = False) -> Iterator[list[Kernel]]:
    """Within, launches with CPU tensors compile for ``capability`` and run nothing; yields what they would have run.

    Triton keeps binaries on disk, so that what was compiled before takes no time. A kernel that needs more shared
    memory than the GPU has is refused by Triton's OutOfResources.

    Args:
        capability: One of SHARED_LIMIT, such as 90.
        only_list: Compile nothing: kernels have neither a binary nor shared memory then.
    """
    if capability not in SHARED_LIMIT:
        raise ValueError(f"capability must be one of {', '.join(map(str, SHARED_LIMIT))}, got {capability}")
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET must be unset: interpreted kernels do not compile")
    active, hook, kernels = driver._active, triton.knobs.runtime.jit_cache_hook, _DRIVER.kernels
    _DRIVER.capability, _DRIVER.kernels = capability, []
    driver.set_active(_DRIVER)
    if only_list:
        triton.knobs.runtime.jit_cache_hook = _DRIVER.list_only
    try:
        yield _DRIVER.kernels
    finally:
        driver.set_active(active)
        triton.knobs.runtime.jit_cache_hook = hook
        _DRIVER.kernels = kernels

"""Compile cases from the tables of tile sizes: every entry that a launch could pick is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokcomp_kernels.triton._compile import LAUNCH_OPTIONS, CompileCase
from tokcomp_kernels.triton._configs import load


def table_cases(
    op: str,
    entry_name: str,
    kernel: Any,
    types: Mapping[str, str],
    constexprs: Mapping[str, object] | None = None,
    itemsize: int | None = None,
) -> list[CompileCase]:
    """One case per entry of ``configs/<op>.json`` for this kernel, over all GPUs.

    ``itemsize`` leaves out the entries that its bound keeps from elements of that many bytes.
    """
    rows = next((types[name] for name in ("x_ptr", "metric_ptr", "grad_ptr", "importance_ptr") if name in types), "")
    cases = []
    for gpu, kernels in load(op).items():
        for entry in kernels.get(entry_name, []):
            bounds: Mapping[str, int] = entry.get("when", {})  # type: ignore[assignment]
            if itemsize is not None and itemsize > bounds.get("itemsize", itemsize):
                continue
            tiles = {name: value for name, value in entry.items() if name.startswith("BLOCK_")}
            sizes = " ".join(f"{name.removeprefix('BLOCK_')}{value}" for name, value in tiles.items())
            cases.append(
                CompileCase(
                    name=f"{entry_name} {rows.removeprefix('*')} {sizes}" + ("" if gpu == "default" else f" {gpu}"),
                    kernel=kernel,
                    types=types,
                    constexprs={**(constexprs or {}), **tiles},
                    divisible=[
                        n
                        for n in kernel.arg_names
                        if n.endswith("_ptr") or n.startswith("stride_") or n == "num_channels"
                    ],
                    **{name: entry[name] for name in LAUNCH_OPTIONS if name in entry},  # type: ignore[arg-type]
                )
            )
            if not bounds.keys() - {"itemsize"}:
                break  # nothing gets past this entry
    return cases

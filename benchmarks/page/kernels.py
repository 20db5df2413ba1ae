"""The section of docs/results.md on the GPU kernels: what the compilers say of them, and whether a GPU has run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.page.tables import Record, markdown, number, paragraph
from tokcomp_kernels.ops._backends import CUDA_WINNERS, TRITON_CONTENDERS

_ARCHITECTURES = (80, 90)


def kernels_section(reports: Mapping[str, Mapping[str, Any]], gpus: Sequence[Record]) -> str:
    """The section. ``reports``: those of ``tools/kernel_report.py`` by language; ``gpus``: records of GPUs."""
    if gpus:
        devices = ", ".join(dict.fromkeys(str(record.provenance["device"]) for record in gpus))
        state = f"Run on: {devices} (the records above)."
    else:
        state = "**No GPU has run any of these kernels.**"
    winners = ", ".join(sorted(CUDA_WINNERS)) or "none yet"
    contenders = ", ".join(sorted(TRITON_CONTENDERS)) or "none"
    parts = [
        "## GPU kernels, as compiled",
        paragraph(
            f"{state} Known of them: the Triton kernels agree with the reference in the interpreter, the CUDA C++",
            "kernels",
            "on the CPU through a shim of the CUDA runtime, and both compile for sm_80 and sm_90 with the",
            "registers and",
            "memory below. `make gpu-check` runs everything on a GPU.",
        ),
        paragraph(
            "Defaults on a GPU: an operator runs in CUDA C++ only where a GPU has measured that kernel the winner",
            f"({winners}), in Triton otherwise, but {contenders} in plain PyTorch until a GPU has measured",
            "Triton's faster.",
            "`TOKCOMP_BACKEND=reference` runs plain PyTorch for all, `TOKCOMP_BACKEND=cuda` the CUDA C++",
            "kernels. Other matrix",
            "products are PyTorch's own.",
        ),
    ]
    for name, title in (("triton", "Triton"), ("cuda", "CUDA C++")):
        report = reports[name]
        versions = ", ".join(f"{tool} {version}" for tool, version in report["versions"].items())
        text = paragraph(
            f"{len(report['kernels'])} compilations ({versions}; `python tools/kernel_report.py`),",
            f"[kernels/{name}.json](../benchmarks/results/kernels/{name}.json): registers per thread and bytes of",
            "shared",
            "memory per block, least to most over dtypes, shapes and tiles.",
            *(["Spills, in bytes per thread, are float32's alone."] if name == "triton" else []),
            *(["Shared memory is what a kernel declares; launches ask for more."] if name == "cuda" else []),
        )
        parts += [f"### {title}\n\n{text}", _table(report["kernels"])]
    return "\n\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row.get("operator", ""), row["kernel"]), []).append(row)
    found = [(operator, kernel, group) for (operator, kernel), group in groups.items()]

    def span(key: str, architecture: int) -> Any:
        def cell(group: tuple[str, str, list[Mapping[str, Any]]]) -> str:
            values = [row[key] for row in group[2] if row["architecture"] == architecture]
            if not values:
                return ""
            least, most = number(min(values)), number(max(values))
            return least if least == most else f"{least} - {most}"

        return cell

    columns: list[tuple[str, Any]] = [("operator", lambda group: group[0])] if any(one[0] for one in found) else []
    columns += [
        ("kernel", lambda group: f"`{group[1].strip('_')}`"),
        ("dtypes", lambda group: ", ".join(sorted({row["dtype"] for row in group[2] if row["dtype"]}))),
        *((f"registers sm_{one}", span("registers", one)) for one in _ARCHITECTURES),
        *((f"shared sm_{one}", span("shared", one)) for one in _ARCHITECTURES),
        ("spills", lambda group: number(max(row["spilled"] for row in group[2]))),
    ]
    return markdown(columns, found)

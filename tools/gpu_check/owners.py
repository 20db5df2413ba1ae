"""Which backend a run's measurements earn each operator on its GPU: the next tokcomp_kernels/ops/owners.json."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokcomp_kernels.ops import _backends

#: How much faster another backend must be than the one that owns an operator by default, on average over blocks.
MARGIN = 1.02
BACKENDS = ("cuda", "triton", "reference")
#: A variable of the environment -> what a graph's backend says after a comma where it is 1.
SWITCHES = {"TOKCOMP_DEPENDENT_LAUNCH": "dependent launch", "TOKCOMP_FUSED_EMBEDDING": "fused embedding"}


def operator_seconds(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[tuple[Any, ...], float]]]:
    """operator -> backend -> (block, batch, dtype) -> median seconds, the latest record's."""
    found: dict[str, dict[str, dict[tuple[Any, ...], float]]] = {}
    for row in (row for record in records for row in record["rows"] if row.get("suite") == "operators"):
        if row["backend"] in BACKENDS:
            seconds = sorted(row["seconds"])
            case = (row["block"], row["batch"], row["dtype"])
            found.setdefault(row["operator"], {}).setdefault(row["backend"], {})[case] = seconds[len(seconds) // 2]
    return found


def earned(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """operator -> the backend that is fastest by the mean ratio over the blocks that all of its backends ran.

    Triton, or PyTorch for an operator of :data:`tokcomp_kernels.ops._backends.CONTENDERS`, gives way to one that is
    faster by :data:`MARGIN`.
    """
    owners = {}
    for operator, backends in sorted(operator_seconds(records).items()):
        default = "reference" if operator in _backends.CONTENDERS else "triton"
        if default not in backends:
            continue
        best, most = default, MARGIN
        for backend in (name for name in BACKENDS if name in backends and name != default):
            shared = backends[backend].keys() & backends[default].keys()
            if not shared:
                continue
            logs = [math.log(backends[default][case] / backends[backend][case]) for case in shared]
            if (ratio := math.exp(sum(logs) / len(logs))) > most:
                best, most = backend, ratio
        owners[operator] = best
    return owners


def switch_gains(records: Iterable[Mapping[str, Any]], name: str) -> dict[tuple[str, int], float]:
    """(model, batch) -> images per second with a switch on over those with all off."""
    rows = [row for record in records for row in record["rows"] if row.get("suite") == "graphs"]
    rates = {(row["model"], row["batch"], row["backend"]): row["images_per_second"] for row in rows}
    return {
        (model, batch): rate / rates[model, batch, "auto"]
        for (model, batch, backend), rate in rates.items()
        if backend == f"auto, {name}" and (model, batch, "auto") in rates
    }


def embedding_earned(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """How images should enter models: fused where no model is slower so and they are faster on average."""
    gains = list(switch_gains(records, SWITCHES["TOKCOMP_FUSED_EMBEDDING"]).values())
    if not gains:
        return {}
    faster = min(gains) > 1 / MARGIN and math.prod(gains) > 1
    return {"embedding": "fused" if faster else "apart"}


def owners_file(gpu: str, owners: Mapping[str, str]) -> str:
    """The file with this GPU's owners beside what it says of others; operators that were not measured keep theirs."""
    known: dict[str, dict[str, str]] = json.loads(_backends.OWNERS.read_text())
    known[gpu] = {**known.get(gpu, {}), **owners}
    return json.dumps(known, indent=1, sort_keys=True) + "\n"


def owners_lines(gpu: str, owners: Mapping[str, str], failed: Sequence[str]) -> list[str]:
    """For the summary."""
    if not owners:
        return []
    lines = [
        "",
        "## Who is fastest",
        "",
        f"For tokcomp_kernels/ops/owners.json (owners.json in details.tar.gz), {gpu}:",
        "",
    ]
    lines += [f"- {operator}: {backend}" for operator, backend in owners.items()]
    if failed:
        lines += ["", f"Not to be committed before these steps pass: {', '.join(failed)}"]
    return lines

"""What the GPU check says: what failed first, then the figures, each beside what was predicted of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tools.gpu_check.owners import SWITCHES, switch_gains
from tools.gpu_check.steps import ROOT, Step

MAX_LISTED = 50
NO_TIME = "not begun: no time left"
PREDICTIONS = ROOT / "benchmarks" / "results" / "predictions.json"
#: A backend of the graphs -> the entry that is predicted.
PREDICTED_GRAPHS = {"auto": "tokcomp-graph", "triton": "tokcomp-graph-linear_gelu"}


def read_records(folder: Any) -> list[dict[str, Any]]:
    """The benchmarks' records, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def rows_of(records: Sequence[dict[str, Any]], suite: str) -> list[dict[str, Any]]:
    return [row for record in records for row in record["rows"] if row.get("suite") == suite]


def model_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """The whole models' rows as a table."""
    rows = rows_of(records, "models")
    if not rows:
        return []
    lines = ["", "## Whole models", ""]
    lines += ["| model | batch | entry | img/s | over published | over compiled timm | of ideal | efficiency | tax |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        cells = [f"{row['model']} {row['budget']}G", str(row["batch"]), row["name"], f"{row['images_per_second']:.0f}"]
        ratios = [f"{row[key][0]:.2f}x" if row[key] else "" for key in ("speedup", "over_timm_compiled")]
        ideal = "" if row["share_of_ideal"] is None else format(row["share_of_ideal"], ".0%")
        shares = [f"{row[key][0]:.1%}" if row[key] else "" for key in ("efficiency", "tax")]
        lines.append(f"| {' | '.join([*cells, *ratios, ideal, *shares])} |")
    return lines


def graph_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """Served models by backend, and where the default's passes spend their time."""
    rows = rows_of(records, "graphs")
    if not rows:
        return []
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    lines = ["", "## Graphs: images per second by TOKCOMP_BACKEND", ""]
    lines += [f"| model | batch | {' | '.join(backends)} |", f"| --- | ---: |{' ---: |' * len(backends)}"]
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in rows):
        rates = {r["backend"]: r["images_per_second"] for r in rows if (r["model"], r["batch"]) == (model, batch)}
        cells = [f"{rates[backend]:.0f}" if backend in rates else "" for backend in backends]
        lines.append(f"| {model} | {batch} | {' | '.join(cells)} |")
    lines += switch_lines(records)
    for row in rows:
        total = sum(one["us"] for one in row["kernels"])
        lines += ["", f"{row['model']}, batch {row['batch']}, {row['backend']}: {total:.0f} us a pass", ""]
        lines += [
            f"- {one['us']:.1f} us, {one['us'] / total:.1%}, {one['launches']:.0f} x `{one['kernel'][:70]}`"
            for one in row["kernels"][:8]
        ]
    return lines


def switch_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """What each switch gains, model by model: whether it should be on here."""
    lines = []
    for variable, name in SWITCHES.items():
        gains = [f"{model}, batch {batch}: {gain:.3f}x" for (model, batch), gain in switch_gains(records, name).items()]
        lines += ["", f"{variable}=1 over 0: " + "; ".join(gains)] if gains else []
    return lines


def comparisons(gpu: str, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for every figure that was predicted: what, measured, predicted, the ratio. Above 1 is better."""
    data = json.loads(PREDICTIONS.read_text())
    known = next((name for name in data["gpus"] if name in gpu), None)
    if known is None:
        return
    keys = ("model", "batch", "precision")
    rates = {
        (row["entry"], *(row[key] for key in keys)): row["images_per_second"]
        for row in data["rows"]
        if row["gpu"] == known
    }
    measured = [(row["name"], row) for row in rows_of(records, "models")]
    measured += [(PREDICTED_GRAPHS.get(row["backend"], ""), row) for row in rows_of(records, "graphs")]
    for entry, row in measured:
        predicted = rates.get((entry, *(row[key] for key in keys)))
        if predicted:
            rate = row["images_per_second"]
            what = f"{row['suite']}: {row['model']}, batch {row['batch']}, {entry}"
            yield f"{what}: measured {rate:.0f} img/s, predicted {predicted:.0f}: {rate / predicted:.2f}"
    operators = {(row["operator"], row["channels"]): row for row in data["operators"]} if known == "H200" else {}
    for row in rows_of(records, "operators"):
        # Predicted for the first compressing blocks of DeiT-S and DeiT-B at batch 1024.
        channels = {"deit-s": 384, "deit-b": 768}.get(row["block"][:6]) if "-197to" in row["block"] else None
        one = operators.get((row["operator"], channels))
        if one and row["batch"] == 1024 and row["backend"] in ("cuda", "triton", "reference"):
            us = 1e6 * sorted(row["seconds"])[len(row["seconds"]) // 2]
            predicted = (one["predicted_cuda_us"] if row["backend"] == "cuda" else None) or one["predicted_us"]
            what = f"operators: {row['operator']}, {row['block']}, {row['backend']}"
            yield (
                f"{what}: measured {us:.0f} us, predicted {predicted:.0f}: {predicted / us:.2f}, "
                f"of its floor {one['floor_us'] / us:.0%}"
            )


def not_measured(records: Sequence[dict[str, Any]]) -> list[str]:
    missing = [row for record in records for row in record.get("not_measured", [])]
    if not missing:
        return []
    said = [
        f"- {row['suite']}, {row['model']}, batch {row['batch']}, {row['name']}: {row['reason']}" for row in missing
    ]
    return ["", "## Not measured", "", *said]


def step_lines(steps: Sequence[Step]) -> list[str]:
    lines = ["| step | status | seconds | tests |", "| --- | --- | --- | --- |"]
    for step in steps:
        counts = ", ".join(f"{count} {name}" for name, count in step.counts.items())
        lines.append(f"| {step.name} | {step.status} | {step.seconds} | {counts} |")
    rest = [step.name for step in steps if step.status == NO_TIME]
    if rest:
        lines += ["", f"To run the rest: `python -m tools.gpu_check --out DIR --only {','.join(rest)}`"]
    for step in (step for step in steps if step.failures):
        lines += ["", f"## Failures of {step.name}", "", *(f"- {failure}" for failure in step.failures[:MAX_LISTED])]
        if len(step.failures) > MAX_LISTED:
            lines.append(f"- and {len(step.failures) - MAX_LISTED} more, in results.json")
    return lines


def summary(facts: dict[str, Any], steps: Sequence[Step], records: Sequence[dict[str, Any]] = ()) -> str:
    wrong = "; ".join(f"{step.name} {step.status}" for step in steps if not step.passed)
    lines = [
        f"NOT everything passed: {wrong}" if wrong else "all passed",
        "",
        f"{facts['gpu']}; torch {facts['packages']['torch']}, triton {facts['packages']['triton']}; "
        f"commit {facts['commit']}",
        "",
        *step_lines(steps),
    ]
    compared = list(comparisons(facts["gpu"], records))
    if compared:
        lines += ["", "## Measured and predicted", "", *(f"- {line}" for line in compared)]
    lines += [*model_lines(records), *graph_lines(records), *not_measured(records)]
    return "\n".join(lines) + "\n"

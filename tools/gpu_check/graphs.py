"""A compressed model as it is served, by one choice of backends: its speed, and where a pass spends its time.

``python -m tools.gpu_check.graphs``; TOKCOMP_BACKEND chooses. On a GPU each model is a CUDA graph. ``--out`` takes the
figures as JSON, in the shape of the benchmarks' records.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokcomp
import torch
from tokcomp.bench.entries import Entry, build_runner
from tokcomp.bench.models import create_model
from tokcomp.measure.timing import interleave, stopwatch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import SUBJECTS
from tools.gpu_check.owners import SWITCHES

#: Model and batch.
CASES = {
    "cuda": (("deit-s", 1024), ("deit-b", 512), ("deit-s", 16), ("deit-s", 8), ("deit-s", 1)),
    "cpu": (("deit-s", 1),),
}
PASSES = 3  # that are profiled
KERNELS = 14  # that are listed
ROUNDS = 5


def where_time_goes(call: Callable[[], Any], device: str) -> list[dict[str, Any]]:
    """Microseconds a pass and launches a pass of each kernel, the longest first."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        for _ in range(PASSES):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    name = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [(getattr(event, name), event) for event in profiler.key_averages()]
    rows = [
        {"kernel": event.key[:100], "us": round(total / PASSES, 2), "launches": event.count / PASSES}
        for total, event in sorted(events, key=lambda item: -item[0])
        if total > 0
    ]
    return rows


def measure(name: str, batch: int, device: torch.device) -> dict[str, Any]:
    subject = SUBJECTS[name]
    precision = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, precision)
    model = create_model(subject.name, device=device, **subject.options)
    method = tokcomp.DiffRate.published(subject.name, subject.budget)
    entry = Entry("tokcomp-graph" if device.type == "cuda" else "tokcomp", method)
    images = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    with torch.inference_mode():
        runner = build_runner(entry, model.eval(), dtype, device, batch)
        calls = {"model": lambda: runner(images)}
        first, second = runner(images).clone(), runner(images).clone()
        assert torch.equal(first, second), f"{name} at batch {batch}: two runs differ"
        samples = interleave(calls, stopwatch(device), rounds=ROUNDS)["model"]
        kernels = where_time_goes(calls["model"], device.type)
    return {
        "suite": "graphs",
        "model": subject.name,
        "budget": subject.budget,
        "batch": batch,
        "precision": precision,
        "backend": backend_name(os.environ),
        "images_per_second": batch / samples.median,
        "seconds": samples.seconds,
        "kernels": kernels,
    }


def backend_name(environment: Mapping[str, str]) -> str:
    """TOKCOMP_BACKEND, and what is switched on beside it."""
    on = [f", {name}" for variable, name in SWITCHES.items() if environment.get(variable) == "1"]
    return environment.get("TOKCOMP_BACKEND", "auto") + "".join(on)


def table(row: Mapping[str, Any]) -> str:
    lines = [f"{row['model']}, batch {row['batch']}, {row['backend']}: {row['images_per_second']:.0f} img/s"]
    lines += [f"{one['us']:10.1f} us {one['launches']:6.0f} x  {one['kernel']}" for one in row["kernels"][:KERNELS]]
    return "\n".join([*lines, f"{sum(one['us'] for one in row['kernels']):10.1f} us in all"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, batch in CASES[options.device]:
        rows.append(measure(name, batch, torch.device(options.device)))
        print(table(rows[-1]), flush=True)
        if options.out:  # after each: a run may be cut short
            options.out.write_text(json.dumps({"rows": rows, "not_measured": []}))


if __name__ == "__main__":
    main()

"""tokcomp info."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tokcomp.cli.errors import blame
from tokcomp.cli.table import table

DESCRIPTION = """\
What this installation has: versions, which kernels were built and for what, the devices that torch sees, the types in
which the CPU computes a model's products, and for each operator the backend that would run on the CPU and on a CUDA
device.

Backends: cpp (compiled for the CPU), cuda (compiled for CUDA), triton, reference (plain PyTorch, works everywhere).
TOKCOMP_BACKEND=auto|cuda|triton|reference changes the choice.
"""

EXAMPLES = """\
examples:
  tokcomp info
  tokcomp info --json > info.json         for a bug report
  TOKCOMP_BACKEND=reference tokcomp info  what a setting changes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    with blame("environment", hint="change or unset the variable"):
        from tokcomp.measure.info import collect

        found = collect()
    print(json.dumps(found, indent=2, default=str) if args.json else _text(found))
    return 0


def _text(found: dict[str, Any]) -> str:
    parts = [
        table(["package", "version"], [[name, text or "not installed"] for name, text in found["versions"].items()])
    ]
    if found["not_loaded"]:
        parts.append(f"compiled kernels: none loaded ({found['not_loaded']})")
    else:
        facts = [f"  {name}: {_value(value)}" for name, value in found["built"].items()]
        parts.append("\n".join(["compiled kernels:", *facts]))
    parts.append(table(["device", "name", ""], [[d["device"], d["name"], d["detail"]] for d in found["devices"]]))
    rows = [[entry["dtype"], entry["products"], entry["reason"]] for entry in found["cpu_products"]]
    parts.append(table(["model on cpu", "products in", "because"], rows))
    has_gpu = any(device["device"].startswith("cuda") for device in found["devices"])
    header = ["operator", "on cpu", "on cuda" if has_gpu else "on cuda (none here)"]
    parts.append(table(header, [[name, chosen["cpu"], chosen["cuda"]] for name, chosen in found["backends"].items()]))
    if found["settings"]:
        parts.append("\n".join(["settings:", *(f"  {name}={value}" for name, value in found["settings"].items())]))
    return "\n\n".join(parts)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_value(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)

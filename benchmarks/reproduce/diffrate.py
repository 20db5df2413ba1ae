"""DiffRate's claims at a small scale: accuracy at equal cost, random schedules, ablations, transfer.

Trains five small ViTs on scikit-learn's digits, searches their schedules, and compares. Everything follows from seeds.
Stop it with Ctrl-C and start it again: it goes on where it was.

    python -m benchmarks.reproduce.diffrate
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import torch
from tokcomp.bench.provenance import provenance
from tokcomp.cli.errors import UserError, check_output_folder
from tokcomp.files import write_whole

from benchmarks.reproduce.plan import QUICK, Settings
from benchmarks.reproduce.runner import result_path, run_units
from benchmarks.reproduce.summary import summarize
from benchmarks.reproduce.tables import all_tables
from benchmarks.reproduce.units import all_units

DEFAULT_OUTPUT = Path("reproduce-output/diffrate")


def reproduce(folder: Path, settings: Settings, jobs: int) -> list[Path]:
    """Run what is not yet done, and write results.json, tables.md and the plots; returns their paths."""
    from benchmarks.reproduce.plots import draw_all

    units = all_units(settings)
    started = time.perf_counter()
    run_units(folder, units, jobs, lambda line: print(line, flush=True))
    summary = summarize(folder, settings)
    seconds = sum(json.loads(result_path(folder, unit.name).read_text())["core_seconds"] for unit in units)
    record = {
        "provenance": provenance(torch.device("cpu")),
        "core_seconds": round(seconds),
        "jobs": jobs,
        **summary,
    }
    write_whole(folder / "results.json", _compact(record))
    write_whole(folder / "tables.md", all_tables(summary))
    plots = draw_all(summary, folder)
    print(f"{time.perf_counter() - started:.0f} s, of all units together {seconds:.0f} core seconds")
    return [folder / "results.json", folder / "tables.md", *plots]


def _compact(record: object) -> str:
    """JSON with one line per short list."""
    text = json.dumps(record, indent=1)
    lines: list[str] = []
    gathered: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if gathered is None and stripped.endswith("["):
            gathered = [line]
        elif gathered is not None and stripped.rstrip(",") == "]":
            lines.append(gathered[0] + " ".join(part.strip() for part in gathered[1:]) + stripped)
            gathered = None
        elif gathered is not None and (stripped.endswith(("[", "{"))):
            lines.extend(gathered)
            gathered = [line] if stripped.endswith("[") else None
            if gathered is None:
                lines.append(line)
        elif gathered is not None:
            gathered.append(line)
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce.diffrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=DEFAULT_OUTPUT, help="folder of all results (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute of everything, too small to show anything")
    args = parser.parse_args(argv)
    try:
        check_output_folder("--output", args.output)
        if args.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {args.jobs}")
        written = reproduce(args.output, QUICK if args.quick else Settings(), args.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("written: " + ", ".join(map(str, written)))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker processes too
    sys.exit(main())

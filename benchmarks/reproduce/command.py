"""The command that runs a study: its options, its files, what interrupts it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokcomp.cli.errors import UserError, check_output_folder
from tokcomp.files import write_whole
from tokcomp.measure.provenance import provenance

from benchmarks.reproduce.runner import Unit, result_path, run_units


@dataclass(frozen=True)
class Study:
    """A study's parts. ``quick`` are settings that run all of it in miniature.

    ``summarize`` (folder of a finished run, settings) gives JSON data, which ``tables`` prints as Markdown and ``draw``
    (summary, folder) as pictures, whose paths it returns.
    """

    name: str
    description: str
    settings: Any
    quick: Any
    units: Callable[[Any], Sequence[Unit]]
    summarize: Callable[[Path, Any], Mapping[str, Any]]
    tables: Callable[[Mapping[str, Any]], str]
    draw: Callable[[Mapping[str, Any], Path], list[Path]]


def reproduce(study: Study, folder: Path, settings: Any, jobs: int) -> list[Path]:
    """Run what is not yet done, and write results.json, tables.md and the plots; returns their paths."""
    units = study.units(settings)
    started = time.perf_counter()
    run_units(folder, units, jobs, lambda line: print(line, flush=True))
    summary = study.summarize(folder, settings)
    seconds = sum(json.loads(result_path(folder, unit.name).read_text())["core_seconds"] for unit in units)
    record = {
        "provenance": provenance(torch.device("cpu")),
        "core_seconds": round(seconds),
        "jobs": jobs,
        **summary,
    }
    write_whole(folder / "results.json", _compact(record))
    write_whole(folder / "tables.md", study.tables(summary))
    plots = study.draw(summary, folder)
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


def run_command(
    study: Study,
    argv: Sequence[str] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    adjust: Callable[[Any, argparse.Namespace], Any] = lambda settings, args: settings,
) -> int:
    """``python -m benchmarks.reproduce.<name>``; returns the exit status.

    Args:
        study: what runs.
        argv: the command's arguments; None: the process's own.
        add_options: adds a study's own options.
        adjust: the settings that those ask for, of the study's.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.reproduce.{study.name}",
        description=study.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path("reproduce-output") / study.name
    parser.add_argument(
        "-o", "--output", type=Path, default=default, help="folder of all results (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a minute of everything, too small to show anything")
    add_options(parser)
    args = parser.parse_args(argv)
    try:
        check_output_folder("--output", args.output)
        if args.jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {args.jobs}")
        settings = adjust(study.quick if args.quick else study.settings, args)
        written = reproduce(study, args.output, settings, args.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("written: " + ", ".join(map(str, written)))
    return 0

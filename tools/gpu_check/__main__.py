"""Build, test and benchmark on the GPU of this machine, as it stands: no virtual environment, no network.

``python -m tools.gpu_check --out DIR`` writes three files into DIR, anew after each step: summary.md, results.json with
every figure, and details.tar.gz with logs, records, profiles and owners.json, the backends that the run earned their
operators. The most telling steps come first: what compiles, side by side; the compiled kernels and one cluster under
compute-sanitizer; whole models, then operators, then the rest. Each step has a time limit; one that reaches it is
interrupted and what it had is kept, and what there is no time for is named, to be run by another call with --only. A
benchmark checks what it times, so it runs even where tests failed; the summary then says so first. Exit status 0 only
where everything asked for passed.

``--device cpu`` rehearses the whole of it where there is no GPU: the same steps on the CPU, small.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tools.gpu_check.owners import earned, embedding_earned, owners_file, owners_lines
from tools.gpu_check.plans import PLANS, Plan, chosen, command_of, environment_of, missing_program, side_by_side
from tools.gpu_check.steps import GRACE_SECONDS, Step, machine, read_failures, read_junit, run
from tools.gpu_check.summary import NO_TIME, comparisons, read_records, summary

#: A step is not begun with less time than this.
LEAST_SECONDS = 25


class Check:
    """A run: where it works, what it may take, and the steps so far."""

    def __init__(self, work: Path, out: Path, device: str, clones: Sequence[str], minutes: float) -> None:
        self.work, self.out, self.device, self.clones = work, out, device, clones
        for folder in (work / "logs", work / "records", out):
            folder.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * minutes - 2 * GRACE_SECONDS
        self.facts = machine()
        self.steps: list[Step] = []
        self.said: set[str] = set()
        self.told = True

    def take(self, plan: Plan) -> Step:
        """One step, if there is time for it."""
        step = Step(plan.name, command_of(plan, self.work, self.device, self.clones))
        log = self.work / "logs" / f"{plan.name}.log"
        left = self.deadline - time.monotonic()
        if missing := missing_program(plan):
            step.status = missing
        elif left < LEAST_SECONDS:
            step.status = NO_TIME
        else:
            run(step, log, min(plan.seconds, left), environment_of(plan, self.facts, self.device))
            if plan.is_pytest:
                read_junit(step, log.with_suffix(".xml"))
            else:
                read_failures(step, log)
        print(f"{step.name}: {step.status}, {step.seconds} s", flush=True)
        return step

    def publish(self) -> None:
        """What there is so far, into the folder that is asked for."""
        records = read_records(self.work / "records")
        owners = {**earned(records), **embedding_earned(records)}
        gpu = self.facts["gpu"].partition(",")[0] or "cpu"
        failed = [step.name for step in self.steps if not step.passed and step.status != NO_TIME]
        try:
            text = summary(self.facts, self.steps, records) + "\n".join(owners_lines(gpu, owners, failed))
            compared = list(comparisons(self.facts["gpu"], records))
        except Exception:  # for a figure that nobody foresaw: the steps to come, and results.json, matter more
            text, compared, self.told = traceback.format_exc(), [], False
        for line in compared:
            if line not in self.said:
                print(line, flush=True)
        self.said.update(compared)
        results = {"machine": self.facts, "steps": [asdict(step) for step in self.steps], "records": records}
        (self.work / "summary.md").write_text(text.rstrip("\n") + "\n")
        (self.work / "results.json").write_text(json.dumps({**results, "owners": owners}, indent=1) + "\n")
        if owners:
            (self.work / "owners.json").write_text(owners_file(gpu, owners))
        with tarfile.open(self.work / "details.tar.gz", "w:gz") as tar:
            for name in ("logs", "records", "owners.json"):
                if (self.work / name).exists():
                    tar.add(self.work / name, arcname=name)
        for name in ("summary.md", "results.json", "details.tar.gz"):
            shutil.copyfile(self.work / name, self.out / f".{name}")
            os.replace(self.out / f".{name}", self.out / name)

    def run(self, plans: Sequence[Plan]) -> bool:
        """All of them; whether everything passed and could be told."""
        for stage in side_by_side(plans):
            with ThreadPoolExecutor(len(stage)) as pool:
                self.steps += pool.map(self.take, stage)
            self.publish()
        return self.told and all(step.passed for step in self.steps)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[Plan]]:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--only", metavar="STEP,STEP", help=f"steps to run: {', '.join(plan.name for plan in PLANS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal (default: cuda)")
    parser.add_argument(
        "--published-code",
        action="append",
        default=[],
        metavar="DIR",
        help="for the benchmarks: your clones; repeatable",
    )
    options = parser.parse_args(arguments)
    try:
        return options, chosen(options.only)
    except ValueError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> int:
    options, plans = parse(arguments)
    # Started in the background, a process ignores interrupts, and so would the steps that are to be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    clones = [str(Path(folder).resolve()) for folder in options.published_code]
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        check = Check(Path(work), options.out.resolve(), options.device, clones, options.minutes)
        passed = check.run(plans)
    print((options.out / "summary.md").read_text())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

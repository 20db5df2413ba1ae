"""DiffRate's claims at a small scale: accuracy at equal cost, random schedules, ablations, transfer.

Trains five small ViTs on scikit-learn's digits, searches their schedules, and compares. Everything follows from seeds.
Stop it with Ctrl-C and start it again: it goes on where it was.

    python -m benchmarks.reproduce.diffrate
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from benchmarks.reproduce.command import Study, run_command
from benchmarks.reproduce.diffrate.plan import QUICK, Settings
from benchmarks.reproduce.diffrate.plots import draw_all
from benchmarks.reproduce.diffrate.summary import summarize
from benchmarks.reproduce.diffrate.tables import all_tables
from benchmarks.reproduce.diffrate.units import all_units


def main(argv: Sequence[str] | None = None) -> int:
    study = Study("diffrate", __doc__ or "", Settings(), QUICK, all_units, summarize, all_tables, draw_all)
    return run_command(study, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker processes too
    sys.exit(main())

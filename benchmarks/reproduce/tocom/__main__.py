"""ToCom's claims at a small scale: accuracy by source and target degree with and without the plugin, and ablations.

Pre-trains small ViTs on one half of scikit-learn's digits, trains plugins on them, fine-tunes them to the other half at
two degrees, and compares. Everything follows from seeds. Stop it with Ctrl-C and start it again: it goes on where it
was.

    python -m benchmarks.reproduce.tocom
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from benchmarks.reproduce.command import Study, run_command
from benchmarks.reproduce.tocom.plan import QUICK, Settings
from benchmarks.reproduce.tocom.plots import draw_all
from benchmarks.reproduce.tocom.summary import summarize
from benchmarks.reproduce.tocom.tables import all_tables
from benchmarks.reproduce.tocom.units import all_units


def main(argv: Sequence[str] | None = None) -> int:
    study = Study("tocom", __doc__ or "", Settings(), QUICK, all_units, summarize, all_tables, draw_all)
    return run_command(study, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the worker processes too
    sys.exit(main())

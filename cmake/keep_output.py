"""Compiler launcher: run a compilation, pass its output on, and keep it in ``<object>.log`` beside the object.

ptxas reports registers, spills and shared memory there (-Xptxas -v); ninja would print it once and forget it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main(command: list[str]) -> int:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = run.stdout.splitlines(keepends=True)
    # The report is long and of interest to tests only; what else the compiler says is for the person who builds.
    sys.stdout.writelines(line for line in lines if not line.startswith(("ptxas info", "    ")) or run.returncode)
    if "-o" in command:
        Path(command[command.index("-o") + 1] + ".log").write_text(run.stdout)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Join the compiler logs of CUDA objects into one file beside the module: ``join_logs.py OUTPUT OBJECT...``."""

from __future__ import annotations

import sys
from pathlib import Path


def main(output: str, *objects: str) -> None:
    logs = [f"== {Path(name).stem}\n{Path(name + '.log').read_text()}" for name in sorted(objects) if name]
    Path(output).write_text("".join(logs))


if __name__ == "__main__":
    main(*sys.argv[1:])

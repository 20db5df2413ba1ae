"""docs/promises.md with the figures of an attack: ``python -m tests.attack.page attack-output/attack.json``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "promises.md"
#: part -> the promise, how it is tested
PROMISES = {
    "operators": (
        "every operator agrees with its reference within the error of float64",
        "random token counts, types, layouts and values",
    ),
    "values": (
        "whatever the values, nothing is read or written outside, and two runs agree to the bit",
        "NaN, infinities, denormal and huge numbers in any place",
    ),
    "arguments": (
        "wrong arguments are refused on every backend in the reference's words",
        "one argument of a right call changed in shape, type or range",
    ),
    "memory": (
        "no operator touches memory that is not its own, and none computes what C++ leaves undefined",
        "the three kinds of call above, the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer",
    ),
    "races": (
        "no two threads of an operator, and no two callers, touch a number unordered",
        "two callers at once, on four threads each, the CPU kernels under ThreadSanitizer",
    ),
    "damaged": (
        "a damaged file is refused by name; what has a digest is read as written or not at all",
        "ten formats, truncated, with flipped, lost, repeated and random bytes",
    ),
    "hostile": (
        "a well-formed file with absurd contents is refused, or read; nothing else is raised",
        "values that do not belong there, at any place of JSON and metadata, with a digest that fits",
    ),
    "pictures": (
        "a picture is drawn, or named and left out; none is written over",
        "six formats in ten modes, whole and damaged, some of them bombs",
    ),
    "killed": (
        "a run that is killed or stopped at any moment goes on to the same bits",
        "search, finetune, tocom, dense training, comparing, scoring, drawing; SIGKILL, SIGTERM or SIGINT at any time",
    ),
    "full disk": (
        "a disk that is full ends a run in one clear sentence, and what was written before stays whole",
        "the same commands with files held below 1 byte to 150 kB, then resumed",
    ),
    "read-only": ("nowhere to write is said before any work", "a file in the way of the folder, and a read-only one"),
    "two writers": (
        "of two runs in one folder one writes, and the other is told so",
        "the same command twice, the second at a random moment of the first",
    ),
    "switching": (
        "a Switchable's batch runs at one degree from end to end",
        "three threads call, one switches; answers compared to the bit",
    ),
    "changing": (
        "a model that is being called is not changed, and the change says so",
        "compress while a call stands in a random block",
    ),
    "server": (
        "nothing that a client sends ends a Server or spoils another's answer",
        "three clients with images, things that are none, and cancellations",
    ),
    "replicas": (
        "servers of one model, in one process or in forked ones, do not disturb each other",
        "two that share a Switchable, one of another Switchable of the model, and two in forks, two clients each",
    ),
    "workers": ("operators work in forked loader processes", "DataLoader with one or two of them"),
}


def rows(parts: dict[str, Any]) -> list[str]:
    """A row of the table for each part, with its figures.

    Raises:
        ValueError: the run left parts out. A table has the figures of one run.
    """
    if missing := [part for part in PROMISES if part not in parts]:
        raise ValueError(f"the figures must be of a run of all parts, got none of {', '.join(missing)}: make attack")
    table = []
    for part, (promise, how) in PROMISES.items():
        figures = parts[part]
        table.append(f"| {promise} | {how} | {part} | {figures['tried']:,} | {figures['failed']:,} |")
    return table


def render(page: str, figures: dict[str, Any]) -> str:
    """The page with the figures of a run in place of those that it has."""
    versions, cpu = figures["on"]["versions"], figures["on"]["host"]["cpu"]
    last = f"Last run: {figures['minutes']:g} minutes on {cpu}, torch {versions['torch']}, timm {versions['timm']}."
    body = "\n".join(["<!-- figures -->", *rows(figures["parts"]), "", last, "<!-- /figures -->"])
    head = "| promise | how it is tested | part | tried | failed |\n|---|---|---|---|---|"
    body = body.replace("<!-- figures -->\n", f"<!-- figures -->\n\n{head}\n")
    return re.sub(r"<!-- figures -->.*<!-- /figures -->", lambda _: body, page, flags=re.S)


if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    except ValueError as error:
        sys.exit(str(error))

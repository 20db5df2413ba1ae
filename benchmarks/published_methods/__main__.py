"""Other methods' published code beside ours, from clones, on a CPU: same weights and inputs, in turns.

    python -m benchmarks.published_methods --published-code A-ViT ATS CDPruner DynamicViT Evo-ViT PiToMe SPViT \\
        VisionZip divprune dymu -o FILE

writes the record and prints a table, which --page draws where a page has the marks for it. A clone is imported apart
from everything else, or single functions of it are run, and nothing of it is kept. Where the published code decides as
ours does, a speed counts only if both answer alike. A clone that cannot run here is named with its reason, and the
others go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokcomp.bench.published_code import PublishedCodeError
from tokcomp.cli.errors import UserError, check_output_file
from tokcomp.files import write_whole
from tokcomp.measure.info import machine, package_versions

from benchmarks.page.tables import replace_block
from benchmarks.published_methods import adaptive, models, selections
from benchmarks.published_methods.pair import Pair, measured

#: A clone's folder -> what is compared with it.
PAIRS: dict[str, Callable[[Path], Sequence[Pair]]] = {
    "A-ViT": adaptive.avit,
    "ATS": adaptive.ats,
    "CDPruner": selections.cdpruner,
    "DynamicViT": models.dynamicvit,
    "Evo-ViT": models.evovit,
    "PiToMe": models.pitome,
    "SPViT": models.spvit,
    "VisionZip": selections.visionzip,
    "divprune": selections.divprune,
    "dymu": adaptive.dymu,
}


#: Where a page holds the table.
BEGIN, END = "<!-- published code: drawn by `python -m benchmarks.published_methods` -->", "<!-- /published code -->"


def table(record: Mapping[str, Any]) -> str:
    lines = [
        "| | | batch | GFLOPs | published, images/s | ours | faster | answers differ by |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        median, least, most = row["speedup"]
        alike, answers = row["alike"]
        differ = f"{row['difference']:.0e}" if answers else "drawn at random"
        differ += f", {alike} of {answers}" if alike < answers else ""
        cost = "" if row["gflops"] is None else f"{row['gflops']:.2f}"
        lines.append(
            f"| {row['name']} | {row['what']} | {row['batch']} | {cost} | {row['published']:.1f} | {row['ours']:.1f} | "
            f"{median:.2f}x ({least:.2f}x - {most:.2f}x) | {differ} |"
        )
    return "\n".join(lines)


def drawn(page: str, record: Mapping[str, Any]) -> str:
    """A page's text with the record's table between its marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    return replace_block(page, BEGIN, END, table(record))


def compared(name: str, folder: Path, batches: Sequence[int], rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of one clone, until it fails.

    Raises:
        PublishedCodeError: it cannot run here, or answers otherwise than ours.
    """
    try:
        pairs = PAIRS[name](folder)
    except PublishedCodeError:
        raise
    except Exception as error:  # whatever the clone's own code raises
        raise PublishedCodeError(f"{name} cannot be set up: {type(error).__name__}: {error}") from error
    for pair in pairs:
        for batch in batches:
            if pair.batches is None or batch in pair.batches:
                yield {"name": name, **measured(pair, batch, rounds)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(PAIRS)
    parser.add_argument("--published-code", type=Path, nargs="+", required=True, help=f"clones named {known}")
    parser.add_argument("--only", nargs="+", choices=PAIRS, metavar="NAME", help="of these clones alone")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the record, JSON")
    parser.add_argument("--page", type=Path, metavar="FILE", help="the page whose marked table is drawn again")
    args = parser.parse_args(argv)
    clones = {folder.resolve().name: folder.resolve() for folder in args.published_code}
    if unknown := clones.keys() - PAIRS.keys():
        parser.error(f"--published-code must be clones named {known}, got {', '.join(sorted(unknown))}")
    if absent := set(args.only or ()) - clones.keys():
        parser.error(f"--only must name clones of --published-code, got {', '.join(sorted(absent))}")
    try:
        check_output_file("--output", args.output)  # before minutes of measuring
        if args.page is not None:
            drawn(args.page.read_text(encoding="utf-8"), {"rows": []})
    except (UserError, OSError, ValueError) as error:
        parser.error(str(error))
    record: dict[str, Any] = {"model": models.MODEL, "machine": machine(), "versions": package_versions()}
    record |= {"rows": [], "left_out": {}}
    for name in args.only or clones:
        try:
            for row in compared(name, clones[name], args.batches, args.rounds):
                record["rows"].append(row)
        except PublishedCodeError as error:
            record["left_out"][name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    write_whole(args.output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    if args.page is not None:
        write_whole(args.page, drawn(args.page.read_text(encoding="utf-8"), record))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

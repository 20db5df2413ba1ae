"""tokcomp demo."""

from __future__ import annotations

import argparse
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.errors import UserError, check_output_folder, save
from tokcomp.cli.table import table

if TYPE_CHECKING:
    from tokcomp.demo import DigitsRow, SpeedRow

DESCRIPTION = """\
See token compression work, in under two minutes on two CPU cores and without a download:

  1. accuracy: a small ViT trained on scikit-learn's handwritten digits, uncompressed and under DiffRate, ToMe and EViT
     at equal cost
  2. speed: DeiT-S at the published 2.3 GFLOPs schedule against timm's own DeiT-S, alternating
  3. pictures: what becomes of the patches of a few digits and of scikit-learn's two photographs

Prints tables and writes report.html (one file, opens anywhere) and results.json.
"""

EXAMPLES = """\
examples:
  tokcomp demo
  tokcomp demo --output my-report
  tokcomp demo --pretrained      photographs through timm's trained DeiT-S, downloaded unless already cached
"""

_RANDOM_NOTE = (
    "DeiT-S has random weights here, since nothing is downloaded. They do not change the speed. In the pictures, "
    "merging depends on how alike patches look to the network, which even random weights show; they cannot know "
    "importance, so DiffRate only merges in them. 'tokcomp demo --pretrained' draws all methods with trained weights."
)
_SCHEDULE_NOTE = (
    "DiffRate's schedule for this model was found by its gradient search, in 135 steps on the training digits (python "
    "-m tools.assets.choose_schedule); r and the keep rate are those with the nearest cost. 'same answer' is "
    "the share of images on which the compressed model answers as the uncompressed one does. One image in 360 is "
    "0.28 %, so differences of about one per cent mean little."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder to write (default: %(default)s)",
    )
    parser.add_argument("--pretrained", action="store_true", help="use timm's pretrained DeiT-S for the photographs")
    parser.add_argument(
        "-b", "--batch-size", type=options.positive_int, default=4, metavar="N", help="images per timed batch"
    )
    parser.add_argument(
        "--rounds", type=options.positive_int, default=5, metavar="N", help="timed rounds (default: %(default)s)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda ... (default: cuda if available)")


def run(args: argparse.Namespace) -> int:
    check_output_folder("--output", args.output)
    if find_spec("sklearn") is None:
        raise UserError("demo needs scikit-learn for its images; pip install 'tokcomp[demo]'")
    started = time.perf_counter()
    device = options.chosen_device(args.device)
    import torch

    from tokcomp import demo
    from tokcomp.measure.info import machine, package_versions

    photo_model = _photo_model(args.pretrained)
    print("1/3  digits: accuracy at equal cost", flush=True)
    digits_model = demo.digits_model()
    digits = demo.evaluate_digits(digits_model, device)
    print("\n" + table(*_digits_table(digits)) + "\n", flush=True)
    dtypes = [torch.float32, torch.bfloat16 if device.type == "cpu" else torch.float16]
    print(f"2/3  speed: DeiT-S, published 2.3 GFLOPs schedule, batch {args.batch_size}, on {device}", flush=True)
    speed = [
        demo.time_speed_up(photo_model, device, dtype, batch_size=args.batch_size, rounds=args.rounds)
        for dtype in dtypes
    ]
    print("\n" + table(*_speed_table(speed)) + "\n", flush=True)
    print("3/3  pictures", flush=True)
    digit_pictures = demo.draw_digits(digits_model, device)
    photos = demo.draw_photos(photo_model, args.pretrained, device)
    results = {
        "versions": package_versions(),
        "machine": machine(),
        "device": str(device),
        "digits": demo.as_data(digits),
        "deit_small_patch16_224": {"gflops": 2.3, "pretrained": args.pretrained, "speed": demo.as_data(speed)},
    }
    html = _page(args, results, digits, speed, digit_pictures, photos)
    save("--output", args.output / "results.json", json.dumps(results, indent=2) + "\n")
    save("--output", args.output / "report.html", html)
    print(f"\nwritten: {args.output / 'report.html'} and {args.output / 'results.json'}")
    print(f"{time.perf_counter() - started:.0f} seconds. Next: 'tokcomp evaluate --help', 'tokcomp visualize --help'.")
    return 0


def _photo_model(pretrained: bool) -> Any:
    from tokcomp import demo

    try:
        return demo.photo_model(pretrained)
    except Exception as error:
        if not pretrained:
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"--pretrained: the weights of {demo.PHOTO_MODEL} could not be loaded ({reason}); omit it for random ones"
        ) from error


def _digits_table(rows: list[DigitsRow]) -> tuple[list[str], list[list[str]]]:
    header = ["method", "M multiply-adds", "cost", "top-1", "same answer", "tokens before block 0 and after each"]
    dense = rows[0].mflops
    return header, [
        [
            row.method,
            f"{row.mflops:.1f}",
            f"{100 * row.mflops / dense:.0f} %",
            f"{row.top1:.1f} %",
            f"{row.agreement:.1f} %",
            " ".join(map(str, row.tokens)) if row.settings else str(row.tokens[0]),
        ]
        for row in rows
    ]


def _speed_table(rows: list[SpeedRow]) -> tuple[list[str], list[list[str]]]:
    header = ["precision", "timm images/s", "compressed images/s", "speed-up"]
    return header, [
        [row.dtype, f"{row.uncompressed:.1f}", f"{row.compressed:.1f}", f"{row.speed_up:.2f}x"] for row in rows
    ]


def _page(
    args: argparse.Namespace,
    results: dict[str, Any],
    digits: list[DigitsRow],
    speed: list[SpeedRow],
    digit_pictures: dict[str, bytes],
    photos: dict[str, bytes],
) -> str:
    from tokcomp import report

    versions, host = results["versions"], results["machine"]
    where = (
        host["gpus"][0]
        if results["device"].startswith("cuda")
        else f"{host['cpu']}, {host['threads']} thread{'s' * (host['threads'] != 1)}"
    )
    dense, rest = digits[0], digits[1:]
    accuracy = [
        report.paragraph(
            f"A ViT of 0.3 M parameters, trained for this package on 1437 digits, on the 360 it has not seen. "
            f"Uncompressed it costs {dense.mflops:.1f} M multiply-adds per image; every method below costs about "
            f"{100 * rest[0].mflops / dense.mflops:.0f} % of that."
        ),
        report.html_table(*_digits_table(digits)),
        report.side_by_side(
            [
                report.bars({row.method: row.top1 for row in digits}, caption="Top-1 accuracy", unit=" %"),
                report.steps(
                    {row.method: row.tokens for row in digits},
                    caption="Tokens, class token included: where each method spends its budget",
                    x_label="block",
                    y_label="tokens",
                ),
            ]
        ),
        report.paragraph(_SCHEDULE_NOTE, dim=True),
        *[report.picture(png, _digit_caption(index)) for index, png in enumerate(digit_pictures.values())],
    ]
    bars = {
        f"{name}, {row.dtype}": value
        for row in speed
        for name, value in (("timm", row.uncompressed), ("tokcomp", row.compressed))
    }
    timing = [
        report.paragraph(
            f"DeiT-S, 224 x 224, batch {speed[0].batch_size}, on {where}: timm's own forward, and the same "
            f"model compressed by the schedule that the DiffRate paper published for 2.3 GFLOPs (uncompressed: 4.6). "
            f"Medians of {speed[0].rounds} alternating rounds."
        ),
        report.html_table(*_speed_table(speed)),
        report.side_by_side(
            [report.bars(bars, caption="Images per second", unit="", colours=report.SERIES_COLOURS[:2])]
        ),
    ]
    pictures = [
        report.paragraph(
            "Every patch has the mean colour of the patches it was merged with; merged patches are outlined in their "
            "group's colour. Blocks count from 0; tokens include the class token."
        ),
        *[report.picture(png, f"{name}.jpg, one row per method at 2.3 GFLOPs") for name, png in photos.items()],
    ]
    if not args.pretrained:
        pictures.append(report.paragraph(_RANDOM_NOTE, dim=True))
    stamp = ", ".join(f"{name} {text}" for name, text in versions.items() if text)
    repeat = [
        report.code(f"tokcomp demo{' --pretrained' if args.pretrained else ''}"),
        report.paragraph(stamp, dim=True),
    ]
    share = 100 * rest[0].mflops / dense.mflops
    lead = (
        f"At {share:.0f} % of the cost, DiffRate keeps {rest[0].top1:.1f} % accuracy on handwritten digits, where the "
        f"whole model has {dense.top1:.1f} %; and DeiT-S runs {speed[0].speed_up:.1f} times as fast as in timm here."
    )
    sections = [
        ("Accuracy at equal cost", accuracy),
        ("Speed", timing),
        ("Photographs", pictures),
        ("Repeat it", repeat),
    ]
    return report.page("tokcomp: fewer tokens, the same model", lead, sections)


def _digit_caption(index: int) -> str:
    if index:
        return "Another digit under the same three methods."
    return (
        "A held-out digit, one row per method. DiffRate prunes (black) what the class token ignores and "
        "merges the next; ToMe only merges; EViT fuses everything it drops into one token."
    )

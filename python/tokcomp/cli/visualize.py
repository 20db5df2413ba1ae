"""tokcomp visualize."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tokcomp.cli import method_options, options
from tokcomp.cli.data import add_strict_option, data_config, strict_error
from tokcomp.cli.errors import UserError, blame, check_output_file, check_output_folder, save
from tokcomp.cli.explorer import add_explorer_options, check_page, explore, refuse_explorer_options
from tokcomp.cli.pictures import check_overwrites, drawing_names, png_bytes
from tokcomp.cli.schedules import load_schedule

DESCRIPTION = """\
Draw what a method does to an image's patches, as in Fig. 5 of the DiffRate paper: the input, then one column per block.

Every patch has the mean colour of the patches it was merged with; merged patches are outlined in their group's colour,
and need not touch. Pruned patches are black. With EViT the dropped patches fuse into one token, so they form a group.

Without a method, one is chosen and named: DiffRate at the smallest budget published for the model, or else ToMe.

--html FILE writes one page instead, which needs no network: it steps through the blocks, shows each token's group,
size and importance on the picture, and switches between methods and budgets. Without a method it has DiffRate, ToMe
and EViT at the published budgets, or at 3/4 and 1/2 of the cost; a method of yours comes first, and the others at its
cost.
"""

EXAMPLES = """\
examples:
  tokcomp visualize cat.jpg --pretrained
      a method chosen for the model
  tokcomp visualize cat.jpg -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3
      writes tokcomp-pictures/cat.png
  tokcomp visualize photos/ -m deit_small_patch16_224 --pretrained --method tome --r 13 --columns 0,3,7,11 -o drawn
      every picture of a folder, four chosen blocks (counted from 0), into the folder 'drawn'
  tokcomp visualize cat.jpg --checkpoint mine.safetensors --method evit --keep-rate 0.7 -o cat-evit.png
      your own weights, drawn into one file
  tokcomp visualize cat.jpg --pretrained --html cat.html
      a page to step through, with every method
"""


#: The method if none is named.
_CHOSEN = "chosen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "tokcomp visualize IMAGE [-m NAME] [--method METHOD ...] [options]"
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a picture, or a folder of pictures")
    options.add_model_options(parser, default="deit_small_patch16_224")
    method_options.add_method_options(parser, default=_CHOSEN)
    output = parser.add_argument_group("picture")
    output.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("tokcomp-pictures"),
        metavar="PATH",
        help="folder to write into, or for one picture a file ending in .png (default: %(default)s)",
    )
    output.add_argument(
        "--columns",
        type=options.list_of(options.non_negative_int),
        metavar="B,B,...",
        help="blocks to draw, from 0 (default: those that leave 3/4, 1/2, 1/3 and 1/6 of the tokens)",
    )
    output.add_argument("--cell", type=options.positive_int, metavar="PX", help="side of a patch in pixels")
    output.add_argument(
        "--outline", type=options.non_negative_int, default=2, metavar="PX", help="default: %(default)s"
    )
    add_explorer_options(parser)
    add_strict_option(output)
    output.add_argument("--num-samples", type=options.positive_int, metavar="N", help="draw N pictures at most")


def run(args: argparse.Namespace) -> int:
    pictures = _pictures(args)
    if args.html is not None:
        check_page(args)
        model = options.build_model(args)
        return explore(args, model, pictures, _named_method(args, model))
    refuse_explorer_options(args)
    targets = _targets(args, pictures)
    device = options.chosen_device(args.device)
    from timm.data import create_transform
    from tqdm import tqdm

    from tokcomp.data import UnreadableImageError

    model = options.build_model(args)
    if args.method == _CHOSEN:
        _choose_method(args, model)
    method = method_options.build_method(args, model)
    method_options.compress_by(args, model, method)
    _check_columns(args, model)
    model.to(device)
    config = data_config(args, model)
    transform = create_transform(**config, is_training=False)
    written, unreadable = [], []
    for path, target in tqdm(list(zip(pictures, targets, strict=True)), unit=" pictures", leave=False, disable=None):
        try:
            drawing = _draw(args, model, path, transform, config, device)
        except UnreadableImageError as error:
            if args.strict:
                raise strict_error(error) from error
            unreadable.append(str(error))
            continue
        save("--output", target, drawing)
        written.append(target)
    for reason in unreadable:
        print(f"not a readable picture: {reason}", file=sys.stderr)
    if not written:
        raise UserError(f"IMAGE must be a readable picture or a folder of them, got '{args.image}'")
    print(f"{args.model} ({options.describe_weights(args)}), {method if method is not None else 'uncompressed'}")
    if not args.pretrained and args.checkpoint is None:
        print("The weights are random, so the choice of patches means little: pass --pretrained or --checkpoint FILE.")
    for target in written:
        print(f"written: {target}")
    return 0


def _named_method(args: argparse.Namespace, model: Any) -> Any:
    """The method of the options, if they name one; the model stays plain."""
    from tokcomp import restore

    if args.method == _CHOSEN:
        if not method_options.given_method_options(args):
            return None
        _choose_method(args, model)
    method = method_options.build_method(args, model)
    method_options.compress_by(args, model, method)
    restore(model)
    return method


def _choose_method(args: argparse.Namespace, model: Any) -> None:
    """Fill in the method and, if unspecified, how strongly it compresses; prints the choice."""
    from tokcomp.adapters import find_adapter
    from tokcomp.schedule import published_budgets

    given = method_options.given_method_options(args)
    if given:
        args.method = method_options.methods_reading(given[0])[0]
        if args.schedule is not None:
            args.method = load_schedule(args.schedule, "--schedule", model=args.model, gflops=args.gflops).method_name
        return
    budgets = published_budgets().get(args.model) or published_budgets().get(args.model.split(".")[0])
    if budgets:
        args.method, args.gflops = "diffrate", min(budgets)
        taken, why = f"--method diffrate --gflops {args.gflops:g}", "the smallest budget published for this model"
    else:
        with blame(f"--model '{args.model}'"):
            geometry = find_adapter(model).geometry(model)
            patches = find_adapter(model).num_tokens(model) - geometry.num_prefix_tokens
        args.method, args.r = "tome", max(1, patches // (2 * geometry.depth))
        taken, why = f"--method tome --r {args.r}", "half of the patches by the last block"
    print(f"no method was named, so {taken} was chosen: {why}")


def _pictures(args: argparse.Namespace) -> list[Path]:
    from tokcomp.data import list_images

    if not args.image.exists():
        raise UserError(f"IMAGE must be a picture or a folder, got '{args.image}', which does not exist")
    pictures = list_images(args.image)
    if not pictures:
        raise UserError(
            f"IMAGE must hold pictures, got the folder '{args.image}' with none; name another folder or a file"
        )
    return pictures[: args.num_samples]


def _targets(args: argparse.Namespace, pictures: list[Path]) -> list[Path]:
    if args.output.suffix.lower() == ".png" and not args.output.is_dir():
        if args.image.is_dir():
            raise UserError(
                f"--output must be a folder for a folder of pictures, got '{args.output}'; leave out '.png'"
            )
        targets = [check_output_file("--output", args.output)]
        check_overwrites("--output", targets)
        return targets
    check_output_folder("--output", args.output)
    targets = [args.output / name for name in drawing_names(pictures)]
    check_overwrites("--output", targets)
    return targets


def _check_columns(args: argparse.Namespace, model: Any) -> None:
    from tokcomp.adapters import find_adapter

    depth = find_adapter(model).geometry(model).depth
    for block in args.columns or ():
        if block >= depth:
            raise UserError(f"--columns must be blocks of {args.model}, 0 to {depth - 1}, got {block}")


def _draw(
    args: argparse.Namespace, model: Any, path: Path, transform: Any, config: dict[str, Any], device: Any
) -> bytes:
    import torch

    from tokcomp.data import load_image
    from tokcomp.visualize import draw_blocks

    image = transform(load_image(path))
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    drawing = draw_blocks(
        model, image.to(device), image * std + mean, blocks=args.columns, cell=args.cell, outline=args.outline
    )
    return png_bytes(drawing)

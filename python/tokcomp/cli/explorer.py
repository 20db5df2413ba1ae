"""tokcomp visualize --html: the explorer's page of pictures, methods and budgets."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcomp.cli import options
from tokcomp.cli.data import data_config, strict_error
from tokcomp.cli.errors import UserError, blame, check_output_file, save

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tokcomp.budgets import LatencyTable
    from tokcomp.compare.build import Builder
    from tokcomp.compare.run import Comparison
    from tokcomp.explore import Choice, Figure
    from tokcomp.methods import Method

#: The methods that every page has, as tokcomp compare calls them, and their names on it; a page has one of each name.
_METHODS = {"diffrate": "DiffRate", "published": "DiffRate", "tome": "ToMe", "evit": "EViT", "uniform": "uniform"}
#: Shares of the uncompressed cost that the page has where nothing was published for the model.
_SHARES = (0.75, 0.5)


def add_explorer_options(parser: argparse.ArgumentParser) -> None:
    page = parser.add_argument_group("page to step through")
    page.add_argument("--html", type=Path, metavar="FILE", help="write one HTML page, and no pictures")
    page.add_argument(
        "--budgets",
        type=options.list_of(options.positive_float),
        metavar="G,G,...",
        help="GFLOPs that the page has every method at",
    )
    page.add_argument(
        "--latency-table", type=Path, metavar="FILE", help="predict images per second by this table of a search"
    )


def refuse_explorer_options(args: argparse.Namespace) -> None:
    for option in ("budgets", "latency_table"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} goes with --html FILE, got it alone; add --html")


def check_page(args: argparse.Namespace) -> None:
    """Refuse, before any work, a page that could not be written or would replace something else."""
    from tokcomp.explore import MARK

    path: Path = args.html
    for option in ("columns", "cell"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for pictures, got it with --html, which shows every block; leave it out")
    check_output_file("--html", path)
    if path.exists() and MARK.encode() not in path.read_bytes()[:2000]:
        raise UserError(f"--html must not overwrite what tokcomp did not write, got '{path}'; name another file")


def explore(args: argparse.Namespace, model: nn.Module, pictures: Sequence[Path], named: Method | None) -> int:
    """Write the page. ``model`` is plain; ``named`` is the method that the user asked for, if any."""
    from tokcomp.compare.build import Builder

    with blame(f"--model '{args.model}'"):
        builder = Builder(model, args.model)
    table = _table(args, model)
    figures, images = _figures(args, model, pictures)
    model.to(options.chosen_device(args.device))
    methods = dict(_methods(args, builder, named))
    choices = watched(
        model, images, methods, builder, {name: _speed(table, model, one) for name, one in methods.items()}
    )
    weights = options.describe_weights(args)
    if args.checkpoint is not None:  # a page may be passed on, and folders are nobody's business
        weights = weights.replace(str(args.checkpoint), Path(args.checkpoint).name)
    lead = f"{args.model}, {weights}. GFLOPs are 1e9 multiply-adds per image."
    if not args.pretrained and args.checkpoint is None:
        lead += " The weights are random, so the choice of patches means little."
    page = page_of(
        "What happens to the tokens", lead, figures, choices, builder, _speed(table, model, None), "predicted"
    )
    save("--html", args.html, page)
    print(f"{args.model} ({weights}): methods and budgets: {len(choices)}, pictures: {len(figures)}")
    print(f"written: {args.html}")
    return 0


def watched(
    model: nn.Module,
    images: Tensor,
    methods: Mapping[tuple[str, str], Method],
    builder: Builder,
    speeds: Mapping[tuple[str, str], float | None],
) -> list[Choice]:
    """The methods, by name and strength, on images [n, 3, H, W] as the model takes them."""
    from tokcomp.explore import Choice, watch

    return [
        Choice(name, strength, builder.flops(method) / 1e9, speeds.get((name, strength)), repr(method), found)
        for (name, strength), method in methods.items()
        for found in [watch(model, images, method)]
    ]


def page_of_comparison(
    comparison: Comparison,
    record: Mapping[str, Any],
    budgets: Mapping[float, Mapping[str, Method]],
    config: Mapping[str, Any],
    pictures: int,
) -> str:
    """The page of ``tokcomp compare``: its first pictures under its methods, with the speeds that it measured.

    Args:
        comparison: finished.
        record: what its ``results.json`` holds.
        budgets: its methods by name, by budget.
        config: how the model wants its images, in timm's terms.
        pictures: how many images.
    """
    import torch

    from tokcomp.explore import Figure

    images = comparison.images.first(pictures).to(comparison.device, comparison.plan.dtype)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    figures = [Figure(f"image {n}", image.cpu().float() * std + mean) for n, image in enumerate(images)]
    methods = {(name, _strength(g)): method for g, found in budgets.items() for name, method in found.items()}
    rows = {(row["name"], _strength(budget["target"])): row for budget in record["budgets"] for row in budget["rows"]}
    speeds = {key: row.get("images_per_second") for key, row in rows.items()}
    choices = watched(comparison.model, images, methods, comparison.builder, speeds)
    lead = f"{record['facts']['model']}, {record['facts']['weights']}. GFLOPs are 1e9 multiply-adds per image."
    dense = record["uncompressed"].get("images_per_second")
    return page_of("What happens to the tokens", lead, figures, choices, comparison.builder, dense, "measured")


def page_of(
    title: str,
    lead: str,
    figures: Sequence[Figure],
    choices: Sequence[Choice],
    builder: Builder,
    speed: float | None,
    speed_kind: str,
) -> str:
    """The page, with what it says of the model itself."""
    from tokcomp.adapters import find_adapter
    from tokcomp.explore import render

    ruler = builder.ruler
    return render(
        title,
        lead,
        figures,
        choices,
        grid=find_adapter(builder.model).grid(builder.model, *figures[0].pixels.shape[-2:]),
        num_prefix_tokens=ruler.prefix,
        gflops=ruler.flops(None) / 1e9,
        images_per_second=speed,
        speed=speed_kind,
    )


def _methods(
    args: argparse.Namespace, builder: Builder, named: Method | None
) -> Iterator[tuple[tuple[str, str], Method]]:
    """The page's methods, by name and strength: the user's own, then every method at every budget."""
    from tokcomp.compare.entries import Variant, parse_methods
    from tokcomp.schedule import published_budgets

    dense = builder.ruler.flops(None) / 1e9
    published = published_budgets().get(args.model) or published_budgets().get(args.model.split(".")[0]) or ()
    budgets = args.budgets or sorted(published, reverse=True) or [share * dense for share in _SHARES]
    if named is not None:
        own = builder.ruler.flops(named) / 1e9
        yield (f"{type(named).__name__} (yours)", _strength(own)), named
        budgets = args.budgets or [own]
    anything = named is not None
    for budget in budgets:
        if not 0 < budget < dense:
            if args.budgets:
                raise UserError(f"--budgets must be below the uncompressed model's {dense:.4g}, got {budget:g}")
            continue
        found: dict[str, Method] = {}
        for entry in parse_methods(list(_METHODS), Variant()):
            # One that cannot have this cost, or that nothing was published to make it from, is left out.
            with suppress(ValueError, TypeError):
                found.setdefault(_METHODS[entry.name], builder.build(entry, budget))
        yield from (((name, _strength(budget)), method) for name, method in found.items())
        anything = anything or bool(found)
    if not anything:
        raise UserError(
            f"--budgets must be GFLOPs that some method can reach on {args.model}, got "
            f"{', '.join(f'{budget:.4g}' for budget in budgets)}; the model itself has {dense:.4g}"
        )


def _strength(gflops: float) -> str:
    return f"{gflops:.4g} GFLOPs"


def _figures(args: argparse.Namespace, model: nn.Module, pictures: Sequence[Path]) -> tuple[list[Figure], Tensor]:
    """The pictures that can be read, for people and as the model takes them: [n, 3, H, W]."""
    import torch
    from timm.data import create_transform

    from tokcomp.data import UnreadableImageError, load_image
    from tokcomp.explore import Figure

    config: dict[str, Any] = data_config(args, model)
    transform = create_transform(**config, is_training=False)
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    figures, images = [], []
    for path in pictures:
        try:
            image = transform(load_image(path))
        except UnreadableImageError as error:
            if args.strict:
                raise strict_error(error) from error
            print(f"not a readable picture: {error}", file=sys.stderr)
            continue
        figures.append(Figure(path.stem, image * std + mean))
        images.append(image)
    if not images:
        raise UserError(f"IMAGE must be a readable picture or a folder of them, got '{args.image}'")
    return figures, torch.stack(images).to(options.chosen_device(args.device))


def _table(args: argparse.Namespace, model: nn.Module) -> LatencyTable | None:
    from tokcomp.budgets import LatencyTable

    if args.latency_table is None:
        return None
    if not args.latency_table.is_file():
        raise UserError(f"--latency-table must be a file, got '{args.latency_table}'; tokcomp search writes one")
    with blame("--latency-table"):
        table = LatencyTable.load(args.latency_table)
        table.check_model(model)
    return table


def _speed(table: LatencyTable | None, model: nn.Module, method: Method | None) -> float | None:
    """Images per second by the table."""
    from tokcomp.cost import counts_of

    return None if table is None else 1000 * table.batch_size / table.milliseconds(counts_of(model, method))

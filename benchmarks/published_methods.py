"""DynamicViT, SPViT, Evo-ViT and PiToMe against their published code, from clones, on a CPU: same weights, in turns.

    python -m benchmarks.published_methods --published-code DynamicViT SPViT Evo-ViT PiToMe -o FILE

writes the record and prints a table. A clone is imported apart from everything
else (``tokcomp.bench.published_code``), and nothing of it is kept. Where the published code decides as ours does, a
speed counts only if both answer alike; SPViT's draws its decisions at random, in inference too, and takes one image.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import copy
import importlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import tokcomp
import torch
from tokcomp import learned
from tokcomp.bench.published_code import PublishedCodeError, apart
from tokcomp.cli.errors import UserError, check_output_file
from tokcomp.files import write_whole
from tokcomp.measure.info import machine, package_versions
from tokcomp.measure.timing import interleave, stopwatch
from tokcomp.runs.steps import seed_all
from torch import Tensor, nn

MODEL = "deit_small_patch16_224"
#: timm's DeiT-S as the published classes are told it.
SHAPE = {"embed_dim": 384, "depth": 12, "num_heads": 6, "qkv_bias": True}
#: How far logits may differ, as a share of their largest: float32 sums in another order through twelve blocks.
TOLERANCE = 1e-3
SPVIT_RATES = (0.7, 0.39, 0.21)
PITOME_RATIO = 0.925

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pair:
    """The published model and ours, with the same weights.

    Args:
        published, ours: images [B, 3, H, W] to logits.
        gflops: of ours.
        agrees: whether both are to answer alike.
        batches: sizes that the published code takes; None: all.
    """

    published: Call
    ours: Call
    gflops: float
    agrees: bool = True
    batches: tuple[int, ...] | None = None


def plain_model(**options: Any) -> Any:
    seed_all(0)
    return timm.create_model(MODEL, **options).eval()


def _stand_ins(folder: Path, bare: Sequence[str]) -> dict[str, ModuleType]:
    """What the clones import and do not use here: names that PyTorch no longer has, a package for logs; and packages of
    the clone without what their own __init__ imports."""
    found = {name: ModuleType(name) for name in ("torch._six", "tensorboardX", *bare)}
    vars(found["torch._six"]).update(inf=math.inf, container_abcs=collections.abc)
    vars(found["tensorboardX"]).update(SummaryWriter=None)
    for name in bare:
        path = folder / name.replace(".", "/")
        if not path.is_dir():
            raise PublishedCodeError(f"{folder.name} has no {name}")
        found[name].__path__ = [str(path)]
    return found


@contextmanager
def _standing_in(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    missing = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def imported(folder: Path, name: str, bare: Sequence[str] = ()) -> Any:
    """A module of a clone; ``bare``: packages of the clone whose own __init__ is left out.

    Raises:
        PublishedCodeError: it does not import here.
    """
    stand_ins = _stand_ins(folder, bare)
    try:
        with apart((folder,)), contextlib.redirect_stdout(io.StringIO()), _standing_in(stand_ins):
            return importlib.import_module(name)
    except Exception as error:
        raise PublishedCodeError(f"{folder.name} does not import: {type(error).__name__}: {error}") from error


def silent(make: Callable[[], Any]) -> Any:
    """What the clones print while they are made or run is left out."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make()


def dynamicvit(folder: Path) -> Pair:
    method = tokcomp.DynamicViT(0.7)
    ours = learned.attach(plain_model(), method).eval()
    module = imported(folder, "models.dyvit")
    rates = [0.7, 0.7**2, 0.7**3]
    theirs = silent(lambda: module.VisionTransformerDiffPruning(**SHAPE, pruning_loc=[3, 6, 9], token_ratio=rates))
    names = {"norm": "in_conv.0", "embed": "in_conv.1", "hidden1": "out_conv.0", "hidden2": "out_conv.2"}
    theirs.load_state_dict(_renamed(ours.state_dict(), "dynamicvit", {**names, "out": "out_conv.4"}))
    return Pair(theirs.eval(), tokcomp.compress(ours, method), tokcomp.flops(ours) / 1e9)


def spvit(folder: Path) -> Pair:
    method = tokcomp.SPViT(SPVIT_RATES)
    ours = learned.attach(plain_model(), method).eval()
    module = imported(folder, "vit_l2_3keep_senet_inference")
    theirs = silent(
        lambda: module.VisionTransformerDiffPruning(**SHAPE, pruning_loc=[3, 6, 9], token_ratio=list(SPVIT_RATES))
    ).eval()
    compressed = tokcomp.compress(ours, method)
    return Pair(
        lambda images: silent(lambda: theirs(images)),
        compressed,
        tokcomp.flops(ours) / 1e9,
        agrees=False,
        batches=(1,),
    )


def evovit(folder: Path) -> Pair:
    """The published model averages its patches, and has no representative tokens."""
    method = tokcomp.EvoViT(representative=False)
    ours = plain_model(global_pool="avg")
    theirs = silent(imported(folder, "deit.evo_deit").evo_deit_small_patch16_224)
    theirs.remove_cls()
    state = {}
    for name, value in ours.state_dict().items():
        _, _, rest = name.partition(".")
        block, _, inner = rest.partition(".")
        kind = inner.rpartition(".")[2]
        if not name.startswith("blocks."):
            state[name.replace("fc_norm.", "norm.")] = value
        elif inner.startswith("attn.qkv"):
            state[f"qks.{block}.qk.{kind}"], state[f"vs.{block}.v.{kind}"] = value[:768], value[768:]
        elif inner.startswith("attn.proj"):
            state[f"projs.{block}.{kind}"] = value
        elif inner.startswith("norm1"):
            state[f"norms.{block}.{kind}"] = value
        else:
            state[name] = value
    theirs.load_state_dict(state)
    return Pair(theirs.eval(), tokcomp.compress(ours, method), tokcomp.flops(ours) / 1e9)


def pitome(folder: Path) -> Pair:
    """As the published code patches DeiT: the first half of the blocks pairs all tokens."""
    plain = plain_model()
    theirs: Any = copy.deepcopy(plain)
    # Its package imports every model that it knows, language models too.
    module = imported(folder, "algo.pitome.patch.deit", ("algo", "algo.pitome", "algo.pitome.patch"))
    silent(lambda: module.apply_patch(theirs, prop_attn=True))
    theirs.ratio, theirs.dist_token, theirs.pre_logits = PITOME_RATIO, None, nn.Identity()
    # Its forward_features takes images alone and pools already; in timm 0.4 only the classifier came after it.
    features, theirs.forward_head = theirs.forward_features, lambda pooled: theirs.head(pooled)
    theirs.forward_features = lambda images, **masks: features(images)
    tokens, r = (plain.patch_embed.num_patches), []
    for _ in plain.blocks:
        r.append(math.floor(tokens - tokens * PITOME_RATIO))
        tokens -= r[-1]
    ours = tokcomp.compress(plain, tokcomp.PiToMe(r, margin=0.75, prop_attn=False, unprotected=0.5))
    return Pair(lambda images: theirs(images, return_flop=False), ours, tokcomp.flops(ours) / 1e9)


def _renamed(state: Mapping[str, Tensor], parts: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        first, *rest = name.split(".")
        if first == parts:
            stage, layer, kind = rest
            name = f"score_predictor.{stage}.{names[layer]}.{kind}"
        found[name] = value
    return found


PAIRS: dict[str, Callable[[Path], Pair]] = {
    "DynamicViT": dynamicvit,
    "SPViT": spvit,
    "Evo-ViT": evovit,
    "PiToMe": pitome,
}


def measured(pair: Pair, batch: int, rounds: int) -> dict[str, Any]:
    """Images per second of both, and how many times faster ours is: the median of the rounds, the least and the most.

    Raises:
        PublishedCodeError: they do not answer alike where they should.
    """
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        difference = None
        if pair.agrees:
            theirs, ours = pair.published(images), pair.ours(images)
            difference = float((theirs - ours).abs().max() / theirs.abs().max())
            if not difference <= TOLERANCE:
                raise PublishedCodeError(f"the logits differ by {difference:.2g} of the largest")
        calls = {"published": lambda: pair.published(images), "ours": lambda: pair.ours(images)}
        found = interleave(calls, stopwatch(torch.device("cpu")), rounds=rounds)
    return {
        "batch": batch,
        "gflops": pair.gflops,
        "difference": difference,
        "published": batch / found["published"].median,
        "ours": batch / found["ours"].median,
        "speedup": found["ours"].speedup_over(found["published"]),
    }


def table(record: Mapping[str, Any]) -> str:
    lines = [
        "| | batch | GFLOPs | published | ours | faster | logits differ by |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        median, least, most = row["speedup"]
        differ = "drawn at random" if row["difference"] is None else f"{row['difference']:.0e}"
        lines.append(
            f"| {row['name']} | {row['batch']} | {row['gflops']:.2f} | {row['published']:.1f} | {row['ours']:.1f} | "
            f"{median:.2f}x ({least:.2f}x - {most:.2f}x) | {differ} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(PAIRS)
    parser.add_argument("--published-code", type=Path, nargs="+", required=True, help=f"clones named {known}")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the record, JSON")
    args = parser.parse_args(argv)
    clones = {folder.resolve().name: folder.resolve() for folder in args.published_code}
    if unknown := clones.keys() - PAIRS.keys():
        parser.error(f"--published-code must be clones named {known}, got {', '.join(sorted(unknown))}")
    try:
        check_output_file("--output", args.output)  # before minutes of measuring
    except UserError as error:
        parser.error(str(error))
    record: dict[str, Any] = {"model": MODEL, "machine": machine(), "versions": package_versions(), "rows": []}
    record["left_out"] = {}
    for name, folder in clones.items():
        try:
            pair = PAIRS[name](folder)
            for batch in args.batches:
                if pair.batches is None or batch in pair.batches:
                    record["rows"].append({"name": name, **measured(pair, batch, args.rounds)})
        except PublishedCodeError as error:
            record["left_out"][name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    write_whole(args.output, json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())

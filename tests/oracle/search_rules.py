"""DiffRate's search on a plain ViT, one image at a time: tokens sorted in every block, none dropped, masks learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracle.plain_vit import PlainViT, attention, classify, embed, mlp
from tests.oracle.rules import LEAST_SIZE, by_importance, groups_of, importance, mean_of_groups, most_similar


class Proxy:
    """What a row of logits stands for: P, P - g, P - 2g, ... patches to keep, each with its probability."""

    def __init__(self, logits: Tensor, granularity: int, num_patches: int, num_prefix: int) -> None:
        candidates = list(range(num_patches, 0, -granularity))
        candidates = candidates[: len(logits)]  # one that may not compress has the first alone
        rho = logits.softmax(0)
        expected = sum(share * count for share, count in zip(rho, candidates, strict=True)) + num_prefix
        self.count = int(torch.ceil(expected.detach()))
        self.kept = expected + (self.count - expected.detach())  # straight through the rounding
        # A token of rank t, the class token being 0, stays where more than t tokens do.
        self.chance = [
            sum(share for share, count in zip(rho, candidates, strict=True) if count + num_prefix > rank)
            for rank in range(num_patches + num_prefix)
        ]

    def mask(self, last: int) -> Tensor:
        """[N], with ``last`` tokens alive: 0 for those that this step removes, with the gradient of their chance."""
        factors = []
        for rank, chance in enumerate(self.chance):
            removed = self.count <= rank < last
            factors.append((0.0 if removed else 1.0) + (chance - chance.detach()))
        return torch.stack(factors)


def search(
    vit: PlainViT,
    image: Tensor,
    prune: Sequence[Proxy],
    merge: Sequence[Proxy],
    *,
    metric: str = "cls_attn",
    pipeline: str = "prune_merge",
    match_inference: bool = False,
    hold_maximum: bool = True,
) -> Tensor:
    """Logits [classes] of one image."""
    x = embed(vit, image)
    size, mask = torch.ones(len(x), dtype=x.dtype), torch.ones(len(x), dtype=x.dtype)
    alive = len(x)
    for block in range(vit.depth):
        attended = attention(vit, block, x, size, mask, hold_maximum=hold_maximum)
        x = x + attended.out
        order = by_importance(importance(metric, attended), vit.num_prefix, alive)
        x, size, mask = x[order], size[order], mask[order]
        for step in pipeline.split("_"):
            proxy = (prune if step == "prune" else merge)[block]
            if proxy.count >= alive:
                continue
            if step == "merge":
                x, size = merge_in_place(vit, x, size, proxy.count, alive, match_inference)
            mask = mask * proxy.mask(alive)
            alive = proxy.count
        x = x + mlp(vit, block, x)
    return classify(vit, x, size, mask)


def merge_in_place(
    vit: PlainViT, x: Tensor, size: Tensor, count: int, alive: int, match_inference: bool
) -> tuple[Tensor, Tensor]:
    """Ranks ``count`` .. ``alive - 1`` join the most similar of those before, and stay where they are themselves."""
    kept, gone = list(range(count)), list(range(count, alive))
    places, cosine = most_similar(x, kept, gone, vit.num_prefix)
    part = size[:alive].tolist()  # the sizes that take part, the sources' by similarity
    for token, similarity in zip(gone, cosine, strict=True):
        part[token] *= similarity
    if not match_inference:
        part = [max(one, 1.0) for one in part]
    new = list(part)
    for token, place in zip(gone, places, strict=True):
        new[place] += part[token]
    if match_inference:  # inference has no sources left whose size would matter
        new[count:] = size[count:alive].tolist()
    new = [max(one, LEAST_SIZE) for one in new]
    sizes = torch.cat([torch.tensor(new, dtype=x.dtype), size[alive:]])
    merged = mean_of_groups(x, groups_of(kept, gone, places))
    return torch.cat([torch.stack(merged), x[count:]]), sizes


def multiply_adds(vit: PlainViT, steps: Sequence[Sequence[Proxy]]) -> Tensor:
    """Alg. 2, and the patch embedding and the classifier; ``steps``: for each block the proxies that have a say.

    The gradient of a block's number of tokens goes to every count of the block, whichever is the smallest, and not to
    the number before.
    """
    channels = vit.weights["pos_embed"].shape[2]
    tokens: Tensor | float = float(vit.num_tokens)
    total: Tensor | float = tokens * vit.weights["patch_embed.proj.weight"].numel()
    total += vit.weights["head.weight"].numel()
    for proxies in steps:
        total = total + 4 * tokens * channels**2 + 2 * tokens**2 * channels
        before = tokens.item() if isinstance(tokens, Tensor) else tokens
        tokens = float(min(before, *(proxy.count for proxy in proxies)))
        for proxy in proxies:
            tokens = tokens + (proxy.kept - proxy.kept.detach())
        total = total + 8 * tokens * channels**2
    return torch.as_tensor(total, dtype=torch.float64)

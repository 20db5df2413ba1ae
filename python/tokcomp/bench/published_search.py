"""What the published search of DiffRate computes in a step, in plain eager PyTorch: the baseline of the search's speed.

For each proxy's token probability a loop over the candidates (one host sync each); in every block tokens, sizes and
mask gathered in descending order; attention maps held in float32 with the mask, exp and eps of Eq. 11-12;
``scatter_reduce``; Alg. 2. Logits, FLOPs and the proxies' gradients agree with the published code's
(``tests/bench/test_published_search.py``). As published, nothing is frozen: gradients are computed for the backbone's
weights too, although the optimizer has only the proxies; ``model.requires_grad_(False)`` gives the variant without.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.bench.published import class_attention_order, gather_tokens

EPS = 1e-6


def round_up(number: Tensor) -> Tensor:
    """The next integer, exactly, with the gradient of the number itself."""
    return number + (number.ceil() - number).detach()


def least(tokens: Tensor, *kept: Tensor) -> Tensor:
    """min(tokens, *kept) with the whole gradient to each of ``kept`` and none to ``tokens``."""
    smallest = torch.stack([tokens, *kept]).min().detach()
    return smallest + torch.stack([one - one.detach() for one in kept]).sum()


class PublishedProxy(nn.Module):
    """A learnable number of kept tokens: one logit per candidate number of patches, from all of them downwards."""

    candidates: Tensor

    def __init__(self, num_patches: int, granularity: int, num_prefix_tokens: int) -> None:
        super().__init__()
        candidates = torch.arange(num_patches, 0, -granularity, dtype=torch.get_default_dtype())
        self.register_buffer("candidates", candidates)
        self.logits = nn.Parameter(torch.zeros_like(candidates))
        self.num_tokens = num_patches + num_prefix_tokens
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self) -> Tensor:
        """0-dim: tokens kept, the prefix included."""
        return round_up(self.candidates @ self.logits.softmax(0)) + self.num_prefix_tokens

    def token_probability(self) -> Tensor:
        """[N]: how probable it is that the token of each rank is kept."""
        probability = torch.zeros(self.num_tokens, device=self.logits.device, dtype=self.logits.dtype)
        for count, share in zip(self.candidates, self.logits.softmax(0), strict=True):
            probability[: int(count) + self.num_prefix_tokens] += share
        return probability

    def mask(self, kept: int, alive: int) -> Tensor:
        """[N]: 0 for ranks ``kept`` .. ``alive - 1``, else 1; its gradient goes straight to the token probability."""
        mask = torch.ones(self.num_tokens, device=self.logits.device, dtype=self.logits.dtype)
        mask[kept:alive] = 0
        probability = self.token_probability()
        return mask + (probability - probability.detach())


def masked_probabilities(scores: Tensor, mask: Tensor) -> Tensor:
    """Eq. 11-12 with eps: scores [B, H, N, N], mask [B, N] -> [B, H, N, N], in float32 at least."""
    num_tokens = scores.shape[-1]
    wide = torch.promote_types(scores.dtype, torch.float32)
    diagonal = torch.eye(num_tokens, device=mask.device, dtype=mask.dtype)
    keep = mask[:, None, None, :]
    keep = keep + (1 - keep) * diagonal
    weights = (scores - scores.amax(dim=-1, keepdim=True)).to(wide).exp() * keep.to(wide)
    weights = (weights + EPS / num_tokens) / (weights.sum(dim=-1, keepdim=True) + EPS)
    return weights.to(scores.dtype)


def masked_attention(attn: Any, x: Tensor, size: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Attention with the masked map held: out [B, N, C], the map [B, H, N, N]. size: [B, N, 1], mask: [B, N]."""
    batch, num_tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scores = (q @ k.transpose(-2, -1)) * attn.scale
    probabilities = masked_probabilities(scores + size.log()[:, None, None, :, 0], mask)
    out = (probabilities.to(v.dtype) @ v).transpose(1, 2).reshape(batch, num_tokens, -1)
    return attn.proj(out), probabilities


def merge_in_place(x: Tensor, size: Tensor, kept: int, alive: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokens ranked ``kept`` .. ``alive - 1`` join the most similar of those before, and stay where they are.

    Their own size becomes what they add, which the next masked attention reads.
    """
    with torch.no_grad():
        unit = x / x.norm(dim=-1, keepdim=True)
        similarity = unit[:, kept:alive] @ unit[:, :kept].transpose(-1, -2)
        similarity[..., :num_prefix_tokens] = -math.inf
        best, slot = similarity.max(dim=-1, keepdim=True)  # [B, S, 1]
    merged = x[:, :kept].scatter_reduce(1, slot.expand(-1, -1, x.shape[-1]), x[:, kept:alive], reduce="mean")
    weighted = torch.cat([size[:, :kept], size[:, kept:alive] * best], dim=1).clamp(min=1).to(size.dtype)
    total = weighted[:, :kept].scatter_reduce(1, slot, weighted[:, kept:], reduce="sum")
    size = torch.cat([total, weighted[:, kept:], size[:, alive:]], dim=1)
    return torch.cat([merged, x[:, kept:]], dim=1), size


class PublishedSearch(nn.Module):
    """A timm VisionTransformer's modules run as the published search runs them, with a pair of proxies per block.

    Args:
        model: a plain timm VisionTransformer, used as it is; as published, its parameters keep their gradients.
        granularity: distance of neighbouring candidates, in tokens.
    """

    prune: Any
    merge: Any

    def __init__(self, model: Any, granularity: int = 1) -> None:
        super().__init__()
        find_adapter(model).geometry(model)  # refuses what is no VisionTransformer
        self.model = model
        patches, depth = int(model.patch_embed.num_patches), len(model.blocks)
        fixed = {0, depth - 1} if model.global_pool == "avg" else {0}
        steps = [patches if index in fixed else granularity for index in range(depth)]

        def proxies() -> nn.ModuleList:
            return nn.ModuleList(PublishedProxy(patches, step, model.num_prefix_tokens) for step in steps)

        self.prune, self.merge = proxies(), proxies()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] of images [B, 3, H, W], and the multiply-adds of one image, 0-dim."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        batch, num_tokens, _ = x.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        size = torch.ones(batch, num_tokens, 1, device=x.device, dtype=wide)
        mask = torch.ones(batch, num_tokens, device=x.device, dtype=wide)
        tokens, alive = torch.tensor(num_tokens, device=x.device, dtype=wide), num_tokens
        flops = torch.full_like(tokens, self._fixed_flops(num_tokens))
        for block, prune, merge in zip(model.blocks, self.prune, self.merge, strict=True):
            out, probabilities = masked_attention(block.attn, block.norm1(x), size, mask)
            x = x + block.drop_path1(block.ls1(out))

            order = class_attention_order(probabilities, model.num_prefix_tokens)
            x, size, mask = gather_tokens(x, order), gather_tokens(size, order), mask.gather(1, order)
            num_pruned_to, num_merged_to = prune(), merge()
            if int(num_pruned_to) < alive:
                mask = mask * prune.mask(int(num_pruned_to), alive)
                alive = int(num_pruned_to)
            if int(num_merged_to) < alive:
                x, size = merge_in_place(x, size, int(num_merged_to), alive, model.num_prefix_tokens)
                mask = mask * merge.mask(int(num_merged_to), alive)
                alive = int(num_merged_to)

            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
            flops = flops + self._attention_flops(block, tokens)
            tokens = least(tokens, num_pruned_to, num_merged_to)
            flops = flops + self._mlp_flops(block, tokens)
        return self._head(model.norm(x), size, mask), flops

    def _fixed_flops(self, num_tokens: int) -> float:
        """Of the patch embedding, by Alg. 2 for the class token too, and of the classifier."""
        kernel = self.model.patch_embed.proj.weight
        head = getattr(self.model.head, "weight", kernel.new_empty(0))
        return float(num_tokens * kernel.numel() + head.numel())

    def _attention_flops(self, block: Any, tokens: Tensor) -> Tensor:
        channels = block.attn.qkv.in_features
        return tokens * 4 * channels**2 + tokens**2 * 2 * channels

    def _mlp_flops(self, block: Any, tokens: Tensor) -> Tensor:
        return tokens * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())

    def _head(self, x: Tensor, size: Tensor, mask: Tensor) -> Tensor:
        model = self.model
        if model.global_pool != "avg":
            return model.forward_head(x)
        prefix = model.num_prefix_tokens
        weight = size[:, prefix:] * mask[:, prefix:, None]
        pooled = (x[:, prefix:] * weight).sum(dim=1) / weight.detach().sum(dim=1)
        return model.head(model.head_drop(model.fc_norm(pooled)))

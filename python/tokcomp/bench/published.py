"""What the published inference code of DiffRate, ToMe and EViT computes, in plain eager PyTorch.

The baseline of every speed figure: attention materialised with its size bias, class attention averaged over heads, all
tokens and sizes gathered in descending order in every block (also where nothing drops), similarity as one product,
``scatter_reduce``. Half precision comes from autocast, as published; the sizes are float32 and promote what they touch.
Logits agree with the compressed model's (``tests/bench/test_published.py``); only how they are computed differs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters import find_adapter
from tokcomp.bench.static_slice import StaticSlice
from tokcomp.methods import Assignment, DiffRate, EViT, Method, ToMe


def materialised_attention(attn: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """timm's Attention with the map held: out [B, N, C], the map [B, H, N, N], keys [B, H, N, D]. size: [B, N, 1]."""
    batch, num_tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    scores = (q @ k.transpose(-2, -1)) * attn.scale
    if size is not None:
        scores = scores + size.log()[:, None, None, :, 0]
    probabilities = scores.softmax(dim=-1)
    out = (probabilities @ v).transpose(1, 2).reshape(batch, num_tokens, attn.num_heads * attn.head_dim)
    return attn.proj(out), probabilities, k


def class_attention_order(probabilities: Tensor, num_prefix_tokens: int) -> Tensor:
    """[B, H, N, N] -> [B, N]: the prefix, then the other tokens by the class token's attention, descending."""
    importance = probabilities[:, :, 0, num_prefix_tokens:].mean(dim=1)
    order = importance.argsort(dim=1, descending=True) + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=order.device).expand(order.shape[0], -1)
    return torch.cat([prefix, order], dim=1)


def gather_tokens(x: Tensor, order: Tensor) -> Tensor:
    """x [B, N, C], order [B, M] -> [B, M, C]."""
    return x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def merge_by_similarity(x: Tensor, size: Tensor, num_kept: int, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Mean of each of the first ``num_kept`` tokens and the later ones that are most similar to it. size: [B, N, 1]."""
    unit = (x / x.norm(dim=-1, keepdim=True)).detach()
    similarity = unit[:, num_kept:] @ unit[:, :num_kept].transpose(-1, -2)
    similarity[..., :num_prefix_tokens] = float("-inf")
    best, slot = similarity.max(dim=-1, keepdim=True)  # [B, S, 1]
    index = slot.expand(-1, -1, x.shape[-1])
    merged = x[:, :num_kept].scatter_reduce(1, index, x[:, num_kept:], reduce="mean")
    return merged, size[:, :num_kept].scatter_reduce(1, slot, size[:, num_kept:] * best, reduce="sum")


def bipartite_merge(x: Tensor, metric: Tensor, r: int, size: Tensor, num_prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """ToMe's matching of even with odd positions, then a size-weighted mean. size: [B, N, 1]."""
    unit = (metric / metric.norm(dim=-1, keepdim=True)).detach()
    even, odd = unit[:, ::2], unit[:, 1::2]
    scores = even @ odd.transpose(-1, -2)
    protected_even, protected_odd = (num_prefix_tokens + 1) // 2, num_prefix_tokens // 2
    scores[:, :protected_even] = float("-inf")
    scores[:, :, :protected_odd] = float("-inf")
    best, best_odd = scores.max(dim=-1)
    edges = best.argsort(dim=-1, descending=True)
    leaving, staying = edges[:, :r], edges[:, r:].sort(dim=1).values
    slot = best_odd.gather(1, leaving).unsqueeze(-1)

    def merge(tokens: Tensor) -> Tensor:
        from_even, into = tokens[:, ::2], tokens[:, 1::2]
        moved = gather_tokens(from_even, leaving)
        into = into.scatter_reduce(1, slot.expand(-1, -1, tokens.shape[-1]), moved, reduce="sum")
        kept = gather_tokens(from_even, staying)
        # Protected odd tokens (a distillation token) go back to the front.
        front = torch.cat([kept[:, :protected_even], into[:, :protected_odd]], dim=1)
        return torch.cat([front, kept[:, protected_even:], into[:, protected_odd:]], dim=1)

    total = merge(size)
    return merge(x * size) / total, total


def keep_attended(x: Tensor, probabilities: Tensor, num_kept: int, fuse: bool, num_prefix_tokens: int) -> Tensor:
    """EViT: the ``num_kept`` most attended tokens (prefix included) and, last, the weighted sum of the others."""
    importance = probabilities[:, :, 0].mean(dim=1)  # [B, N]
    order = class_attention_order(probabilities, num_prefix_tokens)
    kept = gather_tokens(x, order[:, :num_kept])
    if not fuse:
        return kept
    dropped = order[:, num_kept:]
    weight = importance.gather(1, dropped).unsqueeze(-1)
    return torch.cat([kept, (gather_tokens(x, dropped) * weight).sum(dim=1, keepdim=True)], dim=1)


class PublishedPipeline(nn.Module):
    """A timm VisionTransformer's parameters run as the method's own code runs them; logits only, no dropout.

    Args:
        model: a plain timm VisionTransformer, whose modules are used as they are.
        method: a DiffRate (class attention; prune and merge in the published order, or one of them), ToMe or EViT; or a
            StaticSlice, which nobody published, to check ours against.

    Raises:
        ValueError: a DiffRate metric or pipeline that was not published as an inference model.
        TypeError: another method, or a model that is not understood.
    """

    def __init__(self, model: nn.Module, method: Method) -> None:
        super().__init__()
        if not isinstance(method, (DiffRate, ToMe, EViT, StaticSlice)):
            raise TypeError(f"method must be a DiffRate, ToMe or EViT, got {type(method).__name__}")
        if isinstance(method, DiffRate):
            if method.metric != "cls_attn":
                raise ValueError(f"metric must be 'cls_attn', the published one, got {method.metric!r}")
            if method.pipeline == "merge_prune":
                raise ValueError("pipeline must be prune_merge, prune or merge, got 'merge_prune'")
            if not method.similarity_weighted_size:
                raise ValueError("similarity_weighted_size must be True, the published rule for ViTs, got False")
        method.validate(find_adapter(model).geometry(model))
        self.model: Any = model
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        model = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        size: Tensor | None = None
        if isinstance(self.method, DiffRate):
            size = torch.ones_like(x[..., :1], dtype=torch.promote_types(x.dtype, torch.float32))
        for index, block in enumerate(model.blocks):
            x, size = self._block(block, index, x, size)
        return self._head(model.norm(x), size)

    def _block(self, block: Any, index: int, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = size if self.method.proportional_attention else None
        out, probabilities, keys = materialised_attention(block.attn, block.norm1(x), bias)
        x = x + block.ls1(out)
        prefix = self.model.num_prefix_tokens
        assignment = self.method.assign(index, x.shape[1], prefix)
        method = self.method
        if isinstance(method, DiffRate) and size is not None:
            x, size = self._diffrate(x, size, probabilities, assignment)
        elif isinstance(method, ToMe) and assignment is not None:
            size = torch.ones_like(x[..., :1]) if size is None else size
            x, size = bipartite_merge(x, keys.mean(1), x.shape[1] - assignment.num_tokens_out, size, prefix)
        elif isinstance(method, EViT) and assignment is not None:
            x = keep_attended(x, probabilities, assignment.num_prune_kept, method.fuse, prefix)
        elif assignment is not None:
            x = x[:, : assignment.num_tokens_out]
        return x + block.ls2(block.mlp(block.norm2(x))), size

    def _diffrate(
        self, x: Tensor, size: Tensor, probabilities: Tensor, assignment: Assignment | None
    ) -> tuple[Tensor, Tensor]:
        prefix = self.model.num_prefix_tokens
        order = class_attention_order(probabilities, prefix)
        x, size = gather_tokens(x, order), gather_tokens(size, order)
        if assignment is None:
            return x, size
        x, size = x[:, : assignment.num_prune_kept], size[:, : assignment.num_prune_kept]
        if assignment.num_merge_kept < x.shape[1]:
            x, size = merge_by_similarity(x, size, assignment.num_merge_kept, prefix)
        return x, size

    def _head(self, x: Tensor, size: Tensor | None) -> Tensor:
        model = self.model
        if size is None or model.global_pool != "avg":
            return model.forward_head(x)
        prefix = model.num_prefix_tokens
        x, size = x[:, prefix:], size[:, prefix:]
        pooled = (x * size).sum(dim=1) / size.sum(dim=1)
        return model.head(model.head_drop(model.fc_norm(pooled)))

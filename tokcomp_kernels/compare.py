"""Whether an operator's output is right.

The oracle is the reference in float64 on the very values a kernel was given. Two tiers:

- Discrete outputs (orders, source maps) are right when they are a right choice: an order must sort the scores that came
  with it, a match must be as similar as the best one within the rounding of a cosine. Samples marked exact must match
  outright.
- Numbers, given those choices, must lie within ``2 * (reference_error + rounding_band)`` of float64: what plain PyTorch
  loses when it accumulates in the kernel's precision, and what one rounding of the inputs and the result does.
  ``_rounding.py`` says where that budget comes from.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels import reference
from tokcomp_kernels._partition_compare import compare_bipartite_merge, compare_select_diverse
from tokcomp_kernels._rounding import assert_within_rounding, cosine_slack
from tokcomp_kernels.reference._common import cosine, descending_order, effective_size, head_mean
from tokcomp_kernels.reference.add_layer_norm import layer_norm
from tokcomp_kernels.reference.masked_attention import biased_scores
from tokcomp_kernels.reference.masked_merge import live_order
from tokcomp_kernels.reference.masked_softmax import masked_probabilities
from tokcomp_kernels.testing import Sample


def assert_right(sample: Sample, outputs: Any) -> None:
    """Fail unless ``outputs`` is a right answer of ``sample.op`` for ``sample``."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    _COMPARE.get(sample.op, _compare_numbers)(sample, *outputs)


def _compare_numbers(sample: Sample, *outputs: Tensor) -> None:
    function = reference.REFERENCES[sample.op]

    def exact(call: Sample) -> tuple[Tensor, ...]:
        result = function(*call.args, **call.kwargs)
        return result if isinstance(result, tuple) else (result,)

    assert_within_rounding(sample, exact, outputs)


def _compare_class_attention_sort(sample: Sample, cls_attn: Tensor, token_order: Tensor) -> None:
    _compare_numbers(sample, cls_attn, token_order)
    prefix = sample.args[4] if len(sample.args) > 4 else sample.kwargs.get("num_prefix_tokens", 1)
    assert torch.equal(token_order, descending_order(cls_attn, prefix)), (
        f"{sample.id}: token_order does not sort cls_attn"
    )
    if sample.exact:
        want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)[1]
        assert torch.equal(token_order, want), f"{sample.id}: ties must go to the lower index"


def _compare_attention_backward(sample: Sample, *grads: Tensor) -> None:
    def two_passes(call: Sample) -> tuple[Tensor, ...]:
        return _attention_backward_in_two_passes(call)[: len(grads)]

    assert_within_rounding(sample, two_passes, grads)


def _attention_backward_in_two_passes(call: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV [B, H, N, D] and the mask's gradient [B, N] as kernels find them, without a [B, H, N, N] tensor kept.

    The row pass leaves each row's maximum and sum; the column pass recomputes the scores, which then differ by their
    rounding from those in the sum: here its products are added up from the last feature to the first.
    """
    bound = inspect.signature(reference.REFERENCES[call.op]).bind(*call.args, **call.kwargs).arguments
    grad_out, q, k, v = (bound[name] for name in ("grad_out", "q", "k", "v"))
    mask, eps, scale = bound.get("token_mask"), bound.get("eps", 1e-6), bound.get("scale")
    if mask is None:
        mask, eps = torch.ones_like(q[:, 0, :, 0]), 0.0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = biased_scores(q, k, bound.get("size"), scale)
    probabilities, _, by_row, total = masked_probabilities(scores, mask, eps)
    again = biased_scores(q.flip(-1), k.flip(-1), bound.get("size"), scale)
    row_max = scores.amax(-1, keepdim=True) if scores.numel() else total
    powers = (again - torch.where(row_max == float("-inf"), 0.0, row_max)).exp()
    own = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    by_column = powers * torch.where(own, 1.0, mask.to(q.dtype)[:, None, None, :])
    grad = grad_out @ v.mT
    grad = (grad - (grad * probabilities).sum(-1, keepdim=True)) / total
    grad_v = ((by_column + eps / max(q.shape[2], 1)) / total).mT @ grad_out
    grad_mask = torch.where(own, 0.0, powers * grad).sum((1, 2))
    return (grad * by_row) @ k * scale, (grad * by_column).mT @ q * scale, grad_v, grad_mask


def _compare_prune_merge(sample: Sample, x_out: Tensor, size_out: Tensor, source: Tensor) -> None:
    x, importance, num_prune_kept, num_merge_kept = sample.args
    prefix = sample.kwargs.get("num_prefix_tokens", 1)
    num_tokens = x.shape[1]
    alive = min(num_tokens, num_prune_kept)
    kept = min(alive, num_merge_kept)
    order = descending_order(head_mean(importance), prefix)
    slots = source.gather(1, order)
    assert torch.equal(slots[:, :kept], torch.arange(kept, device=x.device).expand(x.shape[0], -1)), "kept slots"
    assert bool((slots[:, alive:] == -1).all()), "tokens that rank after num_prune_kept must be pruned"
    merged = slots[:, kept:alive]
    if merged.numel():
        assert bool(((merged >= prefix) & (merged < kept)).all()), (
            "a destination must be a kept token that is no prefix"
        )
        rows = x.double().gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))
        similarity = cosine(rows[:, kept:alive], rows[:, prefix:kept])
        chosen = similarity.gather(2, (merged - prefix)[:, :, None]).squeeze(2)
        assert bool((chosen >= similarity.amax(2) - cosine_slack(x)).all()), (
            "a merged token must go to its most similar"
        )
    if sample.exact:
        want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)[2]
        assert torch.equal(source, want), f"{sample.id}: source differs from the reference's"

    def given_source(call: Sample) -> tuple[Tensor, ...]:
        return _prune_merge_given(call, order, source, kept, alive)

    assert_within_rounding(sample, given_source, (x_out, size_out, source))
    alone = torch.ones_like(size_out).scatter_add(1, merged, torch.ones_like(merged, dtype=size_out.dtype)) == 1
    copies = x.gather(1, order[:, :kept, None].expand(-1, -1, x.shape[2]))
    same = (x_out == copies) | (x_out.isnan() & copies.isnan())
    assert bool((same | ~alone[:, :, None]).all()), "a kept token that nothing merged into must be an exact copy"


def _compare_prune_merge_norm(
    sample: Sample, x_out: Tensor, normalized: Tensor, size_out: Tensor, source: Tensor
) -> None:
    x, branch, importance, num_prune_kept, num_merge_kept, *norm = sample.args
    kwargs = {name: value for name, value in sample.kwargs.items() if name != "norm_eps"}
    inner = Sample("prune_merge", sample.id, (x + branch, importance, num_prune_kept, num_merge_kept), kwargs)
    _compare_prune_merge(inner, x_out, size_out, source)
    if sample.exact:
        want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)[3]
        assert torch.equal(source, want), f"{sample.id}: source differs from the reference's"
    _compare_layer_norm(sample, x_out, normalized, *norm)


def _compare_add_layer_norm(sample: Sample, total: Tensor, normalized: Tensor) -> None:
    x, branch, *norm = sample.args
    assert torch.equal(total, x + branch), f"{sample.id}: a sum of two numbers has one right rounding"
    _compare_layer_norm(sample, total, normalized, *norm)


def _compare_layer_norm(sample: Sample, x: Tensor, normalized: Tensor, *norm: Tensor) -> None:
    """``normalized`` against float64 on the very rows that came with it."""

    def exact(call: Sample) -> tuple[Tensor, ...]:
        rows, weight, bias = (*call.args, None, None)[:3]
        return (layer_norm(rows, weight, bias, sample.kwargs.get("norm_eps", 1e-6)),)

    assert_within_rounding(Sample(sample.op, sample.id, (x, *norm)), exact, (normalized,))


def _compare_embed_patches(sample: Sample, x: Tensor, normalized: Tensor) -> None:
    def tokens(call: Sample) -> tuple[Tensor, ...]:
        return (reference.REFERENCES[sample.op](*call.args, **call.kwargs)[0],)

    assert_within_rounding(sample, tokens, (x,))
    _compare_layer_norm(sample, x, normalized, *sample.args[5:])


def _prune_merge_given(call: Sample, order: Tensor, source: Tensor, kept: int, alive: int) -> tuple[Tensor, ...]:
    """prune_merge in float64 with the choices taken from ``source``."""
    x = call.args[0]
    size = call.kwargs.get("size")
    size = torch.ones_like(x[..., 0]) if size is None else effective_size(size, x.dtype)
    rows = x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))
    ranked_size = size.gather(1, order)
    dst = source.gather(1, order)[:, kept:alive]
    weight = ranked_size[:, kept:alive]
    if call.kwargs.get("similarity_weighted_size", True) and dst.numel():
        similarity = cosine(rows[:, kept:alive], rows[:, :kept])
        weight = weight * similarity.gather(2, dst[:, :, None]).squeeze(2)
    total = rows[:, :kept].scatter_add(1, dst[:, :, None].expand(-1, -1, x.shape[2]), rows[:, kept:alive])
    count = torch.ones_like(ranked_size[:, :kept]).scatter_add(1, dst, torch.ones_like(weight))
    size_out = effective_size(ranked_size[:, :kept].scatter_add(1, dst, weight), x.dtype)
    return total / count[:, :, None], size_out, source


def _compare_tome_merge(sample: Sample, x_out: Tensor, size_out: Tensor, source: Tensor) -> None:
    x, metric, r = sample.args
    prefix = sample.kwargs.get("num_prefix_tokens", 1)
    num_tokens = x.shape[1]
    r = min(r, (num_tokens - prefix) // 2)
    positions = torch.arange(num_tokens, device=x.device)
    if r == 0:
        assert torch.equal(source, positions.expand(x.shape[0], -1)) and torch.equal(x_out, x), "r = 0 is the identity"
    else:
        a = positions[prefix + prefix % 2 :: 2]
        b = positions[prefix + 1 - prefix % 2 :: 2]
        first_b = num_tokens - r - len(b)
        is_merged = source[:, a] >= first_b  # [B, A]
        assert bool((is_merged.sum(1) == r).all()), "exactly r tokens must merge"
        expected = (~is_merged).cumsum(1) - 1 + prefix
        assert torch.equal(torch.where(is_merged, 0, source[:, a]), torch.where(is_merged, 0, expected)), (
            "unmerged order"
        )
        rest = torch.cat([positions[:prefix], positions[first_b : first_b + len(b)]]).expand(x.shape[0], -1)
        assert torch.equal(torch.cat([source[:, :prefix], source[:, b]], 1), rest), (
            "order of the prefix and the odd set"
        )
        similarity = cosine(metric[:, a].double(), metric[:, b].double())
        best, slack = similarity.amax(2), cosine_slack(metric)
        chosen = similarity.gather(2, (source[:, a] - first_b).clamp_min(0)[:, :, None]).squeeze(2)
        assert bool((~is_merged | (chosen >= best - slack)).all()), "a merged token must go to its most similar"
        if x.shape[0]:
            worst_in = torch.where(is_merged, best, float("inf")).amin(1)
            best_out = torch.where(is_merged, float("-inf"), best).amax(1)
            assert bool((worst_in >= best_out - 2 * slack).all()), "the r most similar pairs must merge"
        if sample.exact:
            want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)[2]
            assert torch.equal(source, want), f"{sample.id}: source differs from the reference's"

    def given_source(call: Sample) -> tuple[Tensor, ...]:
        x, size = call.args[0], call.kwargs.get("size")
        size = torch.ones_like(x[..., 0]) if size is None else effective_size(size, x.dtype)
        total = torch.zeros_like(x[:, : num_tokens - r, 0]).scatter_add(1, source, size)
        index = source[:, :, None].expand(-1, -1, x.shape[2])
        weighted = torch.zeros_like(x[:, : num_tokens - r]).scatter_add(1, index, x * size[:, :, None])
        return weighted / total[:, :, None], total, source

    assert_within_rounding(sample, given_source, (x_out, size_out, source))


def _compare_masked_merge(sample: Sample, x_out: Tensor, size_out: Tensor, rank: Tensor, destination: Tensor) -> None:
    x, importance, token_mask, counts = sample.args
    prefix = sample.kwargs.get("num_prefix_tokens", 1)
    batch, num_tokens, _ = x.shape
    own = torch.arange(num_tokens, device=x.device).expand(batch, -1)
    alive = (token_mask > 0) | (own < prefix)
    assert torch.equal(rank.argsort(1), live_order(importance, alive, prefix)), "rank"
    num_kept = counts[1]
    num_before = alive.sum(1, keepdim=True).minimum(counts[0])
    takes_part = (num_kept > prefix) & (num_kept < num_before) & (rank < num_before)
    is_source = takes_part & (rank >= num_kept)
    is_candidate = (rank >= prefix) & (rank < num_kept)
    assert torch.equal(torch.where(is_source, own, destination), own), "what does not merge is its own destination"
    assert bool(((destination >= 0) & (destination < num_tokens)).all()), "a destination is a token of the image"
    assert bool((is_candidate.gather(1, destination) | ~is_source).all()), "a destination must be a kept patch token"
    similarity = cosine(x.double(), x.double()).masked_fill(~is_candidate[:, None], float("-inf"))
    best, chosen = similarity.amax(2), similarity.gather(2, destination[:, :, None]).squeeze(2)
    assert bool(((chosen >= best - cosine_slack(x)) | ~is_source).all()), "a merged token must go to its most similar"
    if sample.exact:
        want = reference.REFERENCES[sample.op](*sample.args, **sample.kwargs)[3]
        assert torch.equal(destination, want), f"{sample.id}: destination differs from the reference's"

    def given_choices(call: Sample) -> tuple[Tensor, ...]:
        return *_masked_merge_given(call, is_source, takes_part, destination), rank, destination

    assert_within_rounding(sample, given_choices, (x_out, size_out, rank, destination))
    joined = torch.zeros(batch, num_tokens, device=x.device).scatter_add(1, destination, is_source.float()) > 0
    same = (x_out == x) | (x_out.isnan() & x.isnan())
    assert bool((same | joined[:, :, None]).all()), "a token that nothing merged into must be an exact copy"


def _masked_merge_given(
    call: Sample, is_source: Tensor, takes_part: Tensor, destination: Tensor
) -> tuple[Tensor, Tensor]:
    """x and size of masked_merge in float64 with its choices given."""
    x, size = call.args[0], call.kwargs.get("size")
    size = torch.ones_like(x[..., 0]) if size is None else effective_size(size, x.dtype)
    index = destination[:, :, None].expand(-1, -1, x.shape[2])
    weight = size
    if call.kwargs.get("similarity_weighted_size", True):
        weight = weight * cosine(x, x).gather(2, destination[:, :, None]).squeeze(2)
    if call.kwargs.get("min_weighted_size") is not None:
        whole = torch.where(is_source, weight, size).clamp_min(call.kwargs["min_weighted_size"])
        size = weight = torch.where(takes_part, whole, size)
    size_out = effective_size(size.scatter_add(1, destination, torch.where(is_source, weight, 0.0)), x.dtype)
    count = torch.ones_like(size).scatter_add(1, destination, is_source.to(x.dtype))
    total = x.scatter_add(1, index, torch.where(is_source[:, :, None], x, 0.0))
    return total / count[:, :, None], size_out


_COMPARE: dict[str, Callable[..., None]] = {
    "_attention_backward": _compare_attention_backward,
    "_masked_attention_backward": _compare_attention_backward,
    "class_attention_sort": _compare_class_attention_sort,
    "prune_merge": _compare_prune_merge,
    "tome_merge": _compare_tome_merge,
    "masked_merge": _compare_masked_merge,
    "prune_merge_norm": _compare_prune_merge_norm,
    "add_layer_norm": _compare_add_layer_norm,
    "_embed_patches": _compare_embed_patches,
    "bipartite_merge": compare_bipartite_merge,
    "select_diverse": compare_select_diverse,
}

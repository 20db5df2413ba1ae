"""Sample inputs for every operator: one list for correctness, gradients, opcheck and benchmarks' gates.

``samples(op, dtype, device)`` yields named arguments; ``tokcomp_kernels.compare`` says whether an output is right.
Sizes are odd on purpose (1, 2, 33, 197, 257, 577 tokens), inputs random with a seed of their own, layouts mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._layer_samples import add_layer_norm, embed_patches, linear_gelu
from tokcomp_kernels._partition_samples import bipartite_merge, select_diverse
from tokcomp_kernels._sample_maker import Case, Maker
from tokcomp_kernels._schema import OPERATORS

TOKEN_COUNTS = (1, 2, 33, 197, 257, 577)


@dataclass(frozen=True)
class Sample:
    """One call. ``exact``: discrete choices must equal the reference's (no value is near a tie, or all are)."""

    op: str
    id: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    exact: bool = False

    def map(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same call on changed floating tensors."""

        def apply(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        args = tuple(apply(value) for value in self.args)
        kwargs = {name: apply(value) for name, value in self.kwargs.items()}
        return Sample(self.op, self.id, args, kwargs, self.exact)


def samples(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", *, small: bool = False
) -> Iterator[Sample]:
    """Calls of ``op``; ``small`` leaves out those too large for numerical gradients."""
    for name, args, kwargs, exact in _CASES[op](lambda seed: Maker(f"{op}-{seed}", dtype, device), small):
        yield Sample(op, name, args, kwargs, exact)


def _token_counts(small: bool) -> list[tuple[int, int]]:
    """Tokens, and images of so many: one where they are many."""
    return [(count, 1 if count > 200 else 2) for count in ((1, 2, 9) if small else TOKEN_COUNTS)]


def _class_attention_sort(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        q, k, _ = m.packed_qkv(images, 3, num_tokens, 16)
        yield f"N{num_tokens}-packed", (q[:, :, 0], k), {}, False
        size = m.per_token(images, num_tokens, 0.5, 9.0)
        yield f"N{num_tokens}-size-scale-prefix2", (q[:, :, 0], k, size, 0.3, min(2, num_tokens)), {}, False
    m = make("ties")
    q, k, _ = m.packed_qkv(2, 2, 41, 8)
    yield "ties", (q[:, :, 0] * 0, k), {}, True
    yield "B0", (m.randn(0, 2, 8), m.randn(0, 2, 41, 8)), {}, False
    q, k, _ = m.packed_qkv(2, 1, 35, 80)
    yield "prefix0-D80", (q[:, :, 0], k, None, None, 0), {}, False


def _prune_merge(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    channels = 5 if small else 48
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        x, importance = m.randn(images, num_tokens, channels), m.per_token(images, num_tokens)
        alive, kept = max(1, num_tokens - num_tokens // 6), max(min(num_tokens, 2), num_tokens - num_tokens // 4)
        size = m.per_token(images, num_tokens, 0.5, 9.0)
        yield f"N{num_tokens}", (x, importance, alive, kept), {}, False
        strided = m.strided(images, num_tokens, channels)
        yield f"N{num_tokens}-size-strided", (strided, importance, alive, kept), {"size": size}, False
        yield f"N{num_tokens}-keep-all", (x, importance, num_tokens + 4, num_tokens), {"size": size}, False
    m = make("prefix")
    x, importance, size = m.randn(3, 39, channels), m.per_token(3, 39), m.per_token(3, 39, 0.5, 4.0)
    yield "prefix0", (x, importance, 30, 11), {"num_prefix_tokens": 0}, False
    yield (
        "prefix5-plain-size",
        (x, importance, 30, 11),
        {"num_prefix_tokens": 5, "similarity_weighted_size": False, "size": size},
        False,
    )
    yield "one-destination", (x, importance, 39, 2), {"size": size}, False
    yield "prune-only", (x, importance, 17, 39), {"size": size}, False
    yield "prune-all", (x, importance, 1, 39), {"size": size}, False
    yield "transposed", (m.randn(3, channels, 39).mT, importance, 30, 11), {}, False
    yield "importance-dtype", (x, importance.to(x.dtype), 30, 11), {}, False
    by_heads = m.integers(0, 64, 3, 4, 39).to(m.accumulate) / 64  # sums of four are exact in any order
    yield "heads", (x, by_heads, 30, 11), {"size": size}, False
    yield "heads-strided", (x, by_heads.mT.contiguous().mT[:, :2].to(x.dtype), 30, 11), {}, False
    yield "B0", (x[:0], importance[:0], 30, 11), {"size": size[:0]}, False
    tied = m.integers(0, 3, 3, 39).to(m.accumulate)
    yield "ties", (m.signs(3, 39, 6), tied, 33, 9), {"size": m.integers(1, 4, 3, 39).to(m.accumulate)}, True
    special = importance.clone()
    special[:, 3:9] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, float("nan")])
    yield "special-importance", (m.signs(3, 39, 6), special, 38, 36), {}, True
    zeros = m.randn(3, 39, channels)
    zeros[:, ::2] = 0
    yield "zero-vectors", (zeros, importance, 30, 11), {"size": size}, False
    poor = size.clone()
    poor[:, ::3] = torch.tensor(float("nan"))
    poor[:, 1::3] = -1.0
    yield "bad-sizes", (m.signs(3, 39, 6), importance, 30, 11), {"size": poor}, True


def _prune_merge_norm(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    """prune_merge's calls with a branch, whose sum with x is exact where ties have to stay ties, and a LayerNorm."""
    for index, (name, (x, *rest), kwargs, exact) in enumerate(_prune_merge(make, small)):
        m = make(f"{name}-branch")
        branch = x * 0.0 if exact else m.strided(*x.shape) if index % 2 else m.randn(*x.shape)
        weight, bias = m.randn(x.shape[2]), m.randn(x.shape[2])
        norm = ((weight, bias), (weight,), ())[index % 3]
        yield name, (x, branch, *rest, *norm), {**kwargs, **({"norm_eps": 1e-5} if index % 2 else {})}, exact


def _tome_merge(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    channels, width = (5, 3) if small else (48, 16)
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        x, metric = m.randn(images, num_tokens, channels), m.randn(images, num_tokens, width)
        size = m.per_token(images, num_tokens, 0.5, 9.0)
        yield f"N{num_tokens}-r13", (x, metric, 13), {}, False
        strided = m.strided(images, num_tokens, width)
        yield f"N{num_tokens}-r3-size-strided", (x, strided, 3), {"size": size}, False
    m = make("prefix")
    x, metric, size = m.strided(3, 40, channels), m.randn(3, 40, width), m.per_token(3, 40, 0.5, 4.0)
    for prefix in (0, 2, 5):
        yield f"prefix{prefix}", (x, metric, 11), {"num_prefix_tokens": prefix, "size": size}, False
    yield "r0", (x, metric, 0), {"size": size}, False
    yield "most", (x, metric, 99), {"size": size}, False
    yield "B0", (x[:0], metric[:0], 4), {"size": size[:0]}, False
    yield "ties", (x, m.signs(3, 40, 6), 7), {"size": size}, True
    zeros = m.randn(3, 40, width)
    zeros[:, 3:20] = 0
    yield "zero-vectors", (x, zeros, 9), {}, False


def _masked_softmax(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    for num_tokens in (1, 2, 7) if small else (1, 2, 33, 197, 257):
        m = make(f"N{num_tokens}")
        scores, mask = m.randn(2, 2, num_tokens, num_tokens), _binary(m, 2, num_tokens)
        yield f"N{num_tokens}-binary", (scores, mask), {}, False
        yield f"N{num_tokens}-soft-transposed", (scores.mT * 3, m.per_token(2, num_tokens)), {"eps": 1e-3}, False
    m = make("special")
    scores = m.randn(2, 3, 6, 6)
    yield "all-masked", (scores, torch.zeros_like(m.per_token(2, 6))), {}, False
    yield "large", (scores * 40, _binary(m, 2, 6)), {}, False
    yield "B0", (scores[:0], _binary(m, 2, 6)[:0]), {}, False


def _binary(m: Maker, batch: int, num_tokens: int) -> Tensor:
    mask = m.integers(0, 2, batch, num_tokens)
    mask[:, 0] = 1
    return mask.to(m.accumulate)


def _attention(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    yield from _attention_cases(make, small, lambda m, batch, num_tokens: ())


def _attention_heads(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    """Some of attention's: it is the same kernel."""
    yield from (case for case in _attention(make, small) if case[0].startswith(("N33", "N7", "last-dim", "B0")))


def _masked_attention(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    yield from _attention_cases(make, small, lambda m, batch, num_tokens: (_binary(m, batch, num_tokens),))


def _attention_cases(
    make: Callable[[str], Maker], small: bool, extra: Callable[..., tuple[Tensor, ...]]
) -> Iterator[Case]:
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        width = 4 if small else 16
        qkv: tuple[Tensor, ...] = m.packed_qkv(images, 2, num_tokens, width)
        if images > 1:
            yield f"N{num_tokens}-packed", (*qkv, *extra(m, images, num_tokens)), {}, False
        size = m.per_token(images, num_tokens, 0.5, 9.0)
        yield f"N{num_tokens}-size", (*qkv, *extra(m, images, num_tokens)), {"size": size, "scale": 0.4}, False
    m = make("widths")
    for width in (1, 3) if small else (1, 24, 64, 80):
        qkv = tuple(m.strided(1, 3, 10, width) for _ in range(3))
        yield f"D{width}-strided", (*qkv, *extra(m, 1, 10)), {}, False
    qkv = tuple(m.randn(2, 4, 11, 2).mT.contiguous().mT for _ in range(3))  # the last dimension is not the fast one
    yield "last-dim-strided", (*qkv, *extra(m, 2, 11)), {}, False
    yield "B0", (*(t[:0] for t in qkv), *(t[:0] for t in extra(m, 2, 11))), {}, False
    qkv = tuple(m.randn(1, 2, 12, 4) * factor for factor in (6, 6, 1))
    yield "peaked", (*qkv, *extra(m, 1, 12)), {"size": m.per_token(1, 12, 1e-9, 5.0)}, False


def _attention_received(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    for name, (q, k, _), kwargs, exact in _attention_cases(make, small, lambda m, batch, num_tokens: ()):
        yield name, (q, k), kwargs, exact
    m = make("others")
    q, k, _ = m.packed_qkv(2, 3, 41, 8)
    yield "ties", (q, k[:, :, :1].expand_as(k)), {"num_prefix_tokens": 5}, False
    sizes = m.per_token(2, 41, 0.5, 4.0)
    sizes[:, ::3], sizes[:, 1::3] = float("nan"), -1.0
    yield "bad-sizes", (q, k), {"size": sizes}, False
    yield "scale0", (q, k), {"scale": 0.0}, False


def _unmerge(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    channels = 3 if small else 40
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        kept = max(1, num_tokens // 2)
        x, source = m.randn(images, kept, channels), m.source(images, num_tokens, kept)
        yield f"N{num_tokens}", (x, source), {}, True
        yield f"N{num_tokens}-fill", (x, source), {"pruned_fill": m.strided(images, num_tokens, channels)}, True
    m = make("other")
    x, source = m.strided(2, 6, channels), m.source(2, 14, 6)
    yield "strided", (x, source), {}, True
    yield "B0", (x[:0], source[:0]), {}, True
    yield "M0", (x[:, :0], torch.full_like(source, -1)), {}, True


def _masked_merge(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    channels = 5 if small else 48

    def mask(m: Maker, batch: int, num_tokens: int) -> Tensor:
        return (m.per_token(batch, num_tokens) < 0.8).to(m.accumulate)

    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        x, importance, alive = (
            m.randn(images, num_tokens, channels),
            m.per_token(images, num_tokens),
            mask(m, images, num_tokens),
        )
        counts = m.counts(max(1, num_tokens * 3 // 4), max(min(num_tokens, 2), num_tokens * 5 // 8))
        size = m.per_token(images, num_tokens, 0.5, 9.0)
        yield f"N{num_tokens}", (x, importance, alive, counts), {}, False
        strided = m.strided(images, num_tokens, channels)
        clamped = {"size": size, "min_weighted_size": 1.0}
        yield f"N{num_tokens}-size-strided", (strided, importance, alive, counts), clamped, False
        yield f"N{num_tokens}-few-kept", (x, importance, alive, m.counts(num_tokens, 2)), {"size": size}, False
    m = make("prefix")
    x, importance, size, alive = (
        m.randn(3, 39, channels),
        m.per_token(3, 39),
        m.per_token(3, 39, 0.5, 4.0),
        mask(m, 3, 39),
    )
    counts = m.counts(28, 11)
    yield "prefix0", (x, importance, alive, counts), {"num_prefix_tokens": 0}, False
    plain = {"num_prefix_tokens": 5, "similarity_weighted_size": False, "size": size}
    yield "prefix5-plain-size", (x, importance, alive, counts), plain, False
    for name, values in {
        "prefix-kept-alone": (39, 1),
        "counts-negative": (-3, -7),
        "counts-huge": (2**62, 12),
        "counts-crossed": (9, 20),
        "counts-all-kept": (39, 2**62),
    }.items():
        yield name, (x, importance, alive, m.counts(*values)), {"size": size}, False
    yield "all-dead", (x, importance, torch.zeros_like(alive), counts), {}, False
    mixed = m.per_token(3, 39, -1.0, 1.0)
    mixed[:, ::5] = float("nan")
    yield "mixed-mask", (x, importance, mixed, m.counts(14, 6)), {"size": size}, False
    yield "transposed", (m.randn(3, channels, 39).mT, importance, alive, counts), {}, False
    yield "importance-dtype", (x, importance.to(x.dtype), alive.to(x.dtype), counts), {}, False
    yield "B0", (x[:0], importance[:0], alive[:0], counts), {"size": size[:0]}, False
    tied = m.integers(0, 3, 3, 39).to(m.accumulate)
    whole = m.integers(1, 4, 3, 39).to(m.accumulate)
    yield "ties", (m.signs(3, 39, 6), tied, alive, counts), {"size": whole, "min_weighted_size": 0.25}, True
    special = importance.clone()
    special[:, 3:9] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, float("nan")])
    yield "special-importance", (m.signs(3, 39, 6), special, alive, m.counts(36, 24)), {}, True
    zeros = m.randn(3, 39, channels)
    zeros[:, ::2] = 0
    yield "zero-vectors", (zeros, importance, alive, counts), {"size": size, "min_weighted_size": -0.5}, False
    poor = size.clone()
    poor[:, ::3] = torch.tensor(float("nan"))
    poor[:, 1::3] = -1.0
    yield "bad-sizes", (m.signs(3, 39, 6), importance, alive, counts), {"size": poor}, True


def _masked_merge_backward(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        # Sources go to a token of the first half; a destination out of range counts as the token itself.
        own = torch.arange(num_tokens).expand(images, -1)
        split = max(1, num_tokens // 2)
        merged = (m.per_token(images, num_tokens).cpu() < 0.4) & (own >= split)
        destination = torch.where(merged, m.integers(0, split, images, num_tokens).cpu(), own)
        destination[:, -1] = num_tokens + 4 if num_tokens % 2 else -1
        yield f"N{num_tokens}", (m.strided(images, num_tokens, 12), destination.to(m.device)), {}, False
    m = make("other")
    grad = m.randn(3, 12, 33).mT
    yield "transposed", (grad, m.integers(0, 33, 3, 33)), {}, False
    yield "prefix-any", (grad, m.integers(-4, 37, 3, 33)), {}, False
    yield "B0", (grad[:0], m.integers(0, 33, 0, 33)), {}, False


def _merge_backward(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        kept = max(1, num_tokens // 2)
        grad, source = m.strided(images, kept, 12), m.source(images, num_tokens, kept)
        yield f"N{num_tokens}", (grad, source), {}, False
        yield f"N{num_tokens}-size", (grad, source, m.per_token(images, num_tokens, 0.5, 9.0)), {}, False
    yield "B0", (grad[:0], source[:0]), {}, False


def _unmerge_backward(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
    for num_tokens, images in _token_counts(small):
        m = make(f"N{num_tokens}")
        kept = max(1, num_tokens // 2)
        yield f"N{num_tokens}", (m.strided(images, num_tokens, 12), m.source(images, num_tokens, kept), kept), {}, False
    yield "B0", (m.randn(0, 5, 12), m.source(0, 5, 2), 2), {}, False


def _with_grad(forward: Callable[..., Iterator[Case]], like: int) -> Callable[..., Iterator[Case]]:
    """Samples of a backward pass: the forward's, with a random gradient in front shaped as argument ``like``."""

    def cases(make: Callable[[str], Maker], small: bool) -> Iterator[Case]:
        for name, args, kwargs, exact in forward(make, small):
            yield name, (make(name).randn(*args[like].shape), *args), kwargs, exact

    return cases


_CASES: dict[str, Callable[..., Iterator[Case]]] = {
    "class_attention_sort": _class_attention_sort,
    "prune_merge": _prune_merge,
    "masked_softmax": _masked_softmax,
    "masked_attention": _masked_attention,
    "attention": _attention,
    "attention_received": _attention_received,
    "tome_merge": _tome_merge,
    "bipartite_merge": lambda make, small: bipartite_merge(make, _token_counts(small)),
    "select_diverse": lambda make, small: select_diverse(make, _token_counts(small)),
    "unmerge": _unmerge,
    "masked_merge": _masked_merge,
    "prune_merge_norm": _prune_merge_norm,
    "add_layer_norm": lambda make, small: add_layer_norm(make, _token_counts(small), 5 if small else 48),
    "linear_gelu": linear_gelu,
    "_merge_backward": _merge_backward,
    "_unmerge_backward": _unmerge_backward,
    "_masked_softmax_backward": _with_grad(_masked_softmax, 0),
    "_masked_attention_backward": _with_grad(_masked_attention, 0),
    "_attention_heads": _attention_heads,
    "_embed_patches": embed_patches,
    "_attention_backward": _with_grad(_attention, 0),
    "_masked_merge_backward": _masked_merge_backward,
}

_missing = {operator.name for operator in OPERATORS} - _CASES.keys()
if _missing:
    raise RuntimeError(f"operators without samples: {sorted(_missing)}")

"""The Triton merge kernels against a brute force in float64: whom each token joins, group means, sizes.

Ranks are exact. A match is right where its cosine is within the rounding bound of the best one, and exact where every
cosine is exact; means and sizes are then checked for the groups that the kernel formed.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton.prune_merge as prune_merge_module
import tokcomp_kernels.triton.tome_merge as tome_merge_module
from tests.triton.inputs import DEVICE, DTYPES, SMALLEST, UNIT, normal, sizes_of, uniform, wide
from tokcomp_kernels._numbers import MIN_SIZE
from tokcomp_kernels.triton.prune_merge import prune_merge_triton
from tokcomp_kernels.triton.tome_merge import tome_merge_triton


def brute_order(importance, prefix):
    """Indices of one image's tokens in the order of the contract."""
    others = range(prefix, len(importance))
    key = [(np.isnan(value), -value if not np.isnan(value) else 0.0) for value in importance]
    return list(range(prefix)) + sorted(others, key=lambda i: (*key[i], i))


def brute_cosine(a, b):
    with np.errstate(all="ignore"):
        norms = [np.sqrt((rows**2).sum(-1)) for rows in (a, b)]
        inverse = [np.where(norm > 0, 1 / norm, 0.0) for norm in norms]
        cosine = (a @ b.T) * inverse[0][:, None] * inverse[1][None, :]
    return np.where(np.isnan(cosine), 0.0, cosine)


def cosine_bound(width):
    """Float32 dot product and two norms of ``width`` products, relative to the norms, and two more products."""
    return (3 * width + 8) * UNIT[torch.float32]


def assert_mean(got, rows, weights, dtype, what):
    """A weighted mean in float32, stored in ``dtype``: n + 2 roundings of terms, then one division and the store."""
    exact = (rows * weights[:, None]).sum(0) / weights.sum()
    spread = (np.abs(rows) * weights[:, None]).sum(0) / weights.sum()
    bound = (2 * len(rows) + 4) * UNIT[torch.float32] * spread + UNIT[dtype] * np.abs(exact) * 1.01 + SMALLEST[dtype]
    assert (np.abs(got - exact) <= bound).all(), what


def check_groups(x, size, x_out, size_out, source, first_of_slot, weighted_mean, similarity=None):
    """Rows and sizes of every slot, given the groups. ``similarity[b][n]`` scales the size that token n adds."""
    dtype = x.dtype
    sizes = sizes_of(size, x.shape[:2])
    x, x_out, size_out, source = wide(x), wide(x_out), wide(size_out), source.cpu().numpy()
    for b in range(x.shape[0]):
        for slot in range(x_out.shape[1]):
            members = np.flatnonzero(source[b] == slot)
            assert first_of_slot[b][slot] in members
            if len(members) == 1:
                assert np.array_equal(x_out[b, slot], x[b, members[0]], equal_nan=True)
            else:
                weights = sizes[b, members] if weighted_mean else np.ones(len(members))
                assert_mean(x_out[b, slot], x[b, members], weights, dtype, f"row of image {b}, slot {slot}")
            scale = np.array(
                [1.0 if similarity is None or n == first_of_slot[b][slot] else similarity[b][n] for n in members]
            )
            exact = max((sizes[b, members] * scale).sum(), MIN_SIZE)
            slack = (len(members) + 4) * UNIT[torch.float32] + (0 if similarity is None else cosine_bound(x.shape[2]))
            assert abs(size_out[b, slot] - exact) <= slack * sizes[b, members].sum(), f"size of image {b}, slot {slot}"


def check_prune_merge(x, importance, num_prune_kept, num_merge_kept, exact_cosine=False, **options):
    x_out, size_out, source = prune_merge_triton(x, importance, num_prune_kept, num_merge_kept, **options)
    again = prune_merge_triton(x, importance, num_prune_kept, num_merge_kept, **options)
    assert all(torch.equal(a, b) for a, b in zip((size_out, source), again[1:], strict=True))
    assert torch.equal(x_out.nan_to_num(), again[0].nan_to_num())
    batch, num_tokens, channels = x.shape
    prefix = options.get("num_prefix_tokens", 1)
    alive = min(num_tokens, num_prune_kept)
    kept = min(alive, num_merge_kept)
    assert x_out.shape == (batch, kept, channels) and x_out.dtype == x.dtype and x_out.is_contiguous()
    assert size_out.shape == (batch, kept) and size_out.dtype == torch.float32
    assert source.shape == (batch, num_tokens) and source.dtype == torch.int64
    orders, similarity = [], []
    for b in range(batch):
        order = brute_order(wide(importance)[b], prefix)
        orders.append(order)
        where = source[b].tolist()
        assert [where[n] for n in order[:kept]] == list(range(kept))
        assert all(where[n] == -1 for n in order[alive:])
        cosine = np.zeros(num_tokens)
        if kept < alive:
            table = brute_cosine(wide(x)[b, order[kept:alive]], wide(x)[b, order[prefix:kept]])
            for row, n in zip(table, order[kept:alive], strict=True):
                assert prefix <= where[n] < kept
                cosine[n] = row[where[n] - prefix]
                slack = 0.0 if exact_cosine else 2 * cosine_bound(channels)
                assert cosine[n] >= row.max() - slack
                if exact_cosine:
                    assert where[n] - prefix == row.argmax()
        similarity.append(cosine)
    weighted = options.get("similarity_weighted_size", True)
    check_groups(
        x,
        options.get("size"),
        x_out,
        size_out,
        source,
        orders,
        weighted_mean=False,
        similarity=similarity if weighted else None,
    )
    return x_out, size_out, source


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("num_tokens", "channels", "num_prune_kept", "num_merge_kept", "prefix"),
    [
        (1, 8, 1, 1, 1),
        (2, 5, 2, 2, 0),
        (2, 5, 1, 1, 1),
        (33, 24, 30, 17, 2),
    ],
)
def test_prune_merge(num_tokens, channels, num_prune_kept, num_merge_kept, prefix, dtype):
    x = normal(num_tokens, 2, num_tokens, channels, dtype=dtype)
    importance = uniform(1, 0, 1, 2, num_tokens)
    size = uniform(2, 0.5, 4, 2, num_tokens)
    check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size=size, num_prefix_tokens=prefix)


@pytest.mark.parametrize(
    ("num_tokens", "channels", "num_prune_kept", "num_merge_kept", "prefix", "dtype"),
    [
        (197, 192, 192, 180, 1, torch.bfloat16),
        (257, 70, 200, 150, 5, torch.float32),
        (577, 16, 560, 500, 1, torch.float16),
    ],
)
def test_prune_merge_of_many_tokens(num_tokens, channels, num_prune_kept, num_merge_kept, prefix, dtype):
    importance, size = uniform(1, 0, 1, 1, num_tokens), uniform(2, 0.5, 4, 1, num_tokens)
    x = normal(0, 1, num_tokens, channels, dtype=dtype)
    check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size=size, num_prefix_tokens=prefix)


@pytest.mark.parametrize("options", [{"similarity_weighted_size": False}, {}], ids=["whole", "by-similarity"])
def test_prune_merge_without_size(options):
    check_prune_merge(normal(0, 2, 50, 48), normal(1, 2, 50), 48, 20, **options)


def test_prune_merge_above_the_counted_tokens(monkeypatch):
    """There the order comes from a sort; NaN still ranks last, and ties keep their order."""
    monkeypatch.setattr(prune_merge_module, "MAX_COUNTED", 16)
    importance = uniform(0, 0, 9, 2, 70).floor()
    importance[0, ::9] = torch.nan
    importance[0, 5::11] = -torch.inf
    check_prune_merge(normal(1, 2, 70, 8), importance, 65, 40, size=uniform(2, 0.5, 2, 2, 70))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_prune_merge_ties_and_special_importance(kind):
    importance = uniform(0, 0, 4, 2, 60).floor().to(kind)
    importance[:, 3::7] = torch.nan
    importance[:, 4::9] = -0.0
    importance[:, 5::9] = torch.inf
    importance[:, 6::11] = -torch.inf
    check_prune_merge(normal(1, 2, 60, 16), importance, 58, 40)


def test_importance_is_ranked_in_its_own_precision():
    importance = 1.0 + torch.arange(20, dtype=torch.float64, device=DEVICE).flip(0)[None] * 2.0**-50
    importance[0, 7:] = importance[0, 7:].flip(0)
    check_prune_merge(normal(0, 1, 20, 8), importance, 15, 10)


def test_prune_merge_takes_the_lowest_of_equal_slots():
    """Rows are multiples of unit axes, so every cosine is exactly 0, 1 or -1 and most of them tie."""
    axes = torch.randint(0, 5, (2, 80), generator=torch.Generator().manual_seed(3))
    signs = torch.tensor([-2.0, 0.0, 1.0, 4.0])[
        torch.randint(0, 4, (2, 80), generator=torch.Generator().manual_seed(4))
    ]
    x = (torch.eye(5)[axes] * signs[:, :, None]).to(DEVICE)
    check_prune_merge(x, normal(5, 2, 80), 78, 40, exact_cosine=True, size=uniform(6, 0.1, 3, 2, 80))


def test_prune_merge_reads_strided_views():
    packed = normal(0, 40, 3, 2, 32)
    x = packed[:, 1].transpose(0, 1)
    importance = normal(1, 40, 2).t()
    size = uniform(2, 1, 3, 40, 2, 2)[:, :, 1].t()
    check_prune_merge(x, importance, 36, 20, size=size)
    check_prune_merge(normal(3, 2, 40, 64)[:, :, ::2], importance, 36, 20, size=size)
    check_prune_merge(normal(3, 1, 40, 8).expand(3, -1, -1), normal(4, 1, 40).expand(3, -1), 36, 20)


def test_prune_merge_with_values_that_are_not_numbers():
    """NaN and infinite tokens give cosine 0: they go to the lowest slot unless another cosine is positive."""
    x = normal(0, 1, 12, 4)
    importance = torch.arange(12, 0, -1, device=DEVICE, dtype=torch.float32)[None]
    x[0, 9, 2] = torch.nan
    x[0, 10] = torch.inf
    x[0, 11] = 0.0
    x[0, 2, 0] = torch.nan
    size = torch.ones(1, 12, device=DEVICE)
    size[0, 4], size[0, 5], size[0, 6] = torch.nan, -3.0, 0.0
    _, size_out, source = prune_merge_triton(x, importance, 12, 9, size=size)
    assert source[0].tolist() == [*range(9), 1, 1, 1]
    floor = torch.tensor(MIN_SIZE)
    assert torch.equal(size_out[0].cpu(), torch.stack([torch.tensor(1.0)] * 4 + [floor] * 3 + [torch.tensor(1.0)] * 2))


def test_prune_merge_keeps_size_above_zero():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]], device=DEVICE)
    importance = torch.tensor([[0.0, 2.0, 1.0]], device=DEVICE)
    x_out, size_out, _ = prune_merge_triton(x, importance, 3, 2, size=torch.tensor([[1.0, 1.0, 5.0]], device=DEVICE))
    assert torch.equal(size_out.cpu(), torch.tensor([[1.0, MIN_SIZE]]))
    assert torch.equal(x_out.cpu(), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


def test_prune_merge_empty():
    x_out, size_out, source = prune_merge_triton(normal(0, 0, 9, 4), normal(0, 0, 9), 8, 6)
    assert (x_out.shape, size_out.shape, source.shape) == ((0, 6, 4), (0, 6), (0, 9))
    x_out, size_out, source = prune_merge_triton(normal(0, 2, 9, 4), normal(0, 2, 9), 0, 0, num_prefix_tokens=0)
    assert x_out.shape == (2, 0, 4) and size_out.shape == (2, 0) and (source == -1).all()
    x_out, size_out, source = prune_merge_triton(normal(0, 2, 9, 0), normal(0, 2, 9), 8, 6)
    assert x_out.shape == (2, 6, 0) and torch.equal(size_out.cpu().sort(dim=1).values, torch.ones(2, 6))
    assert ((source == 1).sum(dim=1) == 3).all()


def test_an_image_does_not_depend_on_its_batch():
    x, importance, size = normal(0, 5, 70, 40, dtype=torch.float16), normal(1, 5, 70), uniform(2, 0.5, 3, 5, 70)
    metric = normal(3, 5, 70, 32, dtype=torch.float16)
    together = prune_merge_triton(x, importance, 66, 40, size=size)
    alone = prune_merge_triton(x[3:4], importance[3:4], 66, 40, size=size[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(together, alone, strict=True))
    together = tome_merge_triton(x, metric, 20, size=size)
    alone = tome_merge_triton(x[3:4], metric[3:4], 20, size=size[3:4])
    assert all(torch.equal(a[3:4], b) for a, b in zip(together, alone, strict=True))


def check_tome_merge(x, metric, r, exact_cosine=False, **options):
    x_out, size_out, source = tome_merge_triton(x, metric, r, **options)
    again = tome_merge_triton(x, metric, r, **options)
    assert all(torch.equal(a, b) for a, b in zip((x_out, size_out, source), again, strict=True))
    batch, num_tokens, channels = x.shape
    prefix = options.get("num_prefix_tokens", 1)
    r = min(r, (num_tokens - prefix) // 2)
    assert x_out.shape == (batch, num_tokens - r, channels) and x_out.dtype == x.dtype and x_out.is_contiguous()
    assert size_out.shape == (batch, num_tokens - r) and size_out.dtype == torch.float32
    a = [n for n in range(prefix, num_tokens) if n % 2 == 0]
    b = [n for n in range(prefix, num_tokens) if n % 2 == 1]
    first_of_slot = []
    for image in range(batch):
        where = source[image].tolist()
        if r == 0:
            assert where == list(range(num_tokens))
            first_of_slot.append(where)
            continue
        cosine = brute_cosine(wide(metric)[image, a], wide(metric)[image, b])
        slack = 0.0 if exact_cosine else 2 * cosine_bound(metric.shape[2])
        first_b = num_tokens - r - len(b)
        merged = [i for i, n in enumerate(a) if where[n] >= first_b]
        unmerged = [n for i, n in enumerate(a) if i not in merged]
        assert len(merged) == r
        kept = [*range(prefix), *unmerged, *b]
        assert [where[n] for n in kept] == list(range(num_tokens - r))
        best = cosine.max(axis=1)
        for i in merged:
            assert cosine[i, where[a[i]] - first_b] >= best[i] - slack
        if exact_cosine:
            assert merged == sorted(np.argsort(-best, kind="stable")[:r])
            assert all(where[a[i]] - first_b == cosine[i].argmax() for i in merged)
        elif unmerged:
            assert best[merged].min() >= max(best[i] for i in range(len(a)) if i not in merged) - slack
        first_of_slot.append(kept)
    check_groups(x, options.get("size"), x_out, size_out, source, first_of_slot, weighted_mean=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("num_tokens", "r", "prefix"),
    [(1, 3, 1), (2, 1, 0), (33, 9, 2), (66, 20, 0)],
)
def test_tome_merge(num_tokens, r, prefix, dtype):
    x = normal(num_tokens, 2, num_tokens, 24, dtype=dtype)
    metric = normal(num_tokens + 1, 2, num_tokens, 64, dtype=dtype)
    size = uniform(2, 0.5, 4, 2, num_tokens)
    check_tome_merge(x, metric, r, size=size, num_prefix_tokens=prefix)


@pytest.mark.parametrize(
    ("num_tokens", "r", "prefix", "dtype"),
    [(197, 98, 1, torch.float16), (257, 40, 5, torch.float32)],
)
def test_tome_merge_of_many_tokens(num_tokens, r, prefix, dtype):
    x, metric = normal(1, 1, num_tokens, 24, dtype=dtype), normal(2, 1, num_tokens, 64, dtype=dtype)
    check_tome_merge(x, metric, r, size=uniform(2, 0.5, 4, 1, num_tokens), num_prefix_tokens=prefix)


def test_tome_merge_without_size_and_with_odd_width():
    check_tome_merge(normal(0, 2, 50, 33), normal(1, 2, 50, 70), 13)
    check_tome_merge(normal(0, 2, 50, 33, dtype=torch.bfloat16), normal(1, 2, 50, 5).double(), 0)
    check_tome_merge(normal(0, 2, 50, 33, dtype=torch.bfloat16), normal(1, 2, 50, 5).double(), 13)


def test_tome_merge_above_the_counted_edges(monkeypatch):
    monkeypatch.setattr(tome_merge_module, "MAX_COUNTED", 16)
    check_tome_merge(normal(0, 2, 150, 4), normal(1, 2, 150, 8), 40)


@pytest.mark.parametrize("prefix", [0, 1, 2, 3])
def test_tome_merge_takes_the_lowest_of_equal_edges(prefix):
    axes = torch.randint(0, 4, (2, 90), generator=torch.Generator().manual_seed(3))
    signs = torch.tensor([-2.0, 0.0, 1.0, 4.0])[
        torch.randint(0, 4, (2, 90), generator=torch.Generator().manual_seed(4))
    ]
    metric = (torch.eye(4)[axes] * signs[:, :, None]).to(DEVICE)
    check_tome_merge(normal(0, 2, 90, 8), metric, 21, exact_cosine=True, num_prefix_tokens=prefix)


def test_tome_merge_reads_strided_views_and_nan():
    x = normal(0, 40, 3, 2, 32)[:, 1].transpose(0, 1)
    metric = normal(1, 2, 3, 40, 16).mean(1).transpose(1, 2).contiguous().transpose(1, 2)
    size = uniform(2, 1, 3, 40, 2).t()
    check_tome_merge(x, metric, 11, size=size)
    metric = metric.clone()
    metric[0, 5], metric[0, 8] = torch.nan, torch.nan
    check_tome_merge(x, metric, 19, size=size)


def test_tome_merge_empty():
    x_out, size_out, source = tome_merge_triton(normal(0, 0, 9, 4), normal(0, 0, 9, 3), 2)
    assert (x_out.shape, size_out.shape, source.shape) == ((0, 7, 4), (0, 7), (0, 9))


def test_float64_is_refused_by_name():
    with pytest.raises(
        TypeError, match="prune_merge: x must be float16, bfloat16 or float32 for the Triton kernel, got float64"
    ):
        prune_merge_triton(normal(0, 1, 4, 4).double(), normal(0, 1, 4), 3, 2)

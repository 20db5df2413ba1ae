"""The Triton kernels of bipartite_merge and select_diverse where the samples of tests/ops do not reach: sorting instead
of counting, several tiles of everything, images that take turns, equal rows far apart."""

import pytest
import torch

pytest.importorskip("triton")

import tokcomp_kernels.triton.bipartite_merge as bipartite_merge_module
import tokcomp_kernels.triton.select_diverse as select_diverse_module
from tests.triton.inputs import DEVICE, normal, uniform
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.reference import REFERENCES
from tokcomp_kernels.testing import Sample, samples
from tokcomp_kernels.triton.bipartite_merge import bipartite_merge_triton
from tokcomp_kernels.triton.select_diverse import select_diverse_triton


def integers(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def merge(x, metric, role, r, exact=False, **options):
    outputs = bipartite_merge_triton(x, metric, role, r, **options)
    assert_right(Sample("bipartite_merge", "here", (x, metric, role, r), options, exact), outputs)
    return outputs


def select(features, num_kept, exact=False, **options):
    order = select_diverse_triton(features, num_kept, **options)
    assert_right(Sample("select_diverse", "here", (features, num_kept), options, exact), order)
    return order


def test_merging_by_a_sort_gives_the_same_bits(monkeypatch):
    """Ties, and too few sources or destinations, among it."""
    names = {"ties", "too-few", "no-destination", "threshold-ties", "threshold-no-destination"}
    found = [sample for sample in samples("bipartite_merge", torch.float32, DEVICE) if sample.id in names]
    counted = [bipartite_merge_triton(*sample.args, **sample.kwargs) for sample in found]
    monkeypatch.setattr(bipartite_merge_module, "MAX_COUNTED", 0)
    for sample, expected in zip(found, counted, strict=True):
        outputs = bipartite_merge_triton(*sample.args, **sample.kwargs)
        for have, want in zip(outputs, expected, strict=True):
            assert torch.equal(have, want), sample.id


def test_merge_of_several_tiles():
    """Sources, destinations and channels in several tiles, most slots joined more than once; another type of metric."""
    role = integers(0, 0, 3, 1, 105)
    role[:, :35], role[:, 35:102] = 1, 2
    x, metric, size = normal(1, 1, 105, 140).half(), normal(2, 1, 105, 40), uniform(3, 0.5, 4, 1, 105)
    *_, source = merge(x, metric.half(), role, 33, size=size)
    assert int(source[0].bincount().max()) > 2
    merge(x[:, :45], metric[:, :45].double(), role[:, :45], 9, average="mean")


def test_every_source_merges_and_rows_that_are_no_numbers_do_too():
    x, role = normal(0, 1, 24, 4), torch.tensor([0, 2, 2] + [1] * 20 + [2], device=DEVICE)[None]
    metric = torch.eye(6, device=DEVICE)[integers(1, 0, 6, 1, 24)]
    metric[0, 4, 1], metric[0, 9], metric[0, 11] = torch.nan, torch.inf, 0.0
    source = merge(x, metric, role, 20, exact=True)[2]
    assert source[0, [0, 1, 2, 23]].tolist() == [0, 1, 2, 3]
    assert source[0, [4, 9, 11]].tolist() == [1, 1, 1], "a cosine that is no number is 0, the lowest of equal ones wins"


def test_merge_takes_the_lowest_of_equal_rows_across_tiles():
    x, role = normal(0, 1, 160, 3), integers(1, 0, 3, 1, 160)
    role[:, :70], role[:, -3:] = 2, 2
    metric = torch.eye(5, device=DEVICE)[integers(2, 0, 5, 1, 160)] * integers(3, 1, 4, 1, 160)[:, :, None]
    merge(x, metric, role, 20, exact=True)


@pytest.mark.parametrize("rule", ["farthest", "dpp"])
def test_choice_among_wide_features(rule):
    """Patches and channels in several tiles; float64 relevance."""
    relevance = uniform(1, 0.2, 2, 1, 81).double() if rule == "dpp" else None
    select(normal(0, 1, 81, 150).half(), 20, rule=rule, relevance=relevance, num_prefix_tokens=2)


@pytest.mark.parametrize("rule", ["farthest", "dpp"])
def test_equal_patches_are_chosen_by_position(rule):
    """Of 80 patches 12 are different. Nothing is left of a patch that equals a chosen one."""
    features = torch.eye(12, device=DEVICE)[integers(1, 0, 12, 1, 80)] * integers(2, 1, 4, 1, 80)[:, :, None]
    order = select(features, 25, exact=True, rule=rule)
    assert features[0, order[0, 1:13]].sum(0).gt(0).all(), "one of each kind comes first"


@pytest.mark.parametrize("rule", ["farthest", "dpp"])
def test_images_that_take_turns_and_many_patches(rule, monkeypatch):
    features, options = normal(0, 5, 30, 8), {"rule": rule, "num_prefix_tokens": 0}
    together = select_diverse_triton(features, 9, **options)
    monkeypatch.setattr(select_diverse_module, "MAX_COSINES", 2 * 30**2)
    assert torch.equal(select_diverse_triton(features, 9, **options), together)
    monkeypatch.setattr(select_diverse_module, "MAX_PATCHES", 29)
    reference = REFERENCES["select_diverse"](features, 9, **options)
    assert torch.equal(select_diverse_triton(features, 9, **options), reference)


def test_choice_among_patches_that_are_no_numbers():
    features = normal(0, 1, 20, 32)
    features[0, 3], features[0, 7, 1], features[0, 9] = 0.0, torch.nan, torch.inf
    for rule in ("farthest", "dpp"):
        order = select_diverse_triton(features, 20, rule=rule)
        assert order[0].sort().values.tolist() == list(range(20))
    assert order[0, -3:].tolist() == [3, 7, 9], "what has no direction adds nothing"

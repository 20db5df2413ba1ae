"""Every backend of every operator against the reference in float64, and its promises about bits."""

from __future__ import annotations

import pytest
import torch

from tests.ops.backends import SHARED, Target, all_samples, all_targets, find, targets
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.reference._common import sorted_sums, sum_per_slot
from tokcomp_kernels.reference.select_diverse import select_diverse_reference
from tokcomp_kernels.testing import Sample, samples


@pytest.mark.parametrize(("target", "dtype", "sample_ids"), all_samples())
def test_agrees_with_float64(target: Target, dtype: torch.dtype, sample_ids: list[str]) -> None:
    for sample in find(target.op, sample_ids, dtype, target.device):
        before = [t.clone() for t in _tensors(sample)]
        outputs = target.run(sample)
        assert_right(sample, outputs)
        for have, was in zip(_tensors(sample), before, strict=True):
            assert torch.equal(have.nan_to_num(7.0), was.nan_to_num(7.0)), f"{sample.id}: an input was changed"
        inputs = {t.untyped_storage().data_ptr() for t in _tensors(sample) if t.numel()}
        own = {t.untyped_storage().data_ptr() for t in outputs if t.numel()}
        assert not inputs & own, f"{sample.id}: an output aliases an input"


@pytest.mark.parametrize("target", all_targets())
def test_layout_and_dtypes_match_the_fake(target: Target) -> None:
    """What torch.compile plans for is what a kernel allocates."""
    for sample in target.samples(torch.float16, 33):
        meta = sample.map(lambda t: t.to("meta"))
        args = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in meta.args]
        planned = getattr(torch.ops.tokcomp, target.op)(*args, **meta.kwargs)
        planned = planned if isinstance(planned, tuple) else (planned,)
        for have, want in zip(target.run(sample), planned, strict=True):
            assert (have.shape, have.dtype) == (want.shape, want.dtype), sample.id
            if have.numel() > 1:
                assert _effective_strides(have) == _effective_strides(want), sample.id


@pytest.mark.parametrize("target", all_targets())
def test_same_bits_twice_and_in_any_batch(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the reference is the oracle of numbers, not of bits: it uses library matrix products")
    for sample in target.samples(torch.float32, 41):
        if target.interpreted and not sample.id.startswith(("N33", "ties")):
            continue
        whole = target.run(sample)
        # In the interpreter each image alone is a second run as well. But linear_gelu's tiles hold rows of several
        # images, and there NumPy's product of a row depends on the row's place.
        by_image = not (target.interpreted and target.op == "linear_gelu")
        if not target.interpreted or not by_image or len(whole[0]) < 2:
            for have, again in zip(whole, target.run(sample), strict=True):
                assert _same_bits(have, again), f"{sample.id}: two runs differ"
        if not by_image:
            continue
        for image in range(whole[0].shape[0]):
            alone = _image(sample, image)
            for have, single in zip(whole, target.run(alone), strict=True):
                assert _same_bits(have[image : image + 1], single), f"{sample.id}: depends on the batch"


@pytest.mark.parametrize("target", all_targets())
def test_same_bits_on_any_number_of_threads(target: Target) -> None:
    if target.backend != "cpp":
        pytest.skip("only the compiled CPU kernels use threads of their own")
    threads = torch.get_num_threads()
    for sample in samples(target.op, torch.float32):
        whole = target.run(sample)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                for have, again in zip(whole, target.run(sample), strict=True):
                    assert _same_bits(have, again), f"{sample.id}: depends on the number of threads"
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("target", targets("_merge_backward"), ids=lambda target: target.backend)
def test_no_share_of_an_infinite_size_is_known(target: Target) -> None:
    """Slots of an infinite token alone, of two, and of one and a finite one, whose share is zero."""
    size = torch.tensor([[float("inf"), float("inf"), float("inf"), float("inf"), 1.0, 2.0]], device=target.device)
    source = torch.tensor([[0, 1, 1, 2, 2, 3]], device=target.device)
    grad = target.call(torch.ones(1, 4, 3, device=target.device), source, size)[0, :, 0]
    assert grad.isnan().tolist() == [True, True, True, True, False, False]
    assert grad[4:].tolist() == [0.0, 1.0]


def _tensors(sample: Sample) -> list[torch.Tensor]:
    return [value for value in (*sample.args, *sample.kwargs.values()) if isinstance(value, torch.Tensor)]


def _image(sample: Sample, image: int) -> Sample:
    schema = getattr(torch.ops.tokcomp, sample.op).default._schema.arguments

    def one(name: str, value: object) -> object:
        return value[image : image + 1] if isinstance(value, torch.Tensor) and name not in SHARED else value

    args = tuple(one(argument.name, value) for argument, value in zip(schema, sample.args, strict=False))
    return Sample(sample.op, sample.id, args, {name: one(name, value) for name, value in sample.kwargs.items()})


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))


def _effective_strides(t: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


@pytest.mark.parametrize("shape", [(3, 11), (3, 11, 4), (0, 11, 4)])
def test_sums_per_slot_without_atomics_are_the_same(shape: tuple[int, ...]) -> None:
    """What the reference runs on CUDA; whole numbers, whose sums do not depend on the order."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 9, shape, generator=generator).float()
    for num_slots in (1, 5, 20):
        slot = torch.randint(-1, num_slots, shape[:2], generator=generator)
        assert torch.equal(sorted_sums(values, slot, num_slots), sum_per_slot(values, slot, num_slots))


def test_diverse_tokens_of_more_patches_than_similarities_are_stored() -> None:
    """2900 patches in float64 have more than 64 MiB of them, and are compared with each chosen one anew."""
    features = torch.randn(1, 2900, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    options = {"num_prefix_tokens": 1, "rule": "farthest"}
    chosen = torch.ops.tokcomp.select_diverse(features, 9, **options)
    assert torch.equal(chosen, select_diverse_reference(features, 9, **options))

"""The CUDA operators, from their own source, on CPU tensors. ``test_host_shim.py`` builds them and runs this file.

Every call runs twice, with the threads of a block in ascending and in descending order: the bits must agree; they must
also agree between devices, one with clusters and one without. AddressSanitizer watches all of it, so a test also fails
where a kernel reads or writes out of bounds.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tokcomp_kernels._schema import BY_NAME
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.testing import Sample, samples

OPS = (
    *("class_attention_sort", "prune_merge", "prune_merge_norm", "add_layer_norm", "_merge_backward"),
    *("masked_softmax", "_masked_softmax_backward", "attention_received", "attention", "_attention_heads"),
    *("bipartite_merge", "select_diverse"),
)
#: Whose kernels take half precision alone, and give `out` as a view of [B, N, H, D].
HALF = ("attention", "_attention_heads")
#: Shared memory of a block, and whether there are clusters.
DEVICES = {"sm_90": (227 * 1024, True), "sm_80": (163 * 1024, False)}
#: The operators whose kernel depends on the device.
MERGES = ("prune_merge", "prune_merge_norm")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
#: Samples that bfloat16 does not run as well: float16 takes the same paths through the same code.
LONG = ("N197", "N257", "N577")

LIBRARY = torch.library.Library("tokcomp_shim", "DEF")
for name in OPS:
    LIBRARY.define(BY_NAME[name].schema)
torch.ops.load_library(os.environ["TOKCOMP_CUDA_SHIM"])
SHIM = ctypes.CDLL(os.environ["TOKCOMP_CUDA_SHIM"])
SHIM.shim_set_schedule.argtypes = (ctypes.c_int64,)
SHIM.shim_set_device.argtypes = (ctypes.c_int64, ctypes.c_int)
SHIM.shim_launches.restype = ctypes.c_int64
SHIM.shim_merge_plan.argtypes = (ctypes.c_int64, *[ctypes.c_int] * 5, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def run(op: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    expected = None
    for name, device in DEVICES.items():
        SHIM.shim_set_device(*device)
        for descending in (0, 1):
            SHIM.shim_set_schedule(descending)
            outputs = getattr(torch.ops.tokcomp_shim, op)(*args, **kwargs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            expected = expected or outputs
            for have, want in zip(outputs, expected, strict=True):
                assert have.is_contiguous() or (op in HALF and have.transpose(1, 2).is_contiguous())
                assert torch.equal(bits(have), bits(want)), f"other bits on {name} with threads {descending=}"
        if op not in MERGES:
            break
    assert expected is not None
    return expected


def check(op: str, *args: Any, exact: bool = False, **kwargs: Any) -> tuple[Tensor, ...]:
    outputs = run(op, *args, **kwargs)
    assert_right(Sample(op, "shim", args, kwargs, exact), outputs)
    return outputs


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return torch.randn(shape, generator=generator).to(dtype)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape) + 1000 * seed))


def roles(batch: int, num_tokens: int) -> Tensor:
    """Sources (1), destinations (2) and tokens that are neither, at random."""
    return torch.randint(0, 3, (batch, num_tokens), generator=torch.Generator().manual_seed(batch + num_tokens))


def awkward(values: Tensor) -> Tensor:
    """[B, N] with ties, NaN, infinities and both zeros among its values."""
    special = torch.tensor([0.5, float("nan"), -0.0, float("-inf"), 0.0, float("inf"), 0.5, float("nan")])
    places = values[:, ::3].shape[1]
    values = values.clone()
    values[:, ::3] = special.repeat(places)[:places].to(values.dtype)
    return values


def layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values: 16-byte aligned rows, unaligned ones, a strided last dimension, a batch dimension inside."""
    yield x.contiguous()
    yield torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    yield torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    yield x.transpose(0, 1).contiguous().transpose(0, 1)


def all_samples() -> list[Any]:
    return [
        pytest.param(sample, id=f"{op}-{name}-{sample.id}")
        for op in OPS
        for name, dtype in DTYPES.items()
        if op not in HALF or name != "f32"
        for sample in samples(op, dtype)
        if name != "bf16" or not sample.id.startswith(LONG)
    ]


@pytest.mark.parametrize("sample", all_samples())
def test_agrees_with_float64(sample: Sample) -> None:
    assert_right(sample, run(sample.op, *sample.args, **sample.kwargs))


# Beyond the samples that all backends share: what these kernels do differently by size, width and alignment.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 5, 64, 80, 300])
def test_class_attention_sort_widths(width: int, dtype: torch.dtype) -> None:
    check("class_attention_sort", randn(2, 4, width, dtype=dtype), randn(2, 4, 37, width, dtype=dtype), None, 0.3)


@pytest.mark.parametrize(("num_heads", "num_tokens"), [(13, 1024), (2, 1025), (3, 2300)])
def test_class_attention_sort_many_tokens(num_heads: int, num_tokens: int) -> None:
    """Heads in several groups; rows in device memory and a kernel of its own for the order; more than two tiles."""
    k = randn(1, num_heads, num_tokens, 8)
    k[:, :, -40:] = k[:, :, 50:90]
    check("class_attention_sort", randn(1, num_heads, 8), k, rand(1, num_tokens) * 4, None, 3)


def test_class_attention_sort_not_a_number() -> None:
    k = randn(2, 2, 40, 8)
    k[1, 0, 7] = float("nan")
    cls_attn, token_order = run("class_attention_sort", randn(2, 2, 8), k)
    assert cls_attn[0].isfinite().all()
    assert cls_attn[1].isnan().all() and torch.equal(token_order[1], torch.arange(40))
    bad = torch.tensor([float("nan"), -1.0, 0.0, 1e-9]).repeat(10).expand(2, 40)
    check("class_attention_sort", randn(2, 2, 8), randn(2, 2, 40, 8), bad)


WIDTHS = {"f16": (1, 7, 33, 64, 200, 320, 1000, 1280, 2100), "f32": (7, 320, 1280), "bf16": (33, 1000)}


@pytest.mark.parametrize(("width", "dtype"), [(width, dtype) for dtype, widths in WIDTHS.items() for width in widths])
def test_prune_merge_widths(width: int, dtype: str) -> None:
    """From one slice of channels to more than a cluster has blocks, full or not; prune_merge agrees to the bit."""
    number = DTYPES[dtype]
    tokens, alive, kept = (40, 35, 17) if width < 1000 else (20, 18, 9)
    x, branch = (randn(1, tokens, width, dtype=number, seed=seed) for seed in (0, 2))
    weight, bias = randn(2, width, dtype=number)
    importance, size = rand(1, tokens), rand(1, tokens) * 3
    outputs = check("prune_merge_norm", x, branch, importance, alive, kept, weight, bias, size=size, norm_eps=1e-5)
    plain = check("prune_merge", x + branch, importance, alive, kept, size=size)
    for have, want in zip((outputs[0], *outputs[2:]), plain, strict=True):
        assert torch.equal(bits(have), bits(want))


@pytest.mark.parametrize("prefix", range(6))
def test_prune_merge_prefix(prefix: int) -> None:
    check("prune_merge", randn(2, 20, 16), randn(2, 20, seed=1), 15, prefix + 1, num_prefix_tokens=prefix)
    check("prune_merge", randn(2, 20, 16), randn(2, 20, seed=1), prefix, prefix, num_prefix_tokens=prefix)


@pytest.mark.parametrize("num_kept", [302, 2])
def test_prune_merge_more_than_a_tile(num_kept: int) -> None:
    """70 sources or 370 are several tiles of 16, 301 destinations two of 256; a single destination takes all."""
    x = randn(1, 400, 40, dtype=torch.float16)
    check("prune_merge", x, randn(1, 400, seed=1), 372, num_kept, size=rand(1, 400) * 3)


def test_prune_merge_ties_across_tiles() -> None:
    """Equal destinations in every 4 x 4 patch, warp and tile: the lowest slot wins."""
    x = torch.eye(8)[torch.arange(600) % 8][None].contiguous()
    source = check("prune_merge", x, -torch.arange(600.0)[None], 600, 570, exact=True, num_prefix_tokens=1)[2]
    assert source[0, 570:].tolist() == [n % 8 or 8 for n in range(570, 600)]


@pytest.mark.parametrize("num_tokens", [60, 1100, 2100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prune_merge_importance(num_tokens: int, dtype: torch.dtype) -> None:
    """float64 values that float32 cannot tell apart; above 1024 tokens the order has a kernel of its own."""
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(num_tokens))
    importance = awkward((1.0 + order.double()[None] * 2.0**-40).to(dtype))
    check("prune_merge", randn(1, num_tokens, 8), importance, num_tokens - 9, num_tokens - 17, num_prefix_tokens=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_prune_merge_norm_averages_heads_in_its_own_launch(dtype: torch.dtype) -> None:
    """As if the mean had come from the kernel that it spares; float64 is ranked, and averaged, apart."""
    x, branch, heads = randn(2, 50, 96).half(), randn(2, 50, 96, seed=1).half(), rand(2, 7, 50).to(dtype)
    mean = heads[:, 0].to(torch.promote_types(dtype, torch.float32))
    for head in range(1, 7):
        mean = mean + heads[:, head]
    expected = run("prune_merge_norm", x, branch, mean / 7, 45, 30)
    for have, want in zip(run("prune_merge_norm", x, branch, heads, 45, 30), expected, strict=True):
        assert torch.equal(have, want)
    SHIM.shim_set_device(*DEVICES["sm_90"])
    before = SHIM.shim_launches()
    torch.ops.tokcomp_shim.prune_merge_norm(x, branch, heads, 45, 30)
    assert SHIM.shim_launches() - before == (2 if dtype == torch.float64 else 1)


def test_prune_merge_rows_that_are_not_numbers() -> None:
    x = randn(1, 24, 8)
    x[:, 20:22], x[:, 22], x[:, 23, 0] = 0, float("nan"), float("inf")
    x[:, 3], x[:, 5] = float("nan"), 0
    source = run("prune_merge", x, -torch.arange(24.0)[None], 24, 16)[2]
    assert source[0, :16].tolist() == list(range(16))
    assert source[0, 20:23].tolist() == [1, 1, 1]
    assert 1 <= int(source[0, 23]) < 16


def test_pruned_rows_are_not_read() -> None:
    x, importance = randn(1, 30, 16), -torch.arange(30.0)[None]
    branch = randn(1, 30, 16, seed=1)
    expected = run("prune_merge_norm", x, branch, importance, 20, 12)
    x[:, 20:], branch[:, 20:] = float("nan"), float("inf")
    for have, want in zip(run("prune_merge_norm", x, branch, importance, 20, 12), expected, strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [1, 7, 200, 384, 768, 1300, 3000])
def test_add_layer_norm_widths(width: int, dtype: torch.dtype) -> None:
    """In registers, and longer than those hold."""
    x, branch, weight = (randn(3, 5, width, dtype=dtype, seed=seed) for seed in range(3))
    check("add_layer_norm", x, branch, weight[0, 0], weight[0, 1])
    check("add_layer_norm", x[:, 1:], branch[:, :4], None, weight[0, 1])


def test_layer_norm_far_from_zero() -> None:
    """The mean is taken away before anything is squared, also across the slices of a cluster."""
    x = 3000 + randn(1, 12, 1024)
    check("add_layer_norm", x, torch.zeros_like(x))
    check("prune_merge_norm", x, torch.zeros_like(x), rand(1, 12), 11, 9)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_layout_does_not_show(dtype: torch.dtype) -> None:
    """The same bits whatever the strides and the alignment."""
    q, k, x, scores = (randn(*s, dtype=dtype) for s in ((2, 3, 64), (2, 3, 33, 64), (2, 50, 64), (2, 3, 20, 20)))
    source, mask = torch.arange(70).remainder(50).expand(2, 70), (rand(2, 20) > 0.4).float()
    expected = None
    for have in zip(*map(layouts, (k, x, scores)), strict=True):
        outputs = (
            *run("class_attention_sort", q, have[0]),
            *run("prune_merge_norm", have[1], have[1], x[..., 0], 45, 30, have[1][0, 0], have[1][1, 1]),
            *run("add_layer_norm", have[1], have[1], have[1][0, 0], have[1][1, 1]),
            *run("_merge_backward", have[1], source),
            *run("masked_softmax", have[2], mask),
            *run("_masked_softmax_backward", have[2], have[2], mask),
            *(() if dtype == torch.float32 else run("attention", have[0], have[0], have[0])),
        )
        expected = expected or outputs
        for a, b in zip(outputs, expected, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_merge_backward_of_any_source(dtype: torch.dtype) -> None:
    """A map from elsewhere may hold anything; its sizes too."""
    source = torch.tensor([[0, 2, 2, -1, 2**40, -(2**40), 3, 0, 2], [1, 1, 1, 1, 1, 1, 1, 1, 2**32 + 1]])
    size = torch.tensor([1.0, 2, float("nan"), 3, -1, 0, 5, 1e-9, 2]).expand(2, 9)
    for width in (1, 8, 300):
        check("_merge_backward", randn(2, 3, width, dtype=dtype), source)
        check("_merge_backward", randn(2, 3, width, dtype=dtype), source, size)


def test_masked_softmax_many_tokens() -> None:
    """Above 1536 tokens the mask's partial sums lie in device memory."""
    scores, grad = randn(1, 1, 1, 1537).expand(1, 1, 1537, 1537), randn(1, 1, 1, 1537, seed=1).expand(1, 1, 1537, 1537)
    mask = (rand(1, 1537) > 0.5).float()
    grad_scores, grad_mask = torch.ops.tokcomp_shim._masked_softmax_backward(grad, scores, mask)
    assert_right(Sample("_masked_softmax_backward", "shim", (grad, scores, mask)), (grad_scores, grad_mask))


@pytest.mark.parametrize("all_alive", [False, True])
def test_masked_softmax_extremes(all_alive: bool) -> None:
    scores = randn(1, 1, 6, 6)
    scores[..., 1, :] = float("-inf")
    scores[..., 2, 3] = float("nan")
    scores[..., 3, 2] = float("inf")
    scores[..., 4, :] = torch.tensor([1e4, -1e4, 0, 0, -1e4, 0])
    (out,) = run("masked_softmax", scores, torch.full((1, 6), float(all_alive)))
    assert torch.allclose(out[0, 0, 1], torch.tensor(1 / 6))
    assert out[0, 0, 2:4].isnan().all() and out[0, 0, [0, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_masked_softmax_backward_keeps_the_masks_dtype(dtype: torch.dtype) -> None:
    scores, mask = randn(1, 2, 9, 9), rand(1, 9)
    grad_mask = run("_masked_softmax_backward", scores, scores, mask.to(dtype))[1]
    expected = run("_masked_softmax_backward", scores, scores, mask.to(dtype).float())[1]
    assert grad_mask.dtype == dtype and torch.equal(grad_mask, expected.to(dtype))


def calls() -> dict[str, tuple[Any, ...]]:
    half, scores = torch.float16, randn(4, 2, 12, 12, dtype=torch.float16)
    mask = rand(4, 12)
    return {
        "class_attention_sort": (randn(4, 2, 8, dtype=half), randn(4, 2, 12, 8, dtype=half)),
        "prune_merge": (randn(4, 12, 16, dtype=half), rand(4, 12), 10, 7),
        "prune_merge_norm": (*[randn(4, 12, 600, dtype=half)] * 2, rand(4, 12), 10, 7),
        "add_layer_norm": (randn(4, 12, 16, dtype=half), randn(4, 12, 16, dtype=half, seed=1)),
        "_merge_backward": (randn(4, 12, 16, dtype=half), torch.arange(9).remainder(4).expand(4, 9)),
        "masked_softmax": (scores, mask),
        "attention_received": (randn(4, 2, 12, 8, dtype=half), randn(4, 2, 12, 8, dtype=half, seed=1)),
        **dict.fromkeys(HALF, tuple(randn(4, 2, 12, 8, dtype=half, seed=seed) for seed in range(3))),
        "_masked_softmax_backward": (randn(4, 2, 12, 12, dtype=half, seed=1), scores, mask),
        "bipartite_merge": (randn(4, 12, 40, dtype=half), randn(4, 12, 16, dtype=half, seed=1), roles(4, 12), 3),
        "select_diverse": (randn(4, 12, 16, dtype=half), 7),
    }


@pytest.mark.parametrize("op", OPS)
def test_batch_does_not_show(op: str) -> None:
    args = calls()[op]
    together = run(op, *args)
    for first, last in ((2, 3), (2, 4), (4, 4)):
        part = run(op, *(value[first:last] if isinstance(value, Tensor) else value for value in args))
        for have, whole in zip(part, together, strict=True):
            assert have.dtype == whole.dtype and torch.equal(bits(have), bits(whole[first:last]))


@pytest.mark.parametrize("op", OPS)
def test_float64_is_refused(op: str) -> None:
    args = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in calls()[op]]
    types = "float16 or bfloat16 in CUDA C\\+\\+" if op in HALF else "float16, bfloat16 or float32 on cuda"
    name = "attention" if op == "_attention_heads" else op
    with pytest.raises(TypeError, match=rf"^{name}: \w+ must be {types}, got float64"):
        getattr(torch.ops.tokcomp_shim, op)(*args)


def test_nothing_there() -> None:
    """No tokens, no heads, no channels."""
    assert run("class_attention_sort", randn(2, 3, 8), randn(2, 3, 0, 8), None, None, 0)[0].shape == (2, 0)
    cls_attn, token_order = run("class_attention_sort", torch.empty(2, 0, 8), torch.empty(2, 0, 5, 8))
    assert cls_attn.isnan().all() and torch.equal(token_order, torch.arange(5).expand(2, -1))
    assert run("attention_received", *[torch.empty(2, 0, 5, 8)] * 2)[0].isnan().all()
    assert run("attention", *[torch.empty(2, 0, 5, 8).half()] * 3)[1].isnan().all()
    assert run("prune_merge", randn(2, 0, 4), randn(2, 0), 0, 0, num_prefix_tokens=0)[0].shape == (2, 0, 4)
    source = run("prune_merge", torch.empty(2, 9, 0), randn(2, 9), 8, 4)[2]
    assert torch.equal(source.sort(1).values[0], torch.tensor([-1, 0, 1, 1, 1, 1, 1, 2, 3]))
    assert run("prune_merge_norm", *[torch.empty(2, 9, 0)] * 2, randn(2, 9), 8, 4)[1].shape == (2, 4, 0)
    assert run("add_layer_norm", *[torch.empty(2, 9, 0)] * 2)[1].shape == (2, 9, 0)
    assert run("_merge_backward", randn(2, 0, 4), torch.zeros(2, 3, dtype=torch.int64))[0].eq(0).all()
    assert run("masked_softmax", randn(2, 3, 0, 0), randn(2, 0))[0].shape == (2, 3, 0, 0)
    grads = run("_masked_softmax_backward", *[torch.empty(2, 0, 5, 5)] * 2, torch.ones(2, 5))
    assert grads[0].numel() == 0 and torch.equal(grads[1], torch.zeros(2, 5))

"""The traffic model against what the kernels really load and store: each interpreted kernel, byte for byte."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import timm
import tokcomp
import torch
from tokcomp.bench.published import PublishedPipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.model import roofline, traffic_cuda, traffic_triton
from benchmarks.model.roofline import ModelShape, token_counts
from benchmarks.model.stacks import EAGER_LAUNCHES, conventional_kernels
from benchmarks.model.traffic import KernelCost
from tests.bench.dispatched import Dispatched
from tests.bench.interpreted import Launch, counting

DTYPES = {"float16": torch.float16, "float32": torch.float32}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(launches: Sequence[Launch], costs: Sequence[KernelCost]) -> None:
    """Every launch is in the model, in order, with its bytes and its tiles' multiply-adds."""
    found = [(one.read, one.written, one.loaded, one.stored, one.multiply_adds) for one in launches]
    expected = [
        (cost.bytes_read, cost.bytes_written, cost.bytes_loaded, cost.bytes_stored, cost.tile_multiply_adds)
        for cost in costs
    ]
    assert found == expected, [launch.kernel for launch in launches]
    assert [cost.programs or launch.programs for launch, cost in zip(launches, costs, strict=True)] == [
        launch.programs for launch in launches
    ]
    assert all(cost.multiply_adds <= cost.tile_multiply_adds or not cost.tile_multiply_adds for cost in costs)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "width", "has_size"),
    [
        ("float32", 17, 16, True),
        ("float16", 77, 16, False),
        ("float32", 77, 16, True),
        ("float16", 150, 24, False),  # all keys at once, in tiles that cover them
        ("float16", 197, 24, True),
        ("float16", 130, 80, False),  # a head's width in two parts
        ("float16", 40, 136, True),
    ],
)
def test_attention(dtype: str, num_tokens: int, width: int, has_size: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels.triton.attention import attention_triton

    batch, heads = 2, 3
    packed = random(batch, num_tokens, 3, heads, width, dtype=DTYPES[dtype])
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    size = random(batch, num_tokens).exp() if has_size else None
    with counting(monkeypatch) as launches:
        attention_triton(q, k, v, size=size)
    item = q.element_size()
    check(launches, traffic_triton.attention(batch, heads, num_tokens, width, item, has_size=has_size))


def test_compiled_attention_moves_what_tritons_does_and_multiplies_less_padding() -> None:
    """Keys and values are read once however many queries there are, until they no longer fit in shared memory."""
    [ours, _] = traffic_cuda.attention(4, 6, 197, 64, 2, has_size=True)
    [theirs, _] = traffic_triton.attention(4, 6, 197, 64, 2, has_size=True)
    assert (ours.bytes_read, ours.bytes_written) == (theirs.bytes_read, theirs.bytes_written)
    assert ours.multiply_adds == theirs.multiply_adds == 4 * 6 * 2 * 197**2 * 64
    assert ours.tile_multiply_adds == 4 * 6 * 2 * 208**2 * 64 < theirs.tile_multiply_adds
    assert ours.bytes_loaded - ours.bytes_read == 4 * 6 * 197 * 4 + 4 * 5 * 197 * 4  # cls scores; sizes, by six heads
    [streamed] = traffic_cuda.attention(1, 1, 257, 40, 2, has_size=False, mean=False)
    assert streamed.programs == 5 and streamed.tile_multiply_adds == 2 * 320 * 320 * 48
    with pytest.raises(ValueError, match="width must be at most 80, got 88"):
        traffic_cuda.attention(1, 1, 8, 88, 2, has_size=False)


@pytest.mark.parametrize(
    ("dtype", "num_tokens", "width", "has_size"),
    [("float16", 197, 24, True), ("float32", 77, 16, False), ("float16", 40, 136, True)],  # one pass, and two
)
def test_attention_received(
    dtype: str, num_tokens: int, width: int, has_size: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokcomp_kernels.triton.attention_received import attention_received_triton

    batch, heads = 2, 3
    q, k = random(2, batch, num_tokens, heads, width, dtype=DTYPES[dtype]).transpose(2, 3).unbind(0)
    size = random(batch, num_tokens).exp() if has_size else None
    with counting(monkeypatch) as launches:
        attention_received_triton(q, k, size=size)
    item = q.element_size()
    check(launches, traffic_triton.attention_received(batch, heads, num_tokens, width, item, has_size=has_size))


@pytest.mark.parametrize("has_size", [False, True], ids=["ones", "sizes"])
def test_class_attention_sort(has_size: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels.triton.class_attention_sort import class_attention_sort_triton

    batch, heads, num_tokens, width = 2, 3, 150, 24
    q_cls, k = random(batch, heads, width, dtype=torch.float16), random(batch, heads, num_tokens, width).half()
    size = random(batch, num_tokens).exp() if has_size else None
    with counting(monkeypatch) as launches:
        class_attention_sort_triton(q_cls, k, size, num_prefix_tokens=2)
    check(
        launches,
        traffic_triton.class_attention_sort(batch, heads, num_tokens, width, 2, has_size=has_size, num_prefix_tokens=2),
    )


@pytest.mark.parametrize("fused", [False, True], ids=["merge", "merge_norm"])
@pytest.mark.parametrize(
    ("dtype", "num_tokens", "kept", "merged", "has_size"),
    [
        ("float32", 50, 46, 26, True),  # several blocks of slots, parts of the sources, programs that join
        ("float16", 50, 46, 26, False),
        ("float32", 20, 20, 19, True),  # one source
        ("float16", 33, 20, 20, True),  # pruning alone
    ],
)
def test_prune_merge(
    dtype: str, num_tokens: int, kept: int, merged: int, has_size: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokcomp_kernels.triton.prune_merge import prune_merge_triton
    from tokcomp_kernels.triton.prune_merge_norm import prune_merge_norm_triton

    batch, channels = 2, 72
    x, branch = random(2, batch, num_tokens, channels, dtype=DTYPES[dtype]).unbind(0)
    weight, bias = random(2, channels, dtype=x.dtype).unbind(0)
    importance = random(batch, num_tokens, seed=1)
    size = random(batch, num_tokens).exp() if has_size else None
    with counting(monkeypatch) as launches:
        if fused:
            *_, source = prune_merge_norm_triton(x, branch, importance, kept, merged, weight, bias, size=size)
        else:
            *_, source = prune_merge_triton(x, importance, kept, merged, size=size)
    joined = sum(int((row[row >= 0].bincount() > 1).sum()) for row in source)
    costs = traffic_triton.prune_merge(
        batch,
        num_tokens,
        kept,
        merged,
        channels,
        x.element_size(),
        has_size=has_size,
        fused=fused,
        destinations=joined,
    )
    check(launches, costs)
    assert joined <= batch * (kept - merged)


def test_prune_merge_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels.triton.attention import attention_heads_triton
    from tokcomp_kernels.triton.prune_merge import prune_merge_triton

    q, k, v = random(3, 2, 3, 33, 24, dtype=torch.float16).unbind(0)
    x = random(2, 33, 72)
    with counting(monkeypatch) as launches:
        _, by_heads = attention_heads_triton(q, k, v)
        prune_merge_triton(x, by_heads, 20, 20)
    costs = traffic_triton.attention(2, 3, 33, 24, 2, has_size=False, mean=False)
    costs += traffic_triton.prune_merge(2, 33, 20, 20, 72, 4, has_size=False, heads=3, destinations=0)
    check(launches, costs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_layer_norm(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels.triton.add_layer_norm import add_layer_norm_triton

    x, branch = random(2, 3, 11, 72, dtype=DTYPES[dtype]).unbind(0)
    weight, bias = random(2, 72, dtype=x.dtype).unbind(0)
    with counting(monkeypatch) as launches:
        add_layer_norm_triton(x, branch, weight, bias)
    check(launches, traffic_triton.add_layer_norm(33, 72, x.element_size()))


@pytest.mark.parametrize(("dtype", "rows", "inputs"), [("float32", 70, 40), ("float16", 130, 96)])
def test_linear_gelu(dtype: str, rows: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcomp_kernels.triton.linear_gelu import linear_gelu_triton

    x, weight = random(rows, inputs, dtype=DTYPES[dtype]), random(144, inputs, dtype=DTYPES[dtype])
    with counting(monkeypatch) as launches:
        linear_gelu_triton(x, weight, random(144, dtype=DTYPES[dtype]))
    check(launches, traffic_triton.linear_gelu(rows, inputs, 144, x.element_size()))


def test_the_counter_sees_what_the_model_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that reads a row twice, or reads what the model does not know of, does not pass."""
    from tokcomp_kernels.triton.attention import attention_triton

    q, k, v = random(3, 1, 2, 20, 16).unbind(0)
    with counting(monkeypatch) as launches:
        attention_triton(q, k, v, size=torch.ones(1, 20))
    with pytest.raises(AssertionError):
        check(launches, traffic_triton.attention(1, 2, 20, 16, 4, has_size=False))
    with pytest.raises(AssertionError):
        check(launches[:1], traffic_triton.attention(1, 2, 20, 16, 4, has_size=True))


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return timm.create_model("test_vit", img_size=64, num_classes=7).eval()


IMAGES = 2
SCHEDULE = tokcomp.CompressionSchedule([17, 16, 14, 14, 10, 9], [17, 15, 14, 12, 8, 9])


def test_uncompressed_kernels_move_what_pytorch_s_operators_do(small: torch.nn.Module) -> None:
    """timm's model in eager mode, operator by operator; what LayerNorm and attention keep for a backward set aside."""
    shape = ModelShape.of(small)
    with torch.no_grad(), Dispatched() as seen:
        small(torch.zeros(IMAGES, 3, 64, 64))
    blocks = seen.calls[3 : 3 + 10 * shape.depth]  # after the convolution, the class token, the positions
    tokens = IMAGES * shape.num_tokens
    found = []
    for call in blocks:
        read, written = call.read, call.written
        if call.name == "native_layer_norm":
            read, written = read - 2 * 4 * shape.channels, written - 2 * 4 * tokens
        elif call.name.startswith("_scaled_dot"):
            written -= 4 * tokens * shape.heads
        if call.name != "gelu":  # inside the product, in a conventional stack
            found.append((read, written))
    costs = conventional_kernels(shape, token_counts(shape, None), IMAGES, 4)
    assert found == [(cost.bytes_read, cost.bytes_written) for cost in costs if cost.block is not None]
    gelu = next(call for call in blocks if call.name == "gelu")
    [ours] = {
        cost for cost in roofline.kernels(shape, None, IMAGES, torch.float32) if (cost.name, cost.block) == ("gelu", 0)
    }
    assert (gelu.read, gelu.written) == (ours.bytes_read, ours.bytes_written)


def test_a_compressing_block_launches_as_many_kernels_as_another(small: torch.nn.Module) -> None:
    """With prune_merge_norm's CUDA kernel, which is one (tests/cuda counts it); Triton's are three."""
    costs = roofline.kernels(small, SCHEDULE, IMAGES, torch.float32)
    per_block = [[cost.name for cost in costs if cost.block == block] for block in range(len(small.blocks) - 1)]
    compressing = [names for names in per_block if "prune_merge_norm.select" in names]
    assert len(compressing) >= 2
    for names in per_block:
        by_triton = sum(name.startswith("prune_merge_norm.") for name in names)
        assert len(names) - max(by_triton - 1, 0) == 8
        assert by_triton <= 3


def test_a_gpu_s_attention_leaves_heads_to_who_averages_them(
    small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokcomp.adapters.timm_vit import fast

    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    images = random(IMAGES, 3, 64, 64)
    for method, apart in ((tokcomp.DiffRate(SCHEDULE), True), (tokcomp.EViT(0.7, blocks=(1, 3)), False)):
        model = tokcomp.compress(copy.deepcopy(small), method)
        with torch.no_grad():
            want = model(images)
            with monkeypatch.context() as patched, Dispatched() as seen:
                patched.setattr(fast, "_AVERAGES_LATE", frozenset({"cpu"}))
                have = model(images)
        names = [call.name for call in seen.calls]
        assert "_attention_heads" in names and ("attention" in names) != apart
        torch.testing.assert_close(have, want)


def test_multiply_adds_are_pytorch_s(small: torch.nn.Module) -> None:
    counter = FlopCounterMode(display=False)
    # Attention as its two products: PyTorch's counter does not know the CPU's fused operator in every version.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        small(torch.zeros(IMAGES, 3, 64, 64))
    for costs in (roofline.ideal_kernels, roofline.kernels):
        total = sum(cost.flops for cost in costs(small, None, IMAGES, torch.float32))
        assert counter.get_total_flops() == total


#: First kernel of an operator -> the operator. Attention that needs no class row is PyTorch's own on a GPU alone.
OPERATORS = {
    "attention.forward": "attention",
    "sdpa": "attention",
    "prune_merge_norm.select": "prune_merge_norm",
    "add_layer_norm": "add_layer_norm",
}


def test_kernels_are_those_of_the_model_that_runs(small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of a compressed model, with its rows, and every operator of ours, in order."""
    # The fast path makes way for whoever watches operators; here it is what is to be watched.
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    model = tokcomp.compress(copy.deepcopy(small), tokcomp.DiffRate(SCHEDULE))
    with torch.no_grad():
        model(torch.zeros(IMAGES, 3, 64, 64))  # packs the weights
        with Dispatched() as seen:
            model(torch.zeros(IMAGES, 3, 64, 64))
    costs = roofline.kernels(small, SCHEDULE, IMAGES, torch.float32)
    found = [call.matrix for call in seen.calls if call.matrix is not None]
    expected = [cost.matrix for cost in costs if cost.matrix is not None]
    assert found == expected[-len(found) :]
    assert len(expected) - len(found) <= 1  # the patch embedding may be a convolution
    ran = [call.name for call in seen.calls if call.name in OPERATORS.values()]
    operators = [OPERATORS[cost.name] for cost in costs if cost.name in OPERATORS]
    assert ran == operators


def test_launches_of_the_published_code(small: torch.nn.Module) -> None:
    """Operators per block of the published pipeline under autocast, every block compressing; and of timm's model."""
    method = tokcomp.DiffRate(tokcomp.CompressionSchedule([16, 14, 12, 10, 8, 6], [15, 13, 11, 9, 7, 5]))
    pipeline, images = PublishedPipeline(small, method), torch.zeros(IMAGES, 3, 64, 64)
    for run, launches in zip((pipeline, small), EAGER_LAUNCHES, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Dispatched() as seen:
            run(images)
        assert len(seen.calls) / len(small.blocks) == pytest.approx(launches, rel=0.1)


def test_other_methods_are_refused(small: torch.nn.Module) -> None:
    image_attn = tokcomp.DiffRate(SCHEDULE, metric="image_attn")
    for method in (tokcomp.ToMe(2), tokcomp.EViT(0.5), image_attn, tokcomp.DiffRate(SCHEDULE, pipeline="merge_prune")):
        with pytest.raises(
            ValueError, match="method must be DiffRate by class attention, pruning before it merges, got"
        ):
            roofline.kernels(small, method, IMAGES, torch.float32)
    with pytest.raises(ValueError, match="channels must take at most 3072 bytes for whole rows, got 1537 x 2"):
        traffic_triton.prune_merge(1, 9, 8, 7, 1537, 2, has_size=False)

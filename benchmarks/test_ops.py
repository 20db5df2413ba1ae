"""Every operator on blocks of the published models: each backend called directly, the reference, the eager chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokcomp.measure.provenance import find_device
from tokcomp.measure.timing import copies_beyond_cache, rotating
from torch import Tensor

from benchmarks.eager import EAGER
from benchmarks.shapes import BLOCKS, BlockShape
from tokcomp_kernels import native_kernels
from tokcomp_kernels.compare import assert_right
from tokcomp_kernels.ops import IMPLEMENTATIONS
from tokcomp_kernels.testing import Sample

TABLE = (
    "operators: microseconds per call (median), speed over the eager chain (median, least, most), share of the floor"
)
HEAD = ["operator", "block", "batch", "dtype", "backend", "us", "speed", "least", "most", "of floor"]
#: Shorter turns on a GPU, where a launch takes microseconds.
TURN_SECONDS = {"cpu": 0.1, "cuda": 0.03}
GATED_IMAGES = 2

FORWARD = tuple(op for op in EAGER if op in IMPLEMENTATIONS)
BACKWARD = {
    "_merge_backward": "prune_merge",
    "_unmerge_backward": "unmerge",
    "_masked_softmax_backward": "masked_softmax",
    "_masked_attention_backward": "masked_attention",
    "_attention_backward": "attention",
    "_masked_merge_backward": "masked_merge",
}
#: Operators that only the search runs, at its batch size.
SEARCH = ("masked_softmax", "masked_attention", "masked_merge", *BACKWARD)
BATCH = {"cpu": 16, "cuda": 1024}
SEARCH_BATCH = {"cpu": 8, "cuda": 256}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float16,)}
CPU_BLOCKS = (BLOCKS[1], BLOCKS[3])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = find_device(metafunc.config.getoption("--device")).type
    blocks = BLOCKS if kind == "cuda" else CPU_BLOCKS
    metafunc.parametrize("op", (*FORWARD, *BACKWARD))
    metafunc.parametrize("shape", blocks, ids=[shape.id for shape in blocks])
    metafunc.parametrize("dtype", DTYPES[kind], ids=[_name(dtype) for dtype in DTYPES[kind]])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """Arguments of one call, the bytes it has to move at least, and the FLOPs of its products."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bytes: int
    flops: int = 0

    def floor_seconds(self, rates: dict[str, float]) -> float:
        """What the bytes or the products take at the device's rates, whichever is more."""
        return max(self.bytes / rates["copy_bytes_per_s"], self.flops / rates["matrix_flops_per_s"])


def make_case(op: str, shape: BlockShape, batch: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Fresh random arguments of ``op`` as a block of this shape calls it."""
    tokens, channels, kept = shape.tokens, shape.channels, shape.num_merge_kept
    item = torch.finfo(dtype).bits // 8
    plane, small = batch * tokens * channels * item, batch * kept * channels * item
    maps = batch * shape.heads * tokens * tokens * item
    product = 2 * batch * shape.heads * tokens * tokens * shape.width  # FLOPs of q k^T, or of the map times v

    def normal(*sizes: int) -> Tensor:
        return torch.randn(batch, *sizes, device=device).to(dtype)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, tokens, device=device) * (high - low) + low

    def packed() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = normal(tokens, 3, shape.heads, shape.width).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def affine() -> tuple[Tensor, Tensor]:
        weight, bias = torch.randn(2, channels, device=device).to(dtype).unbind(0)
        return weight, bias

    def mask() -> Tensor:
        return (torch.arange(tokens, device=device) < kept).float().expand(batch, tokens).contiguous()

    def source() -> Tensor:
        slots = torch.cat([torch.arange(kept), torch.randint(1, kept, (shape.num_prune_kept - kept,))])
        slots = torch.cat([slots, torch.full((tokens - shape.num_prune_kept,), -1)])
        return (
            torch.stack([slots[torch.randperm(tokens)] for _ in range(min(batch, 16))])
            .repeat(-(-batch // 16), 1)[:batch]
            .to(device)
        )

    if op == "class_attention_sort":
        q, k, _ = packed()
        return Case((q[:, :, 0], k, uniform(1, 3)), {}, plane)
    if op == "prune_merge":
        read = batch * shape.num_prune_kept * channels * item
        counts = (shape.num_prune_kept, shape.num_merge_kept)
        return Case((normal(tokens, channels), uniform(0, 1), *counts), {"size": uniform(1, 3)}, read + small)
    if op == "prune_merge_norm":
        read, counts = 2 * batch * shape.num_prune_kept * channels * item, (shape.num_prune_kept, kept)
        args = normal(tokens, channels), normal(tokens, channels), uniform(0, 1), *counts, *affine()
        return Case(args, {"size": uniform(1, 3)}, read + 2 * small)
    if op == "add_layer_norm":
        return Case((normal(tokens, channels), normal(tokens, channels), *affine()), {}, 4 * plane)
    if op == "linear_gelu":
        weight = torch.randn(4 * channels, channels, device=device).mul(channels**-0.5).to(dtype)
        bias = torch.randn(4 * channels, device=device).to(dtype)
        moved = 5 * small + weight.numel() * item
        return Case((normal(kept, channels), weight, bias), {}, moved, 2 * batch * kept * weight.numel())
    if op == "tome_merge":
        r = tokens - kept
        args = (normal(tokens, channels), normal(tokens, shape.width), r)
        return Case(args, {"size": uniform(1, 3)}, plane + plane // shape.heads + small)
    if op == "bipartite_merge":
        # Every other patch may leave, and may join any of the rest.
        role = (torch.arange(tokens, device=device) % 2 + 1).expand(batch, tokens).clone()
        role[:, 0] = 0
        sources, destinations = (int((role[0] == one).sum()) for one in (1, 2))
        args = (normal(tokens, channels), normal(tokens, shape.width), role, tokens - kept)
        moved = plane + plane // shape.heads + small + role.numel() * role.element_size()
        return Case(args, {"size": uniform(1, 3)}, moved, 2 * batch * sources * destinations * shape.width)
    if op == "select_diverse":
        # A quarter of the patches; of the products each pair's once.
        chosen = 1 + tokens // 4
        return Case((normal(tokens, channels), chosen), {}, plane + 8 * batch * chosen, batch * tokens**2 * channels)
    if op == "unmerge":
        return Case((normal(kept, channels), source()), {}, small + plane)
    if op == "masked_softmax":
        return Case((normal(shape.heads, tokens, tokens), mask()), {}, 2 * maps)
    if op == "attention":
        return Case(packed(), {"size": uniform(1, 3)}, 4 * plane, 2 * product)
    if op == "attention_received":
        return Case(packed()[:2], {"size": uniform(1, 3)}, 2 * plane, product)
    if op == "masked_attention":
        return Case((*packed(), mask()), {"size": uniform(1, 3)}, 4 * plane, 2 * product)
    if op == "masked_merge":
        # What is pruned is dead already, and of no importance, as masked attention leaves it.
        alive = (torch.arange(tokens, device=device) < shape.num_prune_kept).float().expand(batch, tokens)
        args = normal(tokens, channels), uniform(0.1, 1) * alive, alive.contiguous()
        counts = torch.tensor([shape.num_prune_kept, kept], device=device)
        return Case((*args, counts), {"size": uniform(1, 3), "min_weighted_size": 1.0}, 2 * plane)
    if op == "_masked_merge_backward":
        inner = make_case("masked_merge", shape, batch, dtype, device)
        return Case((normal(tokens, channels), _destination(inner)), {}, 2 * plane)
    if op == "_merge_backward":
        return Case((normal(kept, channels), source()), {}, small + plane)
    if op == "_unmerge_backward":
        return Case((normal(tokens, channels), source(), kept), {}, small + plane)
    if op == "_masked_softmax_backward":
        return Case(
            (normal(shape.heads, tokens, tokens), *make_case("masked_softmax", shape, batch, dtype, device).args),
            {},
            3 * maps,
        )
    forward = make_case(op.removeprefix("_").removesuffix("_backward"), shape, batch, dtype, device)
    grad = normal(shape.heads, tokens, shape.width)
    return Case((grad, *forward.args), forward.kwargs, 7 * plane, 5 * product)


def _destination(case: Case) -> Tensor:
    return torch.ops.tokcomp.masked_merge(*case.args, **case.kwargs)[3]


def backends(op: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """The implementations of an operator that run on this device, by the name under which they are listed."""
    names = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}[device.type]
    native = op in native_kernels()[device.type]
    found = {name: IMPLEMENTATIONS[op].callable(name) for name in names if native or name not in ("cpp", "cuda")}
    return {"dispatched": getattr(torch.ops.tokcomp, op).default, **found}


def eager_call(op: str, case: Case, shape: BlockShape) -> Callable[[], Any]:
    """The eager chain on a case; for a backward pass, autograd through the forward's chain."""
    if op in EAGER:
        kwargs = {name: value for name, value in case.kwargs.items() if name != "min_weighted_size"}  # 1, as published
        return lambda: EAGER[op](*case.args, **kwargs)
    grad, forward = case.args[0], BACKWARD[op]
    if op in OF_ANOTHER_CASE:
        inner = make_case(forward, shape, grad.shape[0], grad.dtype, grad.device)
        args, kwargs = inner.args, inner.kwargs
    elif op == "_unmerge_backward":
        args, kwargs = (grad.new_zeros(grad.shape[0], case.args[2], grad.shape[2]), case.args[1]), {}
    else:
        args, kwargs = case.args[1:], case.kwargs
    differentiable = IMPLEMENTATION_INPUTS[forward]
    leaves = [args[i].detach().requires_grad_() for i in range(differentiable)]
    with torch.enable_grad():
        outputs = eager_call(forward, Case((*leaves, *args[differentiable:]), kwargs, 0), shape)()
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    return lambda: torch.autograd.grad(out, leaves, grad.to(out.dtype), retain_graph=True)


#: How many leading arguments of a forward take a gradient.
IMPLEMENTATION_INPUTS = {
    "prune_merge": 1,
    "unmerge": 1,
    "masked_softmax": 2,
    "masked_attention": 4,
    "attention": 3,
    "masked_merge": 1,
}
#: Backward passes that take a map where their forward takes scores: their chain differentiates a case of its own.
OF_ANOTHER_CASE = ("_merge_backward", "_masked_merge_backward")


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check(op: str, calls: dict[str, Callable[..., Any]], case: Case, shape: BlockShape, batch: int) -> None:
    """Every backend right on fresh random images, those images' bits the same in the full batch, and twice the same."""
    chosen = torch.randperm(batch)[:GATED_IMAGES].sort().values
    sample = Sample(op, shape.id, case.args, case.kwargs)

    def pick(value: Any) -> Any:
        of_images = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch
        return value[chosen.to(value.device)] if of_images else value

    few = Sample(op, shape.id, tuple(map(pick, case.args)), {name: pick(value) for name, value in case.kwargs.items()})
    owner = IMPLEMENTATIONS[op].backend(case.args[0].device.type)
    for name, call in calls.items():
        outputs = tensors(call(*few.args, **few.kwargs))
        assert_right(few, outputs if len(outputs) > 1 else outputs[0])
        if name == "reference" or (name == "dispatched" and owner == "reference"):
            continue  # PyTorch's own kernels promise neither
        first, second = tensors(call(*sample.args, **sample.kwargs)), tensors(call(*sample.args, **sample.kwargs))
        for one, other, alone in zip(first, second, outputs, strict=True):
            assert torch.equal(one, other), f"{op}, {name}: two runs differ"
            assert torch.equal(pick(one), alone), f"{op}, {name}: an image's result depends on its batch"
    check_eager(op, few, shape)


def check_eager(op: str, few: Sample, shape: BlockShape) -> None:
    """The eager chain computes the same function: in float64 it agrees with the reference to 1e-9."""
    double = few.map(lambda value: value.double())
    want = tensors(IMPLEMENTATIONS[op].reference(*double.args, **double.kwargs))
    if op in OF_ANOTHER_CASE:
        return  # the forward's row has checked the chain
    if op == "masked_merge":
        order = want[2].argsort(dim=1)
        want = tensors(
            tuple(t.gather(1, order.reshape(*order.shape, *[1] * (t.dim() - 2)).expand(t.shape)) for t in want)
        )
    have = tensors(eager_call(op, Case(double.args, double.kwargs, 0), shape)())
    for one, other in zip(have, want, strict=False):
        assert one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= 1e-9 * max(1.0, other.double().abs().max().item())


@torch.no_grad()
def test_operator(
    op: str, shape: BlockShape, dtype: torch.dtype, device: torch.device, timed: Any, results: Any
) -> None:
    batch = (SEARCH_BATCH if op in SEARCH else BATCH)[device.type]
    first = make_case(op, shape, batch, dtype, device)
    copies = copies_beyond_cache([*first.args, *first.kwargs.values()], device)
    cases = [first, *(make_case(op, shape, batch, dtype, device) for _ in range(copies - 1))]
    found = backends(op, device)
    calls = {
        name: rotating(lambda case, call=call: call(*case.args, **case.kwargs), [(case,) for case in cases])
        for name, call in found.items()
    }
    chains = [(eager_call(op, case, shape),) for case in cases]
    calls["eager"] = rotating(lambda chain: chain(), chains)
    samples = timed(
        calls,
        gate=lambda: check(op, found, first, shape, batch),
        shown="dispatched",
        turn_seconds=TURN_SECONDS[device.type],
    )
    if not samples:
        return
    rates = results.rates_of(dtype)
    for name, one in samples.items():
        speed = one.speedup_over(samples["eager"])
        share = first.floor_seconds(rates) / one.median
        row = {
            "suite": "operators",
            "operator": op,
            "block": shape.id,
            "batch": batch,
            "dtype": _name(dtype),
            "backend": name,
            "seconds": one.seconds,
            "speedup_over_eager": speed,
            "bytes": first.bytes,
            "flops": first.flops,
            "share_of_copy_rate": first.bytes / one.median / rates["copy_bytes_per_s"],
            "share_of_floor": share,
        }
        cells = [op, shape.id, str(batch), _name(dtype), name, f"{one.median * 1e6:.0f}"]
        results.add(row, TABLE, HEAD, [*cells, *(f"{ratio:.2f}x" for ratio in speed), f"{share:.0%}"])

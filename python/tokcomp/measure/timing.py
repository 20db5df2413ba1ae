"""Timing that survives a busy machine: competitors take turns in one process, and ratios are taken turn by turn."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.fastpath import packed_weights
from tokcomp_kernels.product_types import product_dtype

#: Rounds from which a median is reported.
MIN_ROUNDS = 7
#: Seconds that one competitor's turn lasts at least: many launches of something short, one of something long.
TURN_SECONDS = 0.1


@dataclass(frozen=True)
class Samples:
    """Seconds per call of one competitor, one figure per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def most(self) -> float:
        return max(self.seconds)

    def speedup_over(self, other: Samples) -> tuple[float, float, float]:
        """How many times faster than ``other``: median, least and most of the rounds' own ratios."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def now(device: torch.device) -> float:
    """Seconds of the clock, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any], int], float]:
    """``watch(call, launches)`` -> seconds per call: CUDA events around queued launches, or the clock on a CPU."""

    def on_cuda(call: Callable[[], Any], launches: int) -> float:
        with torch.cuda.device(device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            for _ in range(launches):
                call()
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / launches

    def on_cpu(call: Callable[[], Any], launches: int) -> float:
        begin = time.perf_counter()
        for _ in range(launches):
            call()
        return (time.perf_counter() - begin) / launches

    return on_cuda if device.type == "cuda" else on_cpu


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    watch: Callable[[Callable[[], Any], int], float],
    *,
    rounds: int = MIN_ROUNDS,
    turn_seconds: float = TURN_SECONDS,
) -> dict[str, Samples]:
    """Time every call in turn, ``rounds`` times, after a warm-up: A B A B, never A A B B.

    Args:
        calls: name -> a call without arguments. If its first run compiles or allocates, it must have run before.
        watch: from :func:`stopwatch`.
        rounds: turns of each call.
        turn_seconds: minimum length of a turn, which determines its number of launches.
    """
    launches = {}
    for name, call in calls.items():
        watch(call, 2)
        launches[name] = max(1, math.ceil(turn_seconds / max(watch(call, 2), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in calls.items():
                seconds[name].append(watch(call, launches[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def rotating(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """A call that takes the next of ``inputs`` each time, so that no cache holds its input."""
    turns = itertools.cycle(inputs)
    return lambda: call(*next(turns))


def copies_beyond_cache(tensors: Sequence[Any], device: torch.device) -> int:
    """How many copies of these arguments exceed the last-level cache twice over (at most 64)."""
    size = sum(value.numel() * value.element_size() for value in tensors if isinstance(value, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    return min(64, max(2, math.ceil(2 * cache / max(size, 1))))


def device_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The rates that this device reaches now: matrix multiplication in FLOP/s, copying in bytes/s (read plus write).

    The matrix rate is for the type that products of ``dtype`` are computed in (product_types.py). On CPU it is that of
    the faster of PyTorch's two products, MKL's and oneDNN's with a packed weight.
    """
    side, elements = (8192, 1 << 28) if device.type == "cuda" else (2048, 1 << 24)
    dtype = product_dtype(dtype, device.type)
    left, right = torch.randn(2, side, side, device=device).to(dtype).unbind(0)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"matrix": lambda: left @ right, "copy": lambda: target.copy_(source)}
    layer = nn.Linear(side, side, bias=False, device=device, dtype=dtype).requires_grad_(False)
    packed = packed_weights(layer, [layer], left)
    if packed is not None:
        calls["packed"] = lambda: packed.linear(layer, left)
    samples = interleave(calls, stopwatch(device), rounds=5)
    least = min(samples[name].least for name in samples if name != "copy")
    return {
        "matrix_flops_per_s": 2 * side**3 / least,
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / samples["copy"].least,
    }

"""The CUDA operators under the race detector. ``test_races.py`` builds the library and runs this file in a process of
its own: ``python race_suite.py LIBRARY`` runs every case, and ``python race_suite.py LIBRARY SITES`` does without each
of the given barriers in turn, as ``BITS=NAME``. One JSON object a line: the case or the barrier, and what was found or
null.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokcomp_kernels._schema import BY_NAME

MERGES = ("prune_merge", "prune_merge_norm")
OPS = (
    *(*MERGES, "class_attention_sort", "add_layer_norm", "_merge_backward"),
    *("masked_softmax", "_masked_softmax_backward", "attention_received", "_attention_heads"),
    *("bipartite_merge", "select_diverse"),
)
#: Shared memory of a block, and whether there are clusters.
DEVICES = {"sm_90": (227 * 1024, 1), "sm_80": (163 * 1024, 0)}
#: Of threads and blocks: ascending, descending, at random.
SCHEDULES = (0, 1, 20)
#: Seconds of CPU time without one barrier; all cases together take some ten. A loop over garbage may not end.
LIMIT = 60

Case = Callable[[], Any]


def randn(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def merges(
    batch: int, tokens: int, width: int, alive: int, kept: int, dtype: torch.dtype, order: torch.dtype = torch.float32
) -> Iterator[tuple[str, Case]]:
    """Both operators: a cluster of one block or of several, or streaming; one tile of sources and targets or more."""
    x, branch = (randn(batch, tokens, width, dtype=dtype, seed=seed) for seed in (1, 2))
    importance, size = rand(batch, tokens, dtype=order), rand(batch, tokens) * 3
    op = torch.ops.tokcomp_shim
    ranked = ", rank_kernel" if order is torch.float64 else ""
    name = f"{list(x.shape)} > {alive} > {kept}, {str(dtype).removeprefix('torch.')}{ranked}"
    yield f"prune_merge {name}", lambda: op.prune_merge(x, importance, alive, kept, size=size)
    weight, bias = randn(width, dtype=dtype), randn(width, dtype=dtype, seed=3)
    yield (
        f"prune_merge_norm {name}",
        lambda: op.prune_merge_norm(x, branch, importance, alive, kept, weight, bias, size=size),
    )


def cases() -> dict[str, Case]:
    """Quick ones of every path through every kernel."""
    op, half = torch.ops.tokcomp_shim, torch.float16
    found = dict(
        [
            *merges(1, 20, 384, 16, 16, half),  # nothing merges
            *merges(2, 24, 40, 22, 12, half),  # a cluster of one block
            *merges(1, 40, 600, 38, 20, half),  # of four
            *merges(1, 30, 1280, 24, 14, torch.bfloat16),  # of eight
            *merges(1, 30, 300, 26, 17, torch.float32),
            *merges(1, 24, 300, 24, 20, half, torch.float64),  # the order from rank_kernel
            *merges(1, 300, 24, 298, 270, half),  # two tiles of sources and of targets
        ]
    )
    query, keys, sizes = randn(2, 3, 64), randn(2, 3, 20, 64), rand(2, 20)
    found["class_attention_sort"] = lambda: op.class_attention_sort(query, keys, sizes)
    many = randn(1, 13, 1000, 8)
    found["class_attention_sort, heads in groups"] = lambda: op.class_attention_sort(many[:, :, 0], many)
    more = randn(1, 1, 1100, 8)
    found["class_attention_sort, rank_kernel"] = lambda: op.class_attention_sort(more[:, :, 0], more)
    q = randn(1, 2, 70, 40)
    found["attention_received"] = lambda: op.attention_received(q, q)
    wide = randn(1, 1, 20, 200)
    found["attention_received, slices"] = lambda: op.attention_received(wide, wide)
    found["attention_received, tiles"] = lambda: op.attention_received(many[:, :1, :300], many[:, :1, :300])
    found["attention_resident"] = lambda: op._attention_heads(q, q, q, size=rand(1, 70))
    stream = randn(1, 1, 260, 8)
    found["attention_streaming"] = lambda: op._attention_heads(stream, stream, stream)
    for rule in ("farthest", "dpp"):
        found[f"select_diverse, {rule}"] = lambda rule=rule: op.select_diverse(wide[0], 8, rule=rule)
    few, many_sources = torch.arange(20).remainder(3), 2 - (torch.arange(1040) < 1030).long()  # ranked in two tiles
    for name, role, metric, r in (("", few, wide[0], 6), (", tiles", many_sources, more[0, :, :1040], 1020)):
        joined = (randn(1, len(role), 3), metric, role[None], r)
        found[f"bipartite_merge{name}"] = lambda joined=joined: op.bipartite_merge(*joined, size=rand(*joined[2].shape))
    x, source = randn(3, 5, 384), torch.arange(20).remainder(12).expand(2, 20)
    found["add_layer_norm"] = lambda: op.add_layer_norm(x, x)
    grad = randn(2, 12, 64)
    found["_merge_backward"] = lambda: op._merge_backward(grad, source)
    scores, mask = randn(1, 2, 40, 40), rand(1, 40)
    found["masked_softmax"] = lambda: op.masked_softmax(scores, mask)
    found["_masked_softmax_backward"] = lambda: op._masked_softmax_backward(scores, scores, mask)
    return found


class Shim:
    def __init__(self, library: str) -> None:
        definitions = torch.library.Library("tokcomp_shim", "DEF")
        for name in OPS:
            definitions.define(BY_NAME[name].schema)
        self.definitions = definitions  # gone with the object
        torch.ops.load_library(library)
        self.functions = ctypes.CDLL(library)
        self.functions.shim_set_device.argtypes = (ctypes.c_int64, ctypes.c_int)
        self.functions.shim_set_schedule.argtypes = (ctypes.c_int64,)
        self.functions.shim_set_without.argtypes = (ctypes.c_uint64,)

    def run(self, name: str, case: Case) -> str | None:
        """What the first run with a report says, over devices and schedules."""
        for device, limits in DEVICES.items():
            self.functions.shim_set_device(*limits)
            for schedule in SCHEDULES:
                self.functions.shim_set_schedule(schedule)
                try:
                    case()
                except RuntimeError as error:
                    return f"{name} on {device}, schedule {schedule}: {str(error).splitlines()[0]}"
            if not name.startswith(MERGES):
                break
        return None

    def without(self, sites: int, all_cases: dict[str, Case]) -> str | None:
        """In a process of its own, which what is read too early may end."""
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            self.functions.shim_set_without(sites)
            reports = (self.run(*item) for item in all_cases.items())
            os.write(send, (next(filter(None, reports), "")).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as pipe:
            report = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return report or (f"ended by signal {-status}" if status else None)


def main() -> None:
    torch.set_num_threads(1)
    shim, all_cases = Shim(sys.argv[1]), cases()
    if len(sys.argv) == 2:
        for name, case in all_cases.items():
            start = time.perf_counter()
            report = shim.run(name, case)
            print(json.dumps({"case": name, "report": report, "seconds": round(time.perf_counter() - start, 2)}))
    else:
        for bits, _, site in (argument.partition("=") for argument in sys.argv[2:]):
            own = site.partition(".")[0]  # the kernel's own operator first, if it is named so
            start = time.perf_counter()
            report = shim.without(
                int(bits), {name: all_cases[name] for name in sorted(all_cases, key=lambda n: own not in n)}
            )
            print(
                json.dumps({"site": site, "report": report, "seconds": round(time.perf_counter() - start, 2)}),
                flush=True,
            )


if __name__ == "__main__":
    main()

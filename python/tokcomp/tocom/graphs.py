"""CUDA graphs of one model per degree, for batches of shapes that are known in advance."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, cuda, nn

_WARM_UP = 3  # runs before a capture: cuBLAS workspaces, Triton's compilation, lazy buffers


class _Shape(NamedTuple):
    """What a graph is captured for."""

    size: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def of(cls, images: Tensor) -> _Shape:
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return cls(tuple(images.shape), images.dtype, autocast)


class _Captured(NamedTuple):
    graph: cuda.CUDAGraph
    logits: Tensor
    nbytes: int


class Graphs:
    """One graph per degree and shape.

    They share one memory pool, so only one may run at a time: all replays are queued, under a lock, to one stream. It
    waits for the caller's stream, and that for it.
    """

    def __init__(self, models: Mapping[int, nn.Module]) -> None:
        self._models = models
        self._graphs: dict[tuple[int, _Shape], _Captured] = {}
        self._images: dict[_Shape, Tensor] = {}
        self._lock = threading.Lock()
        self._stream: cuda.Stream | None = None
        self._pool: Any = None

    def nbytes(self, degree: int) -> int:
        """Bytes that capturing this degree's graphs took."""
        return sum(captured.nbytes for (of, _), captured in self._graphs.items() if of == degree)

    def capture(self, images: Tensor) -> None:
        """Capture every degree for batches like ``images``, on their device."""
        shape = _Shape.of(images)
        with self._lock, torch.no_grad(), cuda.device(images.device):
            if self._stream is None:
                self._stream, self._pool = cuda.Stream(), cuda.graph_pool_handle()
            if shape not in self._images:
                self._images[shape] = images.clone()
            for degree, model in self._models.items():
                if (degree, shape) not in self._graphs:
                    self._graphs[degree, shape] = self._capture(model, shape)

    def _capture(self, model: nn.Module, shape: _Shape) -> _Captured:
        images, stream = self._images[shape], self._stream
        assert stream is not None
        # Weights that autocast has cast must not be kept between graphs: they would lie in a graph's memory.
        autocast = torch.autocast(
            "cuda", shape.autocast or torch.float16, enabled=shape.autocast is not None, cache_enabled=False
        )
        with autocast:
            stream.wait_stream(cuda.current_stream())
            with cuda.stream(stream):
                for _ in range(_WARM_UP):
                    model(images)
            cuda.synchronize()
            before = self._pool_bytes()
            graph = cuda.CUDAGraph()
            # Other threads may go on using the device.
            with cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = model(images)
        return _Captured(graph, logits, self._pool_bytes() - before)

    def _pool_bytes(self) -> int:
        segments = cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == self._pool)

    def run(self, degree: int, images: Tensor) -> Tensor | None:
        """Logits by the degree's graph, None where none was captured for such a batch."""
        captured = self._graphs.get((degree, shape := _Shape.of(images)))
        if captured is None or self._stream is None or images.device != captured.logits.device:
            return None
        with self._lock, cuda.device(images.device):
            caller = cuda.current_stream()
            self._stream.wait_stream(caller)
            with cuda.stream(self._stream):
                self._images[shape].copy_(images, non_blocking=True)
                captured.graph.replay()
                logits = captured.logits.clone()
            caller.wait_stream(self._stream)
        images.record_stream(self._stream)
        logits.record_stream(caller)
        return logits

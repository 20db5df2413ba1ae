"""CUDA graphs of models, for batch shapes that are known in advance."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, cuda, nn

from tokcomp.deploy.watch import refuse_varying

_WARM_UP = 3  # runs before a capture: cuBLAS workspaces, Triton's compilation, lazy buffers


class _Shape(NamedTuple):
    """The kind of batch that a graph is captured for."""

    size: tuple[int, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None

    @classmethod
    def of(cls, images: Tensor, batch: int | None = None) -> _Shape:
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        return cls((len(images) if batch is None else batch, *images.shape[1:]), images.dtype, autocast)


class _Captured(NamedTuple):
    graph: cuda.CUDAGraph
    logits: Tensor
    nbytes: int


def serve(device: torch.device) -> bool:
    """Whether this device has CUDA graphs."""
    return device.type == "cuda"


class Graphs:
    """One graph per model, identified by a key of the caller's, and batch shape.

    They share one memory pool, so only one may run at a time: all replays are queued, under a lock, on one stream,
    which waits for the caller's stream, which in turn waits for it.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[Hashable, _Shape], _Captured] = {}
        self._images: dict[_Shape, Tensor] = {}
        self._lock = threading.Lock()
        self._stream: cuda.Stream | None = None
        self._pool: Any = None

    def nbytes(self, key: Hashable, batch: int | None = None) -> int:
        """Bytes that capturing this model's graphs took, in total or for one batch size; input buffers not counted."""
        return sum(
            captured.nbytes
            for (of, shape), captured in self._graphs.items()
            if of == key and batch in (None, shape.size[0])
        )

    def input_nbytes(self, batch: int) -> int:
        """Bytes of the buffers into which batches of this size are copied."""
        return sum(images.nbytes for shape, images in self._images.items() if shape.size[0] == batch)

    def buffer(self, images: Tensor) -> Tensor | None:
        """What the graphs for batches like ``images``, under the current autocast, read; None if there are none.

        :meth:`run` copies nothing where it is given that buffer, or its first images.
        """
        with self._lock:
            return self._images.get(_Shape.of(images))

    def clear(self) -> None:
        """Drop every graph and its memory."""
        with self._lock:
            if self._stream is not None:
                self._stream.synchronize()
            self._graphs, self._images, self._stream, self._pool = {}, {}, None, None

    def capture(self, key: Hashable, model: nn.Module, images: Tensor) -> None:
        """Capture ``model`` for batches like ``images``, on their device and under the current autocast.

        Does nothing if there is such a graph for that key. Batches are best captured from the largest down: the later
        ones then reuse the memory in the pool.

        Raises:
            ValueError: images keep different numbers of tokens.
        """
        refuse_varying(model, "a CUDA graph")
        shape = _Shape.of(images)
        # Ordinary tensors even under inference_mode: batches from outside it are copied into them.
        with self._lock, torch.inference_mode(False), torch.no_grad(), cuda.device(images.device):
            if self._stream is None:
                self._stream, self._pool = cuda.Stream(), cuda.graph_pool_handle()
            if (key, shape) not in self._graphs:
                buffer = self._images.get(shape)
                buffer = images.clone() if buffer is None else buffer
                self._graphs[key, shape] = self._capture(model, shape, buffer)
                self._images[shape] = buffer

    def _capture(self, model: nn.Module, shape: _Shape, images: Tensor) -> _Captured:
        stream = self._stream
        assert stream is not None
        # Weights that autocast has cast must not be shared between graphs: they would be in one graph's memory.
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
            # Other threads may keep using the device.
            with cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = model(images)
        return _Captured(graph, logits, self._pool_bytes() - before)

    def _pool_bytes(self) -> int:
        segments = cuda.memory_snapshot()
        return sum(one["total_size"] for one in segments if tuple(one["segment_pool_id"]) == self._pool)

    def run(self, key: Hashable, images: Tensor, batch: int | None = None) -> Tensor | None:
        """Logits by the model's graph, in their own memory; None if no graph was captured for such a batch.

        With ``batch``, by the graph for that many images: what is in the places of the others does not matter.
        """
        shape = _Shape.of(images, batch)
        with self._lock, cuda.device(images.device):
            captured = self._graphs.get((key, shape))
            if captured is None or self._stream is None or images.device != captured.logits.device:
                return None
            caller = cuda.current_stream()
            self._stream.wait_stream(caller)
            with cuda.stream(self._stream):
                buffer = self._images[shape][: len(images)]
                if images.data_ptr() != buffer.data_ptr() or images.stride() != buffer.stride():
                    # Another part of the buffer would overlap with where it goes.
                    within = images.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
                    buffer.copy_(images.clone() if within else images, non_blocking=True)
                captured.graph.replay()
                logits = captured.logits[: len(images)].clone()
            caller.wait_stream(self._stream)
        images.record_stream(self._stream)
        logits.record_stream(caller)
        return logits

"""tokcomp.compile: a model for serving, captured as one CUDA graph per batch size."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcomp import fastpath
from tokcomp.deploy import graphs
from tokcomp.deploy.inputs import check_images, checked_batch, inputs_of
from tokcomp.deploy.watch import Watch

_KEY = "model"
_CALLER = 6  # frames from a warning up to the model's caller: forward, no_grad's wrapper, two of nn.Module's


class Memory(NamedTuple):
    """Bytes that a compiled model holds beyond the model itself."""

    #: By batch size: what its graph added to the pool that all share, and its input buffer.
    graphs: dict[int, int]
    #: Copies of the weights in oneDNN's layout, on CPU.
    packed: int

    @property
    def total(self) -> int:
        return sum(self.graphs.values()) + self.packed


def compile(
    model: nn.Module,
    batch: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    img_size: int | Sequence[int] | None = None,
    pad: bool = False,
) -> CompiledModel:
    """Capture a model for batches of known sizes: in CUDA graphs, nothing is compiled.

    On CUDA the whole model becomes one CUDA graph per batch size: one launch instead of hundreds. Batches of
    other sizes run without a graph, with a single warning, or with ``pad=True`` through the next larger graph. On other
    devices there are no graphs; the model runs once per size, so that weights are packed and memory is allocated.

    The model itself is not changed, and not copied: its weights serve both. Values written into them
    (``load_state_dict``, ``ToCom.fold``) take effect from the next batch on; if they are replaced, the model is
    compressed differently, or a module is exchanged, the next batch captures everything again, with a warning.

    Args:
        model: in evaluation mode, compressed or plain, on the device where it is to run; it must return one tensor of
            logits. What ``torch.compile`` returns will do as well.
        batch: number of images, or several such numbers.
        dtype: compute in this type by autocast, whatever autocast is active around the calls. None: in the weights' own
            type, which is faster if the model was converted (``model.half()``): on CUDA autocast casts each layer's
            input and leaves the path of fused kernels, of which a warning tells.
        img_size: side, or (height, width), of the images; None: the model's own.
        pad: on CUDA, run every batch through graphs: in pieces of the largest size, the last one padded up to the next
            size. An image's logits do not depend on what else is in its batch.

    Raises:
        TypeError: ``model`` is not a module, or its output not a tensor; ``batch`` is not a whole number; ``dtype`` is
            not float16, bfloat16 or the weights' own.
        ValueError: the model is in training mode, on the meta device or on several devices, or has no image size;
            ``batch`` is below 1 or empty.
    """
    return CompiledModel(model, batch, dtype=dtype, img_size=img_size, pad=pad)


class CompiledModel(nn.Module):
    """What :func:`compile` returns: call it with images [B, C, H, W] for their logits.

    The images are of the model's type, on its device. The logits belong to the caller, in their own memory, and carry
    no gradient. Any thread may call it, on any stream: batches that have graphs take turns. Copies and pickles hold the
    model and its settings, and are compiled anew. ``model`` is the model itself: call ``state_dict`` on that.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        batch: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        img_size: int | Sequence[int] | None = None,
        pad: bool = False,
    ) -> None:
        super().__init__()
        self.training = False
        self._img_size, self._inputs = img_size, inputs_of(model, img_size)
        self.model, self._autocast, self.pad = model, _autocast_dtype(dtype, self._inputs.dtype), pad
        self._graphs, self._lock, self._warned = graphs.Graphs(), threading.RLock(), False
        self._watch = Watch(model)
        self._batches: list[int] = []
        if self._autocast is not None and graphs.serve(self._inputs.device):
            warnings.warn(
                f"dtype={self._autocast} runs under autocast, which on CUDA leaves the fused kernels and is slower: "
                f"convert the model and its images instead, with .to({self._autocast})",
                stacklevel=3,
            )
        sizes = [batch] if isinstance(batch, int) else list(batch)
        if not sizes:
            raise ValueError("batch must name at least one size, got none")
        # The largest first: the others then reuse its memory in the pool.
        for size in sorted({checked_batch("batch", size) for size in sizes}, reverse=True):
            self.capture(size)

    def extra_repr(self) -> str:
        return f"batch={self.batches}, dtype={self._autocast or self._inputs.dtype}, pad={self.pad}"

    @property
    def batches(self) -> list[int]:
        """The batch sizes that it is ready for."""
        return sorted(self._batches)

    def capture(self, batch: int) -> None:
        """Make one more batch size ready; does nothing if it already is."""
        checked_batch("batch", batch)
        with self._lock:
            self._refresh()
            self._prepare(batch)
            if batch not in self._batches:
                self._batches = [*self._batches, batch]

    def input_buffer(self, batch: int) -> Tensor:
        """The memory that the graph for ``batch`` images reads, [batch, C, H, W]: filled and passed itself, no copy.

        ``buffer = compiled.input_buffer(64)``, then for each batch ``buffer.copy_(images)`` (from the host, say, or by
        the kernel that normalises them) and ``compiled(buffer)``; with ``pad=True`` its first images do as well. It
        may be filled anew once the call is back: the GPU keeps the order on the caller's stream. A call with other
        images of this size overwrites it, so it is for one caller at a time. When the graphs are captured again, of
        which a warning tells, it is a tensor like any other, and copied: ask for it anew. Without graphs, on a CPU,
        each call gives a tensor of the right shape.

        Raises:
            TypeError, ValueError: ``batch`` is not one of :attr:`batches`.
        """
        checked_batch("batch", batch)
        with self._lock, self._precision():
            if batch not in self._batches:
                ready = ", ".join(map(str, self.batches))
                raise ValueError(
                    f"batch must be one of those that are ready ({ready}), got {batch}: call capture({batch})"
                )
            images = self._inputs.batch(batch)
            buffer = self._graphs.buffer(images) if graphs.serve(images.device) else None
        return images if buffer is None else buffer

    def memory(self) -> Memory:
        """Bytes held beyond the model: per graph, and for packed weights."""
        packed = fastpath.packed_now(self.model)
        nbytes = {batch: self._graphs.nbytes(_KEY, batch) + self._graphs.input_nbytes(batch) for batch in self.batches}
        return Memory(nbytes, 0 if packed is None else packed.nbytes)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W].

        Raises:
            TypeError, ValueError: the images are not a tensor [B, C, H, W], or not of the model's type and device; or
                the model itself refuses their size.
        """
        if isinstance(images, Tensor) and not self._inputs.accepts(images):
            self._refresh()  # the model may have been moved or converted
        check_images(images, self._inputs)
        if self.model.training:
            raise ValueError("model must be in evaluation mode, got one in training mode: call model.eval()")
        with self._precision():
            if not graphs.serve(images.device):
                return self.model(images)
            logits = self._replay(images)
            if logits is None:
                self._say_once(images)
                return self.model(images)
        # Checked while the GPU is at work. A graph of the model's former state has read memory that is still allocated.
        return self.forward(images) if self._refresh() else logits

    def train(self, mode: bool = True) -> CompiledModel:
        """Refuses training mode."""
        if mode:
            raise ValueError("a compiled model is for inference: train its model, compiled.model")
        super().train(False)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _compiled, (self.model, self.batches, self._autocast, self._img_size, self.pad)

    def _precision(self) -> torch.autocast:
        enabled = self._autocast is not None
        return torch.autocast(self._inputs.device.type, self._autocast, enabled=enabled, cache_enabled=False)

    def _replay(self, images: Tensor) -> Tensor | None:
        """Logits through one or more graphs, or None if there is no graph for such a batch."""
        if tuple(images.shape[1:]) != self._inputs.shape or not len(images):
            return None
        batches = self._batches
        if len(images) in batches:
            return self._graphs.run(_KEY, images)
        if not self.pad or not batches:
            return None
        logits = []
        for part in images.split(max(batches)):
            fit = min(batch for batch in batches if batch >= len(part))
            logits.append(self._graphs.run(_KEY, part, fit))
        known = [one for one in logits if one is not None]
        if len(known) < len(logits):  # another thread is capturing anew
            return None
        return known[0] if len(known) == 1 else torch.cat(known)

    def _prepare(self, batch: int) -> None:
        images = self._inputs.batch(batch)
        with torch.no_grad(), self._precision():
            if batch not in self._batches:
                logits: Any = self.model(images)
                if not isinstance(logits, Tensor):
                    raise TypeError(f"model must return one tensor, got {type(logits).__name__}")
                del logits
            if graphs.serve(images.device):
                self._graphs.capture(_KEY, self.model, images)

    def _refresh(self) -> bool:
        """Start anew if the model has changed; returns whether it has."""
        with self._lock:
            change = self._watch.change()
            if change is None:
                return False
            if graphs.serve(self._inputs.device):
                warnings.warn(
                    f"{change} changed since the model was compiled: capturing its graphs again", stacklevel=_CALLER
                )
            self._graphs.clear()
            self._inputs, self._watch = inputs_of(self.model, self._img_size), Watch(self.model)
            done: list[int] = []
            try:
                for batch in sorted(self._batches, reverse=True):
                    self._prepare(batch)
                    done.append(batch)
            finally:
                self._batches = done
            return True

    def _say_once(self, images: Tensor) -> None:
        expected = tuple(images.shape[1:]) == self._inputs.shape and (self.pad or len(images) in self._batches)
        if self._warned or expected:
            return
        self._warned = True
        ready = ", ".join(map(str, self.batches))
        warnings.warn(
            f"images {list(images.shape)} have no CUDA graph and run without one, more slowly: there are graphs for "
            f"{ready} images of {list(self._inputs.shape)}; capture({len(images)}) makes one more, pad=True pads such "
            "batches. This is said once",
            stacklevel=_CALLER,
        )


def _compiled(
    model: nn.Module,
    batch: Sequence[int],
    dtype: torch.dtype | None,
    img_size: int | Sequence[int] | None,
    pad: bool,
) -> CompiledModel:
    return CompiledModel(model, batch, dtype=dtype, img_size=img_size, pad=pad)


def _autocast_dtype(dtype: torch.dtype | None, own: torch.dtype) -> torch.dtype | None:
    """The type to autocast to, or None not to autocast."""
    if dtype is None or dtype == own:
        return None
    if dtype not in (torch.float16, torch.bfloat16) or own != torch.float32:
        name, rule = str(own).removeprefix("torch."), "float16 or bfloat16" if own == torch.float32 else "the weights'"
        raise TypeError(f"dtype must be {rule} for a {name} model, got {dtype}; convert it: model.to(...)")
    return dtype

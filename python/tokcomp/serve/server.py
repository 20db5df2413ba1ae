"""A queue of images and a thread that answers them in batches, each at the degree that a policy gives."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from tokcomp.serve.policy import Policy
from tokcomp.tocom.switch import Switchable


@dataclass(frozen=True)
class Answer:
    """The answer to one request. Times are ``time.perf_counter`` seconds.

    Attributes:
        logits: [classes], on the CPU.
        arrival: when the request was due; latency counts from here.
        started, finished: times of its batch.
        degree: the degree at which its batch ran.
        batch: number of its batch, from 0.
        batch_size: images in its batch.
        waiting: requests in the queue when the batch was put together, its own included.
    """

    logits: Tensor
    arrival: float
    started: float
    finished: float
    degree: int
    batch: int
    batch_size: int
    waiting: int

    @property
    def latency(self) -> float:
        """Seconds from arrival to answer."""
        return self.finished - self.arrival


@dataclass
class _Request:
    image: Tensor
    arrival: float
    future: Future[Answer]


class Server:
    """Takes and answers images one by one, and computes them in batches.

    A worker thread takes the oldest request, waits up to ``max_wait_ms`` until ``max_batch`` are there, asks the policy
    for a degree, and runs the batch at it from end to end. Use it in a ``with`` block: at its end every request is
    answered, unless it ends by an exception (such as Ctrl-C), which drops the requests still waiting. Any thread may
    submit. A bad image is refused, or fails on its own; only a model or policy that is itself at fault ends the server.

    Args:
        model: answers batches of images at a degree.
        policy: chooses the degree.
        max_batch: most images in a batch.
        max_wait_ms: longest time, in milliseconds, that the first request of a batch waits for others.
        device: the device on which the model takes images; by default they are not moved.

    Raises:
        ValueError: a number is out of range, or the model lacks some of the policy's degrees.
    """

    def __init__(
        self,
        model: Switchable,
        policy: Policy,
        *,
        max_batch: int = 16,
        max_wait_ms: float = 2.0,
        device: torch.device | None = None,
    ) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        if not 0 <= max_wait_ms < float("inf"):
            raise ValueError(f"max_wait_ms must be a number of milliseconds, 0 or more, got {max_wait_ms}")
        unknown = sorted(set(policy.degrees) - set(model.degrees))
        if unknown:
            raise ValueError(f"policy must choose among the model's degrees, {model.degrees}, got {unknown}")
        self.model, self.policy, self.max_batch = model, policy, max_batch
        self._max_wait, self._device = max_wait_ms / 1000, device
        self._requests: queue.Queue[_Request | None] = queue.Queue()  # None: no more will come
        self._lock = threading.Lock()  # between submitting and closing
        self._closed = False
        self._dropping = threading.Event()
        self._error: BaseException | None = None
        self._batches = 0
        self._degree = policy.degrees[0]
        self._thread = threading.Thread(target=self._work, name="tokcomp-server", daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drop=error is not None)
        if error is None:
            self.check()

    @property
    def waiting(self) -> int:
        """Requests in the queue now."""
        return self._requests.qsize()

    @property
    def degree(self) -> int:
        """The degree of the latest batch."""
        return self._degree

    def submit(self, image: Tensor, *, arrival: float | None = None) -> Future[Answer]:
        """Queue one image [3, H, W]; the future gives its :class:`Answer`, or the exception that its image caused.

        Args:
            image: normalized, as the model takes it; not to be changed before it is answered.
            arrival: when it was due (``time.perf_counter``); now by default.

        Raises:
            TypeError, ValueError: the model does not take the image (:meth:`Switchable.check_image`).
            RuntimeError: the server is closed, or it failed, which is then the cause.
        """
        self.model.check_image(image)
        request = _Request(image, time.perf_counter() if arrival is None else arrival, Future())
        with self._lock:
            self.check()
            if self._closed or self._thread.ident is None:
                raise RuntimeError("the server must be running to take a request; use it inside its with block")
            self._requests.put(request)
        return request.future

    def check(self) -> None:
        """Raise if the worker failed.

        Raises:
            RuntimeError: it failed; its exception is the cause.
        """
        if self._error is not None:
            raise RuntimeError(f"the server stopped on {type(self._error).__name__}: {self._error}") from self._error

    def close(self, *, drop: bool = False) -> None:
        """Take no more requests and wait for the worker: until all are answered or, with ``drop``, for the batch that
        is running; futures of dropped requests are cancelled. Closing twice is allowed."""
        with self._lock:
            if drop:
                self._dropping.set()
            if not self._closed:
                self._closed = True
                self._requests.put(None)
        if self._thread.ident is None:
            return
        try:
            self._thread.join()
        except BaseException:
            # Interrupted while answering the rest: nobody is waiting for it any more.
            self._dropping.set()
            self._thread.join()
            raise

    def _work(self) -> None:
        batch: list[_Request] = []
        try:
            while batch := self._next_batch():
                self._answer(batch)
        except BaseException as error:
            with self._lock:
                self._error, self._closed = error, True
            for request in batch:
                if not request.future.done():
                    request.future.set_exception(error)
        finally:
            self._refuse_rest()

    def _next_batch(self) -> list[_Request]:
        """The requests of the next batch, one or more; none when no more will come."""
        batch: list[_Request] = []
        deadline = 0.0
        while len(batch) < self.max_batch:
            try:
                timeout = max(deadline - time.perf_counter(), 0.0) if batch else None
                request = self._requests.get(timeout=timeout)
            except queue.Empty:
                break
            if request is None:
                self._requests.put(None)  # nothing comes after it, so it stays the last entry
                break
            if self._dropping.is_set():
                request.future.cancel()
            elif request.future.set_running_or_notify_cancel():  # otherwise its sender has cancelled it
                deadline = deadline or time.perf_counter() + self._max_wait
                batch.append(request)
        return batch

    def _answer(self, batch: list[_Request]) -> None:
        with self._lock:
            waiting = len(batch) + self._requests.qsize() - self._closed  # the entry that marks the end
        started = time.perf_counter()
        self._degree = degree = self.policy.choose(waiting)
        rows = self._logits([request.image for request in batch], degree)
        finished = time.perf_counter()
        for request, row in zip(batch, rows, strict=True):
            if isinstance(row, Exception):
                request.future.set_exception(row)
                continue
            answer = Answer(row, request.arrival, started, finished, degree, self._batches, len(batch), waiting)
            request.future.set_result(answer)
        self._batches += 1

    def _logits(self, images: list[Tensor], degree: int) -> list[Tensor | Exception]:
        """Each image's logits [classes], or the exception of an image that cannot be answered.

        Images that fail together are tried one by one, so that none is lost because of its neighbour. If the model also
        fails on an empty image, it is itself at fault: its exception ends the server.
        """
        try:
            batch = torch.stack(images).to(self._device)
            return list(self.model(batch, degree).float().cpu())  # waits for a GPU
        except Exception as error:
            if len(images) > 1:
                return [self._logits([image], degree)[0] for image in images]
            try:
                self.model(self.model.example_image()[None].to(self._device), degree)
            except Exception:
                raise error from None
            return [error]

    def _refuse_rest(self) -> None:
        """Fail every remaining request with the error, or cancel it."""
        while True:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                return
            if request is None:
                continue
            if self._error is None:
                request.future.cancel()
            elif request.future.set_running_or_notify_cancel():
                request.future.set_exception(self._error)

"""Serving past one machine: a Ray Serve deployment whose replicas each choose their degree by their own queue.

Batches are made by :class:`tokcomp.serve.server.Server` in each replica; Ray Serve divides the requests, replaces
replicas that died, and scales their number. Needs ``pip install 'tokcomp[ray]'``.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from tokcomp.data import UnreadableImageError, load_image
from tokcomp.serve.policy import QueueLength
from tokcomp.serve.server import Answer, Server
from tokcomp.tocom.switch import Switchable

#: Upper ends of the latency histogram's buckets, in ms.
_BUCKETS_MS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


class Replica:
    """One process's server. Made by :func:`application`; here for those who write a deployment of their own.

    Args:
        build: makes the model, in the replica's own process.
        up, down: thresholds of :class:`tokcomp.serve.policy.QueueLength`, in requests of this replica; None: those of
            :meth:`QueueLength.by_batches`.
        max_batch, max_wait_ms: as for :class:`tokcomp.serve.server.Server`.
        transform: from a picture (PIL, RGB) to an image [3, H, W] as the model takes it, for requests by HTTP.
        metrics: where to count; None: nowhere.
    """

    def __init__(
        self,
        build: Callable[[], Switchable],
        up: Sequence[int] | None = None,
        down: Sequence[int] | None = None,
        max_batch: int = 16,
        max_wait_ms: float = 2.0,
        transform: Callable[[Any], Tensor] | None = None,
        metrics: Callable[[], Metrics] | None = None,
    ) -> None:
        model = build()
        if (up is None) != (down is None):
            raise ValueError(f"up and down must both be given or neither, got up={up}, down={down}")
        if up is None or down is None:
            policy = QueueLength.by_batches(model.degrees, max_batch)
        else:
            policy = QueueLength(model.degrees, up, down)
        self._device = model.example_image().device
        self._server = Server(model, policy, max_batch=max_batch, max_wait_ms=max_wait_ms, device=self._device)
        self._transform, self._metrics = transform, None if metrics is None else metrics()
        self._server.__enter__()

    def check_health(self) -> None:
        """Raise if the server stopped, so that Ray Serve starts another replica."""
        self._server.check()

    async def infer(self, image: Tensor) -> Answer:
        """The answer to one image [3, H, W], normalised, as the model takes it.

        Raises:
            TypeError, ValueError: the model does not take the image.
        """
        answer = await asyncio.wrap_future(self._server.submit(image))
        if self._metrics is not None:
            self._metrics.note(answer)
        return answer

    async def __call__(self, request: Any) -> Any:
        """HTTP: a picture as the body of a POST; the answer is JSON with its class, probability and degree."""
        from starlette.responses import JSONResponse

        if self._transform is None:
            return JSONResponse({"error": "application() was given no transform, so pictures cannot be read"}, 501)
        try:
            image = self._transform(load_image(io.BytesIO(await request.body()), "the request's body"))
        except UnreadableImageError:
            return JSONResponse({"error": "the body must be a picture, got what Pillow cannot read"}, 400)
        answer = await self.infer(image)
        probability, found = answer.logits.softmax(0).max(0)
        said = {"class": int(found), "probability": float(probability), "degree": answer.degree}
        return JSONResponse({**said, "latency_ms": 1000 * answer.latency})

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self._server.close(drop=True)


class Metrics:
    """Counts for Prometheus, which Ray exports with the replica's name."""

    def __init__(self) -> None:
        from ray.util import metrics

        self._requests = metrics.Counter("tokcomp_requests", "Requests that were answered.", ("degree",))
        self._latency = metrics.Histogram("tokcomp_latency_ms", "From arrival to answer.", _BUCKETS_MS, ("degree",))
        self._waiting = metrics.Gauge("tokcomp_waiting", "Requests in the queue when the last batch began.")
        self._degree = metrics.Gauge("tokcomp_degree", "The degree of the last batch.")

    def note(self, answer: Answer) -> None:
        tags = {"degree": str(answer.degree)}
        self._requests.inc(1, tags)
        self._latency.observe(1000 * answer.latency, tags)
        self._waiting.set(answer.waiting)
        self._degree.set(answer.degree)


def application(
    build: Callable[[], Switchable],
    *,
    up: Sequence[int] | None = None,
    down: Sequence[int] | None = None,
    max_batch: int = 16,
    max_wait_ms: float = 2.0,
    transform: Callable[[Any], Tensor] | None = None,
    **deployment: Any,
) -> Any:
    """A Ray Serve application of replicas that each hold the model: ``ray.serve.run(application(build))``.

    Args:
        build, up, down, max_batch, max_wait_ms, transform: as for :class:`Replica`.
        deployment: options of ``ray.serve.deployment``: ``num_replicas`` (2 by default), ``autoscaling_config``,
            ``ray_actor_options={"num_gpus": 1}`` and others. ``max_ongoing_requests`` is twice the last threshold of
            the queue by default, since what Ray Serve holds back no replica can see.

    Raises:
        ImportError: Ray Serve is not installed.
        ValueError: only one of up and down.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f"tokcomp.serve.cluster needs Ray Serve: pip install 'tokcomp[ray]' ({error})") from error
    if (up is None) != (down is None):
        raise ValueError(f"up and down must both be given or neither, got up={up}, down={down}")
    most = 16 * max_batch if up is None else 2 * max(up)
    options = {"name": "tokcomp", "max_ongoing_requests": most, **deployment}
    if "autoscaling_config" not in options:
        options.setdefault("num_replicas", 2)
    replica = serve.deployment(**options)(Replica)
    return replica.bind(build, up, down, max_batch, max_wait_ms, transform, Metrics)


class Client:
    """Asks a running application, and asks again where the replica that had a request died, so that none is lost.

    Any thread may ask. A request may be computed twice, which changes nothing.

    Args:
        handle: what ``ray.serve.run`` returned, or ``ray.serve.get_app_handle(name)``.
        attempts: how often a request is sent at most.

    Raises:
        ValueError: fewer than one attempt.
    """

    def __init__(self, handle: Any, attempts: int = 10) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self._infer, self._attempts = handle.infer, attempts
        self._lock = threading.Lock()
        #: Requests that were sent again, over all threads.
        self.resent = 0

    def ask(self, images: Sequence[Tensor]) -> list[Answer]:
        """The answers to images [3, H, W], in their order; all are sent before the first is waited for.

        Raises:
            ray.exceptions.RayActorError: a request's replica died in every attempt.
            ray.exceptions.RayTaskError: the model does not take an image; it is also of the kind that was raised there.
        """
        from ray.exceptions import RayActorError

        sent = [self._infer.remote(image) for image in images]
        answers: list[Answer] = []
        for image, response in zip(images, sent, strict=True):
            for attempt in range(1, self._attempts + 1):
                try:
                    answers.append(response.result())
                    break
                except RayActorError:
                    if attempt == self._attempts:
                        raise
                    with self._lock:
                        self.resent += 1
                    response = self._infer.remote(image)
        return answers

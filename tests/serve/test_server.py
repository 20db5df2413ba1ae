"""The queue and its thread: no clock is looked at; where order matters, the model waits for the test."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from tokcomp.serve.load import capacity, send
from tokcomp.serve.policy import Fixed, QueueLength
from tokcomp.serve.server import Server

from tests.serve.conftest import DEGREES, IMAGES
from tests.threads import in_threads

WAIT = 30  # seconds; for what must happen at once, on however slow a machine


def test_every_request_is_answered_once_with_its_own_logits(switchable):
    alone = {degree: torch.cat([switchable(image[None], degree) for image in IMAGES]) for degree in DEGREES}
    done = []
    policy = QueueLength(DEGREES, up=[3, 6], down=[1, 2])
    with Server(switchable, policy, max_batch=4, max_wait_ms=1) as server:

        def client(first):
            for number in range(first, first + 20):
                index = number % len(IMAGES)
                done.append((index, server.submit(IMAGES[index])))

        in_threads(client, (0, 5, 7))
    answers = [(index, future.result(timeout=0)) for index, future in done]
    assert len(answers) == 60
    for index, answer in answers:
        torch.testing.assert_close(answer.logits, alone[answer.degree][index], atol=1e-5, rtol=1e-5)
    batches = {}
    for _, answer in answers:
        batches.setdefault(answer.batch, []).append(answer)
    assert sorted(batches) == list(range(len(batches)))
    for batch in batches.values():
        assert len({(one.degree, one.started, one.finished, one.batch_size, one.waiting) for one in batch}) == 1
        assert len(batch) == batch[0].batch_size <= 4 and batch[0].waiting >= len(batch)
        assert all(one.arrival <= one.started <= one.finished and one.latency > 0 for one in batch)


def test_batches_and_degrees_follow_the_queue(held):
    policy = QueueLength(DEGREES, up=[4, 8], down=[1, 3])
    with Server(held, policy, max_batch=3, max_wait_ms=0) as server:
        futures = [server.submit(IMAGES[0])]
        assert held.begun.acquire(timeout=WAIT)  # the first batch is on its way, alone
        futures += [server.submit(IMAGES[number]) for number in range(1, 11)]
        assert server.waiting == 10
        held.go.set()
    answers = [future.result(timeout=0) for future in futures]
    # 10 wait, then 7, 4 and 1 are left.
    assert held.calls == [(0, 1), (4, 3), (4, 3), (4, 3), (0, 1)]
    assert [answers[first].waiting for first in (0, 1, 4, 7, 10)] == [1, 10, 7, 4, 1]
    assert [one.batch for one in answers] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert server.degree == 0 and server.waiting == 0


def test_a_batch_waits_for_others(held):
    """The second request comes after the first was taken from the queue, and still shares its batch."""
    with Server(held, Fixed(2), max_batch=2, max_wait_ms=1000 * WAIT) as server:
        first = server.submit(IMAGES[0])
        while server.waiting:
            time.sleep(0.001)
        assert not held.calls
        server.submit(IMAGES[1])
        held.go.set()
        assert first.result(timeout=WAIT).batch_size == 2


def test_the_end_of_the_block_answers_the_rest(held):
    with Server(held, Fixed(0), max_batch=2, max_wait_ms=0) as server:
        futures = [server.submit(image) for image in IMAGES[:7]]
        threading.Timer(0.05, held.go.set).start()
    assert all(future.done() for future in futures) and sum(size for _, size in held.calls) == 7
    with pytest.raises(RuntimeError, match="the server must be running to take a request"):
        server.submit(IMAGES[0])
    server.close()


class Broken:
    degrees = (0,)

    def __init__(self, begun, go):
        self.begun, self.go = begun, go

    def check_image(self, image):
        """Any will do."""

    def example_image(self):
        return IMAGES[0]

    def __call__(self, images, degree):
        self.begun.set()
        assert self.go.wait(WAIT)
        raise FloatingPointError("no such luck")


def test_an_exception_in_the_worker_reaches_everyone():
    begun, go = threading.Event(), threading.Event()
    with pytest.raises(RuntimeError, match="the server stopped on FloatingPointError: no such luck") as caught:  # noqa: SIM117
        with Server(Broken(begun, go), Fixed(0), max_batch=1, max_wait_ms=0) as server:
            futures = [server.submit(image) for image in IMAGES[:3]]
            assert begun.wait(WAIT)
            go.set()
            for future in futures:
                with pytest.raises(FloatingPointError, match="no such luck"):
                    future.result(timeout=WAIT)
            with pytest.raises(RuntimeError, match="the server stopped on FloatingPointError"):
                server.submit(IMAGES[0])
    assert isinstance(caught.value.__cause__, FloatingPointError)


ILL_SHAPED = [
    (IMAGES[0, :1], ValueError, r"image must be \[C, H, W\] = \[3, 32, 32\], got a tensor of shape \[1, 32, 32\]"),
    (IMAGES[0, :, :16], ValueError, r"got a tensor of shape \[3, 16, 32\]"),
    (IMAGES[:1], ValueError, r"got a tensor of shape \[1, 3, 32, 32\]"),
    (IMAGES[0].double(), TypeError, "image must be float32, as the model's weights are, got float64"),
    (IMAGES[0].byte(), TypeError, "image must be float32, .* got uint8"),
    (IMAGES[0].to_sparse(), TypeError, "image must be a dense tensor"),
    (None, TypeError, r"image must be a tensor \[C, H, W\], got NoneType"),
]


def test_an_ill_shaped_image_is_refused_at_once_and_costs_nobody_an_answer(switchable):
    with Server(switchable, Fixed(2), max_batch=8, max_wait_ms=50) as server:
        futures = []
        for number, (image, error, message) in enumerate(ILL_SHAPED):
            futures.append(server.submit(IMAGES[number]))
            with pytest.raises(error, match=message):
                server.submit(image)
    for number, future in enumerate(futures):
        torch.testing.assert_close(
            future.result(timeout=0).logits, switchable(IMAGES[number : number + 1], 2)[0], atol=1e-5, rtol=1e-5
        )


def test_a_request_that_fails_fails_alone(held):
    """Whatever passes the check and cannot be computed: here an image without data."""
    held.go.set()
    with Server(held, Fixed(0), max_batch=3, max_wait_ms=1000 * WAIT) as server:
        futures = [server.submit(image) for image in (IMAGES[0], IMAGES[1].to("meta"), IMAGES[2])]
        with pytest.raises((NotImplementedError, RuntimeError)):
            futures[1].result(timeout=WAIT)
        last = [server.submit(image) for image in IMAGES[:3]]
        assert [future.result(timeout=WAIT).batch_size for future in (futures[0], futures[2], *last)] == [3] * 5


def test_the_sender_hears_of_it_too():
    go = threading.Event()
    go.set()
    with (
        pytest.raises((RuntimeError, FloatingPointError), match="no such luck"),
        Server(Broken(threading.Event(), go), Fixed(0)) as server,
    ):
        send(server, IMAGES, [0.0, 3600.0], [0, 1])  # it does not sleep the hour


def test_an_exception_in_the_block_drops_what_waits(held):
    with pytest.raises(KeyboardInterrupt), Server(held, Fixed(0), max_batch=1, max_wait_ms=0) as server:
        futures = [server.submit(image) for image in IMAGES[:5]]
        assert held.begun.acquire(timeout=WAIT)
        threading.Timer(0.05, held.go.set).start()
        raise KeyboardInterrupt
    assert len(held.calls) == 1 and futures[0].result(timeout=0).batch == 0
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(timeout=0)


def test_a_cancelled_request_is_left_out(held):
    with Server(held, Fixed(0), max_batch=4, max_wait_ms=0) as server:
        futures = [server.submit(IMAGES[0])]
        assert held.begun.acquire(timeout=WAIT)
        futures += [server.submit(image) for image in IMAGES[1:4]]
        assert futures[2].cancel() and not futures[0].cancel()
        held.go.set()
    assert held.calls == [(0, 1), (0, 2)]
    assert [future.cancelled() for future in futures] == [False, False, True, False]


def test_send_keeps_the_order_and_counts_from_when_a_request_was_due(switchable):
    arrivals, chosen = np.linspace(0, 0.05, 30), np.arange(30) % len(IMAGES)
    seen = []
    with Server(switchable, Fixed(2), max_batch=4) as server:
        start, answers = send(server, IMAGES, arrivals, chosen, on_progress=lambda *args: seen.append(args))
    np.testing.assert_allclose([one.arrival - start for one in answers], arrivals, atol=1e-6)
    expected = switchable(IMAGES, 2)
    for index, answer in zip(chosen, answers, strict=True):
        torch.testing.assert_close(answer.logits, expected[index], atol=1e-5, rtol=1e-5)
    assert all(0 <= sent <= 30 for sent, _ in seen)


def test_capacity_keeps_batches_full(held):
    held.go.set()
    with Server(held, Fixed(4), max_batch=3, max_wait_ms=1000) as server:
        assert capacity(server, IMAGES, seconds=0.0) > 0
    assert held.calls == [(4, 3)] * 24


WRONG = {
    "batch": (dict(max_batch=0), "max_batch must be at least 1, got 0"),
    "wait": (dict(max_wait_ms=-1.0), "max_wait_ms must be a number of milliseconds, 0 or more, got -1"),
    "nan": (dict(max_wait_ms=float("nan")), "max_wait_ms must be a number of milliseconds, 0 or more, got nan"),
    "policy": (dict(policy=Fixed(3)), r"policy must choose among the model's degrees, \[0, 2, 4\], got \[3\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input(switchable, case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Server(switchable, **{"policy": Fixed(0), **options})


def test_a_server_that_was_not_started_takes_no_requests(switchable):
    server = Server(switchable, Fixed(0))
    with pytest.raises(RuntimeError, match="use it inside its with block"):
        server.submit(IMAGES[0])
    server.close()

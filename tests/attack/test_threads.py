"""Models that several threads and processes use, and a server that anybody sends to."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import tokcomp
import torch
from tokcomp.serve.policy import QueueLength
from tokcomp.serve.server import Server
from torch.utils.data import DataLoader, Dataset

from tests.attack.parts import MINUTES, Part
from tests.threads import in_threads
from tests.tocom.conftest import lively_plugin

DEGREES = [0, 2, 4]
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CALLS = 40 if MINUTES else 6


@pytest.fixture
def make_switchable(make_vit: Any) -> Callable[[], tokcomp.Switchable]:
    """Makes Switchables of one model."""
    model = make_vit()
    plugin = lively_plugin(model, std=1.0)
    return lambda: tokcomp.Switchable(model, plugin, degrees=DEGREES)


@pytest.fixture
def switchable(make_switchable: Callable[[], tokcomp.Switchable]) -> tokcomp.Switchable:
    return make_switchable()


def test_switching_while_threads_call(switchable: tokcomp.Switchable) -> None:
    """Each batch is answered at one degree from end to end: its answer is one of those of the degrees, to the bit."""
    want = {degree: switchable(IMAGES, degree) for degree in DEGREES}

    def check(rng: random.Random) -> str:
        over = threading.Event()

        def call() -> int:
            for _ in range(CALLS):
                answer = switchable(IMAGES)
                assert any(torch.equal(answer, one) for one in want.values()), "an answer of no degree"
            return CALLS

        def switch(seed: int) -> int:
            mine, switches = random.Random(seed), 0
            while not over.is_set():
                switchable.set_degree(mine.choice(DEGREES))
                switches += 1
            return switches

        with ThreadPoolExecutor(1) as other:
            switches = other.submit(switch, rng.random())
            try:
                in_threads(lambda _: call(), range(3))
            finally:
                over.set()
            assert switches.result() > 0
        return "answers right"

    Part("switching", share=0.04, few=2).each(check)


def test_changing_a_model_that_threads_call(make_vit: Any) -> None:
    """A change is refused while a call is in flight, and nothing of it is left. Between calls it is made."""
    model, method = make_vit(), tokcomp.ToMe(2)
    with torch.no_grad():
        plain = model(IMAGES)

    def check(rng: random.Random) -> str:
        inside, leave = threading.Event(), threading.Event()
        hook = model.blocks[rng.randrange(4)].register_forward_hook(
            lambda *_: inside.set() or (leave.wait(60) and None)
        )

        def call() -> torch.Tensor:
            with torch.no_grad():
                return model(IMAGES)

        with ThreadPoolExecutor(1) as other:
            answer = other.submit(call)
            assert inside.wait(60)
            try:
                with pytest.raises(RuntimeError, match="must not be called while it is changed"):
                    tokcomp.compress(model, method)
            finally:
                leave.set()
            assert torch.equal(answer.result(), plain)
        hook.remove()
        tokcomp.compress(model, method)
        tokcomp.restore(model)
        with torch.no_grad():
            assert torch.equal(model(IMAGES), plain)
        return "refused"

    Part("changing", share=0.02, few=2).each(check)


WRONG: list[Any] = [
    None, "image", torch.zeros(3, 31, 32), torch.zeros(1, 3, 32, 32), torch.zeros(3, 32, 32).double(),
    torch.zeros(3, 32, 32).to_sparse(), torch.zeros(0, 32, 32), torch.zeros(3, 32, 32, dtype=torch.int64),
]  # fmt: skip


def send(server: Server, seed: float) -> list[tuple[int, Future]]:
    """A client's requests: what is no image is refused where it is sent, some are taken back. Which image each is."""
    rng, sent = random.Random(seed), []
    for _ in range(CALLS):
        if rng.random() < 0.3:
            with pytest.raises((TypeError, ValueError)):
                server.submit(rng.choice(WRONG))
            continue
        index = rng.randrange(len(IMAGES))
        sent.append((index, server.submit(IMAGES[index])))
        if rng.random() < 0.1:
            sent.pop()[1].cancel()
    return sent


def serve(model: tokcomp.Switchable, alone: dict[int, torch.Tensor], seeds: list[float]) -> None:
    """A server with a client for each seed. Every answer is as if its image were alone: alone[degree][image]."""
    policy = QueueLength(DEGREES, up=[3, 6], down=[1, 2])
    with Server(model, policy, max_batch=4, max_wait_ms=1) as server:
        sent = in_threads(lambda seed: send(server, seed), seeds)
    for index, future in (one for requests in sent for one in requests):
        answer = future.result(timeout=0)
        # A batch's product may round as another batch's does not.
        torch.testing.assert_close(answer.logits, alone[answer.degree][index], atol=1e-5, rtol=1e-5)


def serve_in_a_fork(*args: Any) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads, and would wait for them
    serve(*args)


def answers_alone(model: tokcomp.Switchable) -> dict[int, torch.Tensor]:
    return {degree: torch.cat([model(image[None], degree) for image in IMAGES]) for degree in DEGREES}


def test_a_server_that_anybody_sends_to(switchable: tokcomp.Switchable) -> None:
    """What is no image is refused where it is sent; everything else is answered, as if it were alone."""
    alone = answers_alone(switchable)

    def check(rng: random.Random) -> str:
        serve(switchable, alone, [rng.random() for _ in range(3)])
        return "answers right"

    Part("server", share=0.04, few=2).each(check)


def test_replicas(switchable: tokcomp.Switchable, make_switchable: Any) -> None:
    """Servers that share a Switchable, one of another Switchable of the same model, and those of forked processes."""
    alone, context = answers_alone(switchable), get_context("fork")
    other = make_switchable()

    def check(rng: random.Random) -> str:
        forks = [
            context.Process(target=serve_in_a_fork, args=(model, alone, [rng.random(), rng.random()]))
            for model in (switchable, other)
        ]
        for fork in forks:
            fork.start()
        here = [(model, [rng.random(), rng.random()]) for model in (switchable, switchable, other)]
        in_threads(lambda one: serve(one[0], alone, one[1]), here)
        for fork in forks:
            fork.join(120)
        assert [fork.exitcode for fork in forks] == [0, 0]
        return "answers right"

    Part("replicas", share=0.03, few=1).each(check)


class Reduced(Dataset):
    """Images reduced by an operator, in whatever process loads them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        x = torch.randn(1, 60, 16, generator=torch.Generator().manual_seed(index))
        return torch.ops.tokcomp.tome_merge(x, x, 20)[0][0]


def test_workers_that_were_forked() -> None:
    want = torch.stack([Reduced()[index] for index in range(12)])

    def check(rng: random.Random) -> None:
        workers = rng.randint(1, 2)
        loader = DataLoader(Reduced(), batch_size=3, num_workers=workers, multiprocessing_context="fork")
        assert torch.equal(torch.cat(list(loader)), want)

    Part("workers", share=0.02, few=1).each(check)

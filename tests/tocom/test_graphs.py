"""CUDA graphs per degree: on a GPU for real; without one, who waits for whom and what is replayed, on stand-ins."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import tokcomp
import torch
from tokcomp.tocom import graphs
from torch import nn

from tests.tocom.conftest import IMAGES

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class StandIn(SimpleNamespace):
    """The part of torch.cuda that graphs.py uses, with work done at once and a record of what was asked."""

    def __init__(self):
        super().__init__(asked=[], current="caller", captured=None, pool=0)

    def Stream(self):
        return SimpleNamespace(name="own", wait_stream=lambda other: self.asked.append(("own waits for", other.name)))

    def current_stream(self):
        waits = lambda other: self.asked.append(("caller waits for", other.name))  # noqa: E731
        return SimpleNamespace(name="caller", wait_stream=waits)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def CUDAGraph(self):
        return SimpleNamespace(replay=None)

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert pool == (0, 1) and capture_error_mode == "thread_local"
        self.captured = graph
        self.pool += 100
        with self.stream(stream):
            yield

    def graph_pool_handle(self):
        return (0, 1)

    def memory_snapshot(self):
        return [
            {"total_size": self.pool, "segment_pool_id": (0, 1)},
            {"total_size": 7, "segment_pool_id": (0, 0)},
        ]

    def synchronize(self):
        pass

    def device(self, device):
        return contextlib.nullcontext()


class Scale(nn.Module):
    """A model whose capture leaves a replay behind."""

    def __init__(self, stand_in, factor):
        super().__init__()
        self.stand_in, self.factor = stand_in, factor

    def forward(self, images):
        logits = images * self.factor
        graph = self.stand_in.captured
        if graph is not None and graph.replay is None:

            def replay():
                self.stand_in.asked.append(("replay on", self.stand_in.current))
                logits.copy_(images * self.factor)

            graph.replay = replay
        return logits


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "cuda", stand_in)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return stand_in


def test_replays_on_stand_ins(stand_in):
    found = graphs.Graphs({degree: Scale(stand_in, degree) for degree in (1, 2)})
    assert found.run(1, torch.ones(3)) is None
    found.capture(torch.ones(3))
    assert found.nbytes(1) == found.nbytes(2) == 100
    found.capture(torch.zeros(3))  # there already
    assert found.nbytes(1) == 100
    stand_in.asked.clear()
    first, second = found.run(2, torch.full((3,), 5.0)), found.run(1, torch.full((3,), 6.0))
    assert first.tolist() == [10.0] * 3 and second.tolist() == [6.0] * 3
    assert stand_in.asked == 2 * [("own waits for", "caller"), ("replay on", "own"), ("caller waits for", "own")]
    assert found.run(1, torch.ones(4)) is None and found.run(1, torch.ones(3).double()) is None


def test_one_replay_at_a_time_on_stand_ins(stand_in):
    found = graphs.Graphs({degree: Scale(stand_in, degree) for degree in (1, 2)})
    found.capture(torch.ones(3))
    failures = []

    def work(degree, value):
        for _ in range(50):
            if found.run(degree, torch.full((3,), value)).tolist() != [degree * value] * 3:
                failures.append(degree)

    threads = [threading.Thread(target=work, args=(1 + index % 2, float(index))) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@on_gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_graphs_on_a_gpu(make_vit, make_plugin, autocast):
    model = make_vit(embed_dim=48).cuda()
    images = IMAGES.cuda()
    if not autocast:
        model, images = model.half(), images.half()
    switchable = tokcomp.Switchable(model, make_plugin(model), degrees=[0, 2, 4])
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        expected = {degree: switchable(images, degree) for degree in (0, 2, 4)}
        switchable.prepare(torch.zeros_like(images))
        for degree in (4, 0, 2, 4):
            switchable.set_degree(degree)
            assert torch.equal(switchable(images), expected[degree])
            assert switchable(images[:2]).shape == (2, 5)
    assert all(number > 0 for number in switchable.memory().values())


@on_gpu
def test_threads_on_a_gpu(make_vit, make_plugin):
    model = make_vit(embed_dim=48).cuda().half()
    switchable, images = tokcomp.Switchable(model, make_plugin(model), degrees=[0, 4]), IMAGES.cuda().half()
    switchable.prepare(images)
    expected = {degree: switchable(images, degree) for degree in (0, 4)}
    failures = []

    def work(degree):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(switchable(images, degree), expected[degree]):
                    failures.append(degree)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(degree,)) for degree in (0, 4, 0, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures

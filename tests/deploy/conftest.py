"""Small models, and a stand-in for CUDA's graphs where there is no GPU."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import tokcomp
import torch
from tokcomp.deploy import graphs
from torch import nn

from tests.library.conftest import images_for, make_vit, method, methods  # noqa: F401


@pytest.fixture
def model(make_vit, methods):  # noqa: F811
    return tokcomp.compress(make_vit(), methods["diffrate"])


@torch.no_grad()
def eager(model, images):
    return model(images)


class StandIn(SimpleNamespace):
    """The part of torch.cuda that graphs.py uses, with work done at once and a record of what was asked."""

    def __init__(self):
        super().__init__(asked=[], current="caller", captured=None, pool=0)

    def Stream(self):
        return SimpleNamespace(
            name="own",
            wait_stream=lambda other: self.asked.append(("own waits for", other.name)),
            synchronize=lambda: self.asked.append(("own is done",)),
        )

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
        self.captured = None

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


class Recorded(nn.Module):
    """A model whose capture leaves a replay behind: like a graph, it goes by the weights' memory at that time."""

    def __init__(self, stand_in, model):
        super().__init__()
        self.stand_in, self.inner = stand_in, model
        self.train(model.training)
        self.eager = 0

    def forward(self, images):
        logits = self.inner(images)
        graph = self.stand_in.captured
        if graph is None:
            self.eager += 1
            return logits
        memory = {id(one): nn.Parameter(one.detach(), requires_grad=False) for one in self.inner.parameters()}
        as_it_is = copy.deepcopy(self.inner, memory)

        def replay():
            self.stand_in.asked.append(("replay on", self.stand_in.current))
            with torch.no_grad():
                logits.copy_(as_it_is(images))

        graph.replay = replay
        return logits


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(graphs, "cuda", stand_in)
    monkeypatch.setattr(graphs, "serve", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return stand_in


@pytest.fixture
def recorded(stand_in):
    """Wraps a model for the stand-in: recorded(model)."""
    return lambda model: Recorded(stand_in, model)


@pytest.fixture
def served(model, recorded):
    """A model on stand-ins for a GPU, and the images' arguments: graphs of 2 and 4 images."""
    return lambda **options: tokcomp.compile(recorded(model), [2, 4], img_size=32, **options)

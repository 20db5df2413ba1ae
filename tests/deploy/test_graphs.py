"""CUDA graphs on stand-ins: who waits for whom, what is replayed, what it takes."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from tokcomp.deploy.graphs import Graphs
from torch import nn

from tests.threads import in_threads


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(factor)), requires_grad=False)

    def forward(self, images):
        return images * self.weight


@pytest.fixture
def models(recorded):
    return {degree: recorded(Scale(degree)) for degree in (1, 2)}


def capture(found, models, images):
    for degree, model in models.items():
        found.capture(degree, model, images)


def test_replays(stand_in, models):
    found = Graphs()
    assert found.run(1, torch.ones(3)) is None
    capture(found, models, torch.ones(3))
    assert found.nbytes(1) == found.nbytes(2) == 100 and found.input_nbytes(3) == 12
    capture(found, models, torch.zeros(3))  # there already
    assert found.nbytes(1) == 100
    stand_in.asked.clear()
    first, second = found.run(2, torch.full((3,), 5.0)), found.run(1, torch.full((3,), 6.0))
    assert first.tolist() == [10.0] * 3 and second.tolist() == [6.0] * 3
    assert stand_in.asked == 2 * [("own waits for", "caller"), ("replay on", "own"), ("caller waits for", "own")]
    assert found.run(1, torch.ones(4)) is None and found.run(1, torch.ones(3).double()) is None


def test_fewer_images_than_the_graph_has_places(models):
    found = Graphs()
    capture(found, models, torch.ones(3))
    assert found.run(2, torch.full((1,), 5.0), batch=3).tolist() == [10.0]
    assert found.run(2, torch.full((2,), 6.0), batch=3).tolist() == [12.0, 12.0]
    assert found.run(2, torch.full((2,), 6.0), batch=4) is None


def test_clear(stand_in, models):
    found = Graphs()
    found.clear()  # nothing to do
    capture(found, models, torch.ones(3))
    stand_in.asked.clear()
    found.clear()
    assert stand_in.asked == [("own is done",)]
    assert found.run(1, torch.ones(3)) is None and found.nbytes(1) == found.input_nbytes(3) == 0


def test_captured_in_inference_mode_and_used_outside(models):
    found = Graphs()
    with torch.inference_mode():
        capture(found, models, torch.ones(3))
    assert found.run(1, torch.zeros(3)).tolist() == [0.0] * 3


def test_a_capture_that_fails_leaves_nothing(models):
    found = Graphs()

    models[1].register_forward_hook(Mock(side_effect=torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        found.capture(1, models[1], torch.ones(3))
    assert found.run(1, torch.ones(3)) is None and found.input_nbytes(3) == 0


def test_one_replay_at_a_time(models):
    found = Graphs()
    capture(found, models, torch.ones(3))

    def work(index):
        degree, value = 1 + index % 2, float(index)
        for _ in range(50):
            assert found.run(degree, torch.full((3,), value)).tolist() == [degree * value] * 3

    in_threads(work, range(4))

"""The input of a CUDA graph, which callers may fill themselves: on stand-ins."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from torch import nn

from tests.deploy.conftest import eager


@pytest.fixture
def copies(monkeypatch):
    """Shapes of what was copied over the start of a graph's input, in order."""
    found, copy_ = [], torch.Tensor.copy_

    def watched(self, other, non_blocking=False):
        if non_blocking:
            found.append(list(other.shape))
        return copy_(self, other, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", watched)
    return found


def test_a_caller_may_fill_the_graph_s_own_input(served, model, images_for, copies):
    compiled = served(pad=True)
    buffer = compiled.input_buffer(4)
    assert buffer.data_ptr() != compiled.input_buffer(2).data_ptr() and buffer.shape == (4, 3, 32, 32)
    for seed in (1, 2):
        images = images_for(model, 4, seed=seed)
        buffer.copy_(images)
        torch.testing.assert_close(compiled(buffer), eager(model, images), atol=2e-5, rtol=0)
        torch.testing.assert_close(compiled(buffer[:3]), eager(model, images[:3]), atol=2e-5, rtol=0)
    assert copies == []
    torch.testing.assert_close(compiled(buffer[1:]), eager(model, images[1:]), atol=2e-5, rtol=0)
    compiled(images)
    compiled(buffer[:2])  # the graph for two reads other memory
    assert copies == [[3, 3, 32, 32], [4, 3, 32, 32], [2, 3, 32, 32]]


def test_an_input_that_is_no_longer_the_graph_s_is_copied(served, model, images_for, copies):
    compiled = served()
    before = compiled.input_buffer(4)
    model.head = nn.Linear(model.head.in_features, 5).eval()
    with pytest.warns(UserWarning, match="capturing its graphs again"):
        compiled(images_for(model, 4))
    copies.clear()
    images = images_for(model, 4, seed=3)
    torch.testing.assert_close(compiled(before.copy_(images)), eager(model, images), atol=2e-5, rtol=0)
    assert copies == [[4, 3, 32, 32]] and compiled.input_buffer(4).data_ptr() != before.data_ptr()


def test_input_buffers_without_graphs_and_refused_ones(model):
    compiled = tokcomp.compile(model, [1, 3])
    assert compiled(compiled.input_buffer(3)).shape[0] == 3
    with pytest.raises(
        ValueError, match=r"batch must be one of those that are ready \(1, 3\), got 2: call capture\(2\)"
    ):
        compiled.input_buffer(2)
    with pytest.raises(TypeError, match="batch must be a whole number, got None"):
        compiled.input_buffer(None)

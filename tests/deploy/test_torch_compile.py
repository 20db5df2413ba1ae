"""torch.compile of compressed models: one graph for every batch size, and what inductor makes of it on CPU."""

from __future__ import annotations

import pytest
import tokcomp
import torch
from torch._dynamo.testing import CompileCounterWithBackend

SCHEDULE = tokcomp.CompressionSchedule([14, 11], [12, 6])
METHODS = {
    "diffrate": tokcomp.DiffRate(SCHEDULE),
    "diffrate-image_attn": tokcomp.DiffRate(SCHEDULE, metric="image_attn"),
    "diffrate-random": tokcomp.DiffRate(SCHEDULE, metric="random", pipeline="merge_prune"),
    "tome": tokcomp.ToMe(3),
    "evit": tokcomp.EViT(0.6, blocks=(1,)),
}


@pytest.fixture
def compressed(make_vit):
    torch._dynamo.reset()
    yield lambda name: tokcomp.compress(make_vit(depth=2), METHODS[name])
    torch._dynamo.reset()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name, dynamic", [*((name, True) for name in METHODS), ("diffrate", None)])
def test_one_graph_serves_every_batch(compressed, images_for, name, dynamic):
    model = compressed(name)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (2, 3, 7):
        images = images_for(model, batch)
        if dynamic is None:
            torch._dynamo.mark_dynamic(images, 0)
        torch.testing.assert_close(compiled(images), model(images), atol=2e-5, rtol=0)
    assert counter.frame_count == 1


@pytest.mark.slow
@torch.no_grad()
def test_inductor(compressed, make_vit, images_for):
    model = tokcomp.compress(make_vit(depth=1), tokcomp.ToMe(3))
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for batch in (4, 2, 6):  # not 3 first: PyTorch would take batch and channels for one size
            images = images_for(model, batch)
            with torch.compiler.set_stance("default" if batch == 4 else "fail_on_recompile"):
                torch.testing.assert_close(compiled(images), model(images), atol=2e-5, rtol=0)

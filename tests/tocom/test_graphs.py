"""Degrees as CUDA graphs, on a GPU; tests/deploy has the graphs themselves on stand-ins."""

from __future__ import annotations

import pytest
import tokcomp
import torch

from tests.threads import in_threads
from tests.tocom.conftest import IMAGES

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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

    def work(degree):
        with torch.cuda.stream(torch.cuda.Stream()):
            assert all(torch.equal(switchable(images, degree), expected[degree]) for _ in range(50))

    torch.cuda.synchronize()
    in_threads(work, (0, 4, 0, 4))

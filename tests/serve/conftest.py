"""A small model at several degrees, behind a real queue."""

from __future__ import annotations

import threading

import pytest
import tokcomp
import torch

from tests.library.conftest import make_vit, meta_model, published  # noqa: F401
from tests.tocom.conftest import lively_plugin

DEGREES = [0, 2, 4]
IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def switchable(make_vit):  # noqa: F811
    """The model at degrees 0, 2 and 4, each with weights of its own."""
    model = make_vit()
    return tokcomp.Switchable(model, lively_plugin(model, seed=1, std=1.0), degrees=DEGREES)


class Held:
    """A Switchable that starts no batch before ``go`` is set, so that a test decides what waits meanwhile."""

    def __init__(self, model):
        self.model, self.degrees, self.go = model, model.degrees, threading.Event()
        self.check_image, self.example_image = model.check_image, model.example_image
        self.begun = threading.Semaphore(0)  # one per batch that has come this far
        self.calls: list[tuple[int, int]] = []  # degree, images

    def __call__(self, images, degree):
        self.calls.append((degree, len(images)))
        self.begun.release()
        assert self.go.wait(30)
        return self.model(images, degree)


@pytest.fixture
def held(switchable):
    held = Held(switchable)
    yield held
    held.go.set()  # whatever the test came to, no thread waits for it

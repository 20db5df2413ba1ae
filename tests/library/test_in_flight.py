"""Changing a model while another thread is in a call of it: refused, and nothing is changed."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import tokcomp
import torch
from tokcomp import adaptformer
from tokcomp.adapters import find_adapter
from tokcomp.dense.segmenter import Segmenter
from tokcomp.in_flight import thread_in

from tests.tocom.conftest import lively_plugin

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REFUSED = r"the model must not be called while it is changed, got a call in thread 'server'"


class Call:
    """A call of a model in a thread of its own that waits in its last block until it is let go."""

    def __init__(self, model, call=None):
        self.arrived, self.go, self.answer = threading.Event(), threading.Event(), None
        encoder = getattr(model, "encoder", model)
        self.hook = encoder.blocks[-1].register_forward_pre_hook(self.wait)
        self.thread = threading.Thread(target=self.run, args=(model if call is None else call,), name="server")

    @torch.compiler.disable
    def wait(self, *_):
        self.arrived.set()
        self.go.wait(60)

    @torch.no_grad()
    def run(self, call):
        self.answer = call(IMAGES)

    @contextmanager
    def running(self):
        self.thread.start()
        try:
            assert self.arrived.wait(60)
            yield
        finally:
            self.go.set()
            self.thread.join()
            self.hook.remove()


@pytest.fixture
def plugin(make_vit):
    return lively_plugin(make_vit(), std=1.0)


CHANGES = {
    "compress": lambda model, plugin: tokcomp.compress(model, tokcomp.ToMe(2)),
    "restore": lambda model, plugin: tokcomp.restore(model),
    "fold": lambda model, plugin: plugin.fold(model, 0, 4),
    "unfold": lambda model, plugin: plugin.unfold(model),
    "attach": lambda model, plugin: adaptformer.attach(model, 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_in_use_is_not_changed(make_vit, plugin, change):
    model = make_vit()
    if change == "restore":
        tokcomp.compress(model, tokcomp.ToMe(4))
    if change == "unfold":
        plugin.fold(model, 0, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hook = model.blocks[-1].register_forward_pre_hook(lambda *_: None)  # as the call has one
    with torch.no_grad():
        wanted = model(IMAGES)
    hook.remove()
    classes = [type(module) for module in model.modules()]
    call = Call(model)
    with call.running(), pytest.raises(RuntimeError, match=REFUSED):
        CHANGES[change](model, plugin)
    assert torch.equal(call.answer, wanted) and [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    CHANGES[change](model, plugin)


@pytest.mark.parametrize("change", ["compress", "restore", "fold"])
def test_a_call_that_begins_meanwhile_undoes_the_change(make_vit, plugin, monkeypatch, change):
    model = make_vit()
    if change == "restore":
        tokcomp.compress(model, tokcomp.ToMe(4))
    with torch.no_grad():
        wanted = model(IMAGES)
    found = iter([None, "server"])
    monkeypatch.setattr("tokcomp.in_flight.thread_in", lambda _: next(found))
    with pytest.raises(RuntimeError, match=REFUSED):
        CHANGES[change](model, plugin)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), wanted)
    assert (find_adapter(model).method(model) is None) == (change != "restore")


@pytest.mark.slow
def test_whose_call_it_is(make_vit):
    """Of a part, of what stands around the model, compiled or not; not of another model, nor of this thread."""
    model, other = make_vit(), make_vit()
    for call in (model.forward_features, torch.compile(model, backend="eager")):
        running = Call(model, call)
        with running.running():
            assert thread_in(model) == "server" and thread_in(other) is None and thread_in(model.blocks[-1]) is not None
    segmenter = Segmenter(make_vit(num_classes=0), 3, "linear").eval()
    with Call(segmenter).running():
        assert thread_in(segmenter.encoder) == "server"
    seen = []
    model.register_forward_hook(lambda *_: seen.append(thread_in(model)))
    model(IMAGES)
    assert seen == [None] and thread_in(model) is None

"""Calls that an exception ends half-way, a Ctrl-C say: the model is as it was before them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tokcomp
import torch
from tokcomp.fastpath import packing
from tokcomp.tocom import fold, layers

from tests.tocom.conftest import qkv_weights, same_bits

TRACED = {str(Path(module.__file__)) for module in (fold, layers, packing)}
STEPS = ["fold", "fold again", "unfold"]


class Stop(BaseException):
    """Such as KeyboardInterrupt."""


def everything(model):
    """The bits of all parameters and buffers, by name, and what is folded in."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: one.detach().view(torch.uint8).numpy().tobytes() for name, one in tensors.items()}, fold.fold_of(
        model
    )


def take(step, plugin, model):
    plugin.unfold(model) if step == "unfold" else plugin.fold(model, 0, 4)


@pytest.mark.parametrize("writes", range(8))
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_at_any_write(make_vit, make_plugin, monkeypatch, writes, step, dtype):
    model = make_vit().to(dtype)
    plugin, plain = make_plugin(model), qkv_weights(model)
    if step != "fold":
        plugin.fold(model, 0, 2)
    before, left = everything(model), [writes]
    original = torch.Tensor.copy_

    def failing(tensor, *args, **kwargs):
        left[0] -= 1
        if left[0] == -1:
            raise Stop
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(Stop):
        take(step, plugin, model)
    monkeypatch.undo()
    assert everything(model) == before
    plugin.unfold(model)
    assert same_bits(qkv_weights(model), plain) and list(model.buffers()) == []


@pytest.mark.parametrize("step", STEPS)
def test_at_any_line(make_vit, make_plugin, step):
    """An exception at every line, in turn, of all that touches weights and records."""
    model = tokcomp.compress(make_vit(depth=1).bfloat16(), tokcomp.ToMe(2))
    plugin, left = make_plugin(model, max_degree=4), [0]
    if step != "fold":
        plugin.fold(model, 0, 2)

    def trace(frame, event, _):
        if frame.f_code.co_filename not in TRACED:
            return None
        left[0] -= event == "line"
        if event == "line" and left[0] == -1:
            sys.settrace(outer)
            raise Stop
        return trace

    before, lines, done, outer = everything(model), 0, False, sys.gettrace()
    while not done:
        left[0] = lines
        try:
            sys.settrace(trace)
            take(step, plugin, model)
            done = True
        except Stop:
            pass
        finally:
            sys.settrace(outer)
        if not done:
            assert everything(model) == before, f"after {lines} lines"
            lines += 1
    assert lines > 50 and everything(model) != before

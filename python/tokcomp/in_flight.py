"""Detecting calls of a model in other threads when it is about to be changed.

The code that changes the model looks through the threads' stacks, so that calls pay nothing for it: no lock and no
counter in forward, and nothing on the model that copies, pickles, torch.compile or CUDA graphs would see.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FrameType

from torch import nn

#: Functions through which a wrapper (a compiled module, a segmenter) calls the model inside it.
_CALLS = {"__call__", "_wrapped_call_impl", "_call_impl", "forward"}


def thread_in(model: nn.Module) -> str | None:
    """The name of another thread that is calling ``model``, a part of it or a module around it."""
    own = threading.get_ident()
    stacks = {ident: frame for ident, frame in sys._current_frames().items() if ident != own}
    if not stacks:
        return None
    parts = {id(module) for module in model.modules()}
    for ident, frame in stacks.items():
        if any(_is_call(one, model, parts) for one in _outwards(frame)):
            return next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))
    return None


def require_idle(model: nn.Module) -> None:
    """Raise RuntimeError if another thread is calling ``model``.

    Called before and after a change. Only a call that begins and ends during the change is missed.
    """
    thread = thread_in(model)
    if thread is not None:
        raise RuntimeError(
            f"the model must not be called while it is changed, got a call in thread '{thread}': let its calls end "
            "first, or change a copy; tokcomp.Switchable changes degrees between the batches of any threads"
        )


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_call(frame: FrameType, model: nn.Module, parts: set[int]) -> bool:
    code = frame.f_code
    if "self" not in code.co_varnames and "self" not in code.co_cellvars:
        return False
    module = frame.f_locals.get("self")
    if not isinstance(module, nn.Module):
        return False
    return id(module) in parts or (code.co_name in _CALLS and any(inner is model for inner in module.modules()))

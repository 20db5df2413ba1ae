"""Bytes of the tensors that PyTorch's operators take and give, counted where they are dispatched."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Call(NamedTuple):
    """One operator that computed something: bytes of its tensor arguments and of its results, and their shapes."""

    name: str
    read: int
    written: int
    taken: tuple[torch.Size, ...]
    given: tuple[torch.Size, ...]

    @property
    def matrix(self) -> tuple[int, int, int] | None:
        """Rows, inputs and outputs of a linear layer."""
        if self.name not in ("addmm", "_linear_pointwise"):
            return None
        inputs = self.taken[1] if self.name == "addmm" else self.taken[0]
        return inputs[:-1].numel(), inputs[-1], self.given[0][-1]


class Dispatched(TorchDispatchMode):
    """``with Dispatched() as seen:`` lists in ``seen.calls`` every operator but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        made = [one for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        storages = {_storage(one) for one in given}
        fresh = [one for one in made if one.numel() and _storage(one) not in storages]
        if given and (fresh or func._schema.is_mutable):
            name, written = func.name().split("::")[1].split(".")[0], fresh or made
            shapes = (tuple(one.shape for one in tensors) for tensors in (given, written))
            self.calls.append(Call(name, _bytes(given), _bytes(written), *shapes))
        return out


def _storage(tensor: torch.Tensor) -> int:
    """Where a tensor's memory is; oneDNN's packed weights do not tell, and nothing shares theirs."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)

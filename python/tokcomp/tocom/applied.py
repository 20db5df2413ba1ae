"""Low-rank terms added to q and v while a ``with`` block runs, without touching the model's own modules.

The modules on the way from the model to its packed layers are replaced by twins that share their parameters, buffers,
hooks and other children. A twin keeps its terms for as long as it is referenced, so gradient checkpointing, which runs
a block again in the backward pass, repeats the same computation even after the ``with`` block has ended.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters.swap import Swapped, original_class, swap_class
from tokcomp.adapters.twins import exchange, modules_on_the_way, twins_of

_TERMS = "_tokcomp_terms"


class Term(NamedTuple):
    """``factor * up @ down`` for the q and for the v rows of one layer."""

    q_down: Tensor  # [K, C]
    q_up: Tensor  # [A, K]
    v_down: Tensor
    v_up: Tensor
    columns: slice  # the part of K in use
    factor: float

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """``out`` [..., 3A] with the term of tokens ``x`` [..., C] added to its q and v."""
        down = torch.cat((self.q_down[self.columns], self.v_down[self.columns]))  # [2R, C]
        hidden = F.linear(x, down.to(x)) * self.factor  # [..., 2R]
        q_up, v_up = self.q_up[:, self.columns], self.v_up[:, self.columns]  # [A, R]
        rank = q_up.shape[1]
        no_k = q_up.new_zeros(q_up.shape[0], 2 * rank)
        up = torch.cat((F.pad(q_up, (0, rank)), no_k, F.pad(v_up, (rank, 0))))  # [3A, 2R]
        flat = torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2).to(out), up.to(out).t())
        return flat.view(out.shape)


class Compensated(Swapped):
    """A packed layer that adds its terms to what it computes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy or pickle of the model that is made while the block runs does not contain the terms.
        state = {name: value for name, value in vars(self).items() if name != _TERMS}
        return object.__new__, (original_class(self),), state

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        for term in self.__dict__[_TERMS]:
            out = term.add(x, out)
        return out


@contextmanager
def terms_added(model: nn.Module, layers: Sequence[nn.Linear], terms: Sequence[Term]) -> Iterator[None]:
    """Add one term per layer while the block runs; blocks nest, and may end in any order."""
    twins = _TWINS.get(model)
    if twins is None:
        twins = _TWINS[model] = _Twins(model, layers)
    scope = list(terms)
    twins.scopes.append(scope)
    twins.renew(model)
    try:
        yield
    finally:
        twins.scopes = [other for other in twins.scopes if other is not scope]
        twins.renew(model)
        if not twins.scopes:
            _TWINS.pop(model, None)


class _Twins:
    """A model's own modules on the way to its packed layers, and the twins that stand in for them now."""

    def __init__(self, model: nn.Module, layers: Sequence[nn.Linear]) -> None:
        self.layers, self.own = modules_on_the_way(model, layers)
        self.twins: dict[str, nn.Module] = {}
        self.scopes: list[list[Term]] = []

    def renew(self, model: nn.Module) -> None:
        """Put twins with the terms of all open scopes in place, or the model's own modules if none is open."""
        self._take_back(model)
        if not self.scopes:
            return
        self.twins = twins_of(self.own)
        for index, path in enumerate(self.layers):
            swap_class(self.twins[path], Compensated)
            self.twins[path].__dict__[_TERMS] = [scope[index] for scope in self.scopes]
        exchange(model, {id(self.own[path]): twin for path, twin in self.twins.items()})

    def _take_back(self, model: nn.Module) -> None:
        """Put the model's own modules back, with whatever was done to their twins."""
        own = {id(twin): self.own[path] for path, twin in self.twins.items()}
        for path, twin in self.twins.items():
            module = self.own[path]
            state = {name: value for name, value in vars(twin).items() if name not in ("_modules", _TERMS)}
            modules = module._modules
            modules.clear()
            modules.update(twin._modules)
            vars(module).clear()
            vars(module).update(state, _modules=modules)
            exchange(module, own)
            module.__class__ = original_class(twin) if path in self.layers else type(twin)
        exchange(model, own)
        self.twins = {}


_TWINS: weakref.WeakKeyDictionary[nn.Module, _Twins] = weakref.WeakKeyDictionary()

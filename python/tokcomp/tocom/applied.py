"""Low-rank terms added to q and v while a ``with`` block runs, without touching the model's own modules.

The modules on the way from the model to the weights of q and v are replaced by twins that share their parameters,
buffers, hooks and other children. A twin keeps its terms for as long as it is referenced, so gradient checkpointing,
which runs a block again in the backward pass, repeats the same computation even after the ``with`` block has ended.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters.projections import Projection, Rows
from tokcomp.adapters.swap import Underlaid, take_out, underlay
from tokcomp.adapters.twins import exchange, modules_on_the_way, twins_of
from tokcomp.tocom.layers import modules_of, pieces

_TERMS = "_tokcomp_terms"


class Matrices(NamedTuple):
    """A plugin's matrices for one block."""

    q_down: Tensor  # [K, C]
    q_up: Tensor  # [A, K]
    v_down: Tensor
    v_up: Tensor


class Term(NamedTuple):
    """``factor * up @ down`` for some rows of a weight [R, C]."""

    rows: slice
    down: Tensor  # [K, C]
    up: Tensor  # [A, K], of which up_rows are for these rows
    up_rows: slice
    columns: slice  # the part of K in use
    factor: float

    def padded_up(self, num_rows: int, before: int, after: int) -> Tensor:
        """``up`` [R, before + K' + after] with zeros around it."""
        return F.pad(self.up[self.up_rows, self.columns], (before, after, self.rows.start, num_rows - self.rows.stop))


class _Compensated(Underlaid):
    """Base of the modules that add the terms of every open scope to what their weight gives."""

    __slots__ = ()

    def without_underlay(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != _TERMS}


class _CompensatedLinear(_Compensated):
    """A layer that adds thin products to what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        for terms in vars(self)[_TERMS]:
            out = _add(terms, x, out)
        return out


class _CompensatedWeight(_Compensated):
    """A layer whose weight others read: it reads as the sum."""

    @property
    def weight(self) -> Tensor:
        return _with_terms(self, "weight")


class _CompensatedMultihead(_Compensated):
    """nn.MultiheadAttention, likewise."""

    @property
    def in_proj_weight(self) -> Tensor:
        return _with_terms(self, "in_proj_weight")


def _mixin(piece: Rows) -> type[Underlaid]:
    if piece.name == "in_proj_weight":
        return _CompensatedMultihead
    return _CompensatedWeight if piece.read_past else _CompensatedLinear


def _add(terms: Sequence[Term], x: Tensor, out: Tensor) -> Tensor:
    """``out`` [..., R] with one scope's terms of tokens ``x`` [..., C] added."""
    down = torch.cat([term.down[term.columns] for term in terms])  # [T * K', C]
    hidden = F.linear(x, down.to(x)) * terms[0].factor  # [..., T * K']
    rank = down.shape[0] // len(terms)
    ups = [term.padded_up(out.shape[-1], rank * i, rank * (len(terms) - 1 - i)) for i, term in enumerate(terms)]
    up = torch.stack(ups).sum(0)  # [R, T * K']
    flat = torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2).to(out), up.to(out).t())
    return flat.view(out.shape)


def _with_terms(module: nn.Module, name: str) -> Tensor:
    """A module's weight with all of its terms, summed in float32 or better and rounded once."""
    weight = module._parameters[name]
    assert weight is not None
    with torch.autocast(weight.device.type, enabled=False):
        total: Tensor = weight
        for term in (term for terms in vars(module)[_TERMS] for term in terms):
            wide = torch.promote_types(torch.promote_types(total.dtype, term.up.dtype), torch.float32)
            up = term.padded_up(weight.shape[0], 0, 0).to(wide)
            total = torch.addmm(total.to(wide), up, term.down[term.columns].to(wide), alpha=term.factor)
        return total.to(weight.dtype)


@contextmanager
def terms_added(
    model: nn.Module,
    projections: Sequence[Projection],
    matrices: Sequence[Matrices],
    columns: slice,
    factor: float,
) -> Iterator[None]:
    """Add ``factor * up @ down`` to each block's q and v while the block runs; blocks nest, and may end in any order.

    Args:
        model: that the projections are of.
        projections: where the blocks' weights are.
        matrices: one for each of them.
        columns: the slots in use.
        factor: of every term.
    """
    twins = _TWINS.get(model)
    if twins is None:
        twins = _TWINS[model] = _Twins(model, projections)
    scope: list[list[Term]] = [[] for _ in modules_of(projections)]
    index = {id(module): number for number, module in enumerate(modules_of(projections))}
    for projection, own in zip(projections, matrices, strict=True):
        for parts, down, up in ((projection.q, own.q_down, own.q_up), (projection.v, own.v_down, own.v_up)):
            start = 0
            for piece in parts:
                up_rows = slice(start, start + piece.num_rows)
                scope[index[id(piece.module)]].append(Term(piece.rows, down, up, up_rows, columns, factor))
                start = up_rows.stop
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
    """A model's own modules on the way to its weights of q and v, and the twins that stand in for them now."""

    def __init__(self, model: nn.Module, projections: Sequence[Projection]) -> None:
        paths, self.own = modules_on_the_way(model, modules_of(projections))
        mixins = {id(piece.module): _mixin(piece) for one in projections for piece in pieces(one)}
        self.mixins = {path: mixins[id(self.own[path])] for path in paths}  # in the order of each scope's terms
        self.twins: dict[str, nn.Module] = {}
        self.scopes: list[list[list[Term]]] = []

    def renew(self, model: nn.Module) -> None:
        """Put twins with the terms of all open scopes in place, or the model's own modules if none is open."""
        self._take_back(model)
        if not self.scopes:
            return
        self.twins = twins_of(self.own)
        for index, (path, mixin) in enumerate(self.mixins.items()):
            underlay(self.twins[path], mixin)
            vars(self.twins[path])[_TERMS] = [scope[index] for scope in self.scopes]
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
            module.__class__ = type(twin)
            take_out(module)
        exchange(model, own)
        self.twins = {}


_TWINS: weakref.WeakKeyDictionary[nn.Module, _Twins] = weakref.WeakKeyDictionary()

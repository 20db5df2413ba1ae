"""What a degree of compression means: one method per degree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from torch import nn

from tokcomp.adapters import find_adapter
from tokcomp.adapters.twins import twin_model
from tokcomp.api import compress
from tokcomp.cost import flops
from tokcomp.methods import DiffRate, EViT, Method, PiToMe, ToMe, ToMeMLP
from tokcomp.schedule import CompressionSchedule
from tokcomp.tocom.layers import modules_of, projections_of

#: ``ToMe``, ``PiToMe`` or ``ToMeMLP`` (degree r merges r tokens in every block), ``EViT`` (degree r drops r), or a
#: mapping or function of degrees.
Degrees: TypeAlias = (
    type[ToMe] | type[PiToMe] | type[ToMeMLP] | type[EViT] | Mapping[int, Method] | Callable[[int], Method]
)


def method_at(degrees: Degrees, degree: int) -> Method:
    """The method of one degree.

    Raises:
        ValueError: the mapping has no such degree.
        TypeError: ``degrees`` is none of these, or gives something that is not a Method.
    """
    if degrees is ToMe:
        return ToMe(degree)
    if degrees is PiToMe:
        return PiToMe(degree)
    if degrees is ToMeMLP:
        return ToMeMLP(degree)
    if degrees is EViT:
        return EViT(num_pruned=degree)
    method: Any
    if isinstance(degrees, Mapping):
        if degree not in degrees:
            raise ValueError(f"method must have an entry for each degree, got none for {degree}: {sorted(degrees)}")
        method = degrees[degree]
    elif callable(degrees) and not isinstance(degrees, type):
        method = degrees(degree)
    else:
        name = degrees.__name__ if isinstance(degrees, type) else repr(degrees)
        raise TypeError(
            f"method must be ToMe, PiToMe, ToMeMLP, EViT, or a mapping or function from degrees to methods, got {name}"
        )
    if not isinstance(method, Method):
        raise TypeError(f"method must give a Method for each degree, got {method!r} for {degree}")
    return method


def diffrate_degrees(
    model: nn.Module, schedules: Iterable[CompressionSchedule | DiffRate], metric: str | None = None
) -> dict[int, Method]:
    """DiffRate schedules as degrees: 0 keeps every token, 1, 2, ... are the schedules, most expensive first.

    Args:
        model: the model that they are for; it is not changed.
        schedules: the schedules, usually two or more; a DiffRate keeps its own metric and pipeline.
        metric: importance for bare schedules; by default as for :class:`tokcomp.DiffRate`.

    Raises:
        ValueError: two of them cost the same, or one does not fit the model.
    """
    adapter = find_adapter(model)
    geometry = adapter.geometry(model)
    given = [one if isinstance(one, DiffRate) else DiffRate(one, metric=metric) for one in schedules]
    methods = [method.fitted(geometry) for method in given]
    costs = [flops_by(model, method) for method in methods]
    order = sorted(range(len(methods)), key=lambda index: -costs[index])
    for first, second in pairwise(order):
        if costs[first] == costs[second]:
            raise ValueError(
                f"schedules must differ in cost, got two of {costs[first] / 1e9:.6g} GFLOPs, at {first} and {second}"
            )
    keep_all = [adapter.num_tokens(model)] * geometry.depth
    uncompressed = DiffRate(CompressionSchedule(keep_all, keep_all), metric=methods[0].metric if methods else metric)
    return {0: uncompressed, **{degree: methods[index] for degree, index in enumerate(order, start=1)}}


def flops_by(model: nn.Module, method: Method) -> int:
    """:func:`tokcomp.flops` of the model if it were compressed by ``method``; the model is not changed."""
    _, projections = projections_of(model)
    twin, _ = twin_model(model, modules_of(projections))
    return flops(compress(twin, method))


def check_degrees(degrees: Sequence[int], max_degree: int) -> list[int]:
    """The degrees as a list.

    Raises:
        TypeError, ValueError: there are none, one occurs twice, or the plugin does not have one.
    """
    found = list(degrees)
    for degree in found:
        if isinstance(degree, bool) or not isinstance(degree, int):
            raise TypeError(f"degrees must be integers, got {degree!r}")
        if not 0 <= degree <= max_degree:
            raise ValueError(f"degrees must be from 0 to {max_degree}, got {degree}")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"degrees must be one or more different ones, got {found}")
    return found

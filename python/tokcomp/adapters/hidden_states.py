"""transformers' ``output_hidden_states`` of a compressed tower: a token for every position, block by block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokcomp.adapters.images import refuse_symbols
from tokcomp.adapters.pooling import Weights
from tokcomp.adapters.tower import CompressedTower, Tower
from tokcomp_kernels.product_types import widened


class HiddenStatesTower(CompressedTower):
    """A compressed tower of transformers.

    ``hidden_states`` has the shapes of the plain model's: what enters block 0, and what leaves each block. A merged
    position has the token that it was merged into, a pruned one keeps the value with which it entered the block that
    pruned it. ``last_hidden_state`` has the tokens that are left.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        refuse_symbols(args[0] if args else next(iter(kwargs.values()), None))
        x, weights, hidden = run_with_hidden_states(self, *args, **kwargs)
        with widened(x):
            output = self._tokcomp_adapter.finish(self, x, weights, **{**kwargs, "return_dict": True})
        if hidden is not None:
            output.hidden_states = hidden
        return output if asked(self, "return_dict", kwargs, True) else output.to_tuple()


def run_with_hidden_states(
    tower: Tower, *args: Any, **kwargs: Any
) -> tuple[Tensor, Weights | None, tuple[Any, ...] | None]:
    """What :meth:`Tower.tokens` returns, and the hidden states where they are asked for; a search keeps none."""
    wanted = asked(tower, "output_hidden_states", kwargs)
    if not wanted or not isinstance(tower, CompressedTower):
        return *tower.tokens(*args, **kwargs), None
    maps: list[Tensor] = []
    x, size = tower.traced(None, *args, maps=maps, **kwargs)
    return x, None if size is None else Weights(size), _selected(maps, wanted)


def asked(module: Any, name: str, kwargs: dict[str, Any], default: Any = False) -> Any:
    """The option ``name`` of a call, or the configuration's where the call says nothing."""
    value = kwargs.get(name)
    return getattr(module.config, name, default) if value is None else value


def _selected(maps: list[Tensor], wanted: Any) -> tuple[Any, ...]:
    """All of ``maps``, or None in place of those that ``wanted``, an index or several, does not name."""
    if wanted is True:
        return tuple(maps)
    indices = {index % len(maps) for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(one if index in indices else None for index, one in enumerate(maps))

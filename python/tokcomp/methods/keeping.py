"""Methods that keep a share, or a number, of the patch tokens in some blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tokcomp.methods.base import Assignment, Geometry, Method, integer, is_list, non_negative, number, require_depth


class KeepingMethod(Method):
    """How many tokens are kept; which ones, a subclass says.

    Args:
        keep_rate: share of the patch tokens to keep, rounded up, in each of ``blocks``; or one per block of the model
            (1 = keep all), in which case ``blocks`` is ignored.
        blocks: indices (from 0) of the blocks in which a single ``keep_rate``, or ``num_kept``, applies.
        num_kept: instead of a keep rate: patch tokens to keep in each of ``blocks``, or one number for each of them.

    Raises:
        TypeError, ValueError: neither or both of keep_rate and num_kept; values outside (0, 1] and 1, 2, ...; not one
            number for each of blocks.
    """

    def __init__(
        self,
        keep_rate: float | Sequence[float] | None = None,
        blocks: Sequence[int] = (3, 6, 9),
        num_kept: int | Sequence[int] | None = None,
    ) -> None:
        if (keep_rate is None) == (num_kept is None):
            got = "neither" if keep_rate is None else "both"
            raise TypeError(f"{type(self).__name__} needs keep_rate or num_kept, got {got}")
        self.keep_rate = None if keep_rate is None else parse_keep_rate(keep_rate)
        self.blocks = parse_blocks(blocks)
        self.num_kept: tuple[int, ...] | None = None
        if num_kept is not None:
            given = list(num_kept) if is_list(num_kept) else [num_kept] * len(self.blocks)  # type: ignore[arg-type]
            if len(given) != len(self.blocks):
                raise ValueError(f"num_kept must be one number, or one for each of {self.blocks}, got {num_kept}")
            self.num_kept = tuple(_at_least_one(one) for one in given)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.settings().items())})"

    def settings(self) -> dict[str, Any]:
        """The arguments that make an equal method."""
        if self.num_kept is not None:
            return {"blocks": self.blocks, "num_kept": self.num_kept}
        blocks = {} if isinstance(self.keep_rate, tuple) else {"blocks": self.blocks}
        return {"keep_rate": self.keep_rate, **blocks}

    def validate(self, geometry: Geometry) -> None:
        require_blocks(self.keep_rate, self.blocks, geometry)
        if geometry.num_tokens is not None:
            self.check_tokens(geometry.num_tokens, geometry.num_prefix_tokens)

    def check_tokens(self, num_tokens: int, num_prefix_tokens: int) -> None:
        left = num_tokens - num_prefix_tokens
        for block, kept in sorted(zip(self.blocks, self.num_kept or (), strict=False)):
            if kept > left:
                raise ValueError(f"num_kept must be at most the {left} patch tokens left in block {block}, got {kept}")
            left = kept

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        patches = num_tokens - num_prefix_tokens
        if self.num_kept is not None:
            kept = self.num_kept[self.blocks.index(block)] if block in self.blocks else patches
        else:
            kept = math.ceil(rate_in(block, self.keep_rate, self.blocks) * patches)
        if kept >= patches:
            return None
        kept += num_prefix_tokens
        return Assignment(kept, kept, kept)


def parse_keep_rate(given: Any) -> float | tuple[float, ...]:
    """A share of the tokens, or one per block.

    Raises:
        TypeError, ValueError: something else.
    """
    return tuple(map(_rate, given)) if is_list(given) else _rate(given)


def parse_blocks(given: Any) -> tuple[int, ...]:
    """Numbers of blocks.

    Raises:
        TypeError, ValueError: something else.
    """
    if not is_list(given):
        raise TypeError(f"blocks must be a list of block numbers, got {given!r}")
    return tuple(non_negative("blocks", block, "be integers") for block in given)


def require_blocks(keep_rate: Any, blocks: Sequence[int], geometry: Geometry) -> None:
    """Raise ValueError unless the model has as many blocks as the keep rates are for, or those that are named."""
    if isinstance(keep_rate, tuple):
        require_depth("keep_rate", len(keep_rate), geometry)
    elif any(block >= geometry.depth for block in blocks):
        raise ValueError(f"blocks must be below the model's depth {geometry.depth}, got {tuple(blocks)}")


def rate_in(block: int, keep_rate: float | tuple[float, ...] | None, blocks: Sequence[int]) -> float:
    """The share of the patch tokens that a block keeps."""
    if isinstance(keep_rate, tuple):
        return keep_rate[block]
    return 1.0 if keep_rate is None or block not in blocks else keep_rate


def _rate(rate: Any) -> float:
    value = number("keep_rate", rate, "be a number or one per block")
    if not 0 < value <= 1:
        raise ValueError(f"keep_rate must be in (0, 1], got {value}")
    return value


def _at_least_one(count: Any) -> int:
    value = integer("num_kept", count, "be an integer or one for each of blocks")
    if value < 1:
        raise ValueError(f"num_kept must be at least 1, got {value}")
    return value

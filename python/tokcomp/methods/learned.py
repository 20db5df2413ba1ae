"""Methods that act between the blocks, most of them with trained parts: their contract, and what one pass keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokcomp.methods.base import Assignment, Evidence, Geometry, Method, Reduced, TokenShape, require_class_token


class Standing(NamedTuple):
    """What a block is told by the passage that it is part of; it may run again when the passage is over."""

    needs: frozenset[str]
    mask: Tensor | None
    size: Tensor | None
    origin: Tensor | None
    filled: Tensor | None


class Passage:
    """One forward pass under a method that acts between the blocks: what happens to the tokens there.

    It is made for the pass and holds all that one block leaves for the next. The attributes say how matters stand for
    the block about to run.
    """

    #: What the attention of each block is to deliver to :meth:`leave`: names of :class:`Evidence` fields.
    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        #: [B, N] 1 for tokens and 0 for those that nobody attends to but themselves, with a gradient; None: all 1.
        self.mask: Tensor | None = None
        #: [B, N] 1 for tokens and 0 for those that nobody attends to, padding too, of a method that ``varies``; None:
        #: all 1.
        self.size: Tensor | None = None
        #: [B, N] bool: False for padding alone, which comes last; None: no padding.
        self.filled: Tensor | None = None
        #: [B, M] int64: the slot that each token which arrived went to, -1 = dropped; None: all stayed.
        self.source: Tensor | None = None
        #: [B, N] int64: the token of block 0 whose place in the image each token has; None: its own.
        self.origin: Tensor | None = None

    def enter(self, block: int, x: Tensor) -> Tensor:
        """The tokens [B, N, C] that enter a block, of those x [B, M, C] that the one before left. Sets the above."""
        return x

    @property
    def standing(self) -> Standing:
        """How matters stand now."""
        return Standing(self.needs, self.mask, self.size, self.origin, self.filled)

    def leave(self, block: int, x: Tensor, evidence: Evidence) -> Tensor:
        """The tokens x [B, N, C] that a block has left, with what is to be changed about them."""
        return x

    def positions(self, x: Tensor) -> Tensor | None:
        """The tokens of all positions [B, N, C] where a block has left x; None: as the source maps say."""
        return None

    def finish(self, x: Tensor) -> Tensor:
        """What the model's last norm gets of the tokens x [B, N, C] that the last block has left."""
        return x


class Answers(NamedTuple):
    """What a model said of a batch, for the losses of a method."""

    logits: Tensor  # [B, classes]
    tokens: Tensor  # [B, N, C] after the model's last norm


class PassageMethod(Method):
    """A method that acts between the blocks, before their attention.

    In evaluation mode tokens really leave; how it trains, its passage says. A subclass defines :meth:`begin`,
    :meth:`counts` and, for its training, :meth:`penalties`.
    """

    between = True
    #: Whether :meth:`penalties` compares with the model as it was before, uncompressed.
    has_teacher: bool = False
    #: Whether a source map says where each position is, and not each token that arrived.
    maps_positions: bool = False

    def validate(self, geometry: Geometry) -> None:
        if geometry.spreads_tokens:
            name = type(self).__name__
            raise ValueError(f"{name} needs a plain vision transformer, got a hierarchical model; use ToMe or DiffRate")
        require_class_token(type(self).__name__, geometry, "ToMe or DiffRate")

    @abstractmethod
    def begin(self, x: Tensor, parts: nn.Module | None, num_prefix_tokens: int, depth: int, training: bool) -> Passage:
        """The passage of a forward pass through ``depth`` blocks that the tokens x [B, N, C] begin.

        ``parts``: the model's for this method; None if it has none.
        """

    @abstractmethod
    def counts(self, depth: int, num_tokens: int, num_prefix_tokens: int) -> list[tuple[int, int]]:
        """As of :class:`Method`."""

    def phases(self) -> Sequence[tuple[float, PassageMethod]]:
        """By which method a training runs, from which share of its steps on; the first from 0 on, shares rising."""
        return ((0.0, self),)

    def penalties(self, passage: Any, answers: Answers, taught: Answers | None) -> dict[str, Tensor]:
        """What training adds to the loss of the answer, by name: 0-dim each, weighted.

        Args:
            passage: of the forward pass, by :meth:`begin`.
            answers: the model's.
            taught: the uncompressed model's of the same images, without gradient; None if there is no such model.
        """
        return {}

    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        """None: inside a block nothing is dropped."""
        return None

    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        raise RuntimeError(f"{type(self).__name__} drops tokens between the blocks, so it has no score within one")

    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        raise RuntimeError(f"{type(self).__name__} drops tokens between the blocks, so it reduces none within one")


class LearnedMethod(PassageMethod):
    """A method with parts that are trained along with the model; :mod:`tokcomp.learned` attaches them to it.

    The method itself has only settings. A subclass also defines :meth:`make_parts`, :meth:`parts_like` and
    :meth:`check_parts`.
    """

    @abstractmethod
    def make_parts(self, shape: TokenShape, depth: int) -> nn.Module:
        """New, untrained parts for a model of ``depth`` blocks."""

    @classmethod
    @abstractmethod
    def parts_like(cls, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Parts of the form that the tensors of a state_dict have, which may come from anyone.

        Raises:
            ValueError: they are not those of this method's parts.
        """

    @abstractmethod
    def check_parts(self, parts: nn.Module, shape: TokenShape, depth: int) -> None:
        """Raise ValueError if parts are not for these settings and such a model."""


def stages(depth: int) -> tuple[int, ...]:
    """Three blocks (from 0), spread as published: 3, 6 and 9 of 12."""
    return tuple(sorted({max(1, depth * k // 4) for k in (1, 2, 3)}))


def powers(keep_rate: float | Sequence[float], number: int) -> tuple[float, ...]:
    """The share of all patch tokens left after each of ``number`` stages: r, r^2, ... of a single rate."""
    return (
        tuple(keep_rate**stage for stage in range(1, number + 1)) if isinstance(keep_rate, float) else tuple(keep_rate)
    )


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The tokens [B, M, C] of x [B, N, C] with these indices [B, M]."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def loaded(make: Callable[[], nn.Module], tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    """The parts that ``make`` makes, with these tensors for their state.

    Raises:
        ValueError: they do not fit; the message names the first tensor that does not.
    """
    with torch.device("meta"):  # without memory: the sizes may come from anyone
        parts = make()
    own = parts.state_dict()
    for key in sorted({*own, *tensors}):
        want, got = (tuple(some[key].shape) if key in some else None for some in (own, tensors))
        if want != got:
            wanted, found = ("nothing" if shape is None else f"of shape {shape}" for shape in (want, got))
            raise ValueError(f"{name}.{key} must be {wanted}, got {found}")
        if not tensors[key].is_floating_point():
            raise ValueError(f"{name}.{key} must hold floating-point numbers, got {tensors[key].dtype}")
    parts.load_state_dict(dict(tensors), assign=True)
    return parts.requires_grad_(True)


def count_of(tensors: Mapping[str, Tensor]) -> int:
    """How many parts there are, by the numbers that their names begin with."""
    return len({key.partition(".")[0] for key in tensors})


def length_of(tensors: Mapping[str, Tensor], key: str, name: str) -> int:
    """The length of a vector.

    Raises:
        ValueError: there is none of that name.
    """
    vector = tensors.get(key)
    if vector is None or vector.ndim != 1:
        got = "nothing" if vector is None else f"a tensor of shape {tuple(vector.shape)}"
        raise ValueError(f"{name}.{key} must be a vector, got {got}")
    return vector.shape[0]


def require_blocks_below(blocks: Sequence[int] | None, geometry: Geometry) -> None:
    """Raise ValueError if the model has fewer blocks than are named."""
    if any(block >= geometry.depth for block in blocks or ()):
        raise ValueError(f"blocks must be below the model's depth {geometry.depth}, got {blocks}")


def slots_of(index: Tensor, num_tokens: int) -> Tensor:
    """The source map [B, num_tokens] under which the tokens index [B, M] go to slots 0 to M - 1; the others leave."""
    source = index.new_full((index.shape[0], num_tokens), -1)
    return source.scatter(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))

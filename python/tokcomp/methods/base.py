"""The three steps of a compression method: score the tokens, assign how many are kept, reduce them."""

from __future__ import annotations

import copy
import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

#: What a block's attention can tell a method, by the field names of :class:`Evidence`.
EVIDENCE = ("cls_attn", "image_attn", "keys", "values")


@dataclass(frozen=True)
class Geometry:
    """What a method may know about a model before it sees an image."""

    depth: int
    num_prefix_tokens: int
    has_class_token: bool
    #: Tokens that enter block 0, prefix included; None if they depend on the image.
    num_tokens: int | None
    #: Blocks after those, which are never compressed but for which a published list may have entries.
    following_blocks: int = 0
    #: Whether every position gets a token again after the last block, as hierarchical models need.
    spreads_tokens: bool = False


class TokenShape(NamedTuple):
    """The tokens of a model's blocks."""

    width: int  # channels
    num_heads: int


class Evidence(NamedTuple):
    """What one block's attention saw; only the fields named in the method's ``needs`` are filled in."""

    cls_attn: Tensor | None = None  # [B, N] float32: the class token's row of the attention, mean over heads
    image_attn: Tensor | None = None  # [B, N] float32: attention each token receives, mean over heads and queries
    keys: Tensor | None = None  # [B, H, N, D]
    values: Tensor | None = None  # [B, H, N, D]

    def require(self, name: str) -> Tensor:
        """The field ``name``. RuntimeError if it is not filled in: the method's ``needs`` do not name it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise RuntimeError(f"{name} was not computed: a method reads only the evidence that its needs name")
        return value


class Assignment(NamedTuple):
    """How many tokens (prefix included) a block keeps. Static: shapes never depend on the images."""

    num_prune_kept: int
    num_merge_kept: int
    num_tokens_out: int


class Norm(NamedTuple):
    """A LayerNorm over channels."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class Reduced(NamedTuple):
    """A block's tokens after compression."""

    x: Tensor  # [B, M, C]
    size: Tensor | None  # [B, M] float32 patches per token; None while all are one patch; 0 for padding
    source: Tensor  # [B, N] int64: the slot each token went to, -1 = pruned


class Method(ABC):
    """A compression method: three small steps per block.

    Methods are immutable once built and keep no state between calls, so one may serve many models and threads.
    """

    #: Names from :data:`EVIDENCE` that :meth:`score` reads in a block that compresses.
    needs: frozenset[str] = frozenset()
    #: Whether attention adds log(size) to its scores once tokens have sizes.
    proportional_attention: bool = False
    #: Whether every position gets a token back after the MLP: each block then sees all tokens (:meth:`spread`).
    unmerges: bool = False
    #: Whether tokens leave between the blocks, before a block's attention, as a :class:`Passage` says.
    between: bool = False
    #: Whether such a method gives every position its token back after the last block, so that any pooling is right.
    keeps_all: bool = False
    #: Whether images of one batch may be left with different numbers of tokens; see :mod:`tokcomp.methods.varying`.
    varies: bool = False
    #: Whether :meth:`score` is ``cls_attn`` as it stands and the reduction averages it where it comes by heads,
    #: [B, H, N], which spares a GPU a kernel.
    averages_heads: bool = False
    #: Of a method that a schedule was turned into: tokens that enter block 0 of the models that it is for, and how many
    #: of them are no patches. A model of another number is refused; one that takes images of any size is not.
    made_for: tuple[int, int] | None = None
    #: What the command line and a plugin's file call the method; by default the class's name in lower case.
    name: ClassVar[str] = "method"

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = vars(cls).get("name", cls.__name__.lower())

    @abstractmethod
    def validate(self, geometry: Geometry) -> None:
        """Raise ValueError or TypeError if this method cannot compress a model of this geometry."""

    def fitted(self, geometry: Geometry) -> Method:
        """The method with what was left to the model chosen for one of this geometry; itself where nothing was."""
        return self

    def for_tokens(self, num_tokens: int, num_prefix_tokens: int) -> Method:
        """The method for images of which ``num_tokens`` enter block 0, in a batch of images that differ in that.

        Itself, unless its counts are for another number of tokens.
        """
        return self

    def check_tokens(self, num_tokens: int, num_prefix_tokens: int) -> None:  # noqa: B027  most take any number
        """Raise ValueError if a model cannot be compressed at an image size that makes ``num_tokens`` enter block 0.

        Called before the first block of every forward pass, so that images of another size are noticed.
        """

    @abstractmethod
    def assign(self, block: int, num_tokens: int, num_prefix_tokens: int) -> Assignment | None:
        """How many of ``num_tokens`` block ``block`` keeps; None if it keeps all."""

    def counts(self, depth: int, num_tokens: int, num_prefix_tokens: int) -> list[tuple[int, int]]:
        """Tokens that attention and MLP of each block see, of an image of ``num_tokens``, prefix included."""
        found = []
        for block in range(depth):
            assignment = self.assign(block, num_tokens, num_prefix_tokens)
            left = num_tokens if assignment is None else assignment.num_tokens_out
            found.append((num_tokens, left))
            num_tokens = num_tokens if self.unmerges else left
        return found

    def added_cost(self, shape: TokenShape, arriving: Sequence[float]) -> float:
        """Multiply-adds of one image that the method itself adds: those of its trained parts.

        Args:
            shape: of the model's tokens.
            arriving: [L] patch tokens that the block before leaves to each.
        """
        return 0.0

    @abstractmethod
    def score(self, evidence: Evidence, block: int, x: Tensor) -> Tensor:
        """Importance [B, N], or the features by which :meth:`reduce` matches tokens."""

    @abstractmethod
    def reduce(
        self, x: Tensor, score: Tensor, assignment: Assignment, *, size: Tensor | None, num_prefix_tokens: int
    ) -> Reduced:
        """Drop and merge tokens of x [B, N, C]. Prefix tokens keep their places and are neither source nor slot."""

    def kept_places(self, score: Tensor, source: Tensor, num_tokens_out: int, num_prefix_tokens: int) -> Tensor:
        """The token whose place in the image each token that is left has, [B, M] int64, for models with rotary places.

        Unless a method says otherwise: of the tokens in a slot, the first.

        Args:
            score: as :meth:`reduce` got it.
            source: [B, N], as it returned it.
            num_tokens_out: M.
            num_prefix_tokens: tokens that keep their places.
        """
        batch, num_tokens = source.shape
        every = torch.arange(num_tokens, device=source.device).expand(batch, -1)
        slots = source.masked_fill(source < 0, num_tokens_out)  # pruned tokens share one more slot, left out below
        first = source.new_full((batch, num_tokens_out + 1), num_tokens)
        first = first.scatter_reduce(1, slots, every, "amin")[:, :num_tokens_out]
        return first.clamp(max=num_tokens - 1)  # padding has no token, and may have any place

    def reduce_norm(
        self,
        x: Tensor,
        branch: Tensor,
        score: Tensor,
        assignment: Assignment,
        *,
        size: Tensor | None,
        num_prefix_tokens: int,
        norm: Norm,
    ) -> tuple[Reduced, Tensor]:
        """:meth:`reduce` of x + branch, both [B, N, C], and ``norm`` of the tokens that are left, [B, M, C].

        For methods that a single operator serves: a class that defines this, ``score`` and ``reduce`` is run this way
        if nothing needs the steps separately, and its ``score`` is called before branch is added.
        """
        reduced = self.reduce(x + branch, score, assignment, size=size, num_prefix_tokens=num_prefix_tokens)
        return reduced, norm(reduced.x)

    def spread(self, x: Tensor, merged: Tensor, branch: Tensor, source: Tensor) -> Tensor:
        """The tokens of all positions after the MLP, [B, N, C]. Called only for a method that ``unmerges``.

        Args:
            x: [B, N, C] before the MLP.
            merged: [B, M, C], what :meth:`reduce` made of it.
            branch: [B, M, C], the MLP's output, without the residual.
            source: [B, N] from :meth:`reduce`.
        """
        return x + torch.ops.tokcomp.unmerge(branch, source)


def most_important(score: Tensor, num_tokens: int, num_prefix_tokens: int) -> Tensor:
    """The prefix tokens and then the most important ones, as prune_merge orders them: [B, num_tokens] int64."""
    rank_by = score.nan_to_num(nan=float("-inf"))
    rank_by = torch.cat(
        (torch.full_like(rank_by[:, :num_prefix_tokens], float("inf")), rank_by[:, num_prefix_tokens:]), 1
    )
    return rank_by.sort(dim=1, descending=True, stable=True).indices[:, :num_tokens]


MethodT = TypeVar("MethodT", bound=Method)


def fitted_to_class_token(method: MethodT, geometry: Geometry) -> MethodT:
    """The method as it is, or one that reads the attention received where the model has no class token."""
    if geometry.has_class_token or "cls_attn" not in method.needs:
        return method
    fitted = copy.copy(method)
    fitted.needs = method.needs - {"cls_attn"} | {"image_attn"}
    return fitted


def attention_of(evidence: Evidence) -> Tensor:
    """What ranks tokens by attention, [B, N]: the class token's, or without one what each receives."""
    return evidence.require("image_attn") if evidence.cls_attn is None else evidence.cls_attn


@functools.cache
def reduces_in_one(method: type[Method]) -> bool:
    """Whether a method's own class defines :meth:`Method.reduce_norm` and the steps that it replaces."""
    steps = ("reduce_norm", "reduce", "score")
    owners = {next(one for one in method.__mro__ if step in vars(one)) for step in steps}
    return len(owners) == 1


def is_list(value: object) -> bool:
    """Whether a value is one per block rather than one for all; a 0-dimensional tensor or array is a number."""
    return hasattr(value, "__iter__") and not isinstance(value, (str, bytes, dict)) and getattr(value, "ndim", 1) > 0


def integer(name: str, value: Any, rule: str = "be an integer") -> int:
    """``value`` as an int. TypeError if it is not one; True and False are not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must {rule}, got {value!r}") from None


def non_negative(name: str, value: Any, rule: str = "be an integer or one per block") -> int:
    """``value`` as an int that is 0 or more."""
    count = integer(name, value, rule)
    if count < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")
    return count


def number(name: str, value: Any, rule: str = "be a number") -> float:
    """``value`` as a float. TypeError if it is none; text, True and False are not."""
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # of a tensor with several
        raise TypeError(f"{name} must {rule}, got {value!r}") from None


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool. TypeError if it is none: 'no' would count as true."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's too
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def require_depth(name: str, entries: int, geometry: Geometry, hint: str = "") -> None:
    """A per-block list must fit the model's depth; entries for the blocks after those are allowed and ignored."""
    if entries not in (geometry.depth, geometry.depth + geometry.following_blocks):
        raise ValueError(
            f"{name} must have one entry per block, got {entries} entries for {geometry.depth} blocks{hint}"
        )


def require_tokens(made_for: tuple[int, int] | None, num_tokens: int, num_prefix_tokens: int) -> None:
    """A schedule's counts must be for as many tokens as enter block 0.

    Args:
        made_for: those of the models that the counts are for, and how many of them are no patches; None: any.
        num_tokens, num_prefix_tokens: the same of this model.
    """
    if made_for is None or made_for[0] == num_tokens:
        return
    prefix = "" if num_prefix_tokens == made_for[1] else f", {num_prefix_tokens}"
    raise ValueError(
        f"the schedule must be for the {num_tokens} tokens that enter block 0, got one for {made_for[0]}; "
        f"schedule.rescaled({num_tokens}{prefix}) keeps the same shares of the patches"
    )


def require_class_token(what: str, geometry: Geometry, instead: str) -> None:
    """Class attention exists only if token 0 is a class token."""
    if not geometry.has_class_token:
        raise ValueError(f"{what} needs a class token, which this model does not have; use {instead}")

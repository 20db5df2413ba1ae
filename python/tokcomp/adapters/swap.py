"""Swapping a module's class for a subclass of it, in place and reversibly.

Unlike a patched ``forward`` attribute, a class survives deepcopy, pickle, replication and torch.compile, and leaves the
module's parameters, buffers, hooks and ``__dict__`` untouched.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:

    class _Base(nn.Module):
        """What a mixin may count on: the original class comes after it, a module with attributes of any type."""

        def __getattr__(self, name: str) -> Any: ...

else:
    _Base = object


class Swapped(_Base):
    """Base of the mixins that :func:`swap_class` puts in front of a module's own class."""

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "a compressed model cannot be scripted by torch.jit.script; use torch.export.export, tokcomp.export or "
            "torch.jit.trace"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The swapped class is made at run time: name its two parts instead, so that pickle can make it again.
        _, _, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        mixin, original = type(self).__bases__
        return (_new, (mixin, _lasting(original)), *rest)


class Underlaid(_Base):
    """Base of the mixins that :func:`underlay` puts in front of a module's own class, below a swapped one.

    They last no longer than a ``with`` block: copies and pickles are without them.
    """

    def without_underlay(self) -> dict[str, Any]:
        """The module's attributes less what only the mixin needs."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (_lasting(original_class(cast("nn.Module", self))),), self.without_underlay()


@functools.cache
def _swapped_class(mixin: type, original: type) -> type:
    return type(f"Compressed{original.__name__}", (mixin, original), {"__module__": __name__, "__doc__": mixin.__doc__})


def _new(mixin: type, original: type) -> object:
    cls: type[nn.Module] = _swapped_class(mixin, original)
    return cls.__new__(cls)


def original_class(module: nn.Module) -> type:
    """The class a module had before :func:`swap_class`; its own class if it was never swapped."""
    cls = type(module)
    return cls.__bases__[1] if issubclass(cls, Swapped) else cls


def swap_class(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the module's class."""
    module.__class__ = _swapped_class(mixin, original_class(module))


def restore_class(module: nn.Module) -> None:
    """Give the module its own class back."""
    module.__class__ = original_class(module)


def underlay(module: nn.Module, mixin: type) -> None:
    """Put ``mixin``, an Underlaid, in front of the module's own class and below what that was swapped for."""
    _set_original_class(module, _underlaid_class(mixin, _lasting(original_class(module))))


def take_out(module: nn.Module) -> None:
    """Undo :func:`underlay`."""
    _set_original_class(module, _lasting(original_class(module)))


@functools.cache
def _underlaid_class(mixin: type, original: type) -> type:
    return type(original.__name__, (mixin, original), {"__module__": original.__module__, "__doc__": original.__doc__})


def _lasting(original: type) -> type:
    """A module's class without an underlaid mixin."""
    return original.__bases__[1] if issubclass(original, Underlaid) else original


def _set_original_class(module: nn.Module, original: type) -> None:
    cls = type(module)
    module.__class__ = _swapped_class(cls.__bases__[0], original) if issubclass(cls, Swapped) else original

"""What is folded into a model: the record that a ToCom plugin leaves on it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

#: Attribute of the model that holds its :class:`Fold`.
RECORD = "_tokcomp_fold"


@dataclass(frozen=True)
class Fold:
    """What is folded into a model: the degrees, and the plugin that the rows come from."""

    source: int
    target: int
    scale: float
    #: Identities of the plugin: of the object, and of its parameters' values.
    plugin: tuple[str, str]
    #: Name of the method that the plugin was trained with, if it says.
    method: str | None = None
    #: Per layer, hashes of the rows as written and of a sample of them.
    written: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return f"degree {self.source} to {self.target} at scale {self.scale:g}"


def fold_of(model: nn.Module) -> Fold | None:
    """What is folded into ``model``."""
    record: Fold | None = vars(model).get(RECORD)
    return record


def require_same_method(record: Fold | None, name: str) -> None:
    """Raise ValueError if what is folded in was made for models compressed by a method other than ``name``."""
    if record is not None and record.method not in (None, name):
        raise ValueError(
            f"method must be {record.method}, which the plugin folded into the model ({record}) was trained with, got "
            f"{name}; unfold the plugin first, or fold it with its method set to None"
        )

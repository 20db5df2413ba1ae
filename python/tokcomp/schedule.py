"""How many tokens each block keeps: plain data, validated, saved as JSON."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tokcomp.files import write_whole

FORMAT = "tokcomp.CompressionSchedule"
VERSION = 1


@dataclass
class CompressionSchedule:
    """Tokens left after pruning and after merging in each block, prefix tokens (class, distillation, ...) included.

    A count that is not below the tokens that arrive leaves them as they are, so counts need not fall monotonically.

    Args:
        num_prune_kept: one count per block, or None for a method that does not prune (CAFormer's schedules).
        num_merge_kept: one count per block, or None for a method that does not merge.
        provenance: where the counts come from, as JSON data (model, budget, search settings); not compared by ``==``.

    Raises:
        ValueError: the lists differ in length, are both missing, or hold a count below 1.
        TypeError: a count is not an integer, or the provenance is not a dict.
    """

    num_prune_kept: list[int] | None
    num_merge_kept: list[int] | None
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.num_prune_kept = _counts("num_prune_kept", self.num_prune_kept)
        self.num_merge_kept = _counts("num_merge_kept", self.num_merge_kept)
        lengths = [len(counts) for counts in (self.num_prune_kept, self.num_merge_kept) if counts is not None]
        if not lengths:
            raise ValueError("num_prune_kept and num_merge_kept must not both be None")
        if len(set(lengths)) > 1:
            raise ValueError(
                "num_prune_kept and num_merge_kept must have one entry per block each, "
                f"got {lengths[0]} and {lengths[1]} entries"
            )
        if not isinstance(self.provenance, dict):
            raise TypeError(f"provenance must be a dict, got {type(self.provenance).__name__}")

    def __len__(self) -> int:
        """Number of blocks."""
        counts = self.num_prune_kept if self.num_prune_kept is not None else self.num_merge_kept
        return len(counts or ())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as JSON: the file at ``path`` is either wholly replaced or left as it was."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "num_prune_kept": self.num_prune_kept,
            "num_merge_kept": self.num_merge_kept,
            "provenance": self.provenance,
        }
        try:
            text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must be JSON data, got {self.provenance!r} ({error})") from error
        write_whole(Path(path), text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CompressionSchedule:
        """Read what :meth:`save` wrote, or a JSON object with just the two lists.

        Raises:
            ValueError: not JSON, not a schedule, or written by a newer version; the message names the file.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if not isinstance(data, dict) or not {"num_prune_kept", "num_merge_kept"} <= data.keys():
            raise ValueError(f"{path}: a schedule must be a JSON object with num_prune_kept and num_merge_kept")
        if data.get("format", FORMAT) != FORMAT:
            raise ValueError(f"{path}: format must be {FORMAT!r}, got {data['format']!r}")
        if data.get("version", VERSION) != VERSION:
            raise ValueError(f"{path}: version must be {VERSION}, got {data['version']!r}; a newer tokcomp wrote it")
        try:
            return cls(data["num_prune_kept"], data["num_merge_kept"], data.get("provenance") or {})
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


def _counts(name: str, counts: Sequence[int] | None) -> list[int] | None:
    if counts is None:
        return None
    if isinstance(counts, (str, bytes, dict)) or not hasattr(counts, "__iter__"):
        raise TypeError(f"{name} must be a list of integers, one per block, got {counts!r}")
    checked = []
    for block, count in enumerate(counts):
        if isinstance(count, bool):
            raise TypeError(f"{name}[{block}] must be an integer, got {count!r}")
        try:
            value = operator.index(count)
        except TypeError:
            raise TypeError(f"{name}[{block}] must be an integer, got {count!r}") from None
        if value < 1:
            raise ValueError(f"{name}[{block}] must be at least 1, got {value}")
        checked.append(value)
    if not checked:
        raise ValueError(f"{name} must have one entry per block, got none")
    return checked


#: timm's model name -> the name in the published tables.
PUBLISHED_MODELS = {
    "deit_tiny_patch16_224": "ViT-T-DeiT",
    "deit_small_patch16_224": "ViT-S-DeiT",
    "deit_base_patch16_224": "ViT-B-DeiT",
    "vit_base_patch16_224.mae": "ViT-B-MAE",
    "vit_large_patch16_224.mae": "ViT-L-MAE",
    "vit_huge_patch14_224.mae": "ViT-H-MAE",
    "caformer_s36": "CAFormer-S36",
}


def published_budgets() -> dict[str, list[float]]:
    """Model name -> the budgets (GFLOPs, multiply-adds) for which a schedule was published."""
    tables = _published_tables()
    return {name: [float(budget) for budget in tables[table]] for name, table in PUBLISHED_MODELS.items()}


def published_schedule(name: str, gflops: float) -> CompressionSchedule:
    """The schedule that the DiffRate paper's authors published for a model and a budget.

    Args:
        name: timm's model name; a pretrained tag after a DeiT name or ``caformer_s36`` is ignored.
        gflops: the budget as published, for example 2.3.

    Raises:
        ValueError: nothing was published for that name or budget; the message lists what was.
    """
    tables = _published_tables()
    known = name if name in PUBLISHED_MODELS else str(name).split(".", 1)[0]
    if known not in PUBLISHED_MODELS:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED_MODELS)}, got {name!r}")
    table = tables[PUBLISHED_MODELS[known]]
    for budget, counts in table.items():
        try:
            if float(budget) == float(gflops):
                provenance = {"model": known, "gflops": float(budget), "source": "published with DiffRate, ICCV 2023"}
                return CompressionSchedule(counts["prune_kept_num"], counts["merge_kept_num"], provenance)
        except (TypeError, ValueError):
            break
    raise ValueError(f"gflops for {known} must be one of {', '.join(table)}, got {gflops!r}")


def _published_tables() -> dict[str, Any]:
    text = resources.files("tokcomp").joinpath("published_schedules.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables

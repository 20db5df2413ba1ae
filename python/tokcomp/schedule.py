"""How many tokens each block keeps: plain data, validated, saved as JSON."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from tokcomp.files import write_whole
from tokcomp.hub import Card, Shareable, card_of_counts, fetch
from tokcomp.reading import parse_json, read_json

FORMAT = "tokcomp.CompressionSchedule"
#: The name of its file in a folder of ``save_pretrained``.
FILE = "schedule.json"
VERSION = 1
#: Method -> its arguments that a schedule may record, and their types. A schedule that names no method is DiffRate's.
METHOD_SETTINGS: dict[str, dict[str, type]] = {
    "diffrate": {"metric": str, "pipeline": str, "seed": int, "similarity_weighted_size": bool},
    "tome": {"prop_attn": bool},
    "evit": {"fuse": bool},
}


@dataclass
class CompressionSchedule(Shareable):
    """Tokens left after pruning and after merging in each block, prefix tokens (class, distillation, ...) included.

    A count at or above the number of tokens that arrive changes nothing, so counts need not decrease monotonically.

    Args:
        num_prune_kept: one count per block, or None for a method that does not prune (CAFormer's schedules).
        num_merge_kept: one count per block, or None for a method that does not merge.
        provenance: where the counts come from, as JSON data (model, budget, search settings); not compared by ``==``
            and not shown by ``repr``.
        num_tokens: tokens that enter block 0 of the models it is for, prefix included: 197 for 224 x 224 pixels in
            patches of 16. A model with another count is refused. None: unknown, so any model of this depth is accepted;
            nothing is inferred from the counts.
        num_prefix_tokens: how many of ``num_tokens`` are not patches; only :meth:`rescaled` uses it.
        method: the arguments of :class:`tokcomp.DiffRate`, among :data:`METHOD_SETTINGS`, that the counts were found
            with: ``{"metric": "image_attn", "pipeline": "merge"}``. DiffRate adopts them and refuses arguments that
            contradict them. None, or a name left out: unspecified. ``{"name": "tome"}`` and ``{"name": "evit"}``: the
            counts are for that method, with its arguments; :func:`tokcomp.methods.scheduled` makes it.

    Raises:
        ValueError: the lists differ in length, are both missing, or hold a count below 1; ``num_tokens`` is not above
            ``num_prefix_tokens``; ``method`` has an unknown name.
        TypeError: a count is not an integer, the provenance or the method is not a dict, or a setting has the wrong
            type.
    """

    num_prune_kept: list[int] | None
    num_merge_kept: list[int] | None
    provenance: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    num_tokens: int | None = None
    num_prefix_tokens: int = 1
    method: dict[str, Any] | None = None

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
        self.num_prefix_tokens = _integer("num_prefix_tokens", self.num_prefix_tokens, least=0)
        if self.num_tokens is not None:
            self.num_tokens = _integer("num_tokens", self.num_tokens, least=self.num_prefix_tokens + 1)
        self.method = _method(self.method)

    def __len__(self) -> int:
        """Number of blocks."""
        counts = self.num_prune_kept if self.num_prune_kept is not None else self.num_merge_kept
        return len(counts or ())

    def rescaled(self, num_tokens: int, num_prefix_tokens: int | None = None) -> CompressionSchedule:
        """The same shares of the patches for models with another number of tokens, for instance at another resolution.

        A count of k of p patches becomes k q / p of q patches, rounded (halves up), and stays at least one if it was;
        prefix tokens are not scaled. ``schedule.rescaled(577)`` takes 224 x 224 pixels in patches of 16 to 384 x 384.

        Args:
            num_tokens: tokens that will enter block 0, prefix included.
            num_prefix_tokens: how many of those are not patches; by default as many as in this schedule.

        Returns:
            A new schedule whose provenance holds this one's under ``rescaled``; this one if the number of tokens is the
            same.

        Raises:
            ValueError: this schedule does not know its own ``num_tokens``, or the new one is not above the prefix.
        """
        if self.num_tokens is None:
            raise ValueError(
                "the schedule must know its num_tokens to be rescaled, got None; state what it is for: "
                "dataclasses.replace(schedule, num_tokens=197)"
            )
        prefix = self.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
        prefix = _integer("num_prefix_tokens", prefix, least=0)
        num_tokens = _integer("num_tokens", num_tokens, least=prefix + 1)
        if (num_tokens, prefix) == (self.num_tokens, self.num_prefix_tokens):
            return replace(self)
        before, after = self.num_tokens - self.num_prefix_tokens, num_tokens - prefix

        def scaled(counts: list[int] | None) -> list[int] | None:
            if counts is None:
                return None
            patches = [max(count - self.num_prefix_tokens, 0) for count in counts]
            kept = [max((2 * count * after + before) // (2 * before), min(count, 1)) for count in patches]
            return [prefix + count for count in kept]

        origin = {"num_tokens": self.num_tokens, "provenance": self.provenance}
        return replace(
            self,
            num_prune_kept=scaled(self.num_prune_kept),
            num_merge_kept=scaled(self.num_merge_kept),
            provenance={"source": "rescaled", "rescaled": origin},
            num_tokens=num_tokens,
            num_prefix_tokens=prefix,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule as JSON: the file at ``path`` is either replaced whole or left as it was.

        Raises:
            TypeError: the provenance is not JSON data.
        """
        data: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "num_prune_kept": self.num_prune_kept,
            "num_merge_kept": self.num_merge_kept,
        }
        if self.num_tokens is not None:
            data |= {"num_tokens": self.num_tokens, "num_prefix_tokens": self.num_prefix_tokens}
        if self.method is not None:
            data["method"] = self.method
        data["provenance"] = self.provenance
        try:
            text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise TypeError(f"provenance must be JSON data, got {self.provenance!r} ({error})") from error
        write_whole(Path(path), text)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: str | None = None, gflops: float | None = None
    ) -> CompressionSchedule:
        """Read what :meth:`save` wrote, a JSON object with just the two lists, or one entry of a published table.

        A published table is DiffRate's ``compression_rate.json``: model -> GFLOPs -> prune_kept_num and merge_kept_num.
        Models that DiffRate published get the ``num_tokens`` of their image size; for others it is unknown.

        Args:
            path: the file.
            model: which of a table's models, by the table's name or timm's; ignored if there is only one.
            gflops: which of the model's budgets; required if there are several.

        Raises:
            ValueError: not JSON, not a schedule, written by a newer version, or a table without that entry; the message
                names the file.
        """
        path = Path(path)
        data = read_json(path)
        try:
            if _is_table(data):
                return _pick(data, model, gflops)
            if gflops is not None:
                raise ValueError("gflops chooses among the entries of a table, got a single schedule; leave it out")
            return cls._from_file(data)
        except (TypeError, ValueError, OverflowError) as error:  # of a number beyond any float
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> CompressionSchedule:
        """Read what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            name: a folder, or a repository of the hub as "owner/name".
            options: ``revision``, ``token``, ``cache_dir`` and ``local_files_only``, as of huggingface_hub.

        Raises:
            FileNotFoundError: no such repository, or the folder or repository has no ``schedule.json``.
            ConnectionError: it is not in the cache, and the hub cannot be reached.
            ValueError: as :meth:`load`.
        """
        return cls.load(fetch(name, FILE, **options))

    def _write_files(self, folder: Path) -> None:
        self.save(folder / FILE)

    def _card(self) -> Card:
        counts = (self.num_prune_kept, self.num_merge_kept)
        return card_of_counts(*counts, self.num_tokens, self.method_name, self.provenance)

    @property
    def method_name(self) -> str:
        """The method that the counts are for: ``diffrate`` unless ``method`` names another."""
        return str((self.method or {}).get("name", "diffrate"))

    @classmethod
    def _from_file(cls, data: Any) -> CompressionSchedule:
        if not isinstance(data, dict) or not {"num_prune_kept", "num_merge_kept"} <= data.keys():
            raise ValueError(
                "a schedule must be a JSON object with num_prune_kept and num_merge_kept, or a table of models and "
                "budgets with prune_kept_num and merge_kept_num"
            )
        if data.get("format", FORMAT) != FORMAT:
            raise ValueError(f"format must be {FORMAT!r}, got {data['format']!r}")
        if data.get("version", VERSION) != VERSION:
            raise ValueError(f"version must be {VERSION}, got {data['version']!r}; a newer tokcomp wrote it")
        return cls(
            data["num_prune_kept"],
            data["num_merge_kept"],
            data.get("provenance") or {},
            data.get("num_tokens"),
            data.get("num_prefix_tokens", 1),
            data.get("method"),
        )


def _counts(name: str, counts: Sequence[int] | None) -> list[int] | None:
    if counts is None:
        return None
    if isinstance(counts, (str, bytes, dict)) or not hasattr(counts, "__iter__") or getattr(counts, "ndim", 1) == 0:
        raise TypeError(f"{name} must be a list of integers, one per block, got {counts!r}")
    checked = []
    for block, count in enumerate(counts):
        checked.append(_integer(f"{name}[{block}]", count, least=1))
    if not checked:
        raise ValueError(f"{name} must have one entry per block, got none")
    return checked


def _integer(name: str, value: Any, *, least: int) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        found = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if found < least:
        raise ValueError(f"{name} must be at least {least}, got {found}")
    return found


def _method(settings: Any) -> dict[str, Any] | None:
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise TypeError(f"method must be a dict of DiffRate's arguments, got {settings!r}")
    chosen = settings.get("name", "diffrate")
    if chosen not in METHOD_SETTINGS:
        raise ValueError(f"method['name'] must be one of {', '.join(METHOD_SETTINGS)}, got {chosen!r}")
    known = METHOD_SETTINGS[chosen]
    for name, value in settings.items():
        if name == "name":
            continue
        if name not in known:
            raise ValueError(f"method must have no settings but {', '.join(known)}, got {name!r}")
        if type(value) is not known[name]:
            raise TypeError(f"method[{name!r}] must be of type {known[name].__name__}, got {value!r}")
    return dict(settings)


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
#: Name in the tables -> tokens that enter block 0 at 224 x 224 pixels, and how many of them are no patches.
_PUBLISHED_TOKENS = {name: (197, 1) for name in PUBLISHED_MODELS.values()}
_PUBLISHED_TOKENS |= {"ViT-H-MAE": (257, 1), "CAFormer-S36": (196, 0)}


def published_budgets() -> dict[str, list[float]]:
    """Model name -> the budgets (GFLOPs, multiply-adds) for which a schedule was published."""
    tables = _published_tables()
    return {name: [float(budget) for budget in tables[table]] for name, table in PUBLISHED_MODELS.items()}


def published_schedule(name: str, gflops: float) -> CompressionSchedule:
    """The schedule that the DiffRate paper's authors published for a model and a budget.

    The counts are those of the paper's repository. Its Table 10 prints the same except for DeiT-T at 1.0 G, whose last
    block keeps 3 and 3 tokens in the table and 21 and 21 here: 0.9983 instead of 1.0036 GFLOPs. The logits are the
    same, since only the last block's MLP sees the difference, and a class-token model reads only its class token after
    that.

    Args:
        name: timm's model name; a pretrained tag after a DeiT name or ``caformer_s36`` is ignored.
        gflops: the budget as published, for example 2.3.

    Raises:
        TypeError: the name is not a string.
        ValueError: nothing was published for that name or budget; the message lists what was.
    """
    tables = _published_tables()
    if not isinstance(name, str):
        raise TypeError(f"name must be a timm model's name, got {type(name).__name__}")
    known = _known_name(name)
    if known is None:
        raise ValueError(f"name must be one of {', '.join(PUBLISHED_MODELS)}, got {name!r}")
    table = PUBLISHED_MODELS[known]
    schedule = _entry(table, tables[table], gflops, what=f"gflops for {known}")
    schedule.provenance = {**schedule.provenance, "model": known, "source": "published with DiffRate, ICCV 2023"}
    return schedule


def _known_name(name: str) -> str | None:
    """The key of PUBLISHED_MODELS that one of timm's names stands for."""
    return next((one for one in (name, str(name).split(".", 1)[0]) if one in PUBLISHED_MODELS), None)


def _published_tables() -> dict[str, Any]:
    text = resources.files("tokcomp").joinpath("published_schedules.json").read_text(encoding="utf-8")
    tables: dict[str, Any] = json.loads(text)
    return tables


def _is_table(data: Any) -> bool:
    """Whether JSON data is laid out as DiffRate's compression_rate.json."""
    if not isinstance(data, dict) or not data:
        return False
    return all(
        isinstance(budgets, dict)
        and budgets
        and all(isinstance(counts, dict) and "merge_kept_num" in counts for counts in budgets.values())
        for budgets in data.values()
    )


def _pick(tables: Mapping[str, Any], model: str | None, gflops: float | None) -> CompressionSchedule:
    """The entry of a table that :meth:`CompressionSchedule.load` was asked for."""
    names = list(tables)
    if len(names) > 1:
        known = None if model is None else PUBLISHED_MODELS.get(_known_name(model) or "", model)
        if known is None or known not in tables:
            raise ValueError(f"model must be one of {', '.join(names)}, or timm's name for it, got {model!r}")
        names = [known]
    return _entry(names[0], tables[names[0]], gflops, what=f"gflops for {names[0]}")


def _entry(name: str, budgets: Mapping[str, Any], gflops: float | None, *, what: str) -> CompressionSchedule:
    """One budget of one model of a table."""
    if gflops is None and len(budgets) == 1:
        gflops = float(next(iter(budgets)))
    for budget, counts in budgets.items():
        try:
            found = math.isclose(float(budget), float(gflops), rel_tol=1e-6)  # type: ignore[arg-type]  # float32 too
        except (TypeError, ValueError):
            break
        if found:
            prune, merge = (_listed(counts.get(f"{step}_kept_num")) for step in ("prune", "merge"))
            num_tokens, num_prefix_tokens = _PUBLISHED_TOKENS.get(name, (None, 1))
            # Without pruning, this is the published method for hierarchical models; otherwise DiffRate's own defaults.
            method = {"metric": "image_attn", "pipeline": "merge", "similarity_weighted_size": False}
            provenance = {"model": name, "gflops": float(budget)}
            return CompressionSchedule(
                prune, merge, provenance, num_tokens, num_prefix_tokens, method if prune is None else None
            )
    raise ValueError(f"{what} must be one of {', '.join(budgets)}, got {gflops!r}")


def _listed(counts: Any) -> Any:
    """A list of counts; the published file stores them as text, and ``"None"`` for none."""
    if not isinstance(counts, str):
        return counts
    return None if counts == "None" else parse_json(counts)

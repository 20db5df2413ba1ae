"""How a model is compressed, as files that make another copy of the model compress in the same way."""

from __future__ import annotations

import inspect
import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tokcomp import methods
from tokcomp.adapters import find_adapter
from tokcomp.api import compress, quantize, restore
from tokcomp.equal_cost import Ruler
from tokcomp.files import write_whole
from tokcomp.folded import fold_of
from tokcomp.hub import Card, Shareable, fetch, fetch_beside
from tokcomp.methods import DiffRate, EViT, Method, ToMe, scheduled
from tokcomp.reading import read_json
from tokcomp.schedule import FILE as SCHEDULE_FILE
from tokcomp.schedule import CompressionSchedule
from tokcomp.tocom.files import FILE as PLUGIN_FILE
from tokcomp.tocom.plugin import ToCom

FORMAT, VERSION, FILE = "tokcomp.CompressionConfig", 1, "tokcomp.json"
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Folding:
    """A plugin and what it is folded for.

    Attributes:
        plugin: the plugin, or its file.
        source, target, scale: as of :meth:`tokcomp.ToCom.fold`.
    """

    plugin: ToCom | Path
    source: int
    target: int
    scale: float


@dataclass
class CompressionConfig(Shareable):
    """How a model is compressed: method and counts, attention, products, and a ToCom plugin that is folded in.

    It holds no weights of the model itself.

    Args:
        schedule: the counts, and the method that they are for: DiffRate, ToMe or EViT; None for another method.
        model: the model's name, for people; :meth:`apply` goes by what the model is.
        attention: as for :func:`tokcomp.compress`.
        quantized: whether products are computed in int8 (:func:`tokcomp.quantize`).
        folding: the plugin, if one is folded in.
        figures: numbers and texts for the card, such as ``{"top1": 79.8}``.
        method: instead of a schedule, the name and the arguments of one of tokcomp's methods:
            ``{"name": "ATS", "arguments": {"num_samples": 40}}``.

    Raises:
        TypeError, ValueError: a value of another kind, or not just one of schedule and method.
    """

    schedule: CompressionSchedule | None
    model: str | None = None
    attention: str = "tokcomp"
    quantized: bool = False
    folding: Folding | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.schedule is None) == (self.method is None):
            raise ValueError(f"schedule or method must be given, got {'neither' if self.method is None else 'both'}")
        if self.method is not None:
            _made(self.method)
        elif not isinstance(self.schedule, CompressionSchedule):
            raise TypeError(f"schedule must be a CompressionSchedule, got {type(self.schedule).__name__}")
        if self.attention not in ("tokcomp", "stock"):
            raise ValueError(f"attention must be 'tokcomp' or 'stock', got {self.attention!r}")
        for name, kind in (("quantized", bool), ("figures", dict)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        if self.model is not None and not isinstance(self.model, str):
            raise TypeError(f"model must be a name or None, got {self.model!r}")

    @classmethod
    def of(
        cls, model: nn.Module, name: str | None = None, *, plugin: ToCom | None = None, **figures: Any
    ) -> CompressionConfig:
        """How ``model`` is compressed now.

        Args:
            model: compressed by one of tokcomp's own methods; it is not changed.
            name: the model's name, for people.
            plugin: the plugin that is folded in, if one is.
            figures: for the card, such as ``top1=79.8``. GFLOPs are added.

        Raises:
            ValueError: the model is not compressed; or a plugin is folded in and this is not the one.
            TypeError: the method is somebody's own, or the model is not understood.
        """
        adapter = find_adapter(model)
        method, record = adapter.method(model), fold_of(model)
        if method is None:
            raise ValueError("model must be compressed, got a plain one: call tokcomp.compress first")
        if (record is None) != (plugin is None):
            given = None if plugin is None else "a ToCom"
            found = "none" if record is None else f"one ({record})"
            raise ValueError(f"plugin must be the one that is folded in, got {given} for a model that has {found}")
        folding = None
        if record is not None and plugin is not None:
            if not plugin.is_folded_into(model):
                raise ValueError(f"plugin must be the one that is folded into the model ({record}), got another")
            folding = Folding(plugin, record.source, record.target, record.scale)
        ruler = Ruler(model)
        dense, cost = ruler.flops(None) / 1e9, ruler.flops(method) / 1e9
        has_schedule = isinstance(method, (DiffRate, ToMe, EViT))
        return cls(
            _schedule_of(ruler, method) if has_schedule else None,
            name,
            "stock" if adapter.keeps_attention(model) else "tokcomp",
            adapter.uses_int8(model),
            folding,
            {"gflops": cost, "uncompressed_gflops": dense, **figures},
            None if has_schedule else _described(method),
        )

    def apply(self, model: ModelT) -> ModelT:
        """Compress ``model`` in this way, in place. If this raises, the model is unchanged.

        Args:
            model: plain, without a plugin; where products are quantised, as :func:`tokcomp.quantize` takes it.

        Returns:
            ``model`` itself.

        Raises:
            ValueError: the model is compressed or has a plugin, or the schedule or the plugin does not fit it.
            TypeError: (UnsupportedModelError) the model is not understood.
        """
        if find_adapter(model).method(model) is not None or fold_of(model) is not None:
            raise ValueError("model must be plain, got one that is compressed or has a plugin: restore and unfold it")
        method = _made(self.method) if self.schedule is None else scheduled(self.schedule)
        plugin = None if self.folding is None else self.folding.plugin
        if isinstance(plugin, Path):
            plugin = ToCom.load(plugin, model)
        try:
            if plugin is not None and self.folding is not None:
                plugin.fold(model, self.folding.source, self.folding.target, self.folding.scale)
            compress(model, method, attention=self.attention)
            if self.quantized:
                quantize(model)
        except BaseException:
            restore(model)
            if plugin is not None:
                plugin.unfold(model)
            raise
        return model

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> CompressionConfig:
        """Read what :meth:`save_pretrained` or :meth:`push_to_hub` wrote.

        Args:
            name: a folder, or a repository of the hub as "owner/name".
            options: ``revision``, ``token``, ``cache_dir`` and ``local_files_only``, as of huggingface_hub.

        Raises:
            FileNotFoundError: no such repository, or the folder or repository lacks a file.
            ConnectionError: it is not in the cache, and the hub cannot be reached.
            ValueError: a file is damaged, or is of a newer version.
        """
        path = fetch(name, FILE, **options)
        data = read_json(path)
        try:
            return cls._from_data(data, path, name, options)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: must be what save_pretrained wrote, got another file ({error!r})") from error

    @classmethod
    def _from_data(
        cls, data: Any, path: Path, name: str | os.PathLike[str], options: dict[str, Any]
    ) -> CompressionConfig:
        if data["format"] != FORMAT or data["version"] != VERSION:
            got = f"{data['format']!r}, version {data['version']!r}"
            raise ValueError(f"{path}: format must be {FORMAT!r}, version {VERSION}, got {got}; is tokcomp too old?")
        schedule, method = None, data["method"]
        if method is None:
            schedule = CompressionSchedule.load(fetch_beside(path, name, SCHEDULE_FILE, **options))
        folding = None
        if data["folding"] is not None:
            source, target, scale = (data["folding"][key] for key in ("source", "target", "scale"))
            if not all(type(one) is int for one in (source, target)) or not math.isfinite(scale):
                raise ValueError(f"{path}: folding must have whole degrees and a scale, got {data['folding']}")
            folding = Folding(fetch_beside(path, name, PLUGIN_FILE, **options), source, target, float(scale))
        return cls(schedule, data["model"], data["attention"], data["quantized"], folding, data["figures"], method)

    def _write_files(self, folder: Path) -> None:
        if self.schedule is not None:
            self.schedule.save(folder / SCHEDULE_FILE)
        folding = None
        if self.folding is not None:
            folding = {name: getattr(self.folding, name) for name in ("source", "target", "scale")}
            plugin = self.folding.plugin
            if isinstance(plugin, Path):
                write_whole(folder / PLUGIN_FILE, plugin.read_bytes())
            else:
                plugin.save(folder / PLUGIN_FILE)
        data = {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "attention": self.attention,
            "quantized": self.quantized,
            "folding": folding,
            "figures": self.figures,
            "method": self.method,
        }
        try:
            text = json.dumps(data, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise TypeError(f"figures must be JSON data, got {self.figures!r} ({error})") from error
        write_whole(folder / FILE, text)  # last: it says that the others are there

    def _card(self) -> Card:
        card = self.schedule._card() if self.schedule is not None else Card("", "", "", "")
        facts = {**card.facts, **({"model": self.model} if self.model else {}), **self.figures}
        if self.schedule is None:
            facts["method"] = repr(_made(self.method))
        if self.attention == "stock":
            facts["attention"] = "the model's own"
        if self.quantized:
            facts["products"] = "int8"
        if self.folding is not None:
            one = self.folding
            facts["ToCom plugin"] = f"folded from degree {one.source} to {one.target} at scale {one.scale:g}"
        return replace(
            card,
            title=f"{self.model or 'A vision transformer'}, compressed",
            tag="compression-config",
            lead="How a vision transformer drops and merges its tokens; the model's own weights are not in here.",
            use="""
import tokcomp

config = tokcomp.CompressionConfig.from_pretrained("owner/name")  # or this folder
config.apply(model)
""",
            facts=facts,
        )


def _schedule_of(ruler: Ruler, method: Method) -> CompressionSchedule:
    """The method as a schedule; DiffRate's own where it has one, with the settings that it runs with."""
    if isinstance(method, DiffRate):
        return replace(method.schedule, method=ruler.settings_of(method))
    return ruler.as_schedule(method)


def _described(method: Method) -> dict[str, Any]:
    """The class of one of tokcomp's methods, and the arguments that make it again."""
    name = type(method).__name__
    if getattr(methods, name, None) is not type(method):
        raise TypeError(f"method must be one of tokcomp's own, got {name}, which nobody could make from a file")
    arguments = {argument: getattr(method, argument) for argument in inspect.signature(type(method)).parameters}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    return {"name": name, "arguments": plain}


def _made(described: Any) -> Method:
    """The method of :func:`_described`; ValueError where it is none, as in a file from anyone."""
    name = described.get("name") if isinstance(described, dict) else None
    kind = getattr(methods, name, None) if isinstance(name, str) and name in methods.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, Method)) or inspect.isabstract(kind) or kind is DiffRate:
        raise ValueError(f"method must have the name of one of tokcomp's methods, got {described!r}")
    try:
        return kind(**described["arguments"])
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"method must have the arguments of {name}, got {described!r} ({error})") from error

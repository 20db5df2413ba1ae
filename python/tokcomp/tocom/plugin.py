"""ToCom: a plugin of low-rank steps between neighbouring compression degrees."""

from __future__ import annotations

import hashlib
import math
import operator
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from tokcomp.adapters import Adapter
from tokcomp.adapters.projections import Projection
from tokcomp.folded import Fold, fold_of
from tokcomp.hub import Card, Shareable, fetch
from tokcomp.methods import Method
from tokcomp.tocom.applied import Matrices, terms_added
from tokcomp.tocom.card import card_of
from tokcomp.tocom.files import FILE, Contents, read_plugin, write_plugin
from tokcomp.tocom.fold import original_rows, require_unchanged, take_out, write_fold
from tokcomp.tocom.layers import Width, describe, pieces, projections_of, width_of
from tokcomp.tocom.variants import STEPS, check_arithmetic, num_slots, slots_between


class ToCom(nn.Module, Shareable):
    """The gap between a model's weights at different compression degrees (ToCom, ECCV 2024).

    One step per pair of neighbouring degrees: low-rank matrices on the q and v weights of every block. From degree m to
    a higher degree n the weights become W + scale * sum of up @ down over the steps m+1..n; towards a lower degree the
    sum over n+1..m is subtracted (Eq. 6-7). A new plugin changes nothing: its up matrices are zero.

    What a degree means depends on the method: ToMe's r, EViT's ``num_pruned``, the position in a list of schedules.

    Args:
        model: any model that :func:`tokcomp.compress` takes; it determines the widths and is not kept. The parameters
            are created on its device, in float32 (float64 for a float64 model).
        rank: rank of a step, 1 or more.
        max_degree: degrees are 0..max_degree.
        arithmetic: how matrices make up the way between two degrees: "steps", as above, or an ablation of the paper's
            Table 5: "two_way", "shared" or "shared_by_distance" (:mod:`tokcomp.tocom.variants`).

    Attributes:
        q_down, v_down: per block, Parameters [max_degree * rank, C].
        q_up, v_up: per block, Parameters [A, max_degree * rank], with A the width of all heads together (usually C).
            Rows ``rank * (d - 1)`` to ``rank * d - 1`` of a down matrix, and those columns of its up matrix, are the
            step from degree d - 1 to d. "two_way": as many again, for the steps back.
        method: name of the method it was trained with ("tome"), or None; a model compressed by another method is
        refused, and so is compressing a model by another method while the plugin is folded into it. provenance: JSON
        data about where it comes from, or None.

    Raises:
        TypeError: rank or max_degree is not an integer; or (UnsupportedModelError) the model is not understood.
        ValueError: rank or max_degree is below 1, or there is no such arithmetic.
    """

    def __init__(self, model: nn.Module, rank: int = 2, max_degree: int = 16, arithmetic: str = STEPS) -> None:
        super().__init__()
        self.rank, self.max_degree = _whole("rank", rank, 1), _whole("max_degree", max_degree, 1)
        self.arithmetic = check_arithmetic(arithmetic)
        self.method: str | None = None
        self.provenance: dict[str, Any] | None = None
        _, projections = projections_of(model)
        self.widths = [width_of(one) for one in projections]
        self._identity = uuid.uuid4().hex
        slots = num_slots(self.arithmetic, self.rank, self.max_degree)
        for name in ("q_down", "q_up", "v_down", "v_up"):
            parameters = nn.ParameterList()
            for projection, width in zip(projections, self.widths, strict=True):
                weight = projection.q[0].weight
                dtype = torch.promote_types(weight.dtype, torch.float32)
                shape = (slots, width.tokens) if name.endswith("down") else (width.attention, slots)
                parameters.append(nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device)))
            setattr(self, name, parameters)
        self.q_down: nn.ParameterList
        self.q_up: nn.ParameterList
        self.v_down: nn.ParameterList
        self.v_up: nn.ParameterList
        for down in (*self.q_down, *self.v_down):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    def extra_repr(self) -> str:
        arithmetic = "" if self.arithmetic == STEPS else f"arithmetic={self.arithmetic}, "
        return f"rank={self.rank}, max_degree={self.max_degree}, {arithmetic}{describe(self.widths)}"

    def fold(self, model: nn.Module, source: int = 0, target: int = 8, scale: float = 0.1) -> None:
        """Turn the weights of a model trained at degree ``source`` into weights for degree ``target``, in place.

        Only the values of the q and v weights change. A second fold of this plugin replaces the first. If this raises,
        the model is unchanged. No other thread may call the model meanwhile; :class:`tokcomp.Switchable` is for models
        that serve.

        Args:
            model: plain or compressed, with the depth and widths that the plugin was made for.
            source, target: degrees, 0..max_degree.
            scale: factor on the steps; the paper trains with 0.1 and uses 0.01 to 0.15.

        Raises:
            TypeError: a degree is not an integer, or the model is not understood.
            ValueError: a degree out of range, a scale that is not finite, a plugin for another width, depth or method,
                or one whose values are not finite.
            RuntimeError: another plugin is folded in already, the weights changed since this one was, or another thread
                is in a call of the model.
        """
        self._steps(source, target, scale)
        projections = self._projections_of(model)
        if any(piece.weight.is_meta for one in projections for piece in pieces(one)):
            raise ValueError("model must have weights to fold into, got one on the meta device")
        plugin = (self._identity, self._digest())
        record = fold_of(model)
        if record is not None:
            require_unchanged(record, projections)
            if not set(record.plugin) & set(plugin):
                raise RuntimeError(f"another plugin is already folded into the model ({record}): unfold that first")
        rows = self.rows_for(model, original_rows(projections), source, target, scale)
        write_fold(model, projections, rows, Fold(int(source), int(target), float(scale), plugin, self.method))

    def unfold(self, model: nn.Module) -> None:
        """Restore, bit for bit, the weights that a model had before :meth:`fold`, whichever plugin was folded in.

        If the model was converted in between, it gets its original weights as the conversion would have made them. Does
        nothing without a fold.

        Raises:
            TypeError: ``model`` is not a module.
            RuntimeError: the weights changed since the fold, or another thread is in a call of the model.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        record = fold_of(model)
        if record is not None:
            _, projections = projections_of(model)
            require_unchanged(record, projections)
            take_out(model, projections)

    def is_folded_into(self, model: nn.Module) -> bool:
        """Whether what is folded into ``model`` is this plugin, or one of the same values."""
        record = fold_of(model)
        return record is not None and bool({self._identity, self._digest()} & set(record.plugin))

    def applied(
        self, model: nn.Module, source: int, target: int, scale: float = 0.1
    ) -> AbstractContextManager[nn.Module]:
        """The effect of :meth:`fold` as a context that is differentiable in the plugin and does not touch the weights.

        Inside it the model adds two thin products to its q and v; only of weights that are read past their layer, as
        nn.MultiheadAttention's are, the sum is formed. Contexts nest, and add up with each other and with a fold. Under
        gradient checkpointing, blocks may run backward after the context has ended, but a model that is checkpointed as
        a whole only inside it. Not for a model that other threads use.

        Raises:
            TypeError, ValueError: as :meth:`fold`, when the context is entered.
        """
        return self._applied(model, source, target, scale)

    @contextmanager
    def _applied(self, model: nn.Module, source: int, target: int, scale: float) -> Iterator[nn.Module]:
        columns, factor = self._steps(source, target, scale)
        projections = self._projections_of(model)
        if columns.start == columns.stop:
            yield model
            return
        matrices = [Matrices(*own) for own in zip(self.q_down, self.q_up, self.v_down, self.v_up, strict=True)]
        with terms_added(model, projections, matrices, columns, factor):
            yield model

    def rows_for(
        self, model: nn.Module, rows: Sequence[Tensor], source: int, target: int, scale: float = 0.1
    ) -> list[Tensor]:
        """What :meth:`fold` would write: rows [2A, C] of q and v per block, made from those for degree ``source``.

        Raises:
            TypeError, ValueError: as :meth:`fold`.
        """
        steps = self._steps(source, target, scale)
        self._projections_of(model)
        return [self._compensated(index, original, *steps) for index, original in enumerate(rows)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plugin as safetensors with its metadata; the file is written whole or left as it was.

        Raises:
            TypeError: the method is not a string, or the provenance not JSON data.
        """
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        size = (self.rank, self.max_degree, self.widths)
        write_plugin(Path(path), Contents(*size, tensors, self.method, self.provenance, self.arithmetic))

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> ToCom:
        """Read a plugin that was made for models like ``model``: what :meth:`save` wrote, or the published code's.

        The published code's files hold ``blocks.{i}.attn.{q,v}_tocom.adapter_{down,up}.weight`` (safetensors or torch;
        other entries are ignored). A step's rank is 2 in them, and degree r switches on the last 2r slots.

        Returns:
            A plugin in the file's element type, on the device of the model's weights.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated or damaged, is not a plugin, or is one for another depth or width or with
                values that are not finite; the message names it.
        """
        contents = read_plugin(Path(path))
        _, projections = projections_of(model)
        _require_widths(contents.widths, [width_of(one) for one in projections], f"{path}: the plugin")
        plugin = cls(model, contents.rank, contents.max_degree, contents.arithmetic)
        with torch.no_grad():
            for name, parameter in plugin.named_parameters():
                parameter.data = contents.tensors[name].to(parameter.device)
        plugin.method, plugin.provenance = contents.method, contents.provenance
        return plugin

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], model: nn.Module, **options: Any) -> ToCom:
        """Read what :meth:`save_pretrained` or :meth:`push_to_hub` wrote, for models like ``model``.

        Args:
            name: a folder, or a repository of the hub as "owner/name".
            model: as for :meth:`load`.
            options: ``revision``, ``token``, ``cache_dir`` and ``local_files_only``, as of huggingface_hub.

        Raises:
            FileNotFoundError: no such repository, or the folder or repository has no ``tocom.safetensors``.
            ConnectionError: it is not in the cache, and the hub cannot be reached.
            ValueError: as :meth:`load`.
        """
        return cls.load(fetch(name, FILE, **options), model)

    def _write_files(self, folder: Path) -> None:
        self.save(folder / FILE)

    def _card(self) -> Card:
        return card_of(self)

    def _projections_of(self, model: nn.Module) -> list[Projection]:
        adapter, projections = projections_of(model)
        _require_widths(self.widths, [width_of(one) for one in projections], "the plugin")
        self._require_method(adapter, model)
        return projections

    def _require_method(self, adapter: Adapter, model: nn.Module) -> None:
        method = adapter.method(model)
        name = self.method if method is None else method_name(method)
        if self.method is not None and name != self.method:
            raise ValueError(
                f"the plugin was trained with the method {self.method}, got a model compressed by {name}; compress the "
                "model by that method, or set the plugin's method to None"
            )

    def _steps(self, source: int, target: int, scale: float) -> tuple[slice, float]:
        """The slots between two degrees, and their factor."""
        source, target = self._degree("source", source), self._degree("target", target)
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"scale must be a number, got {scale!r}")
        if not math.isfinite(scale):
            raise ValueError(f"scale must be finite, got {scale}")
        columns, factor = slots_between(self.arithmetic, self.rank, self.max_degree, source, target)
        return columns, factor * float(scale)

    def _degree(self, name: str, value: int) -> int:
        degree = _whole(name, value, 0)
        if degree > self.max_degree:
            raise ValueError(f"{name} must be a degree from 0 to {self.max_degree}, got {degree}")
        return degree

    @torch.no_grad()
    def _compensated(self, block: int, rows: Tensor, columns: slice, factor: float) -> Tensor:
        """Rows [2A, C] of q and v with the steps added; summed in float32 or better, rounded once."""
        ups, downs = (self.q_up[block], self.v_up[block]), (self.q_down[block], self.v_down[block])
        dtype = torch.promote_types(torch.promote_types(rows.dtype, ups[0].dtype), torch.float32)
        parts = []
        with torch.autocast(rows.device.type, enabled=False):
            for part, up, down in zip(rows.chunk(2), ups, downs, strict=True):
                up, down = up[:, columns].to(rows.device, dtype), down[columns].to(rows.device, dtype)
                if not (torch.isfinite(up).all() and torch.isfinite(down).all()):
                    raise ValueError(f"the plugin's values must be finite, got others in block {block}")
                parts.append(torch.addmm(part.to(dtype), up, down, alpha=factor))
        return torch.cat(parts).to(rows.dtype)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, parameter in self.named_parameters():
            digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def method_name(method: Method) -> str:
    """The name by which the command line knows a method: ``tome`` for ToMe."""
    return method.name


def _require_widths(made_for: Sequence[Width], found: list[Width], what: str) -> None:
    if list(made_for) != found:
        raise ValueError(f"{what} was made for {describe(list(made_for))}, got a model of {describe(found)}")


def _whole(name: str, value: SupportsIndex, least: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number

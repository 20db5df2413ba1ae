"""Writing other rows of q and v into a model so that they can be taken out again.

The original rows are kept in non-persistent buffers of the packed layers. So they follow the weights through deepcopy,
pickle, ``.to()`` and ``.half()``, and are rounded as the weights would have been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokcomp import fastpath
from tokcomp.folded import RECORD, Fold, fold_of
from tokcomp.in_flight import require_idle
from tokcomp.tocom.layers import read_rows, write_rows

_ORIGINAL = "_tokcomp_unfolded"  # buffer of a packed layer: rows of q and v before the fold
_SAMPLE = "_tokcomp_folded"  # buffer of a packed layer: some of the elements that the fold wrote
_SAMPLES = 256
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Marks(NamedTuple):
    original: Tensor
    sample: Tensor


def original_rows(layers: Sequence[nn.Linear]) -> list[Tensor]:
    """Rows [2A, C] of q and v without what is folded in."""
    marks = [_marks(layer) for layer in layers]
    return [read_rows(layer) if mark is None else mark.original for layer, mark in zip(layers, marks, strict=True)]


def require_unchanged(record: Fold, layers: Sequence[nn.Linear]) -> None:
    """Raise RuntimeError unless q and v hold what the fold wrote, up to a conversion of the whole model."""
    if len(layers) == len(record.written) and all(
        _is_as_written(layer, *written) for layer, written in zip(layers, record.written, strict=True)
    ):
        return
    raise RuntimeError(
        f"the q and v weights must be those that the fold ({record}) wrote, got others: they changed since. Train and "
        "load weights without a fold; tokcomp.tocom.fold.forget_fold(model) adopts the present weights as the model's"
    )


def write_fold(model: nn.Module, layers: Sequence[nn.Linear], rows: Sequence[Tensor], record: Fold) -> None:
    """Write rows [2A, C] into every layer and remember the original ones; all layers or none."""
    with torch.inference_mode(_inference(layers)), torch.no_grad():
        originals = original_rows(layers)
        marks = [_Marks(original, _sample(new)) for original, new in zip(originals, rows, strict=True)]
        written = tuple((_hash(new), _hash(mark.sample)) for new, mark in zip(rows, marks, strict=True))
    record = replace(record, written=written)
    with _whole(model, layers):
        for layer, new in zip(layers, rows, strict=True):
            write_rows(layer, new)
        for layer, mark in zip(layers, marks, strict=True):
            _set_marks(layer, mark)
        setattr(model, RECORD, record)


def take_out(model: nn.Module, layers: Sequence[nn.Linear]) -> None:
    """Write back the rows from before the fold, and forget it; all layers or none."""
    with _whole(model, layers):
        for layer, rows in zip(layers, original_rows(layers), strict=True):
            write_rows(layer, rows)
        _forget(model, layers)


def forget_fold(model: nn.Module) -> None:
    """Adopt the current weights as the model's own for good; does nothing without a fold."""
    _forget(model, [module for module in model.modules() if _ORIGINAL in module._buffers])


def _forget(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        _set_marks(layer, None)
    vars(model).pop(RECORD, None)


@contextmanager
def _whole(model: nn.Module, layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Writing to the layers, all undone if the block, or anything after it here, raises: a call in flight, for one."""
    require_idle(model)
    record, marks = fold_of(model), [_marks(layer) for layer in layers]
    inference = _inference(layers)
    with torch.inference_mode(inference), torch.no_grad():
        before = [read_rows(layer) for layer in layers]
    try:
        with torch.inference_mode(inference), torch.no_grad():
            yield
        fastpath.forget(model)
        require_idle(model)
    except BaseException:
        with torch.inference_mode(inference), torch.no_grad():
            for layer, rows, mark in zip(layers, before, marks, strict=True):
                write_rows(layer, rows)
                _set_marks(layer, mark)
        if record is None:
            vars(model).pop(RECORD, None)
        else:
            setattr(model, RECORD, record)
        fastpath.forget(model)
        raise


def _inference(layers: Sequence[nn.Linear]) -> bool:
    """Whether the weights are inference tensors, which can only be written in that mode."""
    return any(layer.weight.is_inference() for layer in layers)


def _marks(layer: nn.Module) -> _Marks | None:
    original, sample = layer._buffers.get(_ORIGINAL), layer._buffers.get(_SAMPLE)
    return None if original is None or sample is None else _Marks(original, sample)


def _set_marks(layer: nn.Module, marks: _Marks | None) -> None:
    for name, tensor in zip((_ORIGINAL, _SAMPLE), marks or (None, None), strict=True):
        if tensor is not None:
            layer.register_buffer(name, tensor, persistent=False)
        elif name in layer._buffers:
            delattr(layer, name)


def _is_as_written(layer: nn.Linear, rows_hash: int, sample_hash: int) -> bool:
    marks = _marks(layer)
    if marks is None or marks.original.dtype != layer.weight.dtype or layer.weight.is_meta:
        return False
    rows = read_rows(layer)
    if rows.shape != marks.original.shape:
        return False
    sample = _hash(marks.sample)
    if sample == sample_hash:
        return _hash(rows) == rows_hash
    # The whole model was converted, so the sample was rounded the same way.
    return _hash(_sample(rows)) == sample


def _sample(rows: Tensor) -> Tensor:
    return rows.flatten()[:: max(1, rows.numel() // _SAMPLES)].clone()


def _hash(rows: Tensor) -> int:
    """A number that changes with any one element; the same on every device."""
    bits = rows.contiguous().view(_INTEGERS[rows.dtype.itemsize]).flatten().long()
    # Odd factors: a change of one element changes the sum modulo 2^64.
    factors = torch.arange(bits.numel(), device=bits.device).mul_(2).add_(1).mul_(0x9E3779B97F4A7C1)
    return int((bits * factors).sum())

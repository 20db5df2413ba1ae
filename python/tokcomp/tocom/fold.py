"""Writing other rows of q and v into a model so that they can be taken out again.

The original rows are kept in non-persistent buffers of the modules that hold the weights. So they follow the weights
through deepcopy, pickle, ``.to()`` and ``.half()``, and are rounded as the weights would have been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokcomp import fastpath
from tokcomp.adapters.projections import Projection
from tokcomp.folded import RECORD, Fold, fold_of
from tokcomp.in_flight import require_idle
from tokcomp.tocom.layers import pieces, read_rows, write_rows

_ORIGINAL = "_tokcomp_unfolded"  # buffer of the module with a block's first rows: rows of q and v before the fold
_SAMPLE = "_tokcomp_folded"  # another: some of the elements that the fold wrote
_SAMPLES = 256
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Marks(NamedTuple):
    original: Tensor
    sample: Tensor


def original_rows(projections: Sequence[Projection]) -> list[Tensor]:
    """Rows [2A, C] of q and v without what is folded in."""
    marks = [_marks(one) for one in projections]
    return [read_rows(one) if mark is None else mark.original for one, mark in zip(projections, marks, strict=True)]


def require_unchanged(record: Fold, projections: Sequence[Projection]) -> None:
    """Raise RuntimeError unless q and v hold what the fold wrote, up to a conversion of the whole model."""
    if len(projections) == len(record.written) and all(
        _is_as_written(one, *written) for one, written in zip(projections, record.written, strict=True)
    ):
        return
    raise RuntimeError(
        f"the q and v weights must be those that the fold ({record}) wrote, got others: they changed since. Train and "
        "load weights without a fold; tokcomp.tocom.fold.forget_fold(model) adopts the present weights as the model's"
    )


def write_fold(model: nn.Module, projections: Sequence[Projection], rows: Sequence[Tensor], record: Fold) -> None:
    """Write rows [2A, C] into every block and remember the original ones; all blocks or none."""
    with torch.inference_mode(_inference(projections)), torch.no_grad():
        originals = original_rows(projections)
        marks = [_Marks(original, _sample(new)) for original, new in zip(originals, rows, strict=True)]
        written = tuple((_hash(new), _hash(mark.sample)) for new, mark in zip(rows, marks, strict=True))
    record = replace(record, written=written)
    with _whole(model, projections):
        for one, new in zip(projections, rows, strict=True):
            write_rows(one, new)
        for one, mark in zip(projections, marks, strict=True):
            _set_marks(_home(one), mark)
        setattr(model, RECORD, record)


def take_out(model: nn.Module, projections: Sequence[Projection]) -> None:
    """Write back the rows from before the fold, and forget it; all blocks or none."""
    with _whole(model, projections):
        for one, rows in zip(projections, original_rows(projections), strict=True):
            write_rows(one, rows)
        _forget(model, [_home(one) for one in projections])


def forget_fold(model: nn.Module) -> None:
    """Adopt the current weights as the model's own for good; does nothing without a fold."""
    _forget(model, [module for module in model.modules() if _ORIGINAL in module._buffers])


def _forget(model: nn.Module, homes: Sequence[nn.Module]) -> None:
    for module in homes:
        _set_marks(module, None)
    vars(model).pop(RECORD, None)


@contextmanager
def _whole(model: nn.Module, projections: Sequence[Projection]) -> Iterator[None]:
    """Writing to the weights, all undone if the block, or anything after it here, raises: a call in flight, for one."""
    require_idle(model)
    record, marks = fold_of(model), [_marks(one) for one in projections]
    inference = _inference(projections)
    with torch.inference_mode(inference), torch.no_grad():
        before = [read_rows(one) for one in projections]
    try:
        with torch.inference_mode(inference), torch.no_grad():
            yield
        fastpath.forget(model)
        require_idle(model)
    except BaseException:
        with torch.inference_mode(inference), torch.no_grad():
            for one, rows, mark in zip(projections, before, marks, strict=True):
                write_rows(one, rows)
                _set_marks(_home(one), mark)
        if record is None:
            vars(model).pop(RECORD, None)
        else:
            setattr(model, RECORD, record)
        fastpath.forget(model)
        raise


def _inference(projections: Sequence[Projection]) -> bool:
    """Whether the weights are inference tensors, which can only be written in that mode."""
    return any(piece.weight.is_inference() for one in projections for piece in pieces(one))


def _home(projection: Projection) -> nn.Module:
    """The module that keeps a block's marks."""
    return projection.q[0].module


def _marks(projection: Projection) -> _Marks | None:
    buffers = _home(projection)._buffers
    original, sample = buffers.get(_ORIGINAL), buffers.get(_SAMPLE)
    return None if original is None or sample is None else _Marks(original, sample)


def _set_marks(module: nn.Module, marks: _Marks | None) -> None:
    for name, tensor in zip((_ORIGINAL, _SAMPLE), marks or (None, None), strict=True):
        if tensor is not None:
            module.register_buffer(name, tensor, persistent=False)
        elif name in module._buffers:
            delattr(module, name)


def _is_as_written(projection: Projection, rows_hash: int, sample_hash: int) -> bool:
    marks, weights = _marks(projection), [piece.weight for piece in pieces(projection)]
    if marks is None or any(weight.dtype != marks.original.dtype or weight.is_meta for weight in weights):
        return False
    rows = read_rows(projection)
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

"""AdaptFormer: a narrow branch beside each MLP, trained while the backbone stays as it is (NeurIPS 2022).

A block's ``MLP(LN(x))`` becomes ``MLP(LN(x)) + scale * up(ReLU(down(LN(x))))`` (ToCom, Eq. 10): the branch reads what
the MLP reads, and its result takes the same path as the MLP's, through LayerScale and stochastic depth if the block has
them. ``up`` starts at zero, so a new branch changes nothing.

The branch lives in the MLP itself, whose class is swapped. So everything works on the model as before:
:func:`tokcomp.compress` with any method, :class:`tokcomp.ToCom`, :class:`tokcomp.Switchable`, copies, pickles,
``.to()``.
"""

from __future__ import annotations

import json
import math
import os
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters import UnsupportedModelError, find_adapter
from tokcomp.adapters.swap import Swapped, restore_class, swap_class
from tokcomp.adapters.timm_vit.adapter import TimmVisionTransformer
from tokcomp.files import write_whole
from tokcomp.in_flight import require_idle
from tokcomp.reading import read_metadata, read_tensors, tensors_to_bytes

FORMAT = "tokcomp.adaptformer"
VERSION = 1
#: The attribute of an MLP that holds its branch.
_BRANCH = "adapter"
_HEADS = ("head", "head_dist")
ModelT = TypeVar("ModelT", bound=nn.Module)


class Branch(nn.Module):
    """``scale * up(ReLU(down(x)))`` for tokens x [..., width].

    Args:
        width: width of the tokens.
        bottleneck: width between the two layers.
        scale: factor on the result.
    """

    def __init__(
        self, width: int, bottleneck: int, scale: float, dtype: torch.dtype | None = None, device: Any = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, bottleneck, dtype=dtype, device=device)
        self.up = nn.Linear(bottleneck, width, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(F.relu(self.down(x)))
        return out * self.scale


class Adapted(Swapped):
    """An MLP with a branch beside it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out + self.adapter(x)


def attach(model: ModelT, bottleneck: int = 32, scale: float = 0.1) -> ModelT:
    """Give every block's MLP a branch, in place. The logits do not change until the branches are trained.

    The parameters are named ``blocks.{i}.mlp.adapter.{down,up}.{weight,bias}``; all others keep their names.

    Args:
        model: a timm VisionTransformer or VisionTransformerDistilled, plain or compressed.
        bottleneck: width of the branches, 1 or more.
        scale: factor on the branches' output; the ToCom paper chooses among 0.01, 0.1, 1, 10 and 100.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: (UnsupportedModelError) the model is not understood; or an argument has the wrong type.
        ValueError: bottleneck or scale is out of range, or the model already has branches.
    """
    mlps = _mlps(model)
    if isinstance(bottleneck, bool) or not isinstance(bottleneck, int):
        raise TypeError(f"bottleneck must be an integer, got {bottleneck!r}")
    if bottleneck < 1:
        raise ValueError(f"bottleneck must be at least 1, got {bottleneck}")
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number, got {scale!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if is_attached(model):
        raise ValueError("model must have no AdaptFormer branches yet, got one with them; detach them first")
    branches = []
    for mlp, width in zip(mlps, _widths(model), strict=True):
        weight = next(mlp.parameters())
        branches.append(Branch(width, bottleneck, float(scale), weight.dtype, weight.device).train(mlp.training))
    require_idle(model)
    for mlp, branch in zip(mlps, branches, strict=True):
        swap_class(mlp, Adapted)
        mlp.add_module(_BRANCH, branch)
    return model


def detach(model: ModelT) -> ModelT:
    """Undo :func:`attach`, in place. A model without branches stays as it is; ``requires_grad`` is not touched."""
    mlps = _mlps(model)
    require_idle(model)
    for mlp in mlps:
        if isinstance(mlp, Adapted):
            restore_class(mlp)
            del mlp._modules[_BRANCH]
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether the model has branches."""
    return any(isinstance(module, Adapted) for module in model.modules())


def freeze(model: nn.Module) -> list[str]:
    """Make only branches and classifier trainable (``requires_grad``), and return the names of their parameters.

    Raises:
        ValueError: the model has no branches.
    """
    names = _own_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return [name for name, _ in model.named_parameters() if name in names]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Branches and classifier: their part of the model's state_dict.

    Raises:
        ValueError: the model has no branches.
    """
    names = _own_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def metadata(model: nn.Module) -> dict[str, str]:
    """The metadata of a file that :func:`save` writes.

    Raises:
        ValueError: the model has no branches.
    """
    branches = _branches(model)
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "bottleneck": str(branches[0].down.out_features),
        "scale": repr(branches[0].scale),
        "depth": str(len(branches)),
        "width": str(branches[0].down.in_features),
        "num_classes": str(getattr(model, "num_classes", 0)),
    }


def save(model: nn.Module, path: str | os.PathLike[str], *, facts: dict[str, Any] | None = None) -> None:
    """Write branches and classifier as safetensors; the file is written whole or left as it was.

    Args:
        model: a model with branches.
        path: the file.
        facts: JSON data about the model, kept under ``tokcomp`` in the file's metadata.

    Raises:
        ValueError: the model has no branches.
    """
    about = metadata(model)
    if facts is not None:
        about["tokcomp"] = json.dumps(facts)
    write_whole(Path(path), tensors_to_bytes(state(model), about))


@torch.no_grad()
def load(path: str | os.PathLike[str], model: ModelT) -> ModelT:
    """Give a model the branches and the classifier that :func:`save` wrote, in place. Branches it has are replaced.

    Everything is checked first: if this raises, the model is as it was.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: no such file.
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: the file is truncated, of another kind, or for another depth, width or number of classes.
    """
    tensors, about = _read(Path(path))
    _mlps(model)
    widths = _widths(model)
    try:
        bottleneck, depth, width = (int(about[name]) for name in ("bottleneck", "depth", "width"))
        scale = float(about["scale"])
        if not 0 < depth <= len(tensors):  # before anything is made as long as the file says
            raise ValueError(f"{depth} blocks in {len(tensors)} tensors")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: the metadata must say bottleneck, scale, depth and width ({error})") from error
    if widths != [width] * depth:
        found = f"{len(widths)} blocks of width {' and '.join(map(str, dict.fromkeys(widths)))}"
        raise ValueError(f"{path}: the branches were made for {depth} blocks of width {width}, got a model of {found}")
    wanted: dict[str, tuple[int, ...]] = {}
    for block in range(depth):
        prefix = f"blocks.{block}.mlp.{_BRANCH}"
        wanted |= {f"{prefix}.down.weight": (bottleneck, width), f"{prefix}.down.bias": (bottleneck,)}
        wanted |= {f"{prefix}.up.weight": (width, bottleneck), f"{prefix}.up.bias": (width,)}
    plain = model.state_dict()
    wanted |= {name: tuple(plain[name].shape) for name in plain if name.split(".")[0] in _HEADS}
    for name in sorted({*wanted, *tensors}):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != wanted.get(name):
            hint = ""
            if name.split(".")[0] in _HEADS:
                hint = (
                    f"; its classifier is one of {about.get('num_classes')} classes, the model's of {_classes(model)}"
                )
            raise ValueError(f"{path}: {name} must be {wanted.get(name, 'absent')}, got {shape or 'nothing'}{hint}")
    detach(model)
    attach(model, bottleneck, scale)
    own = model.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model


def is_saved(path: Path) -> bool:
    """Whether :func:`save` wrote this file."""
    return read_metadata(path).get("format") == FORMAT


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    tensors, about = read_tensors(path, "an AdaptFormer file")
    if about.get("format") != FORMAT:
        raise ValueError(f"{path}: must be an AdaptFormer file, got a file of {len(tensors)} other tensors")
    if about.get("version") != str(VERSION):
        raise ValueError(f"{path}: version must be {VERSION}, got {about.get('version')}; another tokcomp wrote it")
    return tensors, about


def _mlps(model: nn.Module) -> list[Any]:
    """The MLP of each block."""
    adapter = find_adapter(model)
    if not isinstance(adapter, TimmVisionTransformer):
        raise UnsupportedModelError(
            f"{adapter.family}: AdaptFormer's branches are for timm's VisionTransformer, got a {type(model).__name__}"
        )
    blocks: Any = model.blocks
    return [block.mlp for block in blocks]


def _widths(model: nn.Module) -> list[int]:
    """Width of the tokens in each block."""
    return [projection.width for projection in find_adapter(model).projections(model)]


def _branches(model: nn.Module) -> list[Branch]:
    branches = [mlp.adapter for mlp in _mlps(model) if isinstance(mlp, Adapted)]
    if not branches:
        raise ValueError("model must have AdaptFormer branches, got one without; attach or load them first")
    return branches


def _own_names(model: nn.Module) -> set[str]:
    """Names of branches and classifier in the state_dict."""
    ids = {id(branch) for branch in _branches(model)}
    prefixes = [name for name, module in model.named_modules() if id(module) in ids]
    prefixes += [name for name in _HEADS if hasattr(model, name)]
    return {name for name in model.state_dict() if any(name.startswith(f"{prefix}.") for prefix in prefixes)}


def _classes(model: nn.Module) -> int:
    return int(getattr(model, "num_classes", 0))

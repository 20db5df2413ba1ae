"""The published repositories themselves beside ours, from clones that the user has.

Nothing of them is part of this package. A clone is imported apart from everything else: its top-level names (``utils``,
``models``) neither hide nor replace anybody's, what it registers with timm is taken out again, and no byte code is
written into it. The code was written for timm 0.4; where a newer timm only renamed something, the name is supplied.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from tokcomp.methods import DiffRate, Method, ToMe

#: Repository -> the module to import, and a file that tells a clone of it.
REPOSITORIES = {
    "DiffRate": ("DiffRate", "DiffRate/patch/deit.py"),
    "ToMe": ("tome", "tome/patch/timm.py"),
    "ToCom": ("models", "models.py"),
}
ADDRESSES = {
    "DiffRate": "https://github.com/OpenGVLab/DiffRate",
    "ToMe": "https://github.com/facebookresearch/ToMe",
    "ToCom": "https://github.com/JieShibo/ToCom",
}
#: Modules of timm 0.4 that a newer timm has elsewhere.
_MOVED = {"timm.models.layers.helpers": "timm.layers.helpers"}
#: The width that ToCom's published adapters are written for, and its largest degree.
_TOCOM_WIDTH, _TOCOM_DEGREE = 768, 16


class PublishedCodeError(RuntimeError):
    """The published code cannot run this model here; the message says why."""


class PublishedCode(nn.Module):
    """A model patched by a published repository; logits only."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, **self.options)


def find_clones(folders: Sequence[Path]) -> dict[str, Path]:
    """Which repositories the folders hold: repository -> folder.

    Raises:
        ValueError: a folder holds none of them.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        names = [name for name, (_, mark) in REPOSITORIES.items() if (folder / mark).is_file()]
        if not names:
            known = "; ".join(f"{name} ({address})" for name, address in ADDRESSES.items())
            raise ValueError(f"--published-code must be the folder of a clone of {known}, got {folder}")
        found.update({name: folder.resolve() for name in names})
    return found


def patch_with_published_code(
    model: nn.Module, method: Method, folders: Sequence[Path], *, plugin: bool = False
) -> PublishedCode:
    """``model``, a plain timm VisionTransformer, patched in place by the repository of ``method``.

    Args:
        model: in float32.
        method: a DiffRate, run by DiffRate's repository, or a ToMe, run by ToMe's.
        folders: of clones.
        plugin: ToMe with ToCom's plugin from degree 0, whose LoRA its repository computes in every pass. The plugin is
            untrained, so logits are ToMe's.

    Raises:
        PublishedCodeError: no clone of what is needed, or it does not import or patch here.
    """
    clones = find_clones(folders)
    vit: Any = model
    pools = vit.global_pool == "avg"
    if isinstance(method, DiffRate):
        schedule = method.schedule
        if schedule.num_prune_kept is None or schedule.num_merge_kept is None or method.pipeline != "prune_merge":
            raise PublishedCodeError("DiffRate's repository prunes and merges: the schedule must have both lists")
        [package] = _import(clones, "DiffRate")
        _call("DiffRate", package.patch.mae if pools else package.patch.deit, model)
        vit.set_kept_num(list(schedule.num_prune_kept), list(schedule.num_merge_kept))
        options = {"return_flop": False}
    elif isinstance(method, ToMe):
        packages = _import(clones, "ToMe", *(["ToCom"] if plugin else []))
        _call("ToMe", packages[0].patch.mae if pools else packages[0].patch.timm, model, prop_attn=method.prop_attn)
        degrees = list(method.r) if isinstance(method.r, tuple) else [method.r] * len(vit.blocks)
        vit.r = degrees
        if plugin:
            if vit.embed_dim != _TOCOM_WIDTH or max(degrees) > _TOCOM_DEGREE:
                raise PublishedCodeError(
                    f"ToCom's repository takes models {_TOCOM_WIDTH} wide and r up to {_TOCOM_DEGREE}, got "
                    f"{vit.embed_dim} and {max(degrees)}"
                )
            _call("ToCom", packages[1].set_lora, model, 2 * _TOCOM_DEGREE, 0.1)
            for name, weight in model.named_parameters():
                if "adapter_up" in name:
                    nn.init.zeros_(weight)
            vit.r = [[degree, 0] for degree in degrees]
        options = {}
    else:
        raise PublishedCodeError(f"the published repositories run DiffRate and ToMe, got {type(method).__name__}")
    _supply_old_names(vit, pools)
    return PublishedCode(model.to(next(model.parameters()).device).eval(), **options)


def _supply_old_names(model: Any, pools: bool) -> None:
    """What timm had under another name when the repositories were written."""
    for block in model.blocks:
        if not hasattr(block, "drop_path"):
            block.drop_path = block.drop_path1
    if pools and hasattr(model, "forward_head"):
        # Their forward_features takes images alone and pools already; in timm 0.4 only the classifier came after it.
        features = model.forward_features
        model.forward_features = lambda images, **masks: features(images)
        model.forward_head = lambda pooled: model.head(model.head_drop(pooled))


def _call(name: str, function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        raise PublishedCodeError(f"{name}'s repository cannot patch this model: {_reason(error)}") from error


def _import(clones: dict[str, Path], *names: str) -> list[ModuleType]:
    missing = [name for name in names if name not in clones]
    if missing:
        wanted = " and ".join(f"{name} ({ADDRESSES[name]})" for name in missing)
        raise PublishedCodeError(f"--published-code names no clone of {wanted}")
    return _import_from(tuple(names), tuple(clones[name] for name in names))


@functools.cache
def _import_from(names: tuple[str, ...], folders: tuple[Path, ...]) -> list[ModuleType]:
    modules = []
    with apart(folders):
        for name, folder in zip(names, folders, strict=True):
            try:
                modules.append(importlib.import_module(REPOSITORIES[name][0]))
            except Exception as error:
                raise PublishedCodeError(f"{name} does not import from {folder}: {_reason(error)}") from error
    return modules


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    installed = importlib.metadata.version("timm")
    return f"{type(error).__name__}: {lines[0] if lines else ''} (written for timm 0.4; installed is {installed})"


@contextmanager
def apart(folders: Sequence[Path]) -> Iterator[None]:
    """Imports from ``folders`` first; everything global is afterwards as it was before."""
    from timm.models import _registry

    own = {path.stem for folder in folders for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in own}
    tables = [
        table
        for name, table in vars(_registry).items()
        if name.startswith("_") and not name.startswith("__") and isinstance(table, (dict, set))
    ]
    copies = [table.copy() for table in tables]
    path, writes = list(sys.path), sys.dont_write_bytecode
    before = set(sys.modules)
    sys.path[:0] = [str(folder) for folder in folders]
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that timm has moved what they import
            gone = [name for name in _MOVED if importlib.util.find_spec(name) is None]
            moved = {name: importlib.import_module(_MOVED[name]) for name in gone}
            sys.modules.update(moved)
            yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, writes
        for name in [name for name in sys.modules if name not in before and name.partition(".")[0] in own]:
            del sys.modules[name]
        for name in _MOVED.keys() - before:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
        for table, copy in zip(tables, copies, strict=True):
            table.clear()
            table.update(copy)

"""Clones of the published repositories: imported apart from everything else, mapped onto timm's models, gated."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import tokcomp
import torch
from tokcomp.bench.entries import Entry
from tokcomp.bench.models import compare_models
from tokcomp.bench.published_code import PublishedCodeError, find_clones, patch_with_published_code

from tests.bench.toys import CPU, METHOD, make_vit, seconds

#: The names of DiffRate's repository; what they do is this project's own eager pipeline. Imports what timm has moved.
DIFFRATE = {
    "DiffRate/__init__.py": "import utils\nfrom . import patch\n",
    "DiffRate/patch/__init__.py": "from .deit import deit, mae\n",
    "DiffRate/patch/deit.py": """
import copy
import torch
from timm.models.layers.helpers import to_2tuple
from timm.models.registry import register_model
from tokcomp import CompressionSchedule, DiffRate
from tokcomp.bench.published import PublishedPipeline
from utils import FACTOR

@register_model
def deit_small_patch16_224(**options):
    raise AssertionError("registered over timm's own")

class Counts:
    def set_kept_num(self, prune, merge):
        self.counts = prune, merge

    def pooled(self, images):
        assert all(block.drop_path is block.drop_path1 for block in self.blocks)
        return PublishedPipeline(self.plain[0], DiffRate(CompressionSchedule(*self.counts)))(images) * FACTOR

    def forward(self, images, return_flop=True):
        logits = self.classify(images)
        return (logits, 0.0) if return_flop else logits

class DeiT(Counts):
    def classify(self, images):
        return self.head(self.pooled(images))

class MAE(Counts):
    def classify(self, images):
        return self.timms_forward(images)

def patch(model, kind):
    plain = copy.deepcopy(model)
    plain.head = torch.nn.Identity()
    model.plain = [plain]
    old = type(model)

    own = {"timms_forward": old.forward, **({"forward_features": kind.pooled} if kind is MAE else {})}
    model.__class__ = type("Patched", (kind, old), own)
    model.ddp = torch.nn.Parameter(torch.zeros(1))

def deit(model, prune_granularity=1, merge_granularity=1):
    patch(model, DeiT)

def mae(model, prune_granularity=1, merge_granularity=1):
    patch(model, MAE)
""",
    "utils.py": "FACTOR = 1.0\n",
}
TOME = {
    "tome/__init__.py": "from . import patch\n",
    "tome/patch/__init__.py": "from .timm import apply_patch as timm\nfrom .mae import apply_patch as mae\n",
    "tome/patch/timm.py": """
import copy
import torch
from tokcomp import ToMe
from tokcomp.bench.published import PublishedPipeline

def pooled(model, images):
    r = [one[0] if isinstance(one, list) else one for one in model.r]
    return PublishedPipeline(model.plain[0], ToMe(r, model.prop_attn))(images)

def patch(model, prop_attn, **functions):
    plain = copy.deepcopy(model)
    plain.head = torch.nn.Identity()
    model.plain, model.prop_attn = [plain], prop_attn
    model.__class__ = type("Patched", (type(model),), functions)

def apply_patch(model, trace_source=False, prop_attn=True):
    patch(model, prop_attn, forward=lambda self, images: self.head(pooled(self, images)))
""",
    "tome/patch/mae.py": """
from .timm import patch, pooled

def apply_patch(model, trace_source=False, prop_attn=False):
    patch(model, prop_attn, forward_features=pooled)
""",
}
TOCOM = {
    "models.py": """
import tome
import torch

def set_lora(model, dim, s):
    assert (dim, s) == (32, 0.1)
    for block in model.blocks:
        block.attn.adapter_up = torch.nn.Linear(2, 2)
"""
}


@pytest.fixture
def clones(tmp_path: Path) -> dict[str, Path]:
    for name, files in {"DiffRate": DIFFRATE, "ToMe": TOME, "ToCom": TOCOM}.items():
        for path, text in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return {name: tmp_path / name for name in ("DiffRate", "ToMe", "ToCom")}


def compare(model: Any, entry: Entry):
    return compare_models(model, {"code": entry}, batch_sizes=[2], precision="float32", device=CPU, measure=seconds())


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("method", [METHOD, tokcomp.ToMe(3), tokcomp.ToMe([0, 4, 2])], ids=["diffrate", "tome", "list"])
def test_a_clone_runs_beside_ours(clones: dict[str, Path], method: tokcomp.Method, pool: str) -> None:
    """Its logits pass the gate that ours pass; nothing of it is left behind."""
    path, modules, registered = list(sys.path), set(sys.modules), timm.models.model_entrypoint("deit_small_patch16_224")
    code = (clones["DiffRate"], clones["ToMe"])
    rows, missing = compare(make_vit(global_pool=pool), Entry("published-code", method, code=code))
    assert not missing and [row.name for row in rows] == ["code"]
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if name.partition(".")[0] in ("DiffRate", "tome", "utils")}
    assert timm.models.model_entrypoint("deit_small_patch16_224") is registered
    assert not list(clones["DiffRate"].rglob("__pycache__"))


def test_a_clone_that_computes_something_else_gets_no_figure(clones: dict[str, Path]) -> None:
    (clones["DiffRate"] / "utils.py").write_text("FACTOR = 1.01\n")
    rows, missing = compare(make_vit(), Entry("published-code", METHOD, code=(clones["DiffRate"],)))
    assert not rows and "more than twice as far from float64" in missing[0].reason


def test_names_that_others_have_are_theirs_again(clones: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    mine = type(sys)("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    patched = patch_with_published_code(make_vit(), METHOD, [clones["DiffRate"]])
    assert sys.modules["utils"] is mine and patched(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_tocom_needs_its_width(clones: dict[str, Path]) -> None:
    code = (clones["ToMe"], clones["ToCom"])
    _, missing = compare(make_vit(), Entry("published-tocom", tokcomp.ToMe(3), code=code))
    assert "takes models 768 wide and r up to 16, got 24 and 3" in missing[0].reason
    torch.manual_seed(0)
    wide = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=768, depth=2, num_heads=12, num_classes=5)
    rows, missing = compare(wide.eval(), Entry("published-tocom", tokcomp.ToMe(3), code=code))
    assert rows and not missing


@pytest.mark.parametrize(
    ("method", "have", "words"),
    [
        (METHOD, "ToMe", r"names no clone of DiffRate \(https://github.com/OpenGVLab/DiffRate\)"),
        (tokcomp.ToMe(2), "DiffRate", r"names no clone of ToMe \("),
        (tokcomp.EViT(0.5, blocks=(1,)), "ToMe", "run DiffRate and ToMe, got EViT"),
        (tokcomp.DiffRate(METHOD.schedule, pipeline="prune"), "DiffRate", "must have both lists"),
    ],
)
def test_what_a_clone_cannot_do_is_said(clones: dict[str, Path], method: tokcomp.Method, have: str, words: str) -> None:
    with pytest.raises(PublishedCodeError, match=words):
        patch_with_published_code(make_vit(), method, [clones[have]])


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("DiffRate/__init__.py", "import timm.no_such_thing\n", "does not import from .*DiffRate: ModuleNotFoundError"),
        (
            "DiffRate/patch/deit.py",
            "def deit(model):\n    model.moved\n\nmae = deit\n",
            "cannot patch this model: Attribute",
        ),
    ],
)
def test_code_that_breaks_is_a_reason(clones: dict[str, Path], file: str, text: str, words: str) -> None:
    (clones["DiffRate"] / file).write_text(text)
    with pytest.raises(PublishedCodeError, match=words + r".*\(written for timm 0.4; installed is [0-9.]+\)"):
        patch_with_published_code(make_vit(), METHOD, [clones["DiffRate"]])


def test_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--published-code must be the folder of a clone of DiffRate \(https.*, got"):
        find_clones([tmp_path])
    for entry in ({"competitor": "timm", "code": (tmp_path,)}, {"competitor": "published-code", "method": METHOD}):
        with pytest.raises(ValueError, match="code must be given for published-code and published-tocom alone"):
            Entry(**entry)

"""Token compression for vision transformers: DiffRate, ToMe, EViT and others.

>>> model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
>>> tokcomp.compress(model, tokcomp.DiffRate.published("deit_small_patch16_224", gflops=2.3))
>>> logits = model(images)

Names are imported on first use, so ``import tokcomp`` itself needs neither torch nor timm.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokcomp.adapters import UnsupportedModelError
    from tokcomp.api import compress, quantize, restore, trace, uncompress
    from tokcomp.configuration import CompressionConfig
    from tokcomp.cost import flops
    from tokcomp.deploy.compiled import CompiledModel, compile
    from tokcomp.deploy.exported import ExportedModel, export, load_exported
    from tokcomp.equal_cost.thresholds import calibrate
    from tokcomp.methods import (
        ATS,
        AViT,
        CDPruner,
        DiffRate,
        DivPrune,
        DToMe,
        DynamicViT,
        EViT,
        EvoViT,
        Method,
        PiToMe,
        SPViT,
        ToMe,
        ToMeMLP,
        VisionZip,
    )
    from tokcomp.schedule import CompressionSchedule
    from tokcomp.search.model import DiffRateSearch
    from tokcomp.tocom.plugin import ToCom
    from tokcomp.tocom.switch import Switchable
    from tokcomp_kernels._version import __version__

_HOMES = {
    "ATS": "tokcomp.methods",
    "AViT": "tokcomp.methods",
    "CDPruner": "tokcomp.methods",
    "CompiledModel": "tokcomp.deploy.compiled",
    "CompressionConfig": "tokcomp.configuration",
    "CompressionSchedule": "tokcomp.schedule",
    "DiffRate": "tokcomp.methods",
    "DiffRateSearch": "tokcomp.search.model",
    "DToMe": "tokcomp.methods",
    "DivPrune": "tokcomp.methods",
    "DynamicViT": "tokcomp.methods",
    "EViT": "tokcomp.methods",
    "EvoViT": "tokcomp.methods",
    "ExportedModel": "tokcomp.deploy.exported",
    "Method": "tokcomp.methods",
    "PiToMe": "tokcomp.methods",
    "SPViT": "tokcomp.methods",
    "Switchable": "tokcomp.tocom.switch",
    "ToCom": "tokcomp.tocom.plugin",
    "ToMe": "tokcomp.methods",
    "ToMeMLP": "tokcomp.methods",
    "UnsupportedModelError": "tokcomp.adapters",
    "VisionZip": "tokcomp.methods",
    "calibrate": "tokcomp.equal_cost.thresholds",
    "compile": "tokcomp.deploy.compiled",
    "compress": "tokcomp.api",
    "export": "tokcomp.deploy.exported",
    "flops": "tokcomp.cost",
    "load_exported": "tokcomp.deploy.exported",
    "quantize": "tokcomp.api",
    "restore": "tokcomp.api",
    "__version__": "tokcomp_kernels._version",
    "trace": "tokcomp.api",
    "uncompress": "tokcomp.api",
}

__all__ = [
    "ATS",
    "AViT",
    "CDPruner",
    "CompiledModel",
    "CompressionConfig",
    "CompressionSchedule",
    "DToMe",
    "DiffRate",
    "DiffRateSearch",
    "DivPrune",
    "DynamicViT",
    "EViT",
    "EvoViT",
    "ExportedModel",
    "Method",
    "PiToMe",
    "SPViT",
    "Switchable",
    "ToCom",
    "ToMe",
    "ToMeMLP",
    "UnsupportedModelError",
    "VisionZip",
    "__version__",
    "calibrate",
    "compile",
    "compress",
    "export",
    "flops",
    "load_exported",
    "quantize",
    "restore",
    "trace",
    "uncompress",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

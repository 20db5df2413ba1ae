"""Who may run a model in a comparison, and how each is made ready."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokcomp
from tokcomp.bench.published import PublishedPipeline
from tokcomp.bench.published_code import patch_with_published_code
from tokcomp.bench.rivals import build_exported, build_rival, quantised_by_torchao
from tokcomp.bench.transformers_twin import TRANSFORMERS, build_transformers
from tokcomp.methods import Method

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Competitor -> who that is. "published" ones take float32 images and reach half precision by autocast, as published.
COMPETITORS = {
    "published": "the published pipeline in eager PyTorch",
    "published-compiled": "the same under torch.compile",
    "published-code": "the published repository itself, from a clone",
    "published-tocom": "ToCom's repository: ToMe with the plugin computed in every pass, from a clone",
    "timm": "timm as it is: uncompressed, with scaled_dot_product_attention",
    "timm-compiled": "the same under torch.compile",
    "timm-reduce-overhead": "the same with CUDA graphs (torch.compile's mode reduce-overhead)",
    "timm-max-autotune": "the same with its kernels chosen by measuring (torch.compile's mode max-autotune)",
    "timm-cudnn": "timm with cuDNN's attention",
    "onnxruntime": "timm's model in ONNX Runtime",
    "onnxruntime-int8": "the same with its products in int8, by dynamic quantisation",
    "torchao-int8": "timm with its products in int8 by torchao, under torch.compile",
    "openvino": "timm's model in OpenVINO",
    "openvino-int8": "the file of onnxruntime-int8 in OpenVINO",
    "tensorrt": "timm's model in TensorRT, by ONNX Runtime",
    "tokcomp": "the compressed model",
    "tokcomp-stock": "the same with the model's own attention in place of our kernels",
    "tokcomp-transformers": "the compressed model as one of transformers",
    "tokcomp-transformers-sdpa": "the same with its own attention, scaled_dot_product_attention",
    "tokcomp-transformers-flex": "the same with FlexAttention",
    "tokcomp-int8": "the compressed model with its products in int8 (tokcomp.quantize)",
    "tokcomp-onnx": "the compressed model's ONNX file in ONNX Runtime",
    "tokcomp-onnx-int8": "the same with its products in int8, by dynamic quantisation",
    "tokcomp-openvino": "the compressed model's ONNX file in OpenVINO",
    "tokcomp-openvino-int8": "the file of tokcomp-onnx-int8 in OpenVINO",
    "tokcomp-compiled": "the compressed model under torch.compile",
    "tokcomp-graph": "the same under tokcomp.compile: a CUDA graph for the batch size",
}
#: Rivals on the whole model: they take no method.
UNCOMPRESSED = tuple(name for name in COMPETITORS if not name.startswith(("published", "tokcomp")))
#: Of these, what other libraries run.
OTHER_RUNTIMES = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "tensorrt")
#: Our ONNX files in other runtimes.
EXPORTED = ("tokcomp-onnx", "tokcomp-onnx-int8", "tokcomp-openvino", "tokcomp-openvino-int8")
#: What the name of an entry ends in that runs in float32 beside others in half precision.
FLOAT32 = "-float32"
#: Entries whose preparation may fail, which is then a row with the reason: what compiles, and what is not ours.
MAY_FAIL = (
    "published-compiled",
    "published-code",
    "published-tocom",
    *(name for name in UNCOMPRESSED if name != "timm"),
    *TRANSFORMERS,
    *EXPORTED,
    "tokcomp-compiled",
    "tokcomp-graph",
)
#: Entries that run a clone.
FROM_CLONES = ("published-code", "published-tocom")
#: Graphs that torch.compile may make of one function before it refuses: several models share timm's forward.
_RECOMPILE_LIMIT = 256


@dataclass(frozen=True)
class Entry:
    """Who runs the model (a key of :data:`COMPETITORS`), how it compresses (:data:`UNCOMPRESSED` take no method), in
    what precision where that is not the comparison's, and for :data:`FROM_CLONES` the folders of the clones."""

    competitor: str
    method: Method | None = None
    precision: str | None = None
    code: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.competitor not in COMPETITORS:
            raise ValueError(f"competitor must be one of {', '.join(COMPETITORS)}, got {self.competitor!r}")
        if (self.method is None) != (self.competitor in UNCOMPRESSED):
            raise ValueError(
                f"a method must be given for all but uncompressed rivals ({', '.join(UNCOMPRESSED)}), got "
                f"{self.method!r} for {self.competitor}"
            )
        if bool(self.code) != (self.competitor in FROM_CLONES):
            raise ValueError(
                f"code must be given for {' and '.join(FROM_CLONES)} alone, got {self.code!r} for {self.competitor}"
            )

    @property
    def autocasts(self) -> bool:
        """Whether it takes float32 images and reaches half precision by itself."""
        return self.competitor.startswith("published") or self.competitor == "openvino"

    @property
    def in_int8(self) -> bool:
        """Whether its products are in int8, which is a precision of its own whatever its images are."""
        return self.competitor.endswith("-int8")

    @property
    def may_fail(self) -> bool:
        return self.competitor in MAY_FAIL

    @property
    def is_ours(self) -> bool:
        """Whether what runs is ours: our ONNX files are run by others."""
        return self.competitor.startswith("tokcomp") and self.competitor not in EXPORTED


def build_runner(
    entry: Entry, model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> Callable[[Tensor], Tensor]:
    """What maps ``batch`` images to logits: in ``dtype``, or float32 images where the entry autocasts.

    Compiled entries compile in their first call. ``model`` is copied where an entry would change it.
    """
    kind = entry.competitor
    if kind in OTHER_RUNTIMES:
        return build_rival(kind, model, dtype, device, batch)
    if entry.method is not None and kind.startswith("published"):
        pipeline: nn.Module
        if kind in FROM_CLONES:
            plugin = kind == "published-tocom"
            pipeline = patch_with_published_code(copy.deepcopy(model), entry.method, entry.code, plugin=plugin)
        else:
            pipeline = PublishedPipeline(model, entry.method)
        forward: Any = _compiled(pipeline, device) if kind == "published-compiled" else pipeline

        def run(images: Tensor) -> Tensor:
            with autocast(dtype, device):
                return forward(images)

        return run
    own: Any = copy.deepcopy(model).to(dtype)
    if entry.method is not None and kind in TRANSFORMERS:
        return build_transformers(kind, own, entry.method)
    if entry.method is not None:
        tokcomp.compress(own, entry.method, attention="stock" if kind == "tokcomp-stock" else "tokcomp")
    if kind in EXPORTED:
        return build_exported(kind, own, dtype, device, batch)
    if kind == "tokcomp-int8":
        return tokcomp.quantize(own.eval())
    if kind == "tokcomp-graph":
        return tokcomp.compile(own, batch=batch)
    if kind == "torchao-int8":
        return _compiled(quantised_by_torchao(own), device)
    if kind in ("timm-reduce-overhead", "timm-max-autotune"):
        return _compiled(own, device, mode=kind.removeprefix("timm-"))
    if kind == "timm-cudnn":
        return _with_cudnn_attention(own)
    return _compiled(own, device) if kind.endswith("-compiled") else own


def uncompressed_rivals(
    device: torch.device, precision: str, *, compiled: bool = True, autotuned: bool = False, others: bool = True
) -> dict[str, Entry]:
    """Everyone who may run the whole model there, by name, installed or not.

    Args:
        device: where.
        precision: a name in :data:`PRECISIONS`. In half precision on a CPU OpenVINO takes part in float32 as well, for
            a CPU without such products.
        compiled: whether timm is compiled, which takes up to a minute a batch size.
        autotuned: whether a GPU also tries every tile of every product for it, which takes minutes, and on a CPU
            torchao takes part, which is compiled for a minute a batch size.
        others: whether what is not PyTorch takes part.
    """
    names = ["timm", *(["timm-compiled"] if compiled else [])]
    if device.type == "cuda":
        names += ["timm-max-autotune"] if autotuned else []
        names += ["timm-cudnn"] if others else []
        names += ["onnxruntime", "tensorrt"] if others and precision != "bfloat16" else []
        return {name: Entry(name) for name in names}
    if others:
        names += ["onnxruntime", "onnxruntime-int8"] if precision == "float32" else []
        names += ["torchao-int8"] if precision == "float32" and autotuned else []
        names += ["openvino"] if precision in ("float32", "bfloat16") else []
    entries = {name: Entry(name) for name in names}
    if others and precision != "float32":
        entries[f"openvino{FLOAT32}"] = Entry("openvino", precision="float32")
    return entries


def rank_of(precision: str) -> int:
    """How fine a row's precision is: int8, half, float32 from 0 up."""
    return 0 if precision == "int8" else 2 if precision == "float32" else 1


def _with_cudnn_attention(model: nn.Module) -> Callable[[Tensor], Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(images: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return model(images)

    return run


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def compiling() -> Iterator[None]:
    """Room for the graphs of one comparison, which are dropped at its end."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=_RECOMPILE_LIMIT):
        try:
            yield
        finally:
            torch._dynamo.reset()


def _compiled(model: nn.Module, device: torch.device, mode: str | None = None) -> Callable[[Tensor], Tensor]:
    # fullgraph: what cannot be compiled is an error here, not a slow row. On CPU freezing lays weights out for oneDNN,
    # without which Inductor is no faster than eager.
    options: Any = {"freezing": True} if device.type == "cpu" and mode is None else None
    return torch.compile(model, dynamic=False, fullgraph=True, mode=mode, options=options)

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
    "tokcomp": "the compressed model",
    "tokcomp-compiled": "the same under torch.compile",
    "tokcomp-graph": "the same under tokcomp.compile: a CUDA graph for the batch size",
}
#: Entries whose preparation may fail, which is then a row with the reason: what compiles, and what is not ours.
MAY_FAIL = (
    "published-compiled",
    "published-code",
    "published-tocom",
    "timm-compiled",
    "timm-reduce-overhead",
    "tokcomp-compiled",
    "tokcomp-graph",
)
#: Entries that run a clone.
FROM_CLONES = ("published-code", "published-tocom")
#: Graphs that torch.compile may make of one function before it refuses: several models share timm's forward.
_RECOMPILE_LIMIT = 256


@dataclass(frozen=True)
class Entry:
    """Who runs the model (a key of :data:`COMPETITORS`), how it compresses (timm takes no method), in what precision
    where that is not the comparison's, and for :data:`FROM_CLONES` the folders of the clones."""

    competitor: str
    method: Method | None = None
    precision: str | None = None
    code: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.competitor not in COMPETITORS:
            raise ValueError(f"competitor must be one of {', '.join(COMPETITORS)}, got {self.competitor!r}")
        if (self.method is None) != self.competitor.startswith("timm"):
            raise ValueError(f"a method must be given for all but timm, got {self.method!r} for {self.competitor}")
        if bool(self.code) != (self.competitor in FROM_CLONES):
            raise ValueError(
                f"code must be given for {' and '.join(FROM_CLONES)} alone, got {self.code!r} for {self.competitor}"
            )

    @property
    def autocasts(self) -> bool:
        """Whether it takes float32 images and runs half precision under autocast."""
        return self.competitor.startswith("published")

    @property
    def may_fail(self) -> bool:
        return self.competitor in MAY_FAIL

    @property
    def is_ours(self) -> bool:
        return self.competitor.startswith("tokcomp")


def build_runner(
    entry: Entry, model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int = 1
) -> Callable[[Tensor], Tensor]:
    """What maps ``batch`` images to logits: in ``dtype``, or float32 images where the entry autocasts.

    Compiled entries compile in their first call. ``model`` is copied where an entry would change it.
    """
    kind = entry.competitor
    if entry.autocasts:
        assert entry.method is not None
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
    if entry.method is not None:
        tokcomp.compress(own, entry.method)
    if kind == "tokcomp-graph":
        return tokcomp.compile(own, batch=batch)
    if kind == "timm-reduce-overhead":
        return _compiled(own, device, mode="reduce-overhead")
    return _compiled(own, device) if kind.endswith("-compiled") else own


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

"""Who takes part in a comparison of models, and what becomes of those who cannot."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import tokcomp
import torch
from tokcomp.adapters import find_adapter
from tokcomp.bench import entries as entries_module
from tokcomp.bench import models
from tokcomp.bench.entries import Entry, build_runner
from tokcomp.bench.models import Row, compare_models, keep_everything
from tokcomp.bench.published import PublishedPipeline
from tokcomp.bench.static_slice import StaticSlice

from tests.bench.toys import CPU, METHOD, make_vit, seconds

METHODS = {"diffrate": METHOD, "tome": tokcomp.ToMe([0, 3, 2]), "evit": tokcomp.EViT(0.5, blocks=(1,))}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_static_slice_costs_what_the_method_costs_and_drops_the_last_tokens(method: tokcomp.Method) -> None:
    model = make_vit()
    sliced = StaticSlice.like(method, model)
    compressed = tokcomp.compress(copy.deepcopy(model), method)
    own = tokcomp.compress(copy.deepcopy(model), sliced)
    assert tokcomp.flops(own) == tokcomp.flops(compressed) < tokcomp.flops(model)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        have, want = own(images), PublishedPipeline(model.double(), sliced)(images.double())
    assert (have - want).norm() <= 1e-5 * want.norm()
    for source, left in zip(tokcomp.trace(own, images), sliced.num_kept, strict=True):
        assert source[0].tolist() == [position if position < left else -1 for position in range(17)]


def test_a_static_slice_is_checked() -> None:
    with pytest.raises(ValueError, match="num_kept must have one entry per block"):
        tokcomp.compress(make_vit(), StaticSlice([17, 9]))
    with pytest.raises(ValueError, match="num_kept must keep the 1 prefix tokens, got 0"):
        tokcomp.compress(make_vit(), StaticSlice([17, 9, 0]))


def compare(entries: dict[str, Entry], **named: float) -> models.Comparison:
    return compare_models(
        make_vit(), entries, batch_sizes=[1, 2], precision="float32", device=CPU, measure=seconds(**named)
    )


def test_what_does_not_compile_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", Mock(side_effect=RuntimeError("no  C++ compiler\nwas found")))
    rows, missing = compare({"timm": Entry("timm"), "timm-compiled": Entry("timm-compiled")})
    assert [(row.name, row.batch) for row in rows] == [("timm", 1), ("timm", 2)]
    assert [(one.name, one.batch) for one in missing] == [("timm-compiled", 1), ("timm-compiled", 2)]
    assert missing[0].reason == "RuntimeError: no C++ compiler was found"


def test_a_graph_that_cannot_be_captured_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: torch.nn.Module, batch: int) -> None:
        raise RuntimeError(f"no graph of {batch}")

    monkeypatch.setattr(entries_module.tokcomp, "compile", fail, raising=False)
    rows, missing = compare({"tokcomp-graph": Entry("tokcomp-graph", METHOD)})
    assert not rows and [one.reason for one in missing] == [
        "RuntimeError: no graph of 1",
        "RuntimeError: no graph of 2",
    ]


@pytest.mark.parametrize(("error", "kept"), [(torch.OutOfMemoryError, True), (RuntimeError, False)])
def test_only_memory_excuses_what_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], kept: bool
) -> None:
    build = models.build_runner

    def too_large(entry: Entry, model: torch.nn.Module, dtype: torch.dtype, device: torch.device, batch: int):
        if batch > 1:
            raise error("too large")
        return build(entry, model, dtype, device, batch)

    monkeypatch.setattr(models, "build_runner", too_large)
    if kept:
        rows, missing = compare({"tokcomp": Entry("tokcomp", METHOD)})
        assert [row.batch for row in rows] == [1] and [one.batch for one in missing] == [2]
        assert missing[0].reason.endswith(": too large")
    else:
        with pytest.raises(error, match="too large"):
            compare({"tokcomp": Entry("tokcomp", METHOD)})


@pytest.mark.parametrize("competitor", ["tokcomp", "tokcomp-compiled", "published-compiled"])
def test_what_disagrees_is_never_timed(monkeypatch: pytest.MonkeyPatch, competitor: str) -> None:
    """A rival's fault is a reason beside the other rows; a fault of ours, compiled or not, stops everything."""
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda images: model(images) * 1.01)
    if competitor == "tokcomp":
        monkeypatch.setattr(entries_module.tokcomp, "compress", lambda model, method, attention="tokcomp": model)
    entries = {competitor: Entry(competitor, METHOD), "timm": Entry("timm")}
    if competitor.startswith("tokcomp"):
        with pytest.raises(models.DisagreementError, match="more than twice as far from float64"):
            compare(entries)
    else:
        rows, missing = compare(entries)
        assert {row.name for row in rows} == {"timm"} and "more than twice as far" in missing[0].reason


def test_every_batch_is_checked_at_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for one size of batch sees no other."""
    seen: list[int] = []

    def capture(model: torch.nn.Module, batch: int):
        def run(images: torch.Tensor) -> torch.Tensor:
            seen.append(images.shape[0])
            assert images.shape[0] == batch
            return model(images)

        return run

    monkeypatch.setattr(entries_module.tokcomp, "compile", capture, raising=False)
    entries = {"tokcomp-graph": Entry("tokcomp-graph", METHOD)}
    rows, missing = compare_models(
        make_vit(), entries, batch_sizes=[1, 4, 16], precision="float32", device=CPU, measure=seconds()
    )
    assert not missing and [row.batch for row in rows] == [1, 4, 16]
    assert (seen.count(1), seen.count(4), seen.count(16)) == (2 + 18, 2 + 6, 2 + 2)


def test_compiled_models_run() -> None:
    """The real torch.compile, the eager backend in place of Inductor: whole graphs, and their logits agree."""
    compile_with = torch.compile

    def eager(model: torch.nn.Module, **options: object):
        return compile_with(model, backend="eager", fullgraph=options["fullgraph"], dynamic=options["dynamic"])

    names = ("published-compiled", "timm-compiled", "tokcomp-compiled")
    entries = {name: Entry(name, None if name.startswith("timm") else METHOD) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", eager)
        rows, missing = compare_models(
            make_vit(), entries, batch_sizes=[2], precision="float32", device=CPU, measure=seconds()
        )
    assert not missing and len(rows) == 3


def test_figures() -> None:
    def row(name: str, gflops: float, *times: float) -> Row:
        return Row(name, 8, "float32", gflops, 1.0, 1.0, 1.0, None, times)

    ours, whole, sliced = row("a", 2.0, 1.0, 1.0, 1.2), row("b", 4.0, 2.0, 1.8, 2.0), row("c", 2.0, 1.0, 0.8, 1.0)
    assert ours.speed_over(whole) == pytest.approx((1.8, 2.0 / 1.2, 2.0))
    assert ours.efficiency(whole) == pytest.approx((0.9, 1.0 / 1.2, 1.0))
    assert ours.tax(sliced) == pytest.approx((0.2, 0.0, 0.25))
    assert ours.share_of(0.5) == 0.5


def test_keeping_everything_is_the_plain_model() -> None:
    model, images = make_vit(), torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        want = model.double()(images.double())
        have = tokcomp.compress(model.float(), keep_everything(model))(images)
    assert (have - want).norm() <= 1e-5 * want.norm()


def test_stock_attention_is_the_model_s_own() -> None:
    for name, kept in (("tokcomp", False), ("tokcomp-stock", True)):
        run = build_runner(Entry(name, METHOD), make_vit(), torch.float32, CPU)
        assert find_adapter(run).keeps_attention(run) == kept

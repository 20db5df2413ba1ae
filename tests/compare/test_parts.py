"""A comparison's parts: entries, answers and their intervals, schedules for a budget, the linear probe."""

from __future__ import annotations

import json

import pytest
import timm
import tokcomp
import torch
import torch.nn.functional as F
from tokcomp import learned
from tokcomp.compare.answers import Answers, answer, packed, paired, unpacked
from tokcomp.compare.build import Builder
from tokcomp.compare.cells import Cells, weights_digest
from tokcomp.compare.entries import Entry, Variant, parse_methods, sweep, with_seeds
from tokcomp.compare.probe import attach_head, features_of, fit_head, kept_head
from tokcomp.compare.summary import summarize
from tokcomp.equal_cost import BY_COUNT, BY_IMAGES, BY_PREDICTOR, BY_RATE, Ruler, nearest_published
from tokcomp.runs.distributed import World

CPU = torch.device("cpu")
TWELVE = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "num_heads": 2, "depth": 12, "num_classes": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.models.VisionTransformer(**TWELVE).eval()


def test_words_become_entries():
    entries = parse_methods(["tome", "random:2", "evit/prune", "search", "tome"], Variant(seed=3))
    assert [entry.name for entry in entries] == ["tome", "random 1", "random 2", "evit/prune", "search"]
    seeded = with_seeds(entries, 2)
    assert [entry.variant.seed for entry in seeded if entry.kind == "search"] == [3, 4] and len(seeded) == 6
    swept = sweep(Variant(), metrics=["random"], images=[5], epochs=[0.5])
    assert [entry.variant for entry in swept] == [Variant("random"), Variant(images=5), Variant(epochs=0.5)]
    assert len({json.dumps(entry.describe()) for entry in [*seeded, *swept]}) == 9


@pytest.mark.parametrize("word", ["tomo", "random", "random:0", "tome/", "tome/sort", "random:3/merge", "ats/prune"])
def test_other_words_are_refused(word):
    with pytest.raises(ValueError, match=f"must be diffrate, search, .*; got '{word}'"):
        parse_methods([word], Variant())
    with pytest.raises(ValueError, match=r"metrics must be among cls_attn, .*, got 'size'"):
        sweep(Variant(), metrics=["size"])


class First(torch.nn.Module):
    """Logits are the pictures' first pixels."""

    def forward(self, images):
        return images[:, 0, 0]


def test_answers_of_two_processes_are_those_of_one(monkeypatch):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    logits[3, 0] = torch.nan
    images, labels = logits[:, None, None], torch.tensor([0, 1, -4, 2, 1])
    whole = answer(First(), [(images[:2], labels[:2]), (images[2:], labels[2:])], 5, device=CPU)
    tables = []
    monkeypatch.setattr(World, "sum_", lambda self, table: tables.append(table.clone()) or table)
    for rank in (0, 1):
        answer(First(), [(images[rank::2], labels[rank::2])], 5, device=CPU, world=World(rank, 2))
    labels_, classes, losses = sum(tables)
    assert torch.equal(labels_.long(), whole.labels) and torch.equal(classes.long(), whole.classes)
    torch.testing.assert_close(losses, whole.losses, rtol=0, atol=0, equal_nan=True)
    assert whole.classes[3] == -1 and whole.counted.tolist() == [True, True, False, True, True]
    right = logits[[0, 1, 4]].argmax(-1) == labels[[0, 1, 4]]
    assert whole.top1 == pytest.approx(100 * int(right.sum()) / 4) and whole.cross_entropy is None
    good = Answers(*(row[[0, 1, 4]] for row in (whole.labels, whole.classes, whole.losses)))
    expected = F.cross_entropy(logits[[0, 1, 4]].double(), labels[[0, 1, 4]])
    assert good.cross_entropy == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(unpacked(packed(whole.classes)), whole.classes)


def test_the_interval_is_that_of_paired_differences():
    generator = torch.Generator().manual_seed(1)
    one, other = (torch.rand(400, generator=generator) < share for share in (0.8, 0.75))
    mean, half = paired(one, other)
    # Against the textbook: b and c images that only one of the two gets right.
    b, c, n = int((one & ~other).sum()), int((other & ~one).sum()), 400
    assert mean == pytest.approx(100 * (b - c) / n)
    assert half == pytest.approx(100 * 1.959964 * ((b + c - (b - c) ** 2 / n) / (n - 1) / n) ** 0.5)
    assert paired(one, one) == (0.0, 0.0)
    assert paired(one[:1], ~one[:1])[1] == 100  # of one image nothing is known, and JSON has no infinity


def test_a_summary_ranks_random_schedules_by_their_median():
    labels = torch.zeros(10, dtype=torch.int64)

    def cell(entry, kind, right):
        answers = packed((torch.arange(10) >= right).long())
        figures = {"gflops": 1.0, "top1": 10.0 * right, "same": 0.0, "cross_entropy": 1.0, "num_images": 10}
        return {"entry": entry, "kind": kind, "target": 1.0, "answers": answers, "labels": packed(labels), **figures}

    cells = [cell("uncompressed", "none", 9), cell("tome", "tome", 8)]
    cells += [cell(f"random {right}", "random", right) for right in (8, 3, 5)]
    cells += [{"entry": "search", "kind": "search", "target": 1.0, "impossible": "why"}]
    (budget,) = summarize(cells)["budgets"]
    tome, random = budget["rows"]
    assert (tome["less_best"], tome["beats_random"]) == ([0.0, 0.0], pytest.approx(100 * 2.5 / 3))
    assert random["top1"] == 50.0 and random["random"] == [30.0, 50.0, 80.0] and random["less_best"][0] == -30.0
    assert budget["impossible"] == {"search": "why"}


@pytest.mark.parametrize("kind", [*BY_COUNT, *BY_RATE, *BY_IMAGES, *BY_PREDICTOR, "uniform", "random", "published"])
def test_every_method_meets_the_budget(model, kind):
    noise = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = noise * torch.tensor([0.1, 0.2, 0.5, 1, 2, 3])[:, None, None, None]
    builder = Builder(model, "mine", calibration=lambda: images.split(3))
    gflops = 0.6 * builder.ruler.flops(None) / 1e9
    if kind in learned.LEARNED:
        with pytest.raises(ValueError, match="model must have the trained parts of"):
            builder.build(Entry(kind, kind), gflops)
        with_parts = tokcomp.AViT(scale=2.0, shift=-2.0) if kind == "avit" else BY_PREDICTOR[kind](0.7, None)
        learned.attach(model, with_parts)
    method = builder.build(Entry(kind, kind, number=1), gflops)
    shown = images if kind in BY_IMAGES else None
    try:
        cost = tokcomp.flops(tokcomp.compress(model, method), images=shown) / 1e9
        assert cost == pytest.approx(gflops, rel=0.02)
        assert builder.flops(method) / 1e9 == pytest.approx(cost)
    finally:
        tokcomp.restore(model)
    assert repr(builder.build(Entry(kind, kind, number=1), gflops)) == repr(method)
    if kind != "random" and kind not in (*BY_IMAGES, *BY_PREDICTOR):
        like = builder.build(Entry(f"{kind}/merge", kind, pipeline="merge"), gflops)
        assert like.pipeline == "merge" and builder.ruler.flops(like) / 1e9 == pytest.approx(gflops, rel=0.02)


def test_what_cannot_be_made_is_refused(model):
    builder = Builder(model, "mine")
    with pytest.raises(ValueError, match="search needs a search, and there are no images"):
        builder.build(Entry("search", "search"), 0.6 * builder.ruler.flops(None) / 1e9)
    with pytest.raises(ValueError, match="batches must hold images to measure costs on, got none"):
        builder.build(Entry("dtome", "dtome"), 0.6 * builder.ruler.flops(None) / 1e9)
    with pytest.raises(ValueError, match="the budget must be reachable"):
        builder.build(Entry("uniform", "uniform"), 1e-6)
    shallow = timm.models.VisionTransformer(**{**TWELVE, "depth": 5})
    assert nearest_published(Ruler(shallow), "mine", 1e6) is None


def test_the_models_own_published_schedule_comes_first():
    with torch.device("meta"):
        deit = timm.create_model("deit_small_patch16_224")
    builder = Builder(deit, "deit_small_patch16_224")
    own = builder.build(Entry("diffrate", "diffrate"), 2.9)
    assert own.schedule == tokcomp.DiffRate.published("deit_small_patch16_224", 2.9).schedule
    fitted = nearest_published(builder.ruler, "deit_small_patch16_224", 2.7e9)
    assert builder.ruler.flops(fitted) == pytest.approx(2.7e9, rel=0.01)


def test_other_weights_are_other_cells(model, tmp_path):
    before = weights_digest(model)
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    assert weights_digest(model) != before
    cells = Cells(tmp_path)
    assert cells.load("a") is None
    cells.store("a", {"gflops": 1}, {"top1": 2.0})
    assert cells.load("a") == {"top1": 2.0}
    (tmp_path / "cells" / "a.json").write_text('{"cell"')
    assert cells.load("a") is None


def test_the_probe_is_the_optimum_and_becomes_the_head(tmp_path):
    torch.manual_seed(0)
    backbone = timm.models.VisionTransformer(**{**TWELVE, "depth": 1, "num_classes": 0}).eval()
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 3
    features, same = features_of(backbone, [(images[:30], labels[:30]), (images[30:], labels[30:])], CPU)
    assert torch.equal(same, labels)
    weight, bias, penalty = fit_head(features, labels, [1e-2])
    scale = features.std(0, correction=0)
    rows, free = (features - features.mean(0)) / scale, (weight * scale).requires_grad_()
    loss = F.cross_entropy(rows @ free.T + (bias + weight @ features.mean(0)), labels)
    (gradient,) = torch.autograd.grad(loss + penalty * free.square().sum() / 3, free)
    assert gradient.abs().max() < 1e-5
    path = tmp_path / "probe.safetensors"
    for facts, fits in (({"n": 1}, 1), ({"n": 1}, 0), ({"n": 2}, 1)):
        fitted = []
        kept = kept_head(path, facts, lambda fitted=fitted: fitted.append(1) or (weight, bias, penalty))
        assert len(fitted) == fits and torch.equal(kept[0], weight) and torch.equal(kept[1], bias)
    logits = attach_head(backbone, weight, bias)(images)
    torch.testing.assert_close(logits.double(), features @ weight.T + bias, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"labels must be 0 to 2, each at least once, got \[0, 2\]"):
        fit_head(features, labels.where(labels != 1, 2))

"""The ablations of the paper's Table 5: what leads from one degree to another, and the loss by labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.recipe import TOCOM_RECIPE, Targets
from tokcomp.tocom.distill import Distiller
from tokcomp.tocom.variants import ARITHMETICS

CPU = torch.device("cpu")
RECIPE = replace(TOCOM_RECIPE, lr=1e-2, batch_size=8, drop_path=0.0)
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 1, 4, 1, 0, 2, 2, 3])


@pytest.fixture
def assert_leads(make_vit, make_plugin):
    """Assert what a fold at scale 1 adds to q of block 0: assert_leads(arithmetic, source, target, slots, factor)."""

    def check(arithmetic, source, target, slots, factor):
        model = make_vit().double()
        plugin = make_plugin(model, rank=1, max_degree=4, arithmetic=arithmetic)
        before = model.blocks[0].attn.qkv.weight.detach().clone()
        width = before.shape[1]
        expected = factor * sum(plugin.q_up[0][:, [slot]] @ plugin.q_down[0][[slot]] for slot in slots)
        plugin.fold(model, source, target, 1.0)
        found = (model.blocks[0].attn.qkv.weight - before)[:width]
        # Differences of numbers of order 1, of which at most eight are summed: far below 1e-12 in float64.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert expected.abs().max() > 0.1

    return check


def test_the_shared_group_is_whole_for_every_pair(assert_leads):
    for source, target in ((0, 1), (0, 4), (2, 3)):
        assert_leads("shared", source, target, range(4), 1)
        assert_leads("shared", target, source, range(4), -1)


def test_the_shared_group_by_distance(assert_leads):
    assert_leads("shared_by_distance", 0, 4, range(4), 1)
    assert_leads("shared_by_distance", 1, 2, range(4), 1 / 4)
    assert_leads("shared_by_distance", 4, 2, range(4), -1 / 2)


def test_no_inversion_has_matrices_of_its_own_for_the_way_back(assert_leads, make_vit, make_plugin):
    assert_leads("two_way", 1, 3, (1, 2), 1)
    assert_leads("two_way", 3, 1, (5, 6), -1)
    plugin = make_plugin(make_vit(), rank=1, max_degree=4, arithmetic="two_way")
    assert len(plugin.q_down[0]) == 8
    with pytest.raises(ValueError, match="must be a degree from 0 to 4"):
        plugin.fold(make_vit(), 0, 5)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_it_learns_stays_in_the_file_and_adds_nothing_between_equal_degrees(make_vit, tmp_path, arithmetic):
    model, path = make_vit(), tmp_path / "plugin.safetensors"
    plugin = tokcomp.ToCom(model, 1, 4, arithmetic)
    distiller = Distiller(model, plugin, tokcomp.ToMe, RECIPE, total_steps=6, steps_per_epoch=1, device=CPU)
    for _ in range(6):
        distiller.step(IMAGES.clone())
    assert all(up.any() for up in (*plugin.q_up, *plugin.v_up))
    plugin.save(path)
    loaded = tokcomp.ToCom.load(path, make_vit())
    assert loaded.arithmetic == arithmetic and torch.equal(loaded.v_up[1], plugin.v_up[1])
    with safe_open(path, framework="pt") as file:
        # A reader that knows only the published arithmetic refuses the others by their version.
        assert file.metadata()["version"] == ("1" if arithmetic == "steps" else "2")
    found = [model(IMAGES)]
    plugin.fold(model, 3, 3, 1.0)
    assert torch.equal(found[0], model(IMAGES))


def test_the_loss_by_labels_is_the_cross_entropy_of_mixed_and_smoothed_ones(make_vit):
    """By hand, in float64 and in pieces, mixing on; nothing of it reads a teacher."""
    for pieces in (1, 2):
        model = make_vit().double()
        options = dict(total_steps=2, steps_per_epoch=1, device=CPU, seed=3, pieces=pieces, loss="labels")
        plugin = tokcomp.ToCom(model, max_degree=4)
        distiller = Distiller(model, plugin, tokcomp.ToMe, RECIPE, **options)
        distiller._teach = None
        batches = TensorBatches(IMAGES.double(), LABELS, 8, 3, pieces=pieces)
        images, labels = next(iter(batches.iterate(0, 1)))
        given = [images.clone(), labels]
        loss = distiller.step(images, labels)
        _, degree = distiller.drawn
        expected = []
        for part, classes in zip(*(one.chunk(pieces) for one in given), strict=True):
            mixed, targets = Targets(RECIPE, model.num_classes, 3)(part.clone(), classes, 0)
            logits = tokcomp.compress(make_vit().double(), tokcomp.ToMe(degree))(mixed)
            expected.append(F.cross_entropy(logits, targets))
        torch.testing.assert_close(loss, torch.stack(expected).mean().detach(), rtol=1e-12, atol=0)
        assert plugin.v_up[0].any()


def test_what_does_not_fit_is_refused(make_vit):
    options = dict(total_steps=2, steps_per_epoch=1, device=CPU)

    def distiller(model, **more):
        return Distiller(model, tokcomp.ToCom(model, max_degree=2), tokcomp.ToMe, RECIPE, **options, **more)

    with pytest.raises(ValueError, match=r"arithmetic must be one of steps, two_way, .*, got 'both'"):
        tokcomp.ToCom(make_vit(), arithmetic="both")
    with pytest.raises(ValueError, match="loss must be one of distillation, labels, got 'l2'"):
        distiller(make_vit(), loss="l2")
    for model, more in ((make_vit(num_classes=0), {}), (make_vit(), dict(read=torch.nn.Identity()))):
        with pytest.raises(ValueError, match="loss must be 'distillation' for answers that are not a classifier's"):
            distiller(model, loss="labels", **more)
    with pytest.raises(ValueError, match="labels must be given, one per image, for the loss by labels; got None"):
        distiller(make_vit(), loss="labels").step(IMAGES.clone())

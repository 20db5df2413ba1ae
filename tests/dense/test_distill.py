"""Plugins by self-distillation of what a dense model says: the loss by hand, and the study at toy size."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokcomp
import torch
from tokcomp.dense import Segmenter
from tokcomp.runs.recipe import TOCOM_RECIPE
from tokcomp.tocom.distill import Distiller

from benchmarks.reproduce.command import reproduce
from benchmarks.reproduce.dense import STUDY
from benchmarks.reproduce.dense_units import QUICK, all_units
from benchmarks.reproduce.runner import keys_of, run_unit
from tests.tocom.conftest import lively_plugin

PLAIN = replace(TOCOM_RECIPE, mixup=0.0, cutmix=0.0, opt="sgd", sched="none", weight_decay=0.0)


@pytest.mark.parametrize("head", ["linear", "mask_transformer"])
@pytest.mark.parametrize("loss", ["kl", "features"])
def test_a_step_compares_what_the_segmenter_says(make_vit, head, loss):
    encoder = make_vit(num_classes=0, global_pool="", img_size=64).double()
    segmenter = Segmenter(encoder, 5, head).double().eval().requires_grad_(False)
    plugin = lively_plugin(encoder, std=1.0, max_degree=3)
    distiller = Distiller(
        encoder,
        plugin,
        lambda degree: tokcomp.ToMeMLP(10 * degree),
        PLAIN,
        total_steps=2,
        steps_per_epoch=2,
        device=torch.device("cpu"),
        read=segmenter.patch_answers if loss == "kl" else None,
    )
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [parameter.clone() for parameter in plugin.parameters()]
    found = distiller.step(images.clone())
    source, target = distiller.drawn
    assert any(not torch.equal(parameter, old) for parameter, old in zip(plugin.parameters(), before, strict=True))
    with torch.no_grad():
        for parameter, old in zip(plugin.parameters(), before, strict=True):
            parameter.copy_(old)
        teacher = tokcomp.compress(encoder, tokcomp.ToMeMLP(10 * source)).forward_features(images)
        with plugin.applied(tokcomp.compress(encoder, tokcomp.ToMeMLP(10 * target)), source, target):
            student = encoder.forward_features(images)
        if loss == "features":
            expected = (student - teacher).abs().mean()
        else:
            p, q = (segmenter.read(tokens, (8, 8)).softmax(1) for tokens in (teacher, student))
            expected = (p * (p / q).log()).sum(1).mean()  # over the images and patches
    assert expected > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_the_study_at_toy_size(tmp_path):
    settings = replace(QUICK, heads=("linear",), seeds=2)
    units = all_units(settings)
    keys = keys_of(units)
    for unit in units:  # here rather than in processes of its own
        run_unit(tmp_path, unit, keys[unit.name])
    results, tables = reproduce(STUDY, tmp_path, settings, jobs=1)
    rows = json.loads(results.read_text())["heads"]["linear"][0]["own size"]
    assert rows["8"]["flops"] < rows["4"]["flops"] < rows["0"]["flops"]
    same = [rows["0"]["rows"][name]["mean_iou"] for name in ("tome_mlp", "plugin, kl", "merged residual", "ToMe")]
    assert max(same) - min(same) < 1e-6
    text = tables.read_text()
    assert "2 seeds" in text and "| plugin, features | " in text and "| tome_mlp at 96 x 96 | " in text

"""The gate before training speeds: it lets right gradients through and stops wrong ones."""

from __future__ import annotations

import pytest
import timm
import tokcomp
import torch

from benchmarks.training_steps import check_gradients

CPU = torch.device("cpu")
METHOD = tokcomp.DiffRate(tokcomp.CompressionSchedule([17, 13, 9], [17, 11, 7]))


def make_vit():
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5
    ).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_right_gradients_pass(precision):
    check_gradients(make_vit(), METHOD, precision, CPU)


def test_wrong_gradients_are_stopped(monkeypatch):
    compress = tokcomp.compress

    def off_by_a_little(model, method):
        model = compress(model, method)
        model.blocks[1].mlp.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 1.001,))
        return model

    monkeypatch.setattr(tokcomp, "compress", off_by_a_little)
    with pytest.raises(AssertionError, match="gradients differ in float64"):
        check_gradients(make_vit(), METHOD, "float32", CPU)

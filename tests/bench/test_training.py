"""The gate before training speeds: it lets right gradients through and stops wrong ones."""

from __future__ import annotations

import pytest
import tokcomp

from benchmarks.training_steps import check_gradients
from tests.bench.toys import CPU, METHOD, make_vit


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_right_gradients_pass(precision):
    check_gradients(make_vit().train(), METHOD, precision, CPU)


def test_wrong_gradients_are_stopped(monkeypatch):
    compress = tokcomp.compress

    def off_by_a_little(model, method):
        model = compress(model, method)
        model.blocks[1].mlp.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 1.001,))
        return model

    monkeypatch.setattr(tokcomp, "compress", off_by_a_little)
    with pytest.raises(AssertionError, match="gradients differ in float64"):
        check_gradients(make_vit().train(), METHOD, "float32", CPU)

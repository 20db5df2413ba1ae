"""Agreement with the published code, tensor by tensor."""

from __future__ import annotations

import pytest
import tokcomp
import torch

from tests.drawn import draws_what_was_recorded

# The published float32 run itself is off its float64 run by up to 1e-6; two such runs may add up.
TOLERANCE = 1e-5


def method_of(name, settings):
    if name == "diffrate":
        counts = settings["diffrate"]
        return tokcomp.DiffRate(tokcomp.CompressionSchedule(counts["num_prune_kept"], counts["num_merge_kept"]))
    return tokcomp.ToMe(settings["tome"]["r"]) if name == "tome" else tokcomp.EViT(settings["evit"]["keep_rate"])


def block_outputs(model, images):
    outputs = []
    handles = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in model.blocks]
    with torch.no_grad():
        logits = model(images)
    for handle in handles:
        handle.remove()
    return logits, outputs


def sort_rows(x):
    """[N, C] rows in an order that does not depend on the order they came in."""
    return x[x[:, 0].argsort()]


def test_plain_model_is_the_published_one(published):
    with torch.no_grad():
        logits = published.model()(published.images)
    torch.testing.assert_close(logits, published.tensors["timm_logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["diffrate", "tome", "evit"])
def test_logits_and_blocks(published, name):
    model = tokcomp.compress(published.model(), method_of(name, published.settings))
    logits, outputs = block_outputs(model, published.images)
    torch.testing.assert_close(logits, published.tensors[f"{name}.logits"], atol=TOLERANCE, rtol=0)
    for index in range(1, 6):
        expected = published.tensors[f"{name}.block_x.{index}"][0]
        assert outputs[index].shape[1] == expected.shape[0]
        torch.testing.assert_close(sort_rows(outputs[index][0]), sort_rows(expected), atol=TOLERANCE, rtol=0)


@draws_what_was_recorded
@pytest.mark.parametrize("name", ["diffrate", "tome", "evit"])
def test_float64_logits(published, name):
    model = tokcomp.compress(published.model().double(), method_of(name, published.settings))
    with torch.no_grad():
        logits = model(published.images.double())
    expected = published.tensors[f"{name}.logits_f64"]
    assert (logits - expected).abs().max() < 1e-12 * expected.abs().max() * model.embed_dim


@pytest.mark.parametrize("name", ["diffrate", "tome"])
def test_trace_matches_published_sources(published, name):
    """Slots may be numbered differently; which tokens ended up together, and which nowhere, may not."""
    model = tokcomp.compress(published.model(), method_of(name, published.settings))
    for index, ours in enumerate(tokcomp.trace(model, published.images)):
        theirs = published.tensors[f"{name}.block_source.{index}"].long()
        assert torch.equal(ours < 0, theirs < 0)
        together = ours[:, :, None] == ours[:, None, :]
        assert torch.equal(together, theirs[:, :, None] == theirs[:, None, :])


def test_flops_match_published(published):
    model = tokcomp.compress(published.model(), method_of("diffrate", published.settings))
    assert tokcomp.flops(model) == published.settings["diffrate"]["flops"]

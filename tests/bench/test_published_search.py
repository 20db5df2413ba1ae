"""The baseline of the search's speed computes what the published search does, and what ours does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokcomp.bench.published_search import PublishedSearch

from tests.drawn import draws_what_was_recorded
from tests.library.conftest import make_vit, published  # noqa: F401

DATA = Path(__file__).parents[1] / "data" / "published_search.safetensors"
STEPS = ("prune", "merge")


def proxy_gradients(search):
    return {name: value.grad for name, value in search.named_parameters() if not name.startswith("model.")}


def assert_same_gradients(have, want, relative):
    assert have.keys() == want.keys()
    for name in want:
        # What takes no part in a loss has a gradient of zeros, or none.
        gradient, wanted = (torch.zeros(1) if one[name] is None else one[name] for one in (have, want))
        assert (gradient - wanted).norm() <= relative * wanted.norm() + 1e-18, name


@draws_what_was_recorded
def test_agrees_with_the_published_code(published):  # noqa: F811
    with safe_open(DATA, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        settings = {name: json.loads(text) for name, text in file.metadata().items()}
    search = PublishedSearch(published.model().double(), settings["granularity"]).double().eval()
    for step in STEPS:
        for block, proxy in enumerate(getattr(search, step)):
            proxy.logits.data.copy_(tensors[f"logits.{step}.{block}"])
        kept = [int(proxy()) for proxy in getattr(search, step)]
        assert kept == settings[f"kept_{step}"]
    logits, flops = search(published.images.double())
    # The same operators in the same order: what is left is how sums are split over threads.
    torch.testing.assert_close(logits, tensors["logits"], rtol=1e-12, atol=1e-12)
    assert flops.item() == tensors["flops"].item()
    loss = F.cross_entropy(logits, tensors["labels"])
    total = loss + settings["lambda"] * (flops / 1e9 - settings["target_gflops"]).square()
    for which, value in {"grad_ce": loss, "grad_flops_G": flops / 1e9, "grad_total": total}.items():
        search.zero_grad()
        value.backward(retain_graph=True)
        names = [f"{step}.{block}" for step in STEPS for block in range(6)]
        want = {f"{name}.logits": tensors.get(f"{which}.{name}") for name in names}
        assert_same_gradients(proxy_gradients(search), want, 1e-10)
    assert search.model.blocks[0].mlp.fc1.weight.grad.norm() > 0  # nothing is frozen


def test_granularity_need_not_divide_the_patches(make_vit):  # noqa: F811
    search = PublishedSearch(make_vit(), 5)
    assert search.prune[1].candidates.tolist() == [16, 11, 6, 1]
    assert len(search.prune[0].logits) == 1
    pi = search.prune[1].token_probability()
    torch.testing.assert_close(pi[[0, 1, 2, 6, 7, 11, 12, 16]], torch.tensor([4, 4, 3, 3, 2, 2, 1, 1]) / 4)


def test_half_precision_by_autocast(make_vit):  # noqa: F811
    search = PublishedSearch(make_vit(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, flops = search(torch.randn(2, 3, 32, 32))
    (F.cross_entropy(logits.float(), torch.tensor([1, 2])) + flops / 1e6).backward()
    assert all(torch.isfinite(proxy.logits.grad).all() for proxy in search.prune[1:3])


def test_a_model_that_is_no_vision_transformer_is_refused():
    with pytest.raises(TypeError, match="ResNet"):
        PublishedSearch(timm.create_model("resnet18"))

"""The plain functions against outputs of the published code, which nobody here wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tests.drawn import draws_what_was_recorded
from tests.library.conftest import Published, published  # noqa: F401
from tests.oracle import rules
from tests.oracle.plain_vit import PlainViT
from tests.oracle.search_rules import Proxy, multiply_adds, search

DATA = Path(__file__).parents[1] / "data" / "published_search.safetensors"
STEPS = ("prune", "merge")
#: The published outputs are float64 too; their gradients hold that of the softmax's maximum, of the order of its eps.
LOGITS, GRADIENTS = 1e-12, 1e-7


def plain_of(published: Published) -> PlainViT:  # noqa: F811
    model = published.model().double()
    return PlainViT(model.state_dict(), len(model.blocks), model.blocks[0].attn.num_heads)


def off(have: Tensor, want: Tensor) -> float:
    return ((have - want).norm() / want.norm()).item()


@draws_what_was_recorded
def test_methods(published: Published) -> None:  # noqa: F811
    plain, settings = plain_of(published), published.settings
    counts = settings["diffrate"]["num_prune_kept"], settings["diffrate"]["num_merge_kept"]
    rates = settings["tome"]["r"], settings["evit"]["keep_rate"]
    rates = [rate if isinstance(rate, list) else [rate] * plain.depth for rate in rates]

    def of_each_image(name: str, image: Tensor) -> Tensor:
        if name == "diffrate":
            return rules.diffrate(plain, image, *counts)
        return rules.tome(plain, image, rates[0]) if name == "tome" else rules.evit(plain, image, keep_rates=rates[1])

    for name in ("diffrate", "tome", "evit"):
        have = torch.stack([of_each_image(name, image) for image in published.images.double()])
        assert off(have, published.tensors[f"{name}.logits_f64"]) < LOGITS, name


@draws_what_was_recorded
def test_search(published: Published) -> None:  # noqa: F811
    with safe_open(DATA, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        settings = {name: json.loads(text) for name, text in file.metadata().items()}
    plain = plain_of(published)
    leaves = {
        f"{step}.{block}": tensors[f"logits.{step}.{block}"].double().requires_grad_()
        for step in STEPS
        for block in range(plain.depth)
    }

    def proxies(step: str) -> Iterator[Proxy]:
        for block in range(plain.depth):
            yield Proxy(leaves[f"{step}.{block}"], settings["granularity"], plain.num_tokens - 1, 1)

    prune, merge = list(proxies("prune")), list(proxies("merge"))
    assert [proxy.count for proxy in prune] == settings["kept_prune"]
    assert [proxy.count for proxy in merge] == settings["kept_merge"]
    logits = torch.stack([search(plain, image, prune, merge) for image in published.images.double()])
    flops = multiply_adds(plain, list(zip(prune, merge, strict=True)))
    assert off(logits, tensors["logits"]) < LOGITS
    assert flops.item() == tensors["flops"].item()
    losses = {"grad_ce": F.cross_entropy(logits, tensors["labels"]), "grad_flops_G": flops / 1e9}
    for which, loss in losses.items():
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, materialize_grads=True)
        for name, gradient in zip(leaves, found, strict=True):
            want = tensors.get(f"{which}.{name}")
            if want is None or not want.any():  # not in the published graph, or without a share in it
                assert not gradient.any(), f"{which}.{name}"
            else:
                assert off(gradient, want) < GRADIENTS, f"{which}.{name}"

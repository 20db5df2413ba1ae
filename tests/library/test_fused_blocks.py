"""Blocks as six kernels: the sums, reductions and norms in one pass give what the steps give one by one."""

from __future__ import annotations

from typing import Any

import pytest
import tokcomp
import torch
from tokcomp import fastpath
from tokcomp.adapters.timm_vit import fast as timm_vit_fast
from tokcomp.fastpath import packing
from tokcomp.methods.base import reduces_in_one
from torch import Tensor, nn

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SCHEDULE = tokcomp.CompressionSchedule([17, 14, 11, 11], [17, 12, 11, 6])
METHODS = {
    "prune_merge": tokcomp.DiffRate(SCHEDULE),
    "merge_prune": tokcomp.DiffRate(SCHEDULE, pipeline="merge_prune"),
    "prune": tokcomp.DiffRate(SCHEDULE, pipeline="prune"),
    "merge": tokcomp.DiffRate(SCHEDULE, pipeline="merge", similarity_weighted_size=False),
    "random": tokcomp.DiffRate(SCHEDULE, metric="random"),
    "keep-all": tokcomp.DiffRate(tokcomp.CompressionSchedule([17] * 4, [17] * 4)),
    "tome": tokcomp.ToMe(3),
    "evit": tokcomp.EViT(0.7, blocks=(1, 3)),
    "tome_mlp": tokcomp.ToMeMLP([0, 3, 0, 5]),
}


class _Reversed(tokcomp.DiffRate):
    """Keeps what DiffRate would drop: its own score, so the inherited reduction in one go must not be used."""

    def score(self, evidence: Any, block: int, x: Tensor) -> Tensor:
        return -super().score(evidence, block, x) + 0 * x.sum(2)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The path of CUDA, on CPU: linear layers as they stand. Lists the operators that ran."""
    seen: list[str] = []

    def products(model: Any, layers: Any, x: Tensor, **kind: Any) -> fastpath.PlainWeights | None:
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        return None if packing.wants_gradients(model, x) else fastpath.PlainWeights(linear, x.dtype)

    monkeypatch.setattr(timm_vit_fast, "packed_weights", products)
    for name in ("prune_merge_norm", "add_layer_norm", "linear_gelu", "prune_merge"):
        original = getattr(torch.ops.tokcomp, name)

        def spy(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            seen.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.ops.tokcomp, name, spy)
    return seen


def step_by_step(model: Any, images: Tensor) -> Tensor:
    """The same model's logits from the modules themselves."""
    with torch.enable_grad():
        return model(images).detach()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("options", [{}, {"init_values": 0.3}, {"global_pool": "avg"}], ids=["", "scaled", "avg"])
def test_plain_products_give_the_modules_logits(name: str, options: Any, make_vit: Any, plain: list[str]) -> None:
    model = tokcomp.compress(make_vit(**options).double(), METHODS[name])
    expected = step_by_step(model, IMAGES.double())
    plain.clear()
    with torch.no_grad():
        ours = model(IMAGES.double())
    # float64: the same sums in another order, and no choice between tokens is that near.
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert "linear_gelu" in plain and ("add_layer_norm" in plain or name == "tome_mlp")
    if isinstance(METHODS[name], tokcomp.DiffRate) and name != "keep-all":
        assert "prune_merge_norm" in plain and "prune_merge" not in plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_block_is_six_kernels(dtype: torch.dtype, make_vit: Any, plain: list[str], set_products: Any) -> None:
    set_products(bfloat16="bfloat16")
    model = tokcomp.compress(make_vit().to(dtype), METHODS["prune_merge"])
    with torch.no_grad():
        model(IMAGES.to(dtype))
    # Block 0 drops nothing; the last block has no norm of a next one after it.
    dropping = ["prune_merge_norm", "linear_gelu"]
    between = ["add_layer_norm"]
    assert plain == [*between, "linear_gelu", *between, *dropping, *between, *dropping, *between, *dropping]


def test_a_method_that_changes_a_step_is_run_step_by_step(make_vit: Any, plain: list[str]) -> None:
    assert reduces_in_one(tokcomp.DiffRate)
    assert not reduces_in_one(_Reversed) and not reduces_in_one(tokcomp.ToMe)
    model = tokcomp.compress(make_vit().double(), _Reversed(SCHEDULE))
    expected = step_by_step(model, IMAGES.double())
    plain.clear()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)
    assert "prune_merge" in plain and "prune_merge_norm" not in plain


def test_a_hook_that_changes_a_block_is_heard(make_vit: Any, plain: list[str]) -> None:
    """Nothing may be computed ahead from what a hook is about to replace."""
    model = tokcomp.compress(make_vit().double(), METHODS["prune_merge"])
    model.blocks[1].register_forward_hook(lambda module, args, out: out * 1.5)
    expected = step_by_step(model, IMAGES.double())
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_a_block_that_runs_otherwise_gets_and_gives_plain_tokens(odd: int, make_vit: Any, plain: list[str]) -> None:
    model = tokcomp.compress(make_vit().double(), METHODS["prune_merge"])
    model.blocks[odd].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    expected = step_by_step(model, IMAGES.double())
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES.double()), expected, rtol=1e-10, atol=1e-10)


def test_only_cuda_takes_plain_products(make_vit: Any) -> None:
    model = make_vit()
    layers = timm_vit_fast.layers_of(model.blocks[0])
    with torch.no_grad():
        assert fastpath.plain_weights(model, layers, IMAGES) is None

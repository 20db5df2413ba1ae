"""What makes a search step fast changes nothing: packed frozen layers on CPU, a last block without dead tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tokcomp import DiffRateSearch
from tokcomp.adapters.timm_vit import search_fast as timm_vit_search_fast
from torch import nn

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of the switch that ordinary() uses

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture
def calls(monkeypatch):
    """Blocks that ran through packed weights."""
    seen = []
    original = timm_vit_search_fast.run_block

    def spy(block, *args):
        seen.append(block)
        return original(block, *args)

    monkeypatch.setattr(timm_vit_search_fast, "run_block", spy)
    return seen


def make_search(model, seed=0, granularity=2, **options):
    search = DiffRateSearch(model, granularity, **options)
    generator = torch.Generator().manual_seed(seed)
    for number in (*search.prune, *search.merge):
        falling = -torch.arange(len(number.logits)) / 4
        number.logits.data.copy_(0.3 * torch.randn(number.logits.shape, generator=generator) + falling)
    return search


def step(search, images, seed=0):
    """Logits, and the gradient of every proxy."""
    search.zero_grad()
    torch.manual_seed(seed)
    logits, _ = search(images)
    F.cross_entropy(logits.float(), LABELS).backward()
    numbers = (*search.prune, *search.merge)
    return logits.detach(), [torch.zeros(1) if one.logits.grad is None else one.logits.grad.clone() for one in numbers]


def ordinary(search, images, seed=0):
    with torch.backends.mkldnn.flags(enabled=False):
        return step(search, images, seed)


def assert_same(have, want, tolerance):
    torch.testing.assert_close(have[0], want[0], atol=tolerance, rtol=0)
    largest = max(gradient.norm() for gradient in want[1])
    assert largest > 1e-6
    for gradient, wanted in zip(have[1], want[1], strict=True):
        assert (gradient - wanted).norm() <= tolerance * largest


MODELS = {
    "plain": {},
    "average-pool": {"global_pool": "avg"},
    "layer-scale-qk-norm": {"init_values": 0.3, "qk_norm": True},
    "no-bias-relu": {"qkv_bias": False, "act_layer": nn.ReLU},
    "tanh-gelu": {"act_layer": lambda: nn.GELU("tanh")},
    "drop-path": {"drop_path_rate": 0.6},
    "drop-path-layer-scale": {"drop_path_rate": 0.6, "init_values": 0.3},
}


@needs_onednn
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_packed_step_is_the_ordinary_one(make_vit, images_for, calls, options, train, seed):
    search = make_search(make_vit(seed=seed, **options), seed).train(train)
    images = images_for(search.model, seed=seed)
    have = step(search, images)
    assert calls == list(search.model.blocks)
    want = ordinary(search, images)
    assert len(calls) == 4
    # The same float32 sums in another order, on logits and gradients of order 1.
    assert_same(have, want, 1e-4)
    if train and "drop_path_rate" in options:
        assert (step(search, images, seed=1)[0] - want[0]).abs().max() > 1e-2  # other images were dropped
    with torch.no_grad():
        torch.manual_seed(0)
        torch.testing.assert_close(search(images)[0], want[0], atol=1e-4, rtol=0)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_no_worse_than_the_ordinary_path(make_vit, images_for, calls, dtype, half_products):
    # Every token is kept: rounding cannot swap two of them.
    search = make_search(make_vit(embed_dim=48).to(dtype))
    for number in (*search.prune, *search.merge):
        number.logits.data.copy_(30.0 * torch.arange(len(number.logits), 0, -1))
    images = images_for(search.model).to(dtype)
    exact = ordinary(copy.deepcopy(search).double(), images.double())[0]
    slow_error = (ordinary(search, images)[0].double() - exact).abs().mean()
    assert not calls
    fast = step(search, images)[0]
    assert fast.dtype == dtype and len(calls) == 4
    assert (fast.double() - exact).abs().mean() < 1.5 * slow_error


@needs_onednn
@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.6, "init_values": 0.3}], ids=["plain", "drop-path"])
def test_autocast_is_no_worse_than_on_the_ordinary_path(make_vit, images_for, calls, options, set_products):
    search = make_search(make_vit(embed_dim=48, **options)).train()
    for number in (*search.prune, *search.merge):
        number.logits.data.copy_(30.0 * torch.arange(len(number.logits), 0, -1))
    search.prune[1].logits.data.mul_(-1 / 30)  # only here may rounding make a difference to which tokens stay
    set_products(bfloat16="bfloat16", float16="float32")
    which = 1  # of all gradients, the one that is not zero
    errors = []  # of one draw rounding may leave either path the better one by chance
    for seed in range(21):
        images = torch.randn(images_for(search.model).shape, generator=torch.Generator().manual_seed(seed))
        exact, exact_gradients = ordinary(search, images, seed)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16):
            slow, slow_gradients = ordinary(search, images, seed)
            assert not calls
            fast, fast_gradients = step(search, images, seed)
        assert len(calls) == 4
        pairs = ((slow, slow_gradients), (fast, fast_gradients))
        errors.append([(logits - exact).abs().mean() for logits, _ in pairs])
        norm = exact_gradients[which].norm()
        errors[-1] += [(gradients[which] - exact_gradients[which]).norm() / norm for _, gradients in pairs]
    slow_error, fast_error, slow_gradient_error, fast_gradient_error = torch.tensor(errors).median(0).values
    assert slow_error > 1e-4 and slow_gradient_error > 0  # there was rounding
    assert fast_error < 1.5 * slow_error
    assert slow_gradient_error < 0.5  # the gradient is still recognisable
    assert fast_gradient_error < 1.5 * slow_gradient_error
    assert_same(step(search, images, seed), (exact, exact_gradients), 1e-4)  # packed anew in float32
    calls.clear()
    with torch.autocast("cpu", torch.float16):  # which nothing here multiplies: float32, but for the head
        have = step(search, images, seed)
    assert len(calls) == 4 and have[0].dtype == torch.float16
    assert_same((have[0].float(), have[1]), (exact, exact_gradients), 1e-2)


@needs_onednn
def test_checkpointing_gives_the_same_step(make_vit, images_for, calls):
    search = make_search(make_vit(drop_path_rate=0.5)).train()
    images = images_for(search.model)
    want = step(search, images)
    search.model.set_grad_checkpointing()
    have = step(search, images)
    assert len(calls) > 2 * 4  # once more in the backward pass
    assert torch.equal(have[0], want[0])
    assert_same(have, want, 1e-6)


@needs_onednn
def test_gradient_to_the_images(make_vit, images_for, calls):
    search = make_search(make_vit())
    images = images_for(search.model).requires_grad_()
    [have] = torch.autograd.grad(F.cross_entropy(search(images)[0], LABELS), images)
    assert len(calls) == 4
    with torch.backends.mkldnn.flags(enabled=False):
        [want] = torch.autograd.grad(F.cross_entropy(search(images)[0], LABELS), images)
    assert (have - want).norm() <= 1e-4 * want.norm()


WATCHED = {
    "hook": lambda model: model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None),
    "trainable weight": lambda model: model.blocks[1].attn.proj.weight.requires_grad_(True),
    "other linear": lambda model: nn.utils.parametrizations.weight_norm(model.blocks[2].mlp.fc2).requires_grad_(False),
    "float64": lambda model: model.double(),
    "dropout": lambda model: setattr(model.blocks[0].mlp.drop1, "p", 0.5),
}


@pytest.mark.parametrize("change", WATCHED.values(), ids=WATCHED)
def test_ordinary_path_where_the_packed_one_does_not_serve(make_vit, images_for, calls, change):
    search = make_search(make_vit()).train()
    change(search.model)
    images = images_for(search.model).to(next(search.model.parameters()).dtype)
    logits, gradients = step(search, images)
    assert not calls
    assert torch.isfinite(logits).all() and any(gradient.norm() > 0 for gradient in gradients)


@needs_onednn
def test_weights_that_change_between_steps_are_noticed(make_vit, images_for, calls):
    search = make_search(make_vit())
    images = images_for(search.model)
    before = step(search, images)
    search.model.blocks[2].mlp.fc1.weight.data.mul_(1.5)
    after = step(search, images)
    assert len(calls) == 8 and not torch.equal(after[0], before[0])
    assert_same(after, ordinary(search, images), 1e-4)


@pytest.mark.parametrize("pipeline", ["prune_merge", "merge_prune", "prune", "merge"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"reg_tokens": 3}], ids=["plain", "qk-norm", "registers"])
def test_dead_tokens_of_the_last_block_are_left_out(make_vit, images_for, pipeline, options):
    """In float64, where the packed path does not serve: same logits, same gradients."""
    search = make_search(make_vit(**options).double(), pipeline=pipeline).double()
    images = images_for(search.model).double()
    rows = []
    search.model.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    have = step(search, images)
    search._prefix_only_block = None
    want = step(search, images)
    assert rows == [search.num_prefix_tokens, search.num_tokens]
    # 60 sums of fewer than 100 terms; the kernels hold the maximum of a row constant, and so does this.
    torch.testing.assert_close(have[0], want[0], atol=1e-12, rtol=0)
    assert_same(have, want, 1e-11)


def test_every_token_of_the_last_block_where_the_head_reads_them(make_vit, images_for):
    search = make_search(make_vit(global_pool="avg"))
    rows = []
    search.model.norm.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    step(search, images_for(search.model))
    assert rows == [search.num_tokens]

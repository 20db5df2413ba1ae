"""The search of CAFormer's schedules: merging in the third stage, the grid restored under the mask."""

from __future__ import annotations

import pytest
import tokcomp
import torch
import torch.nn.functional as F
from tokcomp import DiffRateSearch

from tests.library.small_caformer import HEIGHT, TOKENS, VARIANTS, WIDTH, caformer, images_of
from tests.search.test_model import assert_foretells, compressed

PIPELINES = ("merge", "prune", "prune_merge", "merge_prune")


def searched(seed=0, dtype=torch.float64, options=None, **settings):
    """A search whose model has images of 64 x 96 for its own."""
    model = caformer(seed, **(options or {})).to(dtype)
    model.pretrained_cfg = {"input_size": (3, HEIGHT, WIDTH)}
    return DiffRateSearch(model, **settings)


def set_counts(search, step, counts):
    """Logits that stand for these counts and leave each neighbouring candidate some probability."""
    with torch.no_grad():
        for number, count in zip(getattr(search, step), counts, strict=True):
            if not number.fixed:
                candidates = search.num_tokens - search.granularity * torch.arange(len(number.logits))
                number.logits.copy_(-3.0 * (candidates - count + 0.3).abs())
    assert all(int(number()) == count for number, count in zip(getattr(search, step), counts, strict=True))
    return search


MERGE, PRUNE = [TOKENS, 17, 9, TOKENS], [TOKENS, 20, 14, TOKENS]


def with_counts(search):
    for step, counts in (("merge", MERGE), ("prune", PRUNE)):
        set_counts(search, step, counts)
    return search.eval()


def test_published_settings_are_the_default():
    search = searched()
    method = search.method()
    assert (method.metric, method.pipeline, method.similarity_weighted_size) == ("image_attn", "merge", False)
    assert len(search.merge) == 4  # the third stage's blocks
    # As published, its first and its last block keep their tokens: all that follows reads every position.
    assert [number.fixed for number in search.merge] == [True, False, False, True]
    schedule = search.schedule()
    assert schedule.num_prune_kept is None
    assert schedule.num_merge_kept == [TOKENS, 13, 13, TOKENS]  # 12.5 of 24, rounded up


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("metric", ["image_attn", "random"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_foretells_the_compressed_model(pipeline, metric, weighted):
    search = searched(pipeline=pipeline, metric=metric, similarity_weighted_size=weighted, match_inference=True)
    assert_foretells(with_counts(search), images_of().double())


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    search = with_counts(searched(seed=2, options=VARIANTS[variant], match_inference=True))
    assert_foretells(search, images_of(search.model, seed=2).double())


@pytest.mark.parametrize("metric", ["cls_attn", "cls_attn_v"])
def test_metrics_of_a_class_token_are_refused(metric):
    with pytest.raises(ValueError, match=f"metric '{metric}' needs a class token, which this model does not have"):
        searched(metric=metric)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_gradients_reach_every_logit_that_can_matter(pipeline):
    search = with_counts(searched(pipeline=pipeline))
    logits, _ = search(images_of().double())
    F.cross_entropy(logits, torch.arange(3)).backward()
    # A step whose count is not below what is alive when its turn comes has no part in the loss.
    idle = {("prune", 1), ("prune", 2)} if pipeline == "merge_prune" else set()
    for step in ("prune", "merge"):
        for block, number in enumerate(getattr(search, step)):
            gradient = number.logits.grad
            if number.fixed or step not in pipeline:
                assert gradient is None or not gradient.any()
            else:
                assert gradient.isfinite().all()
                assert gradient.any() != ((step, block) in idle)


def test_the_multiply_adds_move_every_free_logit():
    search = with_counts(searched())
    search.flops().backward()
    assert all(number.logits.grad.abs().min() > 0 for number in search.merge if not number.fixed)


def test_the_grid_passes_gradient_to_merged_tokens():
    """The last block that merges reaches the loss through the grid alone when the block after it does not attend."""
    search = with_counts(searched())
    with torch.no_grad():
        search.model.stages[2].blocks[3].token_mixer.proj.weight.zero_()
    search(images_of().double())[0].square().sum().backward()
    assert search.merge[2].logits.grad.abs().sum() > 1e-6


@pytest.mark.parametrize("pipeline", ["merge", "prune"])
def test_the_mask_of_a_lost_token_moves_its_position_as_its_gradient_says(pipeline):
    """The mask is 0 or 1 in the forward pass, but what it multiplies is linear in it: 1 gives the token back."""
    from tokcomp.adapters.timm_caformer.search import _Positions, _spread
    from tokcomp.blocks.search import TokenState

    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1.0, 0, 1, 1, 0, 1]], dtype=torch.float64, requires_grad=True)
    token = torch.tensor([[0, 3, 2, 3, 3, 5]]) if pipeline == "merge" else torch.arange(6).unsqueeze(0)
    pruned = (mask.detach() == 0) if pipeline == "prune" else torch.zeros(1, 6, dtype=torch.bool)
    fill = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
    positions = _Positions(token, fill, pruned)
    out = _spread(x, TokenState(mask), positions)
    expected = x.clone()
    expected[0, [1, 4]] = x[0, 3] if pipeline == "merge" else fill[0, [1, 4]]
    assert torch.equal(out, expected)
    assert torch.equal(_spread(x, TokenState(torch.ones_like(mask)), positions), x)
    (gradient,) = torch.autograd.grad(out.sum(), mask)
    torch.testing.assert_close(gradient, (x - expected).sum(2), atol=1e-12, rtol=0)


def test_flops_are_those_of_the_compressed_model():
    for granularity in (1, 5):
        search = searched(granularity=granularity)
        assert search.flops().item() == tokcomp.flops(compressed(search)) < tokcomp.flops(search.model)
    counts = search.counts()
    assert counts.num_in[0] == TOKENS and counts.num_in[1:].tolist() == counts.num_out[:-1].tolist()


def test_keeping_everything_is_the_plain_model():
    search = searched(dtype=torch.float32).eval()
    with torch.no_grad():
        for number in search.merge:
            number.logits[0] = 1e3
        found, flops = search(images_of())
        # Another order of the sums, and the softmax's eps: float32 roundings of outputs of order 1.
        torch.testing.assert_close(found, search.model(images_of()), atol=3e-5, rtol=0)
    assert flops.item() == tokcomp.flops(search.model)


def test_a_short_search_comes_nearer_the_target():
    search = searched(dtype=torch.float32, options={"drop_path_rate": 0.1})
    dense = tokcomp.flops(search.model)
    target = 0.9 * search.flops().item()
    optimizer = torch.optim.AdamW([p for p in search.parameters() if p.requires_grad], lr=0.1, weight_decay=0)
    losses = []
    for step in range(12):
        torch.manual_seed(step)
        logits, flops = search(images_of(batch=4, seed=step))
        miss = ((flops - target) / dense).square()
        loss = F.cross_entropy(logits, torch.arange(4)) + 1e3 * miss
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(miss.item())
    assert losses[-1] < 0.5 * losses[0]
    schedule = search.schedule()
    assert schedule.num_merge_kept != searched().schedule().num_merge_kept
    assert tokcomp.flops(compressed(search)) == search.flops().item()


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for enabled in (False, True):
        search = with_counts(searched())
        search.model.set_grad_checkpointing(enabled)
        search(images_of().double())[0].square().sum().backward()
        gradients.append([number.logits.grad for number in search.merge[1:3]])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.any()
        torch.testing.assert_close(plain, checkpointed)


def test_the_model_is_frozen_and_otherwise_left_alone():
    search = with_counts(searched(dtype=torch.float32))
    model, images = search.model, images_of()
    plain = model(images)
    classes = [type(module) for module in model.modules()]
    search(images)[0].sum().backward()
    assert [type(module) for module in model.modules()] == classes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(images), plain)


def test_other_images_and_models_are_refused():
    with pytest.raises(ValueError, match=r"must give 24 tokens .* got 16"):
        searched(dtype=torch.float32)(images_of(height=64, width=64))
    model = caformer(num_classes=0)
    model.reset_classifier(0, global_pool="")
    with pytest.raises(tokcomp.UnsupportedModelError, match="global_pool='' leaves the positions unpooled"):
        DiffRateSearch(model)
    with pytest.raises(ValueError, match="model must be plain"):
        DiffRateSearch(tokcomp.compress(caformer(), tokcomp.ToMe(2)))


def test_half_precision():
    wanted = with_counts(searched(dtype=torch.float32))(images_of(batch=9))[0]
    search = with_counts(searched(dtype=torch.bfloat16))
    found, flops = search(images_of(batch=9).bfloat16())
    found.float().square().sum().backward()
    assert found.dtype == torch.bfloat16 and flops.dtype == torch.float64
    assert search.merge[1].logits.grad.isfinite().all()
    # A rounding may change which tokens merge, so the middle image is compared: some tens of roundings of 8 bits.
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median() < 25 * torch.finfo(torch.bfloat16).eps

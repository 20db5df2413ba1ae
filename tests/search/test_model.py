"""DiffRateSearch: what it leaves alone, that it foretells the compressed model, where gradients go, what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import tokcomp
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from tokcomp import DiffRateSearch

PIPELINES = ("prune_merge", "merge_prune", "prune", "merge")
FAMILIES = {
    "deit": {},
    "distilled": {"cls": VisionTransformerDistilled},
    "mae": {"global_pool": "avg"},
    "registers": {"reg_tokens": 2},
    "layer-scale, qk-norm": {"init_values": 0.5, "qk_norm": True},
    "avgmax": {"global_pool": "avgmax"},
    "map": {"global_pool": "map", "class_token": False},
    "pre-norm": {"pre_norm": True},
}


def draw_logits(search: DiffRateSearch, seed: int = 0) -> DiffRateSearch:
    """Falling kept numbers, some of them above what is still alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for step in ("prune", "merge"):
            for block, number in enumerate(getattr(search, step)):
                centre = torch.rand((), generator=generator) * 0.3 + (block + (step == "merge") / 2) / len(search.prune)
                places = torch.linspace(0, 1, len(number.logits))
                number.logits.copy_(-40 * (places - centre).square())
    return search


def compressed(search):
    return tokcomp.compress(copy.deepcopy(search.model), search.method())


def assert_foretells(search, images):
    """At the counts it stands for, the search computes the compressed model, but for the softmax's eps of 1e-6."""
    with torch.no_grad():
        found, wanted, plain = search(images)[0], compressed(search)(images), search.model(images)
    spread = (wanted - plain).abs().max()
    assert spread > 1e-2  # compression is felt
    assert (found - wanted).abs().max() < 1e-3 * spread


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("metric", ["image_attn", "random"])  # tests/oracle has the others
def test_foretells_the_compressed_model(make_vit, images_for, metric, pipeline):
    model = make_vit().double()
    search = DiffRateSearch(model, metric=metric, pipeline=pipeline, match_inference=True, seed=3).eval()
    assert_foretells(draw_logits(search), images_for(model).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(make_vit, images_for, family):
    model = make_vit(**FAMILIES[family]).double()
    search = draw_logits(DiffRateSearch(model, match_inference=True).eval())
    assert search.metric == ("image_attn" if "class_token" in FAMILIES[family] else "cls_attn")
    images = images_for(model).double()
    assert_foretells(search, images)
    logits, flops = search(images)
    (F.cross_entropy(logits, torch.arange(len(images))) + (flops / 1e6).square()).backward()
    for step in (search.prune, search.merge):
        for number in step:
            assert number.fixed or (number.logits.grad.isfinite().all() and number.logits.grad.any())


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_the_head_passes_gradient_to_dead_tokens(make_vit, images_for, pool):
    """The last block before the fixed one reaches the loss of these models through their pooling too."""
    model = make_vit(global_pool=pool).double()
    search = draw_logits(DiffRateSearch(model).eval())
    logits, _ = search(images_for(model).double())
    logits.square().sum().backward()
    assert search.prune[-1].fixed
    assert search.merge[-2].logits.grad.any()


@pytest.mark.parametrize("granularity", [1, 3, 16])
def test_flops_are_those_of_the_compressed_model(make_vit, granularity):
    model = make_vit()
    search = draw_logits(DiffRateSearch(model, granularity))
    assert search.flops().item() == tokcomp.flops(compressed(search))
    counts = search.counts()
    assert counts.num_in[0] == 17
    assert counts.num_in[1:].tolist() == counts.num_out[:-1].tolist()
    assert counts.num_out.tolist() == sorted(counts.num_out.tolist(), reverse=True)


def test_keeping_everything_is_the_plain_model(make_vit, images_for):
    model = make_vit()
    search = DiffRateSearch(model).eval()
    with torch.no_grad():
        for number in [*search.prune, *search.merge]:
            number.logits[0] = 1e3
        found, _ = search(images_for(model))
        torch.testing.assert_close(found, model(images_for(model)), atol=1e-5, rtol=1e-5)
    assert search.flops().item() == tokcomp.flops(model)


def test_image_alone_is_image_in_a_batch(make_vit, images_for):
    model = make_vit()
    search = draw_logits(DiffRateSearch(model)).eval()
    images = images_for(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(search(images)[0][2:3], search(images[2:3])[0], atol=1e-6, rtol=1e-5)
        assert search(images[:0])[0].shape == (0, 5)


def test_the_model_is_frozen_and_otherwise_left_alone(make_vit, images_for):
    model = make_vit()
    before, plain = copy.deepcopy(model.state_dict()), model(images_for(model))
    classes = [type(module) for module in model.modules()]
    search = draw_logits(DiffRateSearch(model))
    search(images_for(model))[0].sum().backward()
    assert [type(module) for module in model.modules()] == classes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(model.eval()(images_for(model)), plain)
    learns = [name for name, parameter in search.named_parameters() if parameter.requires_grad]
    assert learns == [f"{step}.{block}.logits" for step in ("prune", "merge") for block in range(4)]


def test_drop_path_in_training_only(make_vit, images_for):
    model = make_vit(drop_path_rate=0.5)
    search = draw_logits(DiffRateSearch(model))
    images = images_for(model)

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return search(images)[0]

    search.eval()
    assert torch.equal(logits(0), logits(1))
    search.train()
    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


def test_grad_checkpointing_gives_the_same_gradients(make_vit, images_for):
    model = make_vit().double()
    images = images_for(model).double()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        search = draw_logits(DiffRateSearch(model)).eval()
        search(images)[0].square().sum().backward()
        gradients.append([number.logits.grad for number in [*search.prune[1:3], *search.merge[1:3]]])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert any(plain.any() for plain in gradients[0])


def test_a_step_descends(make_vit, images_for):
    """A few steps on the multiply-adds alone come nearer the target."""
    model = make_vit(img_size=64)
    search = DiffRateSearch(model)
    optimizer = torch.optim.Adam([p for p in search.parameters() if p.requires_grad], lr=0.1)
    target = 0.8 * tokcomp.flops(model)
    first = abs(search.flops().item() - target)
    for _ in range(60):
        optimizer.zero_grad()
        (search.flops() / target - 1).square().backward()
        optimizer.step()
    assert abs(search.flops().item() - target) < 0.2 * first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make_vit, images_for, dtype):
    images = images_for(make_vit())
    wanted = draw_logits(DiffRateSearch(make_vit())).eval()(images)[0]
    search = draw_logits(DiffRateSearch(make_vit().to(dtype))).eval()
    found, flops = search(images.to(dtype))
    found.float().square().sum().backward()
    assert found.dtype == dtype
    assert flops.dtype == torch.float64
    assert search.prune[1].logits.grad.isfinite().all()
    assert (found - wanted).abs().mean() < 0.1 * wanted.abs().max()


def test_copies_and_state(make_vit, images_for):
    model = make_vit()
    search = draw_logits(DiffRateSearch(model)).eval()
    images = images_for(model)
    for other in (copy.deepcopy(search), pickle.loads(pickle.dumps(search))):
        assert torch.equal(other(images)[0], search(images)[0])
    fresh = DiffRateSearch(make_vit()).eval()
    fresh.load_proxy_state(search.proxy_state())
    assert fresh.schedule() == search.schedule()
    assert sorted(search.proxy_state()) == sorted(f"{s}.{b}.logits" for s in ("prune", "merge") for b in range(4))


def test_state_of_another_search_is_refused(make_vit):
    search = draw_logits(DiffRateSearch(make_vit()))
    before = search.proxy_state()
    with pytest.raises(ValueError, match=r"prune\.1\.logits must have shape \(6,\), got \(16,\)"):
        DiffRateSearch(make_vit(), 3).load_proxy_state(before)
    with pytest.raises(ValueError, match="exactly this search's 8 logits, got 7"):
        search.load_proxy_state({name: value * 2 for name, value in before.items() if name != "prune.3.logits"})
    assert all(torch.equal(before[name], value) for name, value in search.proxy_state().items())


def test_schedule_by_pipeline(make_vit):
    assert DiffRateSearch(make_vit(), pipeline="prune").schedule().num_merge_kept is None
    assert DiffRateSearch(make_vit(), pipeline="merge").schedule().num_prune_kept is None
    schedule = DiffRateSearch(make_vit(reg_tokens=2)).schedule()
    assert schedule.num_prune_kept == schedule.num_merge_kept == [19, 12, 12, 12]  # 8.5 of 16 up, and 3 prefix tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"granularity": 0}, ValueError, "granularity must be between 1 and the model's 16 patches, got 0"),
        ({"granularity": 17}, ValueError, "got 17"),
        ({"granularity": 2.0}, TypeError, "granularity must be an integer, got 2.0"),
        ({"metric": "norm"}, ValueError, "metric must be one of"),
        ({"pipeline": "both"}, ValueError, "pipeline must be one of"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_frozen(make_vit, options, error, message):
    model = make_vit()
    with pytest.raises(error, match=message):
        DiffRateSearch(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_wrong_models_are_refused(make_vit):
    with pytest.raises(tokcomp.UnsupportedModelError, match="ResNet"):
        DiffRateSearch(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match=r"model must be plain.*restore"):
        DiffRateSearch(tokcomp.compress(make_vit(), tokcomp.ToMe(2)))
    with pytest.raises(tokcomp.UnsupportedModelError, match="global_pool=''"):
        DiffRateSearch(make_vit(global_pool=""))
    with pytest.raises(ValueError, match="class token"):
        DiffRateSearch(make_vit(class_token=False, global_pool="avg"), metric="cls_attn")


def test_other_image_sizes_are_refused(make_vit):
    search = DiffRateSearch(make_vit(dynamic_img_size=True))
    with pytest.raises(ValueError, match=r"must give 17 tokens .* got 65"):
        search(torch.randn(1, 3, 64, 64))


def test_nan_logits_have_no_schedule(make_vit):
    search = DiffRateSearch(make_vit())
    search.merge[2].logits.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"merge\[2\]\.logits must be numbers, got NaN"):
        search.schedule()

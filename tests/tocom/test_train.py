"""Training a plugin: the loss and its gradient, what a step draws, pieces, processes, stopping and going on."""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import replace

import pytest
import tokcomp
import torch
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.log import read_log
from tokcomp.runs.recipe import TOCOM_RECIPE
from tokcomp.runs.steps import DivergedError
from tokcomp.tocom.degrees import diffrate_degrees
from tokcomp.tocom.distill import Distiller, distillation_loss, draw_degrees
from tokcomp.tocom.train import TocomRun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.train.conftest import StopAfter

CPU = torch.device("cpu")
PLAIN = replace(TOCOM_RECIPE, lr=1e-2, mixup=0.0, cutmix=0.0, batch_size=8)
LIVELY = replace(TOCOM_RECIPE, lr=5e-3, batch_size=8, clip_grad=1.0)
IMAGES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_distiller(make_vit):
    def make(recipe=PLAIN, *, total=8, method=tokcomp.ToMe, max_degree=4, dtype=torch.float32, vit=(), **options):
        model = make_vit(**dict(vit)).to(dtype)
        torch.manual_seed(5)
        plugin = tokcomp.ToCom(model, max_degree=max_degree)
        arguments = dict(total_steps=total, steps_per_epoch=3, device=CPU, seed=3)
        return Distiller(model, plugin, method, recipe, **{**arguments, **options})

    return make


def test_the_recipe_of_the_paper():
    recipe = TOCOM_RECIPE
    assert (recipe.epochs, recipe.opt, recipe.lr, recipe.sched) == (10, "adamw", 1e-3, "cosine")
    assert (recipe.weight_decay, recipe.batch_size, recipe.warmup_epochs) == (0.05, 1024, 0)
    assert (recipe.drop_path, recipe.mixup, recipe.cutmix, recipe.reprob) == (0.1, 0.8, 1.0, 0.25)
    assert recipe.aa == "rand-m9-mstd0.5-inc1"


def test_loss_is_the_divergence_of_eq_9():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, headless=False), expected, rtol=1e-12, atol=0)
    expected = (student - teacher).abs().mean()
    torch.testing.assert_close(distillation_loss(student, teacher, headless=True), expected, rtol=1e-12, atol=0)
    assert distillation_loss(student, student, headless=False).abs() < 1e-15
    half = distillation_loss(student.bfloat16(), teacher.bfloat16(), headless=False)
    assert half.dtype == torch.float32 and half > 0


def test_every_pair_of_degrees_is_as_likely():
    degrees, count = [0, 1, 2, 5], 6000
    drawn = [draw_degrees(7, step, degrees) for step in range(count)]
    pairs = {(m, n): drawn.count((m, n)) for m in degrees for n in degrees}
    assert all(pairs[m, m] == 0 for m in degrees)
    # Binomial: six standard deviations about count / 12.
    assert all(abs(found - count / 12) < 6 * (count / 12) ** 0.5 for (m, n), found in pairs.items() if m != n)
    assert drawn[:9] == [draw_degrees(7, step, degrees) for step in range(9)]
    assert drawn[:9] != [draw_degrees(8, step, degrees) for step in range(9)]


def test_a_step_is_that_of_the_paper(make_distiller, make_vit):
    """By hand, in float64: the teacher at m, the student at n with the plugin from m to n."""
    recipe = replace(PLAIN, opt="sgd", sched="none", weight_decay=0.0, drop_path=0.0)
    distiller = make_distiller(recipe, dtype=torch.float64)
    with torch.no_grad():
        for up in (*distiller.plugin.q_up, *distiller.plugin.v_up):
            up.normal_()
    plugin, images = copy.deepcopy(distiller.plugin), IMAGES[:8].double()
    loss = distiller.step(images.clone())
    m, n = distiller.drawn
    assert m != n
    model = make_vit().double()
    with torch.no_grad():
        teacher = tokcomp.compress(model, tokcomp.ToMe(m))(images)
    tokcomp.compress(model, tokcomp.ToMe(n))
    with plugin.applied(model, m, n, 0.1):
        expected = distillation_loss(model(images), teacher, headless=False)
        expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert loss > 0
    for (name, ours), theirs in zip(distiller.plugin.named_parameters(), plugin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-15, msg=name)


class Sizes(TorchDispatchMode):
    """Notes how many elements every new tensor has."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves(args) if isinstance(one, torch.Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.found[one.numel()] += 1
        return out


@pytest.mark.parametrize(
    ("amp", "products"),
    [(False, "bfloat16"), (True, "bfloat16"), (True, "float32")],
    ids=["float32", "bfloat16", "bfloat16 where it is float32"],
)
@pytest.mark.filterwarnings("ignore:mixed precision")
def test_a_step_copies_no_weights(make_distiller, amp, products, set_products):
    """In none of its operations, backward included, save for autocast's one cast a pass of a weight to bfloat16."""
    set_products(bfloat16=products)
    options = dict(amp_dtype=torch.bfloat16) if amp else {}
    # Widths at which only a weight, or its gradient, is of a weight's size.
    distiller = make_distiller(vit=dict(embed_dim=78), **options)
    weights = Counter(one.numel() for one in distiller.models[0].parameters() if one.ndim == 2)
    assert len(weights) == 4 and weights[3 * 78 * 78] == 4
    distiller.step(IMAGES[:2].clone())
    with Sizes() as sizes:
        distiller.step(IMAGES[:2].clone())
    copies = {size: sizes.found[size] for size in weights if sizes.found[size]}
    casts = amp and products == "bfloat16"
    assert copies == ({size: 2 * count for size, count in weights.items()} if casts else {})
    assert sum(sizes.found.values()) > 100


METHODS = {
    "tome": tokcomp.ToMe,
    "evit": lambda degree: tokcomp.EViT(num_pruned=degree),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_closes_the_gap(make_distiller, method):
    distiller = make_distiller(replace(PLAIN, lr=3e-2, drop_path=0.0), method=METHODS[method], total=60)
    before = [parameter.detach().clone() for parameter in distiller.models[0].parameters()]

    def gap():
        with torch.no_grad():
            teacher = distiller.models[0](IMAGES)
            with distiller.plugin.applied(distiller.models[4], 0, 4, 0.1):
                return distillation_loss(distiller.models[4](IMAGES), teacher, headless=False).item()

    start = gap()
    for step in range(60):
        distiller.step(IMAGES[8 * (step % 3) :][:8].clone())
    assert gap() < 0.8 * start
    assert all(torch.equal(a, b) for a, b in zip(before, distiller.models[0].parameters(), strict=True))
    assert all(parameter.grad is None for parameter in distiller.models[0].parameters())


def test_schedules_as_degrees(make_distiller, make_vit):
    counts = [[17, 15, 14, 13], [17, 12, 10, 8]]
    degrees = diffrate_degrees(make_vit(), [tokcomp.CompressionSchedule(one, one) for one in counts])
    distiller = make_distiller(method=degrees.__getitem__, max_degree=2)
    assert all(distiller.step(IMAGES[:8].clone()) > 0 for _ in range(3))


def test_the_plugin_says_what_it_was_trained_with(make_distiller):
    assert make_distiller().plugin.method == "tome"
    assert make_distiller(method=METHODS["evit"]).plugin.method == "evit"
    mixed = make_distiller(method=lambda degree: METHODS["evit" if degree > 2 else "tome"](degree))
    assert mixed.plugin.method is None


def test_headless_models_match_features(make_distiller):
    distiller = make_distiller(replace(LIVELY, drop_path=0.0), vit=dict(num_classes=0, global_pool="avg"))
    assert distiller.headless
    loss = distiller.step(IMAGES[:8].clone())
    assert loss > 0 and distiller.plugin.q_up[0].grad.any()


def test_the_student_alone_has_drop_path(make_distiller):
    distiller = make_distiller(vit=dict(drop_path_rate=0.5))
    modes, degrees = [], {id(model): degree for degree, model in distiller.models.items()}
    distiller.models[0].register_forward_pre_hook(  # which they share
        lambda model, _: modes.append((degrees[id(model)], model.blocks[3].drop_path1.training))
    )
    distiller.step(IMAGES[:8].clone())
    teacher, student = distiller.drawn
    assert modes == [(teacher, False), (student, True)]
    assert not any(module.training for module in distiller.models[student].modules())


def test_pieces_add_up_to_the_batch(make_distiller):
    """In float64, mixing on: the pieces hold whole pairs, so they are mixed as the batch is."""
    found = []
    for pieces in (1, 2):
        distiller = make_distiller(replace(LIVELY, drop_path=0.0), dtype=torch.float64, pieces=pieces)
        batches = TensorBatches(IMAGES.double(), torch.zeros(24).long(), 8, 3, pieces=pieces)
        for images, _ in batches.iterate(0, 2):
            distiller.step(images)
        found.append(distiller.plugin.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_bfloat16_and_checkpointing(make_vit):
    model = make_vit()
    model.set_grad_checkpointing()
    distiller = Distiller(
        model,
        tokcomp.ToCom(model, max_degree=4),
        tokcomp.ToMe,
        LIVELY,
        total_steps=4,
        steps_per_epoch=2,
        device=CPU,
        amp_dtype=torch.bfloat16,
    )
    assert distiller.step(IMAGES[:8].clone()).isfinite()
    assert distiller.plugin.q_up[0].dtype == torch.float32 and distiller.plugin.v_up[3].any()
    with pytest.raises(ValueError, match="mixed precision must be in bfloat16 here, got float16"):
        Distiller(
            *(model, distiller.plugin, tokcomp.ToMe, LIVELY),
            **dict(total_steps=4, steps_per_epoch=2, device=CPU, amp_dtype=torch.float16),
        )


def test_what_does_not_fit_is_refused(make_distiller):
    with pytest.raises(ValueError, match="opt must be an optimizer that timm knows, got 'typo'"):
        make_distiller(replace(PLAIN, opt="typo"))
    with pytest.raises(ValueError, match="keep_rate must have one entry per block"):
        make_distiller(method=lambda degree: tokcomp.EViT([0.5, 0.5]))


# ---- runs


@pytest.fixture
def make_run(make_distiller):
    def make(folder, images=IMAGES, lr=LIVELY.lr, **options):
        return TocomRun(
            make_distiller(replace(LIVELY, lr=lr), vit=dict(drop_path_rate=0.2), **options),
            TensorBatches(images, torch.zeros(len(images)).long(), 8, 3),
            folder,
            settings={"lr": lr},
            facts={"model": "tiny"},
            total_steps=8,
            checkpoint_steps=2,
            log_steps=3,
        )

    return make


def test_a_stopped_run_goes_on_exactly(make_run, tmp_path, at=5):
    whole = make_run(tmp_path / "whole")
    assert whole.train(StopAfter(whole))
    parts = make_run(tmp_path / "parts")
    assert not parts.train(StopAfter(parts, at)) and parts.trainee.step_number == at
    assert not (tmp_path / "parts" / "tocom.safetensors").exists()
    parts = make_run(tmp_path / "parts")
    parts.resume()
    assert parts.train(StopAfter(parts), resumed=True)
    for name in ("log.csv", "tocom.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    rows = read_log(tmp_path / "parts" / "log.csv")
    assert [row["step"] for row in rows] == [3, 6, 8] and all(row["loss"] > 0 for row in rows)


def test_what_comes_out(make_run, make_vit, tmp_path):
    run = make_run(tmp_path)
    run.train(StopAfter(run))
    plugin = tokcomp.ToCom.load(tmp_path / "tocom.safetensors", make_vit())
    assert torch.equal(plugin.v_up[2], run.trainee.plugin.v_up[2]) and plugin.v_up[2].any()
    assert plugin.provenance == {"source": "ToCom training", "model": "tiny", "settings": {"lr": LIVELY.lr}}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["loss"] > 0 and summary["images_per_second"] > 0


def test_a_run_that_diverges_keeps_its_checkpoint(make_run, tmp_path):
    images = torch.randn(64, 3, 32, 32)
    run = make_run(tmp_path, images)
    images[[index for index, _ in run.batches.keys(3)]] = float("nan")
    with pytest.raises(DivergedError, match="the loss of step 4 is nan; the checkpoint before it is kept"):
        run.train(StopAfter(run))
    again = make_run(tmp_path)
    again.resume()
    assert again.trainee.step_number == 2 and again.trainee.is_finite()

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image
from tokcomp.runs.batches import part_of_batch
from tokcomp.runs.recipe import (
    FINETUNE_RECIPE,
    SCRATCH_RECIPE,
    SEARCH_RECIPE,
    LearningRate,
    Recipe,
    Targets,
    make_optimizer,
    soft_cross_entropy,
    train_transform,
)

PLAIN = Recipe(lr=0.1, min_lr=0.01, weight_decay=0.0, epochs=2, mixup=0.0, cutmix=0.0)


def test_the_papers_tables():
    table5 = {"opt": "adamw", "lr": 1e-2, "min_lr": 1e-3, "sched": "cosine", "weight_decay": 0.0, "batch_size": 1024}
    both = {"aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0}
    assert {**table5, **both, "epochs": 3}.items() <= SEARCH_RECIPE.describe().items()
    table6 = {"opt": "adamw", "lr": 2e-5, "min_lr": 1e-6, "weight_decay": 0.05, "batch_size": 1024, "epochs": 30}
    assert {**table6, **both}.items() <= FINETUNE_RECIPE.describe().items()
    assert {**both, "lr": 1e-3, "epochs": 300, "warmup_epochs": 5}.items() <= SCRATCH_RECIPE.describe().items()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number above 0, got 0.0"),
        ({"min_lr": math.nan}, "min_lr must be a finite number, 0 or more, got nan"),
        ({"smoothing": 1.0}, r"smoothing must be in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"backbone_lr_scale": 2.0}, "backbone_lr_scale must be above 0 and at most 1, got 2.0"),
    ],
)
def test_unfit_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**PLAIN.__dict__, **setting})


def test_the_rate_falls_by_a_cosine_over_the_steps():
    optimizer = make_optimizer(PLAIN, [torch.nn.Parameter(torch.zeros(2))])
    rate = LearningRate(PLAIN, optimizer, total=10, steps_per_epoch=5)
    # The closed form in double precision; timm evaluates the same one.
    expected = [0.01 + 0.5 * 0.09 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert [rate.set(step) for step in range(10)] == pytest.approx(expected, rel=1e-12)
    assert rate.set(3) == pytest.approx(expected[3], rel=1e-12)  # no state: any step, in any order
    assert optimizer.param_groups[0]["lr"] == rate.set(3)


def test_the_rate_warms_up():
    recipe = Recipe(**{**PLAIN.__dict__, "warmup_epochs": 1.0, "warmup_lr": 0.0})
    rate = LearningRate(recipe, make_optimizer(recipe, [torch.nn.Parameter(torch.zeros(2))]), 10, steps_per_epoch=4)
    assert [rate.set(step) for step in range(4)] == pytest.approx([0.0, 0.025, 0.05, 0.075])


@pytest.mark.parametrize("sched", ["cosine", "none"])
def test_the_backbones_rate_is_scaled(sched):
    """The parts come first, at the full rate; biases get no weight decay at either."""
    recipe = Recipe(**{**PLAIN.__dict__, "backbone_lr_scale": 0.01, "weight_decay": 0.05, "sched": sched})
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "parts": torch.nn.Linear(2, 2)})
    optimizer = make_optimizer(recipe, model, {"parts.weight", "parts.bias"})
    rate = LearningRate(recipe, optimizer, 10, steps_per_epoch=5).set(4)
    found = {id(one): group for group in optimizer.param_groups for one in group["params"]}
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(rate * (1 if name.startswith("parts") else 0.01), rel=1e-12)
        assert group["weight_decay"] == (0 if name.endswith("bias") else 0.05)


def test_unknown_names_are_refused():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="opt must be an optimizer that timm knows, got 'nope'"):
        make_optimizer(Recipe(**{**PLAIN.__dict__, "opt": "nope"}), parameters)
    recipe = Recipe(**{**PLAIN.__dict__, "sched": "nope"})
    with pytest.raises(ValueError, match="sched must be a scheduler that timm knows, got 'nope'"):
        LearningRate(recipe, make_optimizer(recipe, parameters), 10, 5)
    config = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="aa must be an augmentation policy that timm knows, got 'nope'"):
        train_transform(Recipe(**{**PLAIN.__dict__, "aa": "nope"}), config)
    image = train_transform(SEARCH_RECIPE, config)(Image.new("RGB", (16, 12), (255, 255, 255)))
    assert image.shape == (3, 8, 8)


@pytest.mark.parametrize("parts", [2, 4])
def test_mixing_the_parts_is_mixing_the_batch(parts):
    recipe = Recipe(**{**PLAIN.__dict__, "mixup": 0.8, "cutmix": 1.0})
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(16, 3, 8, 8, generator=generator), torch.arange(16) % 5
    seen = set()
    for step in range(8):
        mixed, targets = Targets(recipe, 5, seed=0)(images.clone(), labels, step)
        for part in range(parts):
            places = part_of_batch(16, part, parts)
            some, answers = Targets(recipe, 5, seed=0)(images[places].clone(), labels[places], step)
            assert torch.equal(some, mixed[places]) and torch.equal(answers, targets[places])
        assert torch.allclose(targets.sum(-1), torch.ones(16))
        seen.add(mixed[0].sum().item())
    assert len(seen) == 8


def test_soft_targets_are_timms():
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(6, 5, generator=generator).double(), torch.arange(6) % 5
    images = torch.zeros(6, 3, 2, 2).double()
    _, targets = Targets(PLAIN, 5, seed=0)(images, labels, step=0)
    found = soft_cross_entropy(logits, targets)
    # Each sums 5 products of numbers below 10 in double precision, the targets being exact to 1 ulp of float32.
    assert found.item() == pytest.approx(LabelSmoothingCrossEntropy(0.1)(logits, labels).item(), abs=1e-6)
    assert found.item() == pytest.approx(SoftTargetCrossEntropy()(logits, targets).item(), abs=1e-12)


def test_mixing_leaves_the_generators_alone():
    recipe = Recipe(**{**PLAIN.__dict__, "mixup": 0.8})
    before = torch.get_rng_state()
    Targets(recipe, 5, seed=0)(torch.rand(2, 3, 2, 2, generator=torch.Generator()), torch.zeros(2).long(), step=0)
    assert torch.equal(before, torch.get_rng_state())

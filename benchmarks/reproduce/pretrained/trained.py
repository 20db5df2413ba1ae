"""Methods that are trained, on the pretrained backbone: all trained alike, for a little, and measured at one cost.

Beside them ToMe, whose model is trained just as long, so that what training does for a method can be told from what it
does for any model. Parts of a method's own are trained at a higher rate than the weights that have been trained
before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import tokcomp
import torch
from tokcomp import learned
from tokcomp.compare.answers import Answers, answer, paired
from tokcomp.compare.run import Images
from tokcomp.equal_cost import BY_IMAGES, BY_PREDICTOR, Measured, count_for_budget, predictor_for_budget
from tokcomp.finetune.tuner import FineTuner
from tokcomp.methods import AViT, LearnedMethod, Method, PassageMethod, ToMe
from tokcomp.runs.batches import LoaderBatches
from tokcomp.runs.data import spread_sample, training_part
from tokcomp.runs.recipe import FINETUNE_RECIPE, Recipe
from tokcomp.runs.steps import Progress, seed_all
from torch import Tensor, nn

from benchmarks.reproduce.pretrained.study import CPU, Prepared, Work, keep, prepare, resumed

FOLDER, RESULTS = "trained", "results.json"
#: In this order, the most telling first.
NAMES = ("dynamicvit", "spvit", "tome", "evovit", "avit")
#: DiffRate's fine-tuning with nothing but the pictures themselves.
RECIPE = replace(
    FINETUNE_RECIPE, aa=None, hflip=0.0, color_jitter=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0), mixup=0.0, cutmix=0.0,
    smoothing=0.0, drop_path=0.0,
)  # fmt: skip
#: Between which A-ViT's shift is looked for, so that the untrained model halts at the budget, and how often that range
#: is halved.
_SHIFTS, _HALVINGS = (-64.0, 64.0), 7


def run_trained(work: Work) -> bool:
    """Every method, one after the other."""
    settings, own, path = work.settings, work.settings.trained, work.folder / FOLDER / RESULTS
    prepared = prepare(work, 0)
    dense = tokcomp.flops(prepared.model) / 1e9
    gflops = float(f"{own.share * dense:.4g}")
    facts = {**prepared.facts, "gflops": gflops, "uncompressed": dense, "settings": repr(own), "test": settings.test}
    record = resumed(path, facts, rows={})
    training, testing = work.sources.images(settings)
    images = Images(prepared.batches(testing, settings.test, 0), settings.test)
    calibration = [x for x, _ in prepared.batches(training, own.calibration, 4)()]
    for name in NAMES:
        if name in record["rows"]:
            continue
        if work.over:
            return False
        seed_all(own.seed)
        model, method = _untrained(name, prepared.model, gflops * 1e9, calibration)
        losses = _train(name, model, method, prepared, training, work)
        if losses is None:
            return False
        method, cost = _at_the_budget(model, method, gflops * 1e9, calibration)
        found = answer(model.eval(), images, settings.test, device=CPU)
        record["rows"][name] = _row(found, method, cost, losses)
        keep(path, record)
    return True


def _untrained(
    name: str, plain: nn.Module, budget: float, calibration: Sequence[Tensor]
) -> tuple[nn.Module, Method | None]:
    """A copy of the plain model, compressed to a cost of ``budget`` and with new parts, and the method."""
    model, method = copy.deepcopy(plain), None
    if name == "tome":
        method = count_for_budget(model, budget, ToMe)
    elif name in BY_PREDICTOR:
        method = predictor_for_budget(model, budget, BY_PREDICTOR[name])
    elif name == "avit":
        method = _halting(model, budget, calibration)
    if isinstance(method, LearnedMethod):
        learned.attach(model, method)
    return (model if method is None else tokcomp.compress(model, method)), method


def _halting(model: nn.Module, budget: float, calibration: Sequence[Tensor]) -> AViT:
    """A-ViT under whose shift the untrained model's mean cost on some images is nearest to a budget."""
    (low, high), costs = _SHIFTS, {}
    for _ in range(_HALVINGS):
        shift = (low + high) / 2
        method = AViT(shift=shift)
        trial = learned.attach(copy.deepcopy(model), method)
        costs[shift] = Measured(trial, calibration).flops(method)
        low, high = (shift, high) if costs[shift] > budget else (low, shift)  # a higher shift halts earlier
    return AViT(shift=min(costs, key=lambda shift: abs(costs[shift] - budget)))


def _train(
    name: str, model: nn.Module, method: Method | None, prepared: Prepared, training: Any, work: Work
) -> list[float] | None:
    """Trains the model in place; every step's loss, or None if it was asked to stop."""
    own = work.settings.trained
    parts = any(learned.LEARNED.keys() & set(path.split(".")) for path, _ in model.named_parameters())
    rate = own.parts_lr if parts else own.lr
    recipe: Recipe = replace(
        RECIPE,
        lr=rate,
        min_lr=rate / 100,
        backbone_lr_scale=own.lr / rate,
        epochs=1,
        batch_size=own.batch,
    )
    has_teacher = isinstance(method, PassageMethod) and method.has_teacher
    part = training_part(training, spread_sample(training, own.images, 5), recipe, prepared.config)
    batches = LoaderBatches(part, own.batch, own.seed)
    tuner = FineTuner(
        model,
        recipe,
        num_classes=training.num_classes,
        total_steps=own.steps,
        steps_per_epoch=own.steps,
        device=CPU,
        seed=own.seed,
        amp_dtype=torch.bfloat16,
        teacher=copy.deepcopy(prepared.model) if has_teacher else None,
    )
    progress, losses = Progress(own.steps, label=name, show=work.show_progress), []
    try:
        for images, labels in batches.iterate(0, own.steps):
            if work.stop.wanted:
                return None
            losses.append(tuner.step(images, labels).item())
            progress.advance()
    finally:
        progress.close()
    return losses


def _at_the_budget(
    model: nn.Module, method: Method | None, budget: float, calibration: Sequence[Tensor]
) -> tuple[Method | None, float]:
    """The trained model's method, moved to the budget where its cost depends on the images; and the cost."""
    model.eval()
    if method is None or not method.varies:
        return method, tokcomp.flops(model)
    tokcomp.restore(model)
    method = BY_IMAGES["avit"](model, budget, calibration)
    cost = Measured(model, calibration).flops(method)
    tokcomp.compress(model, method)
    return method, cost


def _row(found: Answers, method: Method | None, cost: float, losses: Sequence[float]) -> dict[str, Any]:
    tenth = max(len(losses) // 10, 1)
    return {
        "method": repr(method),
        "gflops": cost / 1e9,
        "top1": found.top1,
        "cross_entropy": found.cross_entropy,
        "first_losses": round(sum(losses[:tenth]) / tenth, 4),
        "last_losses": round(sum(losses[-tenth:]) / tenth, 4),
        "right": "".join(str(int(one)) for one in found.right),
    }


def section(record: Mapping[str, Any]) -> str:
    """The results as a part of the page."""
    rows, facts = record["rows"], record["facts"]
    hits = {name: torch.tensor([float(one) for one in row["right"]]) for name, row in rows.items()}
    best = max(rows, key=lambda name: rows[name]["top1"])
    lines = [
        f"All at {facts['gflops']:g} of {facts['uncompressed']:.4g} GFLOPs, and all trained alike, for a little:",
        f"`{facts['settings']}`, by AdamW in bfloat16, a method's own parts at `parts_lr`, all other weights at `lr`.",
        "*Less the best* is top-1 minus the best row's, in points, with its paired 95 % interval over the images.",
        "",
        "| trained | top-1 | less the best | cross entropy | GFLOPs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        less = "" if name == best else "{:+.2f} ± {:.2f}".format(*paired(hits[name], hits[best]))
        lines.append(f"| {name} | {row['top1']:.2f} % | {less} | {row['cross_entropy']:.4f} | {row['gflops']:.4f} |")
    return "\n".join(lines)

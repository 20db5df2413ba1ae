"""ToCom on the pretrained backbone: plugins distilled on one set's pictures, judged by heads of that set and another.

A head is fitted on the features at degree m (ToMe merging m tokens in every block) and answers on those at degree n, as
they are and with the plugin from m to n. The plugin has seen Fashion-MNIST's training pictures without their labels; of
the digits it has seen nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import tokcomp
import torch
from tokcomp import ToCom, ToMe
from tokcomp.compare.answers import paired
from tokcomp.compare.probe import features_of, fit_head
from tokcomp.data import DigitsDataset
from tokcomp.runs.batches import LoaderBatches
from tokcomp.runs.data import Part, spread_sample
from tokcomp.runs.recipe import TOCOM_RECIPE, plain_transform
from tokcomp.runs.steps import Progress
from tokcomp.tocom.distill import Distiller
from torch import Tensor, nn

from benchmarks.reproduce.pretrained.plan import Settings
from benchmarks.reproduce.pretrained.study import CPU, Work, keep, passes_for, resumed

FOLDER, RESULTS = "tocom", "results.json"
#: The paper's recipe with few, larger updates, and nothing but the pictures themselves.
RECIPE = replace(TOCOM_RECIPE, aa=None, mixup=0.0, cutmix=0.0, drop_path=0.0, reprob=0.0, repeated_aug=1)


@dataclass(frozen=True)
class _Task:
    """A set's pictures: to fit a head on, and to measure on."""

    head: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    test: Callable[[], Iterator[tuple[Tensor, Tensor]]]


def run_tocom(work: Work) -> bool:
    """Plugins of every seed, one after the other."""
    settings, path = work.settings, work.folder / FOLDER / RESULTS
    size = settings.sizes[0]
    model = work.sources.backbone(size, settings)
    facts = {**work.sources.describe(), "img_size": size, "settings": repr(settings.tocom)}
    record = resumed(path, facts, plugins={})
    tasks, training = _tasks(work, model, size)
    heads: dict[str, Any] = {}
    for seed in range(settings.tocom.seeds):
        if str(seed) in record["plugins"]:
            continue
        if work.over:
            return False
        if not heads:
            heads = {name: _Heads(model, task, settings) for name, task in tasks.items()}
            record["plain"] = {name: one.plain for name, one in heads.items()}
        plugin = _distilled(model, training, work, seed)
        if plugin is None:
            return False
        record["plugins"][str(seed)] = {name: one.with_plugin(plugin) for name, one in heads.items()}
        record["gains"] = {
            name: one.gains([p[name] for p in record["plugins"].values()]) for name, one in heads.items()
        }
        keep(path, record)
    return True


def _tasks(work: Work, model: nn.Module, size: int) -> tuple[dict[str, _Task], Part]:
    sources, settings = work.sources, work.settings
    config, batches = passes_for(model, size)
    fashion, test = sources.images(settings)
    digits = [DigitsDataset(train=train) for train in (True, False)]
    tasks = {
        sources.describe()["data"]: _Task(batches(fashion, settings.head, 0), batches(test, settings.test, 0)),
        "digits": _Task(batches(digits[0], settings.head, 0), batches(digits[1], settings.test, 0)),
    }
    return tasks, Part(fashion, spread_sample(fashion, settings.tocom.images, 3), plain_transform(config))


class _Heads:
    """Heads of a task fitted at the lowest and the highest degree, and what they answer at every other one."""

    def __init__(self, model: nn.Module, task: _Task, settings: Settings) -> None:
        self._model, self._task, self._scale = model, task, settings.tocom.scale
        top = settings.tocom.max_degree
        fitted = {degree: fit_head(*self._features(task.head, degree))[:2] for degree in (0, top)}
        self._heads: dict[int, tuple[Tensor, Tensor]] = fitted
        self._pairs = [(m, n) for m in fitted for n in range(top + 1)]
        rows = {degree: self._features(task.test, degree) for degree in range(top + 1)}
        self.hits = {(m, n): self._right(m, *rows[n]) for m, n in self._pairs}
        self.plain = {_way(pair): _percent(hits) for pair, hits in self.hits.items()}

    def _features(self, start: Callable[[], Any], degree: int) -> tuple[Tensor, Tensor]:
        tokcomp.compress(self._model, ToMe(degree))
        try:
            return features_of(self._model, start(), CPU)
        finally:
            tokcomp.restore(self._model)

    def _right(self, head: int, features: Tensor, labels: Tensor) -> Tensor:
        weight, bias = self._heads[head]
        return (features @ weight.T + bias).argmax(-1) == labels

    def with_plugin(self, plugin: ToCom) -> dict[str, str]:
        """Per pair of degrees m, n apart: which test images are right with the plugin from m to n, as 0s and 1s."""
        found = {}
        for source, target in self._pairs:
            if source == target:
                continue
            tokcomp.compress(self._model, ToMe(target))
            try:
                with torch.no_grad(), plugin.applied(self._model, source, target, self._scale):
                    rows = features_of(self._model, self._task.test(), CPU)
            finally:
                tokcomp.restore(self._model)
            hits = self._right(source, *rows)
            found[_way((source, target))] = "".join(str(int(one)) for one in hits)
        return found

    def gains(self, plugins: list[Mapping[str, str]]) -> dict[str, Any]:
        """Per pair: top-1 of every plugin in %, and the mean gain over none with half its paired 95 % interval."""
        result = {}
        for pair, plain in self.hits.items():
            if pair[0] == pair[1]:
                continue
            hits = torch.tensor([[float(one) for one in plugin[_way(pair)]] for plugin in plugins])
            result[_way(pair)] = {
                "top1": [_percent(one) for one in hits],
                "gain": list(paired(hits.mean(0), plain)),
            }
        return result


def _way(pair: tuple[int, int]) -> str:
    return f"{pair[0]} -> {pair[1]}"


def _percent(hits: Tensor) -> float:
    return round(100.0 * hits.double().mean().item(), 4)


def _distilled(model: nn.Module, training: Part, work: Work, seed: int) -> ToCom | None:
    """A plugin of that seed; None if the training was asked to stop."""
    own = work.settings.tocom
    torch.manual_seed(seed)
    plugin = ToCom(model, max_degree=own.max_degree)
    recipe = replace(RECIPE, lr=own.lr, min_lr=own.lr / 100, batch_size=own.batch, epochs=1)
    batches = LoaderBatches(training, own.batch, seed)
    distiller = Distiller(
        model,
        plugin,
        ToMe,
        recipe,
        total_steps=own.steps,
        steps_per_epoch=own.steps,
        device=CPU,
        scale=own.scale,
        seed=seed,
    )
    progress = Progress(own.steps, label=f"plugin {seed + 1} of {own.seeds}", show=work.show_progress)
    try:
        for images, _ in batches.iterate(0, own.steps):
            if work.stop.wanted:
                return None
            distiller.step(images)
            progress.advance()
    finally:
        progress.close()
        model.requires_grad_(True)
    return plugin


def section(record: Mapping[str, Any]) -> str:
    """The results as a part of the page."""
    lines = []
    for task, gains in record["gains"].items():
        lines += [
            f"### {task}",
            "| head at, run at | as it is | with the plugin | gain |",
            "| --- | ---: | ---: | ---: |",
        ]
        for way, found in gains.items():
            mean, half = found["gain"]
            top1 = sum(found["top1"]) / len(found["top1"])
            lines.append(f"| {way} | {record['plain'][task][way]:.2f} % | {top1:.2f} % | {mean:+.2f} ± {half:.2f} |")
        ends = [way for way in record["plain"][task] if way.split(" -> ")[0] == way.split(" -> ")[1]]
        told = ", ".join(f"{record['plain'][task][way]:.2f} % at {way.split()[0]}" for way in ends)
        lines += ["", f"Heads at the degree that they were fitted at: {told}.", ""]
    return "\n".join(lines)

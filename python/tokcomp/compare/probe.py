"""A linear head for a backbone without one, trained on the features of some labelled images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.files import write_whole
from tokcomp.reading import read_tensors, tensors_to_bytes

#: Strengths of the penalty that are tried: of the mean squared weight per class, on standardized features.
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)
#: Share of the images that choose among them: one in this number.
_HELD_OUT = 5


def check_headless(model: nn.Module) -> None:
    """Raise ValueError unless a timm model has no classifier and can get one."""
    if getattr(model, "num_classes", None) != 0 or not hasattr(model, "reset_classifier"):
        raise ValueError("the model must be a timm model without a classifier (num_classes=0), got one with another")


@torch.no_grad()  # inference mode's tensors could not be fitted to
def features_of(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What a headless model gives its head, [n, C] float64 on the CPU, and the labels [n]."""
    rows, labels = [], []
    for images, answers in batches:
        rows.append(model(images.to(device)).double().cpu())
        labels.append(answers)
    return torch.cat(rows), torch.cat(labels)


def fit_head(features: Tensor, labels: Tensor, penalties: Sequence[float] = PENALTIES) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression with a squared penalty, to its optimum: the same head every time.

    Of the penalties, the one whose head, fitted on four fifths of the images, has the least cross entropy on the other
    fifth; the head is then fitted on all.

    Args:
        features: [n, C] float64.
        labels: [n] int64, 0 .. classes - 1; every class must occur.
        penalties: to choose from.

    Returns:
        Weight [classes, C] and bias [classes] float64, and the penalty.

    Raises:
        ValueError: the labels leave out a class, or there are fewer than two.
    """
    classes = int(labels.max()) + 1 if len(labels) else 0
    if classes < 2 or len(labels.unique()) < classes or int(labels.min()) < 0:
        raise ValueError(
            f"labels must be 0 to {max(classes - 1, 1)}, each at least once, got {labels.unique().tolist()}"
        )
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    rows = (features - mean) / scale
    held_out = torch.arange(len(rows)) % _HELD_OUT == 0

    def loss_of(penalty: float) -> float:
        weight, bias = _fit(rows[~held_out], labels[~held_out], classes, penalty)
        return float(F.cross_entropy(rows[held_out] @ weight.T + bias, labels[held_out]))

    penalty = penalties[0] if len(penalties) == 1 else min(penalties, key=loss_of)
    weight, bias = _fit(rows, labels, classes, penalty)
    weight = weight / scale
    return weight, bias - weight @ mean, penalty


def _fit(rows: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(rows @ weight.T + bias, labels) + penalty * weight.square().sum() / classes
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def kept_head(
    path: Path, facts: Mapping[str, Any], fit: Callable[[], tuple[Tensor, Tensor, float]]
) -> tuple[Tensor, Tensor]:
    """The head in a file, if it was fitted under the same facts; otherwise the one that ``fit`` gives, then kept there.

    A head that is fitted again may differ in its last bits, as features do with the number of threads, and with it
    everything that was computed before would be another model's.
    """
    key = json.dumps(facts, sort_keys=True)
    if path.is_file():
        tensors, metadata = read_tensors(path, "the head of a probe")
        if metadata.get("facts") == key and tensors.keys() == {"weight", "bias"}:
            return tensors["weight"], tensors["bias"]
    weight, bias, penalty = fit()
    write_whole(path, tensors_to_bytes({"weight": weight, "bias": bias}, {"facts": key, "penalty": str(penalty)}))
    return weight, bias


def attach_head(model: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """Give a headless timm model this head, in place.

    Raises:
        ValueError: the model's own new head is no linear layer of this width.
    """
    model.reset_classifier(len(bias))  # type: ignore[operator]
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.weight.shape != weight.shape:
        raise ValueError(f"the model must get a linear head of {weight.shape[1]} features, got {type(head).__name__}")
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    return model

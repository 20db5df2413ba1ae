"""The gradient search on a model of the run, and how far what it saw is from what inference does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import tokcomp
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from tokcomp.search.model import DiffRateSearch

from benchmarks.reproduce.diffrate.measure import logits_of, training_pictures
from benchmarks.reproduce.diffrate.plan import SearchSettings
from tools.assets.choose_schedule import search_digits

_GAP_PICTURES = 180


@dataclass(frozen=True)
class Found:
    """A finished search, and the method it found."""

    search: DiffRateSearch
    method: tokcomp.DiffRate
    log: list[dict[str, Any]]


def search_schedule(model: VisionTransformer, settings: SearchSettings, seed: int) -> Found:
    """Search as the settings say, on training digits alone."""
    search, log = search_digits(
        model,
        settings.share,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        flops_weight=settings.flops_weight,
        num_pictures=settings.images,
        metric=settings.metric,
        pipeline=settings.pipeline,
        match_inference=settings.match_inference,
        seed=seed,
    )
    return Found(search, search.method(), [asdict(line) for line in log])


@torch.inference_mode()
def gap(model: VisionTransformer, found: Found) -> dict[str, float]:
    """The same counts in the search's own forward and in inference, on training pictures.

    Returns:
        ``logits``, the mean absolute difference of the logits; the cross entropy in ``search`` and in ``inference``.
    """
    images, labels = training_pictures(_GAP_PICTURES)
    masked = torch.cat([found.search(part)[0] for part in images.split(60)])
    dropped = logits_of(model, found.method, images)
    return {
        "logits": float((masked - dropped).abs().mean()),
        "search": float(F.cross_entropy(masked, labels)),
        "inference": float(F.cross_entropy(dropped, labels)),
    }

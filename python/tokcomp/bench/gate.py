"""Correctness first: nothing is timed that does not compute what it should, twice to the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokcomp.adapters.timm_vit.embedding import image_shape
from tokcomp.bench.entries import PRECISIONS, Entry, build_runner
from tokcomp.bench.published import PublishedPipeline
from tokcomp.methods import Method

#: Images that the gate looks at.
GATE_IMAGES = 9


class DisagreementError(RuntimeError):
    """The compressed model and the published pipeline differ by more than rounding: no speed is reported."""


class Gate:
    """Fresh random images, and what the published pipeline makes of them in float64 and in ``precision``.

    Args:
        model: the plain model in float32, on ``device``.
        precision: a name in PRECISIONS.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        self.precision, self.device = precision, device
        self._model = model
        self.images = torch.randn(GATE_IMAGES, *image_shape(model), device=device).to(PRECISIONS[precision])
        self._logits: dict[Method, tuple[Tensor, Tensor]] = {}

    def check(
        self, run: Callable[[Tensor], Tensor], method: Method, *, batch: int = GATE_IMAGES, entry: Entry | None = None
    ) -> dict[str, float]:
        """Compare logits, and two runs bit for bit. Returns the relative errors of "tokcomp" and "published".

        The oracle is the published pipeline in float64. The median image's relative error must be within twice that of
        the published pipeline run in ``precision`` plus one rounding: the median, since a rounding that swaps two
        nearly equal tokens changes an image's logits in either.

        Args:
            run: maps ``batch`` images to logits.
            method: how it compresses.
            batch: images per call.
            entry: whose ``run`` this is, ours if not given. A rival may take float32 images, and sum by atomics, which
                gives other bits in another run.

        Raises:
            DisagreementError: it computes something else, or not the same twice.
        """
        oracle, published = self._wanted(method)
        autocasts, ours = entry is not None and entry.autocasts, entry is None or entry.is_ours
        have = self._run(run, batch, autocasts)
        if ours and not torch.equal(have, self._run(run, batch, autocasts)):
            raise DisagreementError("two runs of the compressed model on the same images differ")
        errors = {"tokcomp": _median_error(have, oracle), "published": _median_error(published, oracle)}
        if not errors["tokcomp"] <= 2 * errors["published"] + torch.finfo(PRECISIONS[self.precision]).eps:
            raise DisagreementError(
                f"the compressed model's logits are {errors['tokcomp']:.3g} off in {self.precision}, the published "
                f"pipeline's {errors['published']:.3g}: more than twice as far from float64"
            )
        return errors

    def _run(self, run: Callable[[Tensor], Tensor], batch: int, autocasts: bool) -> Tensor:
        """Logits of the gate's images, in batches of just ``batch``, the last one filled up from the front."""
        images = self.images.float() if autocasts else self.images
        positions = torch.arange(-(-len(images) // batch) * batch, device=images.device) % len(images)
        return torch.cat([run(images[part]).clone() for part in positions.split(batch)])[: len(images)]

    def _wanted(self, method: Method) -> tuple[Tensor, Tensor]:
        if method not in self._logits:
            oracle = PublishedPipeline(copy.deepcopy(self._model).double(), method)(self.images.double())
            pipeline = build_runner(
                Entry("published", method), self._model, PRECISIONS[self.precision], self.device, GATE_IMAGES
            )
            self._logits[method] = oracle, pipeline(self.images.float())
        return self._logits[method]


def check_agreement(
    run: Callable[[Tensor], Tensor], model: nn.Module, method: Method, precision: str, device: torch.device
) -> dict[str, float]:
    """:class:`Gate` for a single entry."""
    return Gate(model, precision, device).check(run, method)


def _median_error(logits: Tensor, oracle: Tensor) -> float:
    difference = (logits.double() - oracle).norm(dim=1) / oracle.norm(dim=1)
    return difference.median().item()

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
#: Of them, the share whose top-1 class products in int8 must leave as it is. Rounding to 8 bits has no bound that a
#: fault would not stay below, but what computes something else agrees on one image in as many as there are classes.
#: Less than what a trained model keeps (98 % and more): with random weights, classes lie closer together.
INT8_SAME_ANSWERS = 0.5


class DisagreementError(RuntimeError):
    """What runs and what it should compute differ by more than rounding: no speed is reported."""


class Gate:
    """Fresh random images, and what the reference makes of them in float64 and in ``precision``.

    The reference of a method is its published pipeline; that of the uncompressed model is timm.

    Args:
        model: the plain model in float32, on ``device``.
        precision: a name in PRECISIONS.
        device: where it runs.
    """

    def __init__(self, model: nn.Module, precision: str, device: torch.device) -> None:
        self.precision, self.device = precision, device
        self._model = model
        self.images = torch.randn(GATE_IMAGES, *image_shape(model), device=device).to(PRECISIONS[precision])
        self._logits: dict[Method | None, tuple[Tensor, Tensor]] = {}

    def check(
        self,
        run: Callable[[Tensor], Tensor],
        method: Method | None,
        *,
        batch: int = GATE_IMAGES,
        entry: Entry | None = None,
    ) -> dict[str, float]:
        """Compare logits, and two runs of ours bit for bit.

        The oracle is the reference in float64. The median image's relative error must be within twice that of the
        reference run in ``precision`` plus one rounding: the median, since a rounding that swaps two nearly equal
        tokens changes an image's logits in either. Products in int8 must leave the answer as it is on a share of
        :data:`INT8_SAME_ANSWERS` of the images.

        Returns:
            The relative errors of this one ("tokcomp") and of the reference ("published"), and "same_answers", the
            share of the images with the oracle's top-1 class.

        Args:
            run: maps ``batch`` images to logits.
            method: how it compresses, None for a rival that does not.
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
        same = (have.argmax(dim=1) == oracle.argmax(dim=1)).double().mean().item()
        errors = {"tokcomp": _median_error(have, oracle), "published": _median_error(published, oracle)}
        who = "the compressed model" if entry is None or entry.is_ours else entry.competitor
        if entry is not None and entry.in_int8:
            if same < INT8_SAME_ANSWERS:
                raise DisagreementError(f"{who} answers as the model does on {same:.0%} of the images alone")
        elif not errors["tokcomp"] <= 2 * errors["published"] + torch.finfo(PRECISIONS[self.precision]).eps:
            reference = "timm" if method is None else "the published pipeline"
            raise DisagreementError(
                f"{who}'s logits are {errors['tokcomp']:.3g} off in {self.precision}, {reference}'s "
                f"{errors['published']:.3g}: more than twice as far from float64"
            )
        return {**errors, "same_answers": same}

    def _run(self, run: Callable[[Tensor], Tensor], batch: int, autocasts: bool) -> Tensor:
        """Logits of the gate's images, in batches of just ``batch``, the last one filled up from the front."""
        images = self.images.float() if autocasts else self.images
        positions = torch.arange(-(-len(images) // batch) * batch, device=images.device) % len(images)
        return torch.cat([run(images[part]).clone() for part in positions.split(batch)])[: len(images)]

    def _wanted(self, method: Method | None) -> tuple[Tensor, Tensor]:
        if method not in self._logits:
            exact = copy.deepcopy(self._model).double()
            oracle = (exact if method is None else PublishedPipeline(exact, method))(self.images.double())
            entry = Entry("timm") if method is None else Entry("published", method)
            reference = build_runner(entry, self._model, PRECISIONS[self.precision], self.device, GATE_IMAGES)
            self._logits[method] = oracle, reference(self.images.float() if entry.autocasts else self.images)
        return self._logits[method]


def check_agreement(
    run: Callable[[Tensor], Tensor], model: nn.Module, method: Method, precision: str, device: torch.device
) -> dict[str, float]:
    """:class:`Gate` for a single entry."""
    return Gate(model, precision, device).check(run, method)


def _median_error(logits: Tensor, oracle: Tensor) -> float:
    difference = (logits.double() - oracle).norm(dim=1) / oracle.norm(dim=1)
    return difference.median().item()

"""Switching a model between compression degrees while it serves."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokcomp import fastpath
from tokcomp.adapters import find_adapter
from tokcomp.adapters.projections import Projection
from tokcomp.adapters.twins import twin_model
from tokcomp.api import compress
from tokcomp.deploy.graphs import Graphs
from tokcomp.folded import fold_of
from tokcomp.methods import Method, ToMe
from tokcomp.tocom.degrees import Degrees, check_degrees, method_at
from tokcomp.tocom.layers import modules_of, pieces, projections_of, read_rows, write_rows
from tokcomp.tocom.plugin import ToCom


class Switchable:
    """A model at several compression degrees at once, one of which answers the next batch.

    There is one copy of the model. Each degree except ``source`` has its own q, k, v weights with the plugin folded in,
    and on CPU packed copies of them; everything else is shared. :meth:`set_degree` only selects the degree of the next
    batches: it loads nothing and may be called at any time from any thread. A batch runs to its end at the degree at
    which it started, while other threads may run theirs at others.

    The original model is left as it is and may still be used. Its q, k, v weights must not change: degree ``source``
    runs on them, and the other degrees' weights were made from them.

    Args:
        model: in evaluation mode, plain or compressed, on the device where it is to run; its weights are those for
            degree ``source``.
        tocom: the plugin.
        source: the degree that the model was trained at.
        degrees: the degrees to switch between; it starts at the first.
        method: what a degree means: ``ToMe`` or ``PiToMe`` (r tokens merged per block), ``EViT`` (r tokens dropped per
            block), or a mapping or function from degrees to methods, such as
            :func:`tokcomp.tocom.degrees.diffrate_degrees`.
        scale: the plugin's scale.

    Raises:
        TypeError, ValueError: as :meth:`ToCom.fold` and :func:`tokcomp.compress`; or the model is in training mode, or
            has a plugin folded in.
    """

    def __init__(
        self,
        model: nn.Module,
        tocom: ToCom,
        source: int = 0,
        degrees: Sequence[int] = (0, 4, 8, 12, 16),
        method: Degrees = ToMe,
        scale: float = 0.1,
    ) -> None:
        if not isinstance(tocom, ToCom):
            raise TypeError(f"tocom must be a ToCom, got {type(tocom).__name__}")
        adapter, projections = projections_of(model)
        if any(module.training for module in model.modules()):
            raise ValueError("model must be in evaluation mode, got one in training mode: call model.eval()")
        if fold_of(model) is not None:
            raise ValueError(f"model must have no plugin folded in, got one with {fold_of(model)}: unfold it")
        self.source = source
        self._weight = next(model.parameters())
        self._image_shape, self._any_size = adapter.image_shape(model), adapter.geometry(model).num_tokens is None
        self._models: dict[int, nn.Module] = {}
        self._own: dict[int, list[nn.Module]] = {}
        for degree in check_degrees(degrees, tocom.max_degree):
            twin, _ = twin_model(model, modules_of(projections))
            compress(twin, method_at(method, degree))
            rows = tocom.rows_for(twin, [read_rows(one) for one in projections], source, degree, scale)
            self._models[degree], self._own[degree] = twin, []
            if degree != source:
                _, own = projections_of(twin)
                self._own[degree] = modules_of(own)
                for projection, new in zip(own, rows, strict=True):
                    _give_own_weights(projection, new)
            adapter.warm_up(twin)
        self._graphs = Graphs()
        self._degree = next(iter(self._models))

    def __repr__(self) -> str:
        return f"Switchable(source={self.source}, degrees={list(self._models)}, degree={self._degree})"

    @property
    def degrees(self) -> list[int]:
        """The degrees to switch between."""
        return list(self._models)

    @property
    def degree(self) -> int:
        """The degree at which the next batch runs."""
        return self._degree

    def set_degree(self, degree: int) -> None:
        """Run the batches that start from now on at ``degree``.

        Raises:
            ValueError: not one of :attr:`degrees`.
        """
        self._degree = self._known(degree)

    def method(self, degree: int) -> Method:
        """The method that ``degree`` stands for.

        Raises:
            ValueError: not one of :attr:`degrees`.
        """
        model = self._models[self._known(degree)]
        method = find_adapter(model).method(model)
        assert method is not None
        return method

    def example_image(self) -> Tensor:
        """An empty image [C, H, W] of the model's own size and type, on its device."""
        return torch.zeros(self._image_shape, dtype=self._weight.dtype, device=self._weight.device)

    def check_image(self, image: Tensor) -> None:
        """Refuse anything but an image for a batch: [C, H, W], dense, with the model's channels, size and type.

        For a model that takes images of any size, height and width are free.

        Raises:
            TypeError: not a dense tensor, or not of the weights' dtype.
            ValueError: wrong shape.
        """
        if not isinstance(image, Tensor):
            raise TypeError(f"image must be a tensor [C, H, W], got {type(image).__name__}")
        if image.is_nested or image.layout != torch.strided:
            raise TypeError("image must be a dense tensor, got a sparse or nested one; call .to_dense()")
        shape, wanted = list(image.shape), list(self._image_shape)
        if len(shape) != 3 or shape[0] != wanted[0] or not (shape == wanted or (self._any_size and min(shape) > 0)):
            size = "H, W" if self._any_size else f"{wanted[1]}, {wanted[2]}"
            raise ValueError(f"image must be [C, H, W] = [{wanted[0]}, {size}], got a tensor of shape {shape}")
        if image.dtype != self._weight.dtype:
            dtypes = [str(one.dtype).removeprefix("torch.") for one in (self._weight, image)]
            raise TypeError(f"image must be {dtypes[0]}, as the model's weights are, got {dtypes[1]}")

    @torch.no_grad()
    def __call__(self, images: Tensor, degree: int | None = None) -> Tensor:
        """Logits of images [B, 3, H, W] at the current degree, or at ``degree`` for this batch only. No gradients."""
        degree = self._degree if degree is None else self._known(degree)
        if images.is_cuda:
            logits = self._graphs.run(degree, images)
            if logits is not None:
                return logits
        answer: Tensor = self._models[degree](images)
        return answer

    def prepare(self, images: Tensor) -> None:
        """Make every degree ready for batches of this shape and type, before serving starts.

        On CUDA this captures one graph per degree; batches of other shapes run without one. Elsewhere it runs every
        degree once.
        """
        if images.is_cuda:
            for degree, model in self._models.items():
                self._graphs.capture(degree, model, images)
        else:
            for degree in self._models:
                self(images, degree)

    def memory(self) -> dict[int, int]:
        """Bytes that each degree holds beyond the shared model: q, k, v weights, their packed copies, CUDA graphs."""
        return {degree: self._nbytes(degree) for degree in self._models}

    def _nbytes(self, degree: int) -> int:
        own = self._own[degree]
        packed = fastpath.packed_now(self._models[degree])
        _, projections = projections_of(self._models[degree])
        weights = {id(piece.weight): piece.weight.nbytes for one in projections for piece in pieces(one)} if own else {}
        return sum(weights.values()) + (0 if packed is None else packed.nbytes_of(own)) + self._graphs.nbytes(degree)

    def _known(self, degree: int) -> int:
        whole = hasattr(degree, "__index__") and not isinstance(degree, bool)
        if not whole or degree not in self._models:
            raise ValueError(f"degree must be one of {', '.join(map(str, self._models))}, got {degree!r}")
        return operator.index(degree)


def _give_own_weights(projection: Projection, rows: Tensor) -> None:
    """Give twins their own weights with ``rows`` for q and v; biases stay shared."""
    for module, name in {(piece.module, piece.name) for piece in pieces(projection)}:
        weight = module._parameters[name]
        assert weight is not None
        own = nn.Parameter(weight.detach().clone(), requires_grad=False)
        vars(module)["_parameters"] = {**module._parameters, name: own}
    write_rows(projection, rows)

"""Batches that depend only on (seed, step)."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tokcomp.data import EveryNth, num_images
from tokcomp.runs.distributed import ALONE, World
from tokcomp.runs.steps import ORDER, SAMPLE, derived_seed, seeded


def part_of_batch(batch_size: int, part: int, parts: int) -> list[int]:
    """The positions in a batch that one of ``parts`` equal parts holds.

    A part of even size holds whole mixup pairs (i, B - 1 - i), mirrored as in the batch, so mixing each part with the
    same draws equals mixing the batch. Parts are a process's share, or a share's pieces under gradient accumulation.
    """
    size = batch_size // parts
    if size % 2:
        return list(range(part * size, (part + 1) * size))
    first = range(part * (size // 2), (part + 1) * (size // 2))
    return [*first, *(batch_size - 1 - place for place in reversed(first))]


def check_batch_size(batch_size: int, world_size: int, pieces: int, mixes: bool) -> None:
    """Refuse a batch that does not divide into equal parts for the processes and pieces.

    Raises:
        ValueError: it does not, or mixing needs an even number of images in each part and it is odd.
    """
    step = world_size * pieces * (2 if mixes else 1)
    if batch_size % step:
        why = f"{world_size} processes x {pieces} accumulated pieces" + (" x pairs for mixup" if mixes else "")
        raise ValueError(f"the batch size must be a multiple of {step} ({why}), got {batch_size}")


class Batches(ABC):
    """An endless stream of batches: images in random order, each image once before any is repeated.

    Args:
        num_images: images to draw from.
        batch_size: images in the whole batch, over all processes.
        seed: seeds the order and the augmentation.
        epoch_images: images that make an epoch; by default all. A small subset of a large set can keep the large set's
            number, so that an epoch stays the same number of steps.
        world: the processes that share each batch.
        pieces: equal parts, one after the other, into which a process's images are ordered.
        repeats: how many times an image comes in a row, each time augmented differently (DeiT's repeated augmentation).
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        *,
        epoch_images: int | None = None,
        world: World = ALONE,
        pieces: int = 1,
        repeats: int = 1,
    ) -> None:
        if num_images < 1:
            raise ValueError("the training data must hold at least one image, got none")
        self.num_images, self.batch_size, self.seed, self.pieces = num_images, batch_size, seed, pieces
        self.epoch_images = num_images if epoch_images is None else epoch_images
        self._repeats = repeats
        parts = world.size * pieces
        check_batch_size(batch_size, world.size, pieces, mixes=False)
        mine = range(world.rank * pieces, (world.rank + 1) * pieces)
        self._places = np.array([place for part in mine for place in part_of_batch(batch_size, part, parts)])
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.epoch_images // self.batch_size)

    def keys(self, step: int) -> list[tuple[int, int]]:
        """This process's images at a step: (index, earlier occurrences). The pair seeds the image's augmentation."""
        position = step * self.batch_size + self._places  # in the endless stream
        turn, within = np.divmod(position, self.num_images * self._repeats)
        place, copy = np.divmod(within, self._repeats)
        return [
            (int(self._order(t)[p]), t * self._repeats + c)
            for t, p, c in zip(turn.tolist(), place.tolist(), copy.tolist(), strict=True)
        ]

    @abstractmethod
    def iterate(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [b, 3, H, W] and labels [b] of the steps start .. stop - 1, b = batch_size / processes."""

    def _make_order(self, turn: int) -> np.ndarray:
        return np.random.default_rng(derived_seed(self.seed, ORDER, turn)).permutation(self.num_images)


class LoaderBatches(Batches):
    """Batches of a data set, loaded by worker processes. The images do not depend on their number.

    Args:
        dataset: gives (image tensor, label); the global generators of torch, numpy and random, from which its transform
            may draw, are seeded for every image by (seed, earlier occurrences, index).
        workers: loader processes; 0 loads in this one.
        pin_memory: for copies to a GPU that do not wait.
        others: as for :class:`Batches`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(num_images(dataset), batch_size, seed, **others)
        self._dataset = _Seeded(dataset, seed)
        self._workers, self._pin_memory = workers, pin_memory

    def iterate(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._dataset,
            batch_sampler=_Keys(self, start, stop),
            num_workers=self._workers,
            pin_memory=self._pin_memory,
            worker_init_fn=_heed_parent_alone,
            generator=torch.Generator(),  # otherwise it draws from the global one, needlessly
        )
        return iter(loader)


class TensorBatches(Batches):
    """Batches of images that are in memory.

    Args:
        images: [n, 3, H, W], as the model or ``augment`` takes them.
        labels: [n] int64.
        augment: (images [B, ...] of the whole batch, generator seeded by the step) -> images for the model.
        others: as for :class:`Batches`.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        *,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        world: World = ALONE,
        **others: Any,
    ) -> None:
        super().__init__(len(labels), batch_size, seed, world=world, **others)
        self._images, self._labels, self._augment = images, labels, augment
        self._whole = self if augment is None else TensorBatches(images, labels, batch_size, seed, **_whole(others))

    def iterate(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, stop):
            if self._augment is None:
                chosen = self._chosen(step)
                yield self._images[chosen], self._labels[chosen]
                continue
            # Drawn for the whole batch, so that a process's images do not depend on how many processes there are.
            chosen = self._whole._chosen(step)
            generator = torch.Generator(self._images.device).manual_seed(derived_seed(self.seed, SAMPLE, step))
            images, places = self._augment(self._images[chosen], generator), torch.from_numpy(self._places)
            yield images[places], self._labels[chosen[places]]

    def _chosen(self, step: int) -> Tensor:
        return torch.tensor([index for index, _ in self.keys(step)])


def _whole(others: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in others.items() if name == "repeats"}


class _Seeded(Dataset[Any]):
    """A data set by key (index, earlier occurrences), which seeds what its transform draws."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        index, times = key
        with seeded(self._seed, SAMPLE, times, index):
            return cast("tuple[Any, int]", self._dataset[index])


class _Keys:
    """The keys of each batch, for a DataLoader."""

    def __init__(self, batches: Batches, start: int, stop: int) -> None:
        self._batches, self._start, self._stop = batches, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self._batches.keys(step) for step in range(self._start, self._stop))


def _heed_parent_alone(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the run itself ends its workers after the step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Still(Dataset[Any]):
    """A data set whose images, if drawn at random, are the same each time."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return num_images(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with seeded(SAMPLE, index):
            return cast("tuple[Any, int]", self._dataset[index])


def held_out_batches(
    dataset: Dataset[Any], batch_size: int, *, workers: int = 0, pin_memory: bool = False, world: World = ALONE
) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    """A function that starts a pass over a data set in order; each process gets every world.size-th image.

    Images that are drawn at random are the same in every pass.
    """
    share = EveryNth(_Still(dataset), world.rank, world.size)

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        return iter(
            DataLoader(
                share,
                batch_size=batch_size,
                num_workers=workers,
                pin_memory=pin_memory,
                worker_init_fn=_heed_parent_alone,
                generator=torch.Generator(),
            )
        )

    return start

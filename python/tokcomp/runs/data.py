"""Labelled images for training: opened, checked before the first step, and divided into parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from tokcomp.data import DigitsDataset, ReadableImages, as_rgb, count_classes, num_images
from tokcomp.runs.recipe import Recipe, plain_transform, train_transform
from tokcomp.runs.steps import SPLIT, derived_seed


def open_dataset(
    name: str,
    root: Path | None,
    *,
    split: str,
    class_map: str = "",
    download: bool = False,
    batch_size: int = 1,
    unreadable: str = "next",
) -> Dataset[Any]:
    """One of timm's data sets, or the digits that come with tokcomp.

    Args:
        name: timm's data set type/name, "" for a folder with one sub-folder per class, or "digits".
        root: its folder.
        split: "train", "validation", ...; for the digits, every name but "train" gives the held-out part.
        class_map: text file of class names, in label order.
        download: let timm download it.
        batch_size: a hint that some of timm's iterable data sets need.
        unreadable: what to do about image files that cannot be read, as in :class:`tokcomp.data.ReadableImages`.

    Raises:
        ValueError: the data set cannot be opened; the message says which one and why.
    """
    from timm.data import ImageDataset, create_dataset

    if name == "digits":
        try:
            return DigitsDataset(train=split == "train")
        except ImportError as error:
            raise ValueError("--dataset digits needs scikit-learn; pip install 'tokcomp[demo]'") from error
    try:
        dataset: Dataset[Any] = create_dataset(
            name,
            root=None if root is None else str(root),
            split=split,
            class_map=cast(Any, class_map),
            download=download,
            batch_size=batch_size,
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        what = f"--dataset '{name}'" if name else f"DATA '{root}'"
        raise ValueError(
            f"{what} could not be opened as a data set ({reason}); it must be one folder per class"
        ) from error
    return ReadableImages(dataset, unreadable) if type(dataset) is ImageDataset else dataset


def labels_of(dataset: Dataset[Any]) -> Tensor | None:
    """The labels of a data set [n], int64, if it knows them without reading its images."""
    if isinstance(dataset, Part):
        labels = labels_of(dataset.dataset)
        return None if labels is None else labels[dataset.indices]
    keeper: Any = getattr(dataset, "reader", dataset)  # timm's readers, or a torchvision-style data set
    found = next((getattr(keeper, name) for name in ("targets", "labels") if hasattr(keeper, name)), None)
    if found is None and hasattr(keeper, "samples"):
        found = [label for _, label in keeper.samples]
    if found is None:
        return None
    return torch.as_tensor([-1 if label is None else int(label) for label in found], dtype=torch.int64)


def check_labels(dataset: Dataset[Any], num_classes: int) -> None:
    """Refuse data that cannot train a head of ``num_classes``, before anything is done with it.

    Raises:
        ValueError: no random access, no images, images without a label, or a different number of classes than the
            head's.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            "the training data must allow random access, got a stream (wds/..., tfds/...); "
            "use a folder of images, torch/... or hfds/..."
        )
    if len(dataset) == 0:
        raise ValueError("the training data must hold at least one image, got none")
    if num_classes < 1:
        raise ValueError("the model must have a classifier, got num_classes = 0; pass --num-classes and a --checkpoint")
    labels = labels_of(dataset)
    if labels is not None and bool((labels < 0).any()):
        missing = int((labels < 0).sum())
        raise ValueError(
            f"every training image must have a label, got {missing} of {len(labels)} without; "
            "put each class in a separate folder"
        )
    # A part may lack some classes: the whole set says how many there are.
    whole = dataset
    while isinstance(whole, Part):
        whole = whole.dataset
    classes, labels = count_classes(whole), labels_of(whole)
    if classes is None and labels is not None:
        classes = int(labels.max()) + 1
    if classes is not None and classes != num_classes:
        raise ValueError(
            f"the data set must have as many classes as the model's head, {num_classes}, got {classes}; "
            "pass the right --model, --checkpoint and --num-classes, or --class-map for some of the classes"
        )


class Part(Dataset[Any]):
    """Some images of a data set, as RGB, with a transform applied: (image, label).

    Args:
        dataset: gives (PIL image, label); its own ``transform`` must not be set.
        indices: which ones, in this order; None for all.
        transform: PIL image -> tensor; None keeps the pictures.
    """

    def __init__(
        self, dataset: Dataset[Any], indices: Sequence[int] | None = None, transform: Callable[[Any], Any] | None = None
    ) -> None:
        self.dataset, self.transform = dataset, transform
        self.indices = list(range(num_images(dataset))) if indices is None else list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self.indices[index]]
        if isinstance(image, Image.Image) and image.mode != "RGB":
            image = as_rgb(image)
        return (image if self.transform is None else self.transform(image)), int(label)


def spread_sample(dataset: Dataset[Any], count: int, seed: int) -> list[int]:
    """``count`` indices of a data set, drawn by ``seed`` and spread over its classes as the whole set is, ascending.

    Images are drawn without repetition. If the labels are unknown, they are spread over the set's order.
    """
    total = num_images(dataset)
    if count >= total:
        return list(range(total))
    draw = np.random.default_rng(derived_seed(seed, SPLIT))
    order = draw.permutation(total)
    labels = labels_of(dataset)
    groups = np.arange(total) if labels is None else labels.numpy()
    order = order[np.argsort(groups[order], kind="stable")]  # class by class, shuffled within each
    # One place in each of `count` equal stretches: every class gets its share, to within one image.
    edges = np.arange(count + 1) * total // count
    places = edges[:-1] + (draw.random(count) * np.diff(edges)).astype(np.int64)
    return sorted(order[places].tolist())


def split_off(dataset: Dataset[Any], count: int, seed: int) -> tuple[list[int], list[int]]:
    """A data set's indices as (the others, ``count`` held out and spread over the classes)."""
    held_out = spread_sample(dataset, count, seed)
    chosen = set(held_out)
    return [index for index in range(num_images(dataset)) if index not in chosen], held_out


def training_part(dataset: Dataset[Any], indices: Sequence[int] | None, recipe: Recipe, config: dict[str, Any]) -> Part:
    """Images to train on, augmented as the recipe says. The digits are not, since they are drawn anew each time, and
    mirroring and cropping would turn them into something else.

    Raises:
        ValueError: timm does not understand the recipe's ``aa``.
    """
    transform = plain_transform(config) if isinstance(dataset, DigitsDataset) else train_transform(recipe, config)
    return Part(dataset, indices, transform)

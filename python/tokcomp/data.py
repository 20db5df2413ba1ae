"""Images for the command line: timm's data sets, the bundled digits, folders and single files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

DIGITS_IMAGE_SIZE = 32
_INK_EXTENT = 22.0  # pixels that the 8x8 original spans on the canvas
_MAX_SHIFT = 5.0  # pixels off the centre, either way
_HELD_OUT_SEED = 20
_RENDER_SEED = 7


def digits_split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 digits as ((train, labels), (held out, labels)), the same 1437 and 360 every time.

    Images are [n, 1, 8, 8] float32 in 0..1 (ink), labels [n] int64; the split is stratified by class.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float().div_(16.0).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    train, held_out = train_test_split(
        range(len(labels)), test_size=360, random_state=_HELD_OUT_SEED, stratify=digits.target
    )
    return (ink[train], labels[train]), (ink[held_out], labels[held_out])


def render_digits(ink: Tensor, generator: torch.Generator, *, augment: bool = False, spread: float = 1.0) -> Tensor:
    """Draw 8x8 digits in coloured ink somewhere on coloured paper: [n, 1, 8, 8] -> [n, 3, 32, 32], both in 0..1.

    Most of a picture is paper, which is what token compression exploits. ``augment`` also turns, shears and scales the
    digits more; ``spread`` (0..1) says how far from the centre they may lie.
    """
    count = ink.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    angle = uniform(-1, 1) * (math.radians(15) if augment else math.radians(5))
    shear = uniform(-1, 1) * (0.25 if augment else 0.0)
    scale = 1 + uniform(-1, 1) * (0.2 if augment else 0.05)
    free = spread * _MAX_SHIFT / (DIGITS_IMAGE_SIZE / 2)
    shift = uniform(-free, free, 2)
    # affine_grid maps canvas coordinates to the original's, so the matrix is the inverse of the movement.
    zoom = DIGITS_IMAGE_SIZE / _INK_EXTENT / scale
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    linear = torch.stack([torch.stack([cos, sin + shear * zoom], -1), torch.stack([-sin, cos], -1)], -2)  # [n, 2, 2]
    offset = -(linear @ shift.unsqueeze(-1))
    grid = F.affine_grid(torch.cat([linear, offset], -1), [count, 1, DIGITS_IMAGE_SIZE, DIGITS_IMAGE_SIZE], False)
    coverage = F.grid_sample(ink, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    coverage = coverage.mul(1.3).clamp(max=1.0)
    paper, colour = uniform(0.8, 1.0, 3, 1, 1), uniform(0.0, 0.4, 3, 1, 1)
    return paper + (colour - paper) * coverage


def held_out_digits() -> tuple[Tensor, Tensor]:
    """The 360 held-out digits as drawn for every evaluation: images [360, 3, 32, 32] in 0..1, labels [360]."""
    _, (ink, labels) = digits_split()
    return render_digits(ink, torch.Generator().manual_seed(_RENDER_SEED)), labels


class DigitsDataset(Dataset[Any]):
    """The digits as pictures, in the form of timm's data sets: (PIL image, label), with a settable ``transform``.

    Args:
        train: the 1437 training digits, drawn anew each time they are asked for, turned, sheared and moved by torch's
            global generator; otherwise the 360 held-out digits, drawn once.
    """

    num_classes = 10

    def __init__(self, train: bool = False) -> None:
        if train:
            (self._ink, labels), _ = digits_split()
        else:
            images, labels = held_out_digits()
            self.images = [_as_picture(image) for image in images]
        self.train = train
        self.labels: list[int] = labels.tolist()
        self.transform: Callable[[Image.Image], object] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[object, int]:
        image = self._draw(index) if self.train else self.images[index]
        return (image if self.transform is None else self.transform(image)), self.labels[index]

    def _draw(self, index: int) -> Image.Image:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return _as_picture(render_digits(self._ink[index : index + 1], generator, augment=True)[0])


def _as_picture(image: Tensor) -> Image.Image:
    """[3, H, W] in 0..1 -> PIL."""
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())


class _Subset(Dataset[Any]):
    """Some images of a data set, whose transform can be set, as timm's loader does."""

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.dataset[self.indices[index]]

    @property
    def transform(self) -> object:
        return self.dataset.transform  # type: ignore[attr-defined]

    @transform.setter
    def transform(self, transform: object) -> None:
        self.dataset.transform = transform  # type: ignore[attr-defined]


class SpreadSubset(_Subset):
    """``num_samples`` of a data set, evenly spread: the first ones in a sorted folder would all be of one class."""

    def __init__(self, dataset: Dataset[Any], num_samples: int) -> None:
        total = num_images(dataset)
        chosen = [index * total // num_samples for index in range(num_samples)]
        super().__init__(dataset, chosen if num_samples < total else range(total))


class EveryNth(_Subset):
    """The images ``first``, ``first + step``, ...: one process's share of a data set."""

    def __init__(self, dataset: Dataset[Any], first: int, step: int) -> None:
        super().__init__(dataset, range(first, num_images(dataset), step))


def num_images(dataset: Dataset[Any]) -> int:
    """The number of images in a data set that knows it, as every map-style data set does."""
    return len(cast(Sized, dataset))


def count_classes(dataset: Dataset[Any]) -> int | None:
    """The number of classes in a data set, if it is known without reading the whole set."""
    while isinstance(dataset, _Subset):
        dataset = dataset.dataset
    if hasattr(dataset, "num_classes"):
        return int(dataset.num_classes)
    class_to_idx = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    return len(set(class_to_idx.values())) if class_to_idx else None


def list_images(path: Path) -> list[Path]:
    """The picture itself, or the pictures in a folder (not in its subfolders), by name."""
    if path.is_dir():
        return sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
    return [path]


class UnreadableImageError(OSError):
    """A file that is not a picture, is damaged, or would unpack to more pixels than Pillow allows."""


def load_image(source: Any, name: object = None) -> Image.Image:
    """A picture as RGB, upright.

    Args:
        source: a path, a binary file, or a picture that is already open.
        name: what to call it in an error; by default its path.

    Raises:
        UnreadableImageError: it cannot be read.
    """
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        with picture:
            return as_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # Pillow's decoders raise anything: SyntaxError, struct.error, a bomb's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImageError(f"'{source if name is None else name}' ({reason})") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as RGB. A 16-bit picture keeps its high byte; Pillow would turn every value above 255 white."""
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if image.mode != "I" or deep.max(initial=0) > 255:
            image = Image.fromarray((deep.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


#: Labels from here down say that image ``-2 - label`` of a set could not be read; -1 is an image without a label.
_FIRST_UNREADABLE = -2


def unreadable_indices(labels: Tensor) -> list[int]:
    """Which images of a :class:`ReadableImages` these labels [n] report as unreadable."""
    return [_FIRST_UNREADABLE - label for label in labels.tolist() if label <= _FIRST_UNREADABLE]


class ReadableImages(Dataset[Any]):
    """timm's data set of image files, made to recognise files that cannot be read: (image, label).

    timm itself silently substitutes a neighbouring image, and fails with a traceback on a decompression bomb.

    Args:
        dataset: a ``timm.data.ImageDataset``.
        unreadable: what to do about an image that cannot be read: "raise"; take the "next" readable one, with a
            warning; or "mark" it: a black picture with a label that :func:`unreadable_indices` recognises.
    """

    def __init__(self, dataset: Any, unreadable: str = "next") -> None:
        self.dataset, self.reader, self.unreadable = dataset, dataset.reader, unreadable
        self.transform: Callable[[Image.Image], object] | None = None

    def __len__(self) -> int:
        return num_images(self.dataset)

    def filename(self, index: int) -> str:
        """The file of an image, for messages."""
        return str(self.reader.filename(index, absolute=True))

    def __getitem__(self, index: int) -> tuple[object, int]:
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                picture, label = self._read(at)
                break
            except UnreadableImageError as error:
                if self.unreadable == "raise":
                    raise
                if self.unreadable == "mark":
                    picture, label = Image.new("RGB", (32, 32)), _FIRST_UNREADABLE - at
                    break
                warnings.warn(f"not a readable picture: {error}; the next image takes its place", stacklevel=2)
        else:
            raise UnreadableImageError(f"none of the {len(self)} images can be read")
        return (picture if self.transform is None else self.transform(picture)), label

    def _read(self, index: int) -> tuple[Image.Image, int]:
        try:
            source, label, *_ = self.reader[index]
        except OSError as error:
            raise UnreadableImageError(f"'{self.filename(index)}' ({error})") from error
        try:
            picture = load_image(source, self.filename(index))
        finally:
            if hasattr(source, "close"):
                source.close()
        return picture, -1 if label is None else int(label)

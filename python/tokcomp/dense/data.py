"""Images and masks for training and evaluation: a folder of them, or any data set of (picture, mask)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokcomp.data import IMAGE_SUFFIXES, num_images

IGNORE = 255


class MaskFolder(Dataset[Any]):
    """ADE20k's layout: ``images/SPLIT/NAME.jpg`` and ``annotations/SPLIT/NAME.png``, a grey picture of class numbers.

    Gives (PIL image, mask [H, W] uint8); 255 means no class.

    Args:
        root: folder that contains ``images`` and ``annotations``.
        split: such as "training" or "validation".
        reduce_zero_label: class 0 is "none" and the others count from 1 (ADE20k): 0 becomes 255, n becomes n - 1.

    Raises:
        ValueError: a folder is missing or empty, or an image has no mask.
    """

    def __init__(self, root: Path, split: str, *, reduce_zero_label: bool = False) -> None:
        images, masks = root / "images" / split, root / "annotations" / split
        for folder in (images, masks):
            if not folder.is_dir():
                raise ValueError(f"the data must have images/{split} and annotations/{split}, got no folder '{folder}'")
        self.images = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        self.masks = [masks / f"{path.stem}.png" for path in self.images]
        missing = next((path for path in self.masks if not path.is_file()), None)
        if missing is not None:
            raise ValueError(f"every image must have a mask, got none at '{missing}'")
        if not self.images:
            raise ValueError(f"the data must hold at least one image, got an empty folder '{images}'")
        self.reduce_zero_label = reduce_zero_label

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        from PIL import Image

        image = Image.open(self.images[index]).convert("RGB")
        mask = np.asarray(Image.open(self.masks[index]))
        if mask.ndim != 2 or mask.shape[::-1] != image.size:
            raise ValueError(
                f"a mask must be a grey picture of its image's size, {image.width} x {image.height}, got "
                f"{mask.shape[1]} x {mask.shape[0]} with {mask.ndim} axes at '{self.masks[index]}'"
            )
        mask = mask.astype(np.uint8)
        return image, mask - 1 if self.reduce_zero_label else mask  # 0 - 1 is 255


class Prepared(Dataset[Any]):
    """Pairs as the model takes them: image [3, H, W] float32, normalised, and mask [H, W] int64.

    Args:
        dataset: gives (PIL image, mask).
        size: (H, W) to which both are resized (images bilinear, masks nearest).
        mean, std: the model's, per channel.
        augment: first cut out a random piece of half to twice the size, and mirror half of the pairs, as Segmenter
            does; drawn from torch's global generator.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augment: bool = False,
    ) -> None:
        self.dataset, self.size, self.augment = dataset, size, augment
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __len__(self) -> int:
        return num_images(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, mask = self.pair(index)
        return self._normalised(picture), torch.from_numpy(np.array(mask)).long()

    def _normalised(self, picture: Any) -> Tensor:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return (image - self._mean) / self._std

    def pair(self, index: int) -> tuple[Any, np.ndarray]:
        """(PIL image, mask [H, W] uint8) of the right size, not normalised."""
        from PIL import Image

        image, mask = self.dataset[index]
        box = (0.0, 0.0, float(image.width), float(image.height))
        if self.augment:
            zoom, across, down, mirrored = torch.rand(4).tolist()
            height, width = (side / 2 ** (2 * zoom - 1) for side in self.size)
            shrink = min(1.0, image.height / height, image.width / width)
            height, width = height * shrink, width * shrink
            left, top = across * (image.width - width), down * (image.height - height)
            box = (left, top, left + width, top + height)
        size = self.size[::-1]
        if image.size != size or self.augment:
            image = image.resize(size, Image.Resampling.BILINEAR, box=box)
            mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST, box=box))
        if self.augment and mirrored < 0.5:
            image, mask = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), np.ascontiguousarray(mask[:, ::-1])
        return image, mask


class WholeImages(Prepared):
    """Pairs for scoring at full resolution: an image keeps its shape, a mask its size; one pair makes a batch.

    Image [3, h, w] float32, normalised, resized until ``size`` just fits into it; mask [H, W] int64 as it is.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image, mask = self.dataset[index]
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        height, width = (
            max(round(scale * side), least) for side, least in zip((image.height, image.width), self.size, strict=True)
        )
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        return self._normalised(image), torch.from_numpy(np.array(mask)).long()


class InMemory(Dataset[Any]):
    """A data set read once: for generated pictures, which take longer to draw than a small model takes to train on."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.pairs = [cast("tuple[Any, np.ndarray]", dataset[index]) for index in range(num_images(dataset))]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray]:
        return self.pairs[index]

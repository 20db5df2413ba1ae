"""Fashion-MNIST: 60,000 + 10,000 pictures of clothes in ten classes, from its own files.

Debian's package ``dataset-fashion-mnist`` installs them in ``/usr/share/datasets/fashion-mnist``; torchvision's
``FashionMNIST(root, download=True)`` keeps the same files in ``root/FashionMNIST/raw``.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format, packed or not; ``path`` is without ``.gz``.

    Raises:
        ValueError: there is no such file, or it is not IDX of bytes.
    """
    packed = path.with_name(path.name + ".gz")
    if not path.is_file() and not packed.is_file():
        raise ValueError(f"the images must be in IDX files, got a folder without '{path}' and '{packed.name}'")
    data = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
    dims = data[3] if len(data) > 4 else 0
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(dims)]
    if data[:3] != b"\0\0\x08" or len(data) != 4 + 4 * dims + int(np.prod(shape)):
        raise ValueError(f"{path} must be an IDX file of bytes, got other contents")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


class FashionMNIST(Dataset):
    """Pictures and labels of the training or the test part, as timm's data sets give them: (PIL image, label)."""

    num_classes = 10

    def __init__(self, folder: Path, *, train: bool) -> None:
        part = "train" if train else "t10k"
        self.pixels = read_idx(folder / f"{part}-images-idx3-ubyte")  # [n, 28, 28]
        self.labels: list[int] = read_idx(folder / f"{part}-labels-idx1-ubyte").tolist()
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]


class Noise(Dataset):
    """Pictures of noise in ten classes, the same every time: for a run in miniature."""

    num_classes = 10

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.pixels = torch.randint(0, 256, (count, 28, 28, 3), generator=draw, dtype=torch.uint8).numpy()
        self.labels = [index % self.num_classes for index in range(count)]
        self.transform = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.labels[index]

"""Metrics against counting, generated pictures, folders of masks, and files of segmenters."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tokcomp.dense import ConfusionMatrix
from tokcomp.dense.data import InMemory, MaskFolder, Prepared
from tokcomp.dense.files import SegmenterSettings, load_segmenter, save_segmenter
from tokcomp.dense.picture import paint_mask
from tokcomp.dense.shapes import CLASSES, ShapesDataset

HALF = (0.5, 0.5, 0.5)


@pytest.mark.parametrize("seed", range(4), ids="seed{}".format)
def test_scores_are_what_counting_gives(seed):
    draw = np.random.default_rng(seed)
    classes = 5
    truth = draw.choice([0, 1, 2, 3, 255], size=(3, 9, 7))  # class 4 is in neither
    guess = draw.integers(0, 4, size=truth.shape)
    matrix = ConfusionMatrix(classes)
    for one, other in zip(guess, truth, strict=True):
        matrix.update(torch.from_numpy(one), torch.from_numpy(other))
    scores = matrix.scores()
    pairs = [(int(g), int(t)) for g, t in zip(guess.ravel(), truth.ravel(), strict=True) if t != 255]
    expected = []
    for index in range(classes):
        both = sum(g == t == index for g, t in pairs)
        either = sum(index in (g, t) for g, t in pairs)
        expected.append(100 * both / either if either else math.nan)
    assert scores.num_pixels == len(pairs)
    assert scores.pixel_accuracy == pytest.approx(100 * sum(g == t for g, t in pairs) / len(pairs))
    assert scores.iou == pytest.approx(expected, nan_ok=True) and math.isnan(scores.iou[4])
    assert scores.mean_iou == pytest.approx(sum(expected[:4]) / 4)


def test_wrong_counts_are_refused():
    matrix = ConfusionMatrix(3, ignore_index=9)
    with pytest.raises(ValueError, match=r"the same shape, got \[2\] and \[3\]"):
        matrix.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="truth must be classes from 0 to 2, got 0 to 255; ignore_index is 9"):
        matrix.update(torch.tensor([0, 1]), torch.tensor([0, 255]))
    with pytest.raises(ValueError, match="predicted must be classes from 0 to 2, got -1 to 1"):
        matrix.update(torch.tensor([-1, 1]), torch.tensor([0, 1]))
    matrix.update(torch.tensor([5]), torch.tensor([9]))  # ignored, whatever was predicted
    with pytest.raises(ValueError, match="at least one pixel with a label, got none"):
        matrix.scores()


def test_generated_pictures():
    dataset = ShapesDataset((64, 96), 30, train=True, seed=3)
    seen = set()
    for index in range(30):
        picture, mask = dataset[index]
        assert picture.size == (96, 64) and mask.shape == (64, 96) and mask.dtype == np.uint8
        seen.update(np.unique(mask).tolist())
    assert seen == set(range(len(CLASSES)))
    again, other = ShapesDataset((64, 96), 5, train=True, seed=3), ShapesDataset((64, 96), 5, train=True, seed=4)
    held_out = ShapesDataset((64, 96), 5, seed=3)
    assert np.array_equal(again[2][0], dataset[2][0]) and np.array_equal(again[2][1], dataset[2][1])
    for unlike in (other, held_out):
        assert not np.array_equal(unlike[2][1], dataset[2][1])
    assert len(list(again)) == 5  # it ends
    large = ShapesDataset((512, 512), 1)[0]
    assert large[0].size == (512, 512) and len(np.unique(large[1])) > 3
    for arguments, message in ((((16, 64), 3), "at least 32 pixels"), (((64, 64), 0), "count must be at least 1")):
        with pytest.raises(ValueError, match=message):
            ShapesDataset(*arguments)


@pytest.fixture
def folder(tmp_path):
    """Three images of 20 x 30 with masks in ADE20k's layout."""
    draw = np.random.default_rng(0)
    for part in ("images", "annotations"):
        (tmp_path / part / "training").mkdir(parents=True)
    for name in ("a", "b", "c"):
        pixels = draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "training" / f"{name}.png")
        mask = draw.integers(0, 4, (20, 30), dtype=np.uint8)
        Image.fromarray(mask).save(tmp_path / "annotations" / "training" / f"{name}.png")
    return tmp_path


def test_a_folder_of_masks(folder):
    plain, reduced = (MaskFolder(folder, "training", reduce_zero_label=reduce) for reduce in (False, True))
    assert len(plain) == 3
    for index in range(3):
        mask, other = plain[index][1], reduced[index][1]
        assert set(np.unique(mask)) == {0, 1, 2, 3} and set(np.unique(other)) == {0, 1, 2, 255}
        assert np.array_equal(other[mask > 0], mask[mask > 0] - 1)
    image, mask = Prepared(plain, (16, 32), HALF, HALF)[1]
    assert image.shape == (3, 16, 32) and mask.shape == (16, 32) and mask.dtype == torch.int64
    assert float(image.min()) >= -1 and float(image.max()) <= 1 and set(mask.unique().tolist()) == {0, 1, 2, 3}


def test_masks_move_with_their_images():
    # A picture whose red is its label, so that any cut that moves one without the other shows.
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 1
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0] = 255 * mask
    data = Prepared(InMemory([(Image.fromarray(pixels), mask)]), (64, 64), (0, 0, 0), (1, 1, 1), augment=True)
    shares = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, found = data[0]
        edges = edges_of(found)
        assert ((image[0] > 0.5).long() == found)[~edges].all()
        shares.add(round(float(found.float().mean()), 3))
    assert len(shares) > 6


def edges_of(mask: torch.Tensor) -> torch.Tensor:
    """Pixels beside another class, where bilinear and nearest may differ."""
    padded = torch.nn.functional.pad(mask[None, None].float(), (2, 2, 2, 2), mode="replicate")
    high = torch.nn.functional.max_pool2d(padded, 5, 1)
    low = -torch.nn.functional.max_pool2d(-padded, 5, 1)
    return (high != low)[0, 0]


def test_wrong_folders_are_refused(folder):
    with pytest.raises(ValueError, match="must have images/validation and annotations/validation, got no folder"):
        MaskFolder(folder, "validation")
    (folder / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"every image must have a mask, got none at .*b\.png"):
        MaskFolder(folder, "training")
    Image.new("L", (5, 5)).save(folder / "annotations" / "training" / "b.png")
    with pytest.raises(ValueError, match="grey picture of its image's size, 30 x 20, got 5 x 5"):
        MaskFolder(folder, "training")[1]
    for path in (folder / "images" / "training").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="at least one image, got an empty folder"):
        MaskFolder(folder, "training")


SETTINGS = SegmenterSettings(
    "vit_tiny_patch16_224",
    (32, 48),
    "mask_transformer",
    ("sky", "sea"),
    HALF,
    HALF,
    model_kwargs={"embed_dim": 32, "depth": 2, "num_heads": 2},
)


def test_files_of_segmenters(tmp_path):
    segmenter = SETTINGS.build()
    images = torch.randn(2, 3, 32, 48)
    save_segmenter(tmp_path / "one.safetensors", segmenter, SETTINGS, {"mean_iou": 12.5})
    other, settings = load_segmenter(tmp_path / "one.safetensors")
    assert settings == SETTINGS
    with torch.no_grad():
        assert torch.equal(other(images), segmenter(images))
        larger, _ = load_segmenter(tmp_path / "one.safetensors", img_size=(64, 64))
        assert larger(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "one.safetensors"
    with pytest.raises(ValueError, match="which does not exist"):
        load_segmenter(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="got a file that does not load"):
        load_segmenter(path)
    segmenter = SETTINGS.build()
    save_segmenter(path, segmenter, SETTINGS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="got a file that does not load"):
        load_segmenter(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="got another kind of safetensors"):
        load_segmenter(path)
    shallow = SegmenterSettings(**{**vars(SETTINGS), "model_kwargs": {**SETTINGS.model_kwargs, "depth": 1}})
    save_segmenter(path, segmenter, shallow)
    with pytest.raises(ValueError, match="does not fit the model that it names, vit_tiny_patch16_224"):
        load_segmenter(path)


HOSTILE = {
    "a hub": ({"model": "hf-hub:somebody/model"}, "model must be one of timm's own, got 'hf-hub:somebody/model'"),
    "a folder": ({"model": "local-dir:/tmp/x"}, "model must be one of timm's own"),
    "another file": ({"model_kwargs": {"checkpoint_path": "x.pth"}}, "model_kwargs must describe only the model"),
    "depth": ({"model_kwargs": {"depth": 10**6}}, "model_kwargs must be those of the weights"),
    "patches": ({"model_kwargs": {"patch_size": [10**9, 10**9]}}, "model_kwargs must be those of the weights"),
    "size": ({"img_size": (10**6, 10**6)}, "img_size must be that of the weights"),
    "types": ({"img_size": ("a", None)}, "the metadata must say how the segmenter is built"),
    "name": ({"model": 3}, "model must be one of timm's own, got 3"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_segmenter_reaches_for_nothing(tmp_path, monkeypatch, case):
    """Neither the network nor another file, nor more memory than its own weights take."""
    changes, message = HOSTILE[case]
    segmenter = SETTINGS.build()
    save_segmenter(tmp_path / "one.safetensors", segmenter, SegmenterSettings(**{**vars(SETTINGS), **changes}))
    monkeypatch.setattr("timm.create_model", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_segmenter(tmp_path / "one.safetensors")


def test_masks_as_pictures():
    picture = np.asarray(paint_mask(np.array([[0, 1], [2, 255]]), 3))
    assert len({tuple(colour) for colour in picture.reshape(-1, 3)}) == 4
    assert tuple(picture[1, 1]) == (150, 150, 150)

"""Pictures that are none, are hostile or deep, and figures that mean nothing: named, skipped, or refused."""

from __future__ import annotations

import json
import shutil
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tokcomp.data import ReadableImages, UnreadableImageError, load_image
from tokcomp.measure.evaluate import evaluate
from tokcomp.runs.data import open_dataset

SHARED = ("-m", "tokcomp_digits_vit", "--device", "cpu")
EVALUATE = ("evaluate", *SHARED, "-b", "2", "--json")


def bomb(path):
    """A PNG of some hundred bytes that claims 50,000 x 50,000 pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    size = (50_000).to_bytes(4, "big")
    head = chunk(b"IHDR", size + size + bytes([8, 2, 0, 0, 0]))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


@pytest.fixture
def bad_folder(image_folder):
    """The two classes with a decompression bomb in one and a file of words in the other."""
    bomb(image_folder / "validation" / "cat" / "1.png")
    (image_folder / "validation" / "dog" / "0.png").write_bytes(b"words")
    return image_folder


def test_a_picture_of_16_bits_is_not_white(tmp_path):
    deep = np.linspace(0, 65535, 64 * 4, dtype=np.uint16).reshape(4, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    read = np.asarray(load_image(tmp_path / "deep.png"))
    np.testing.assert_array_equal(read, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))
    (tmp_path / "set" / "a").mkdir(parents=True)
    shutil.copy(tmp_path / "deep.png", tmp_path / "set" / "a")
    picture, label = open_dataset("", tmp_path / "set", split="train")[0]
    assert label == 0 and np.array_equal(np.asarray(picture), read)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluate_names_and_leaves_out_what_cannot_be_read(run, bad_folder, workers):
    status, out, err = run(*EVALUATE, bad_folder, "-j", workers)
    found = json.loads(out)
    assert status == 0, err
    assert (found["num_images"], found["num_unreadable"]) == (4, 2)
    assert "2 images could not be read and are not counted" in err
    assert "cat/1.png" in err and "dog/0.png" in err
    status, _, err = run(*EVALUATE, bad_folder, "-j", workers, "--strict")
    assert status == 2 and "Traceback" not in err
    assert "--strict: not a readable picture: '" in err and "cat/1.png' (Image size (2500000000 pixels)" in err


@pytest.mark.slow
def test_tocom_evaluate_names_them_once(run, bad_folder, tmp_path):
    import tokcomp

    model = timm.create_model("tokcomp_digits_vit")
    tokcomp.ToCom(model, max_degree=4).save(tmp_path / "plugin.safetensors")
    command = ("tocom", "evaluate", bad_folder, *SHARED, "--pretrained", "--plugin", tmp_path / "plugin.safetensors")
    status, _, err = run(*command, "--method", "tome", "--targets", "0,4", "-j", "0")
    assert status == 0 and err.count("2 images could not be read") == 1 and "cat/1.png" in err


@pytest.mark.slow
def test_visualize_goes_on_after_a_bomb(run, refused, bad_folder, tmp_path):
    command = ("visualize", *SHARED, bad_folder / "validation" / "cat", "--method", "tome", "--r", "8")
    status, out, err = run(*command, "-o", tmp_path / "drawn")
    assert status == 0 and out.count("written:") == 2
    assert "not a readable picture: '" in err and "cat/1.png' (Image size" in err
    assert "--strict: not a readable picture: '" in refused(*command, "-o", tmp_path / "strict", "--strict")


def test_training_takes_the_next_picture_and_says_so(bad_folder):
    data = open_dataset("", bad_folder, split="validation")
    assert isinstance(data, ReadableImages)
    with pytest.warns(UserWarning, match=r"cat/1\.png' .*; the next image takes its place"):
        picture, label = data[1]
    assert label == 0 and picture.tobytes() == data[2][0].tobytes()
    for path in (bad_folder / "validation").glob("*/*.png"):
        path.write_bytes(b"words")
    with pytest.warns(UserWarning), pytest.raises(UnreadableImageError, match="none of the 6 images can be read"):
        data[0]


def test_no_readable_image_is_an_error(refused, bad_folder):
    for path in (bad_folder / "validation").glob("*/*.png"):
        path.write_bytes(b"words")
    assert "at least one image, got 6 that cannot be read" in refused(*EVALUATE, bad_folder, "-j", "0")


def test_pictures_in_no_class_s_folder_are_refused(run, image_folder):
    status, _, err = run(*EVALUATE, image_folder / "validation" / "cat", "-j", "0")
    assert status == 2 and "DATA must be one folder per class, got pictures that lie in no such folder" in err


def test_fewer_classes_than_the_model_s_are_pointed_out(run, image_folder, tmp_path):
    status, _, err = run(*EVALUATE, image_folder, "-j", "0")
    assert (
        status == 0 and "the data set has 2 classes and the model 10; the folders, by name, stand for its first" in err
    )
    (tmp_path / "classes.txt").write_text("\n".join(["cow", "cat", "dog"]))
    status, _, err = run(*EVALUATE, image_folder, "-j", "0", "--class-map", tmp_path / "classes.txt")
    assert status == 0 and "note:" not in err


@pytest.mark.slow
def test_top_5_of_two_classes_says_nothing(run, image_folder):
    status, _, err = run(*EVALUATE, image_folder, "-j", "0", "--num-classes", "2")
    assert status == 0 and "with 2 classes every answer is in the top 5" in err


def test_a_model_of_nan_has_no_accuracy(run, image_folder, tmp_path):
    model = timm.create_model("tokcomp_digits_vit")
    torch.nn.init.constant_(model.head.bias, float("nan"))
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    status, _, err = run(*EVALUATE, image_folder, "-j", "0", "--checkpoint", tmp_path / "nan.pt")
    assert status == 2 and "the model's logits must be numbers, got NaN or infinity for all 6 images" in err


def test_nan_is_no_answer():
    """torch.topk ranks NaN first, so that the right class's NaN would count."""
    logits = torch.eye(3)
    logits[1, 1] = float("nan")
    found = evaluate(lambda images: logits, [(torch.zeros(3, 1), torch.arange(3))], device=torch.device("cpu"))
    assert (found.top1, found.num_not_finite) == (pytest.approx(200 / 3), 1)

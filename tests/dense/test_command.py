"""``tokcomp dense``, from training to pictures, on sizes that take seconds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokcomp.cli import main
from tokcomp.dense.train import DenseRun
from tokcomp.runs.log import read_log

from tests.cli.conftest import run  # noqa: F401

SMALL = ("--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "--img-size", "48")
TRAIN = ("dense", "train", *SMALL, "--head", "linear", "-b", "2", "--device", "cpu")
FEW = ("--train-images", "6", "--num-samples", "3", "--steps", "4", "--log-interval", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A segmenter and a plugin, trained for a moment."""
    folder = tmp_path_factory.mktemp("dense")
    assert main([*TRAIN, *FEW, "-o", str(folder / "run")]) == 0
    weights = folder / "run" / "segmenter.safetensors"
    arguments = ("--max-degree", "4", "--steps", "3", "-b", "2", "--train-images", "4", "--lr", "0.05")
    assert main(["dense", "tocom", str(weights), *arguments, "--device", "cpu", "-o", str(folder / "plugin")]) == 0
    return SimpleNamespace(folder=folder, weights=weights, plugin=folder / "plugin" / "tocom.safetensors")


def test_train_writes_what_it_says(trained):
    folder = trained.folder / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["classes"] == 6 and 0 <= summary["mean_iou"] <= 100
    assert list(summary["iou"])[:2] == ["background", "disk"]
    rows = read_log(folder / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and "mean_iou" in rows[-1]
    assert "encoder.blocks.1.attn.qkv.weight" in load_file(trained.weights)


def test_a_stopped_run_goes_on_to_the_same_bits(run, trained, tmp_path, monkeypatch):  # noqa: F811
    step = DenseRun.train

    def stop_early(self, stop, *, resumed=False):
        if resumed:
            return step(self, stop, resumed=True)
        add = self.trainee.step

        def counted(*batch):
            if self.step_number == 1:
                stop.signal = 15
            return add(*batch)

        self.trainee.step = counted
        return step(self, stop)

    monkeypatch.setattr(DenseRun, "train", stop_early)
    status, _, err = run(*TRAIN, *FEW, "-o", tmp_path / "run")
    assert status == 143 and "stopped after step 2 of 4" in err
    status, _, err = run(*TRAIN, *FEW, "-o", tmp_path / "run")
    assert status == 2 and "must not hold another run, got '" in err and "continue that run with --resume" in err
    status, _, err = run(*TRAIN, *FEW, "--lr", "0.1", "-o", tmp_path / "run", "--resume")
    assert status == 2 and "--resume: a resumed run must keep its settings" in err
    status, out, _ = run(*TRAIN, *FEW, "-o", tmp_path / "run", "--resume")
    assert status == 0 and "written: " in out
    ours, theirs = load_file(tmp_path / "run" / "segmenter.safetensors"), load_file(trained.weights)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (tmp_path / "run" / "log.csv").read_bytes() == (trained.folder / "run" / "log.csv").read_bytes()


def test_evaluate(run, trained, tmp_path):  # noqa: F811
    common = ("dense", "evaluate", trained.weights, "--num-samples", "3", "--device", "cpu")
    status, out, _ = run(
        *common, "--degrees", "0,2,4", "--plugin", trained.plugin, "--results-file", tmp_path / "r.json"
    )
    assert status == 0 and "with plugin" in out
    result = json.loads((tmp_path / "r.json").read_text())
    rows = result["degrees"]
    assert [row["r"] for row in rows] == [0, 2, 4] and rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]
    assert rows[0]["mean_iou"] == rows[0]["mean_iou_with_plugin"]
    assert rows[0]["mean_iou"] == pytest.approx(
        json.loads((trained.folder / "run/summary.json").read_text())["mean_iou"]
    )
    status, out, _ = run(*common, "--json", "--img-size", "64,80")
    assert status == 0 and json.loads(out)["img_size"] == [64, 80] and len(json.loads(out)["degrees"]) == 1


def test_visualize(run, trained, tmp_path):  # noqa: F811
    target = tmp_path / "drawn.png"
    degrees = ("--degrees", "0,4", "--plugin", trained.plugin, "--num-samples", "2", "--device", "cpu")
    status, out, _ = run("dense", "visualize", trained.weights, *degrees, "-o", target)
    assert status == 0 and str(target) in out
    pixels = np.asarray(Image.open(target))
    assert pixels.shape[0] > 2 * 48 and pixels.shape[1] >= 4 * 48


def test_a_folder_of_masks_and_a_compressed_encoder(run, tmp_path):  # noqa: F811
    draw = np.random.default_rng(0)
    for split in ("training", "validation"):
        for part, kind in (("images", "jpg"), ("annotations", "png")):
            (tmp_path / part / split).mkdir(parents=True)
            for name in range(3):
                pixels = draw.integers(0, 4, (40, 50), dtype=np.uint8)
                picture = Image.fromarray(pixels if kind == "png" else np.repeat(60 * pixels[..., None], 3, 2))
                picture.save(tmp_path / part / split / f"{name}.{kind}")
    data = ("--data-dir", tmp_path, "--num-classes", "3", "--reduce-zero-label")
    status, out, err = run(*TRAIN, *data, "--steps", "2", "--r", "4", "-o", tmp_path / "run")
    assert status == 0, err
    assert "3 classes" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["settings"]["r"] == 4 and list(summary["iou"]) == ["class 0", "class 1", "class 2"]
    status, _, err = run("dense", "evaluate", tmp_path / "run" / "segmenter.safetensors")
    assert status == 2 and "the segmenter must be for generated pictures" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--img-size", "50"), "--img-size: the sides of images must be multiples of the patch, 16 x 16, got 50 x 50"),
        (("--img-size", "16"), "--img-size: size must be at least 32 pixels"),
        (("--img-size", "48,48,48"), "--img-size must be one number or height,width, got 3 numbers"),
        (("--head", "conv"), "invalid choice: 'conv'"),
        (("--r", "5"), "--r: r must be at most half of the model's patch tokens, 4, got 5"),
        (("--model", "vit_tinny"), "--model must be a name that timm knows, got 'vit_tinny'; did you mean"),
        (("--model", "resnet18"), "--model 'resnet18' could not be built for segmentation"),
        (("--model-kwargs", "depth"), "must be NAME=VALUE, got 'depth'"),
        (("--num-classes", "3"), "--num-classes must be 6 for generated pictures, got 3"),
        (("--reduce-zero-label",), "--reduce-zero-label belongs to --data-dir"),
        (("--data-dir", "nowhere", "--num-classes", "3"), "--data-dir: the data must have images/validation"),
        (("--data-dir", "nowhere"), "--num-classes must be the number of classes of DATA"),
        (("--lr", "0.1", "--min-lr", "0.2"), "--min-lr must not be above --lr"),
        (("--opt", "adamm"), "opt must be an optimizer that timm knows"),
    ],
    ids=str,
)
def test_mistakes_in_training_are_named(run, tmp_path, arguments, message):  # noqa: F811
    status, _, err = run(*TRAIN, *FEW, *arguments, "-o", tmp_path / "run")
    assert status == 2 and message in err.replace("images/training", "images/validation")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "nowhere.safetensors"), "FILE: the segmenter must be a file, got 'nowhere.safetensors'"),
        (("evaluate", "FILE", "--degrees", "0,9"), "degree 9 at --tokens-per-degree 1: r must be at most half"),
        (("evaluate", "FILE", "--plugin", "PLUGIN", "--degrees", "5"), "from 0 to the plugin's 4, got 5"),
        (("evaluate", "FILE", "--plugin", "FILE"), "--plugin"),
        (("evaluate", "FILE", "--img-size", "50"), "multiples of the patch"),
        (("tocom", "FILE", "--max-degree", "16"), "degree 16 at --tokens-per-degree 1: r must be at most half"),
        (("visualize", "FILE", "-o", "."), "--output must be a file, got the folder"),
    ],
    ids=str,
)
def test_mistakes_in_use_are_named(run, trained, tmp_path, arguments, message):  # noqa: F811
    files = {"FILE": trained.weights, "PLUGIN": trained.plugin}
    status, _, err = run("dense", *(files.get(one, one) for one in arguments), "--num-samples", "1")
    if arguments[0] == "tocom":
        status, _, err = run("dense", *(files.get(one, one) for one in arguments), "-o", tmp_path / "plugin")
    assert status == 2 and message in err


def test_help_teaches(run):  # noqa: F811
    status, out, _ = run("dense", "--help")
    assert status == 0 and "tokcomp dense evaluate" in out
    for action in ("train", "tocom", "evaluate", "visualize"):
        status, out, _ = run("dense", action, "--help")
        assert status == 0 and "examples:" in out

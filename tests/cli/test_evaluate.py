from __future__ import annotations

import json
from unittest.mock import Mock

import pytest
import torch
from tokcomp.cli import main
from tokcomp.measure.evaluate import evaluate

DIGITS = ("evaluate", "--dataset", "digits", "-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0")
TINY = ("evaluate", "-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0", "-b", "2")


def test_digits_uncompressed(run):
    status, out, _ = run(*DIGITS, "--pretrained", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["num_images"] == 360 and found["top1"] >= 97.0 and found["top5"] >= found["top1"]
    assert found["method_settings"] is None and found["images_per_second"] > 0


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "tome", "--r", "8"),
        ("--method", "tome", "--gflops", "0.012"),
        ("--method", "evit", "--keep-rate", "0.7", "--keep-blocks", "1,3"),
        ("--method", "evit", "--num-pruned", "4", "--no-fuse"),
        ("--method", "tome", "--r", "8,8,8,4,4,0", "--no-prop-attn", "--amp"),
        ("--method", "tome", "--r", "8", "--quantize", "int8"),
        ("--method", "pitome", "--gflops", "0.012", "--margin", "0.75", "--unprotected", "0.5"),
        ("--method", "visionzip", "--num-kept", "30,20", "--keep-blocks", "1,3", "--contextual", "0.2"),
        ("--method", "divprune", "--keep-rate", "0.5", "--keep-blocks", "2"),
        ("--method", "cdpruner", "--gflops", "0.014"),
        ("--method", "dtome", "--thresholds", "0.8"),
        ("--method", "ats", "--samples", "30", "--keep-blocks", "1,2,4"),
    ],
    ids=" ".join,
)
def test_methods_cost_less(run, options):
    status, out, _ = run(*DIGITS, "--pretrained", "--num-samples", "40", "--json", *options)
    found = json.loads(out)
    assert status == 0
    assert found["num_images"] == 40 and found["gflops"] < 0.022 and found["top1"] > 50
    assert found["method_settings"].lower().startswith(f"{options[1]}(")


def test_budget_is_met(run):
    _, out, _ = run(*DIGITS, "--num-samples", "20", "--json", "--method", "tome", "--gflops", "0.012")
    assert json.loads(out)["gflops"] == pytest.approx(0.012, rel=0.05)


def test_schedule_file(run, tmp_path):
    from tokcomp import CompressionSchedule

    CompressionSchedule([65, 50, 40, 30, 20, 12], [65, 45, 35, 25, 15, 10]).save(tmp_path / "mine.json")
    schedule = ("--method", "diffrate", "--schedule", tmp_path / "mine.json")
    status, out, _ = run(*DIGITS, "--pretrained", "--num-samples", "40", *schedule)
    assert status == 0
    assert "DiffRate(" in out and "top-1" in out


def test_image_folder_and_results_file(run, image_folder, tmp_path):
    target = tmp_path / "out" / "result.json"
    status, out, _ = run(*TINY, image_folder, "--method", "tome", "--r", "4", "--results-file", target)
    assert status == 0
    found = json.loads(target.read_text())
    assert found["num_images"] == 6 and found["data"] == str(image_folder)
    assert f"written: {target}" in out and "random" in out


def test_samples_are_spread_over_the_classes(image_folder):
    from timm.data import create_dataset
    from tokcomp.data import SpreadSubset

    subset = SpreadSubset(create_dataset("", root=str(image_folder), split="validation"), 2)
    assert [label for _, label in subset] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "DATA must be a folder of images, got nothing; name one, or try --dataset digits"),
        (("nowhere",), "DATA must be a folder or archive of images, got 'nowhere', which does not exist"),
        (("a", "--data-dir", "b"), "DATA and --data-dir are the same thing, got both"),
        (("-b", "0"), "argument -b/--batch-size: must be a whole number above 0, got '0'"),
        (
            ("--r", "8"),
            "--r belongs to --method tome or tome_mlp or pitome, got --method none; change the method",
        ),
        (("--method", "tome", "--keep-rate", "0.7"), "--keep-rate belongs to --method evit or visionzip or divprune"),
        (("--method", "tome"), "--method tome needs --r or --gflops or --schedule, got none of them"),
        (
            ("--method", "tome", "--r", "0", "--gflops", "1"),
            "needs exactly one of --r or --gflops or --schedule, got --r and --gflops",
        ),
        (("--method", "tome", "--r", "-1"), "argument --r: "),
        (
            ("--method", "tome", "--r", "8,8"),
            "--method tome does not fit tokcomp_digits_vit: r must have one entry per block",
        ),
        (("--method", "tome", "--gflops", "9"), "--gflops: the budget must lie between 0.0"),
        (("--method", "evit", "--keep-rate", "1.5"), "--keep-rate: keep_rate must be in (0, 1], got 1.5"),
        (
            ("--method", "evit", "--num-pruned", "3", "--keep-blocks", "1"),
            "--keep-blocks goes with --keep-rate, got --num-pruned",
        ),
        (("--method", "pitome", "--r", "3", "--margin", "2"), "--method pitome: margin must be in [-1, 1]"),
        (("--method", "dtome", "--thresholds", "2"), "--thresholds: thresholds must be in [-1, 1]"),
        (("--method", "dtome", "--thresholds", "0.9,a"), "argument --thresholds: must be a number, got 'a'"),
        (("--method", "ats"), "--method ats needs --samples, got none of them"),
        (("--method", "divprune"), "--method divprune needs --keep-rate or --num-kept or --gflops, got none of them"),
        (
            ("--method", "divprune", "--num-kept", "70", "--keep-blocks", "1"),
            "num_kept must be at most the 64 patch tokens left in block 1, got 70",
        ),
        (("--method", "diffrate", "--gflops", "2.3"), "--gflops: name must be one of deit_tiny_patch16_224"),
        (("--method", "diffrate", "--schedule", "nowhere.json"), "--schedule must be a JSON file, got 'nowhere.json'"),
        (("--checkpoint", "nowhere.pth"), "--checkpoint must be a file, got 'nowhere.pth', which does not exist"),
        (("--checkpoint", __file__, "--pretrained"), "--pretrained and --checkpoint exclude each other"),
        (("--device", "abacus"), "--device must be a device of this machine, got 'abacus'"),
        (("--num-classes", "3"), "the model must have a class for each of the data set's 10, got a model of 3"),
        (("--quantize", "int8", "--amp"), "--quantize int8 takes no --amp; leave one of them out"),
        (
            ("--quantize", "int8", "--model-dtype", "bfloat16"),
            "--quantize int8: model cannot be quantised to int8: its weights must be float32",
        ),
        (("--amp-dtype", "int8"), "argument --amp-dtype: invalid choice: 'int8'"),
    ],
)
def test_mistakes_are_named(run, options, message):
    needs_data = not options or options[0] in ("nowhere", "a")
    argv = TINY if needs_data else DIGITS
    status, out, err = run(*argv, *options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err and out == ""


def test_unknown_model_is_refused_with_a_suggestion(refused):
    err = refused("evaluate", "--dataset", "digits", "-m", "deit_smal_patch16_224")
    assert (
        "--model must be a name that timm knows, got 'deit_smal_patch16_224'; did you mean deit_small_patch16_224"
        in err
    )


def test_unsupported_model_is_refused_by_name(refused):
    argv = ("evaluate", "--dataset", "digits", "-m", "resnet18", "--method", "tome", "--r", "4", "--device", "cpu")
    err = refused(*argv)
    assert "--model 'resnet18': " in err and "ResNet" in err


def test_broken_schedule_is_named(run, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    status, _, err = run(*DIGITS, "--method", "diffrate", "--schedule", tmp_path / "bad.json")
    assert status == 2 and "--schedule: " in err and "bad.json: a schedule must be a JSON object" in err


def test_empty_folder_is_named(refused, tmp_path):
    err = refused(*TINY, tmp_path)
    assert f"DATA '{tmp_path}' could not be opened as a data set" in err


def test_output_is_checked_before_the_work(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("work began"))
    assert "--results-file must be a file, got the folder" in refused(*DIGITS, "--results-file", tmp_path)


def test_interrupt_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tokcomp.measure.evaluate.evaluate", Mock(side_effect=KeyboardInterrupt))
    target = tmp_path / "result.json"
    assert main([*DIGITS, "--results-file", str(target)]) == 130
    assert "stopped after 0 images; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class _Answers(torch.nn.Module):
    """Logits are the pictures' first pixels."""

    def forward(self, images):
        return images[:, 0, 0]


def test_accuracy_is_counted_right():
    logits = torch.tensor([[0.9, 0.1, 0, 0, 0, -1.0], [0, 1, 0, 0, 0, 2], [0, 1, 2, 3, 4, 5]])
    images = logits[:, None, None]  # [3, 1, 1, 6]
    batches = [(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([0]))]
    found = evaluate(_Answers(), batches, device=torch.device("cpu"))
    assert found.top1 == pytest.approx(100 / 3)
    assert found.top5 == pytest.approx(200 / 3)  # the third image's own class is ranked sixth
    assert found.num_images == 3


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="batches must hold at least one image, got none"):
        evaluate(_Answers(), [], device=torch.device("cpu"))


def test_label_without_a_class_is_an_error():
    batches = [(torch.zeros(1, 1, 1, 4), torch.tensor([4]))]
    with pytest.raises(ValueError, match="labels must be below the model's 4 classes, got 4"):
        evaluate(_Answers(), batches, device=torch.device("cpu"))

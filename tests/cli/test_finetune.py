from __future__ import annotations

import json

import pytest
import timm
import tokcomp
import torch
from tokcomp.finetune.tuner import FineTuner

MODEL = ("finetune", "-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0")
DIGITS = (*MODEL, "--dataset", "digits", "--pretrained")
#: 1437 images: 5 steps an epoch.
SHORT = ("-b", "256", "--epochs", "0.6", "--method", "tome", "--r", "12")


@pytest.mark.slow
def test_digits(ran, tmp_path, few_images):
    out, _ = ran(*DIGITS, *SHORT, "-o", tmp_path, "--log-interval", "1")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["gflops"] < 0.5 * summary["uncompressed_gflops"]
    assert summary["settings"]["recipe"]["lr"] == 2e-5 and summary["settings"]["recipe"]["epochs"] == 0.6
    assert "ToMe(r=12" in out and "before" in out and "best (weights)" in out and f"written: {tmp_path}" in out
    names = {"best.safetensors", "checkpoint.pt", "curves.png", "last.safetensors", "log.csv", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} - {"tensorboard"} == names
    # Scored the same by evaluate, and loadable by timm alone.
    weights = str(tmp_path / "last.safetensors")
    model = timm.create_model("tokcomp_digits_vit", checkpoint_path=weights).eval()
    tokcomp.compress(model, tokcomp.ToMe(12))
    from tokcomp.runs.batches import held_out_batches
    from tokcomp.runs.data import Part, open_dataset
    from tokcomp.runs.recipe import plain_transform

    config = timm.data.resolve_model_data_config(model)
    part = Part(open_dataset("digits", None, split="validation"), range(20), plain_transform(config))
    images, labels = next(held_out_batches(part, 20)())
    with torch.no_grad():
        top1 = 100 * (model(images).argmax(-1) == labels).double().mean().item()
    assert top1 == pytest.approx(summary["last"]["top1"])


@pytest.mark.slow
def test_a_signal_stops_and_resume_goes_on_exactly(goes_on_exactly, few_images):
    command = (*DIGITS, *SHORT, "--model-ema-decay", "0.9", "--log-interval", "1")
    names = ("log.csv", "best.safetensors", "last.safetensors", "last_ema.safetensors")
    err = goes_on_exactly(FineTuner, command, names, "--lr", "1e-3")
    assert "--resume: a resumed run must keep its settings, got recipe = " in err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_reported(run, tmp_path, few_images, monkeypatch):
    step = FineTuner.step

    def ruinous(self, images, labels):
        return step(self, images * float("nan") if self.step_number == 1 else images, labels)

    monkeypatch.setattr(FineTuner, "step", ruinous)
    status, _, err = run(*DIGITS, *SHORT, "-o", tmp_path, "--checkpoint-interval", "1")
    assert status == 1
    assert "error: the loss of step 2 is nan; the checkpoint before it is kept" in err and "Traceback" not in err
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "summary.json").exists()


def test_from_scratch_takes_the_recipe_of_deit(ran, tmp_path, training_folder):
    options = ("--from-scratch", "-b", "4", "--num-classes", "2", "--epochs", "1", "--method", "evit")
    extra = ("--keep-rate", "0.7", "--grad-checkpointing", "--grad-accum-steps", "2", "--amp")
    ran(*MODEL, training_folder, *options, *extra, "--keep-blocks", "1,3", "-o", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    recipe = summary["settings"]["recipe"]
    assert recipe["lr"] == pytest.approx(5e-4 * 4 / 512) and recipe["min_lr"] == recipe["lr"] / 100
    assert recipe["repeated_aug"] == 3 and recipe["reprob"] == 0.25
    assert recipe["model_ema_decay"] == 0.99996 and recipe["warmup_epochs"] == 5
    assert summary["weights"] == "random weights" and summary["settings"]["amp"] == "bfloat16"
    assert (tmp_path / "run" / "last_ema.safetensors").exists()


def test_a_part_of_the_training_images_can_be_held_out(run, refused, ran, tmp_path, training_folder):
    (training_folder / "validation").rename(tmp_path / "elsewhere")
    command = (*MODEL, training_folder, "--from-scratch", "--num-classes", "2", "-b", "4", "--epochs", "1")
    command = (*command, "-o", tmp_path / "run")
    assert "DATA must have folders 'train' and 'validation', got " in refused(*command)
    assert run(*command, "--held-out", "16")[0] == 2
    ran(*command, "--held-out", "4")
    settings = json.loads((tmp_path / "run" / "summary.json").read_text())["settings"]
    assert (settings["train_images"], settings["val_images"]) == (12, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "fine-tuning needs trained weights, got none; pass --pretrained, --checkpoint FILE or --from-scratch",
        ),
        (("--pretrained", "--from-scratch"), "--from-scratch starts from random weights, got trained ones too"),
        (("--from-scratch", "-b", "7"), "--batch-size: the batch size must be a multiple of 2 (1 processes"),
        (("--from-scratch", "-b", "8", "--grad-accum-steps", "3"), "the batch size must be a multiple of 6"),
        (("--from-scratch", "--num-classes", "7"), "as many classes as the model's head, 7, got 10"),
        (("--from-scratch", "--opt", "typo"), "recipe: opt must be an optimizer that timm knows, got 'typo'"),
        (("--from-scratch", "--sched", "typo"), "recipe: sched must be a scheduler that timm knows, got 'typo'"),
        (("--from-scratch", "--smoothing", "1"), "recipe: smoothing must be in [0, 1), got 1.0"),
        (("--from-scratch", "--min-lr", "1"), "--min-lr must not be above --lr, got 1 and 0.001"),
        (("--from-scratch", "--amp", "--amp-dtype", "float16"), "in float16 must run on cuda, got cpu"),
        (("--from-scratch", "--method", "tome", "--r", "8,8"), "--method tome does not fit tokcomp_digits_vit: r"),
        (("--from-scratch", "--method", "diffrate", "--gflops", "2.3"), "--gflops: name must be one of deit_tiny"),
        (("--from-scratch", "--held-out", "1437"), "--held-out must leave images to train on, got 1437 of 1437"),
        (("--pretrained", "--reprob", "0.1"), "--reprob has no effect with --dataset digits, which are drawn anew"),
        (("--from-scratch", "--lr", "0"), "argument --lr: must be a number above 0, got '0'"),
        (("--from-scratch", "--mixup", "-1"), "argument --mixup: must be a number, 0 or more, got '-1'"),
        (("--from-scratch", "--resume"), "--resume: the checkpoint must be a file, got "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_named_before_anything_is_written(run, tmp_path, arguments, message):
    status, out, err = run(*MODEL, "--dataset", "digits", *arguments, "-o", tmp_path / "out")
    assert status == 2 and message in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    assert "--output must be a folder, got" in refused(*DIGITS, "-o", tmp_path / "file" / "run")


def test_data_without_images_or_labels_is_refused(run, tmp_path):
    for part in ("train", "validation"):
        (tmp_path / "empty" / part / "cat").mkdir(parents=True)
    status, _, err = run(*MODEL, tmp_path / "empty", "--from-scratch", "-o", tmp_path / "out")
    assert status == 2 and "DATA" in err and "Traceback" not in err and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dynamicvit"])
def test_trained_parts_come_along(run, ran, tmp_path, few_images, method):
    """A run makes them, its checkpoint has them, and evaluate and another run go on with them."""
    options = ("--method", method, "--keep-rate", "0.6")
    short = (*options, "-b", "32", "--epochs", "0.03", "--mixup", "0", "--cutmix", "0")
    ran(*DIGITS, *short, "-o", tmp_path / "one")
    weights = tmp_path / "one" / "last.safetensors"
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    data = ("--dataset", "digits", "-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0")
    out, _ = ran("evaluate", *data, "--checkpoint", weights, *options, "--num-samples", "20", "--json")
    assert json.loads(out)["gflops"] == pytest.approx(summary["gflops"])
    ran(*MODEL, "--dataset", "digits", "--checkpoint", weights, *short, "-o", tmp_path / "two")
    second = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert second["before"] == summary["last"] and second["settings"]["teacher"] == f"weights from {weights}"
    status, _, err = run(*DIGITS, *short, "--torchcompile", "-o", tmp_path / "three")
    assert status == 2 and f"--method {method} takes no --torchcompile" in err
    status, _, err = run(*DIGITS, *options, "--adaptformer", "-o", tmp_path / "three")
    assert status == 2 and "--adaptformer keeps branches and classifier alone, got --method" in err
    status, _, err = run("evaluate", *data, "--pretrained", *options, "--num-samples", "20")
    assert (
        status == 2 and f"--method {method} does not fit tokcomp_digits_vit: model must have the trained parts" in err
    )
    assert not (tmp_path / "three").exists()

from __future__ import annotations

import argparse
import json

import pytest
import timm
import tokcomp
import torch
from safetensors.torch import load_file
from tokcomp import assets  # noqa: F401  registers the digits model with timm
from tokcomp.cli.tocom import train
from tokcomp.cli.training import Job
from tokcomp.runs.distributed import ALONE
from tokcomp.runs.recipe import TOCOM_RECIPE
from tokcomp.tocom.distill import Distiller

MODEL = ("-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu")
DIGITS = (*MODEL, "--dataset", "digits", "-j", "0")
STEP = ("--source", "0", "--target", "2")
#: 1437 images: 22 steps an epoch.
SHORT = ("-b", "64", "--epochs", "0.15", "--max-degree", "6", "--log-interval", "1")


@pytest.fixture
def digits_vit():
    return timm.create_model("tokcomp_digits_vit", pretrained=True).eval()


@pytest.fixture
def plugin(tmp_path, digits_vit):
    """A plugin for the digits model that changes what it answers."""
    plugin = tokcomp.ToCom(digits_vit, max_degree=6)
    torch.manual_seed(0)
    with torch.no_grad():
        for up in (*plugin.q_up, *plugin.v_up):
            up.normal_()
    plugin.save(tmp_path / "plugin.safetensors")
    return plugin


@pytest.mark.slow
def test_train(ran, tmp_path, digits_vit):
    out, _ = ran("tocom", "train", *DIGITS, *SHORT, "-o", tmp_path / "run")
    assert "degrees 0 to 6" in out and f"written: {tmp_path / 'run' / 'tocom.safetensors'}" in out
    names = {"checkpoint.pt", "log.csv", "summary.json", "tocom.safetensors"}
    assert {path.name for path in (tmp_path / "run").iterdir()} - {"tensorboard"} == names
    plugin = tokcomp.ToCom.load(tmp_path / "run" / "tocom.safetensors", digits_vit)
    assert (plugin.method, plugin.max_degree, plugin.rank) == ("tome", 6, 2) and plugin.q_up[0].any()
    settings = plugin.provenance["settings"]
    plain = {"aa": None, "hflip": 0.0, "color_jitter": 0.0, "reprob": 0.0}  # digits are drawn anew each time
    assert settings["recipe"] == {**TOCOM_RECIPE.describe(), **plain, "batch_size": 64, "epochs": 0.15}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


@pytest.mark.slow
def test_a_signal_stops_and_resume_goes_on_exactly(goes_on_exactly):
    command = ("tocom", "train", *DIGITS, *SHORT, "--method", "evit")
    err = goes_on_exactly(Distiller, command, ("log.csv", "tocom.safetensors"), "--scale", "0.2")
    assert "--resume: a resumed run must keep its settings, got scale = 0.2" in err


def test_a_loss_that_is_not_finite_is_reported(run, tmp_path, monkeypatch):
    step = Distiller.step
    monkeypatch.setattr(Distiller, "step", lambda self, images, labels: step(self, images * float("nan")))
    status, _, err = run("tocom", "train", *DIGITS, *SHORT, "-o", tmp_path / "run")
    assert status == 1 and "tokcomp tocom: error: the loss of step 1 is nan" in err and "Traceback" not in err


def test_the_ablations_of_table_5_are_options(run, ran, tmp_path, digits_vit):
    command = ("tocom", "train", *DIGITS, "-b", "8", "--epochs", "0.01", "--max-degree", "3", "--rank", "1")
    varied = ("--arithmetic", "two_way", "--loss", "labels", "--scale", "0.2", "--smoothing", "0.05")
    ran(*command, *varied, "-o", tmp_path / "run")
    plugin = tokcomp.ToCom.load(tmp_path / "run" / "tocom.safetensors", digits_vit)
    assert plugin.arithmetic == "two_way" and len(plugin.q_down[0]) == 6
    settings = plugin.provenance["settings"]
    assert {name: settings[name] for name in ("arithmetic", "loss", "scale", "rank")} == dict(
        arithmetic="two_way", loss="labels", scale=0.2, rank=1
    )
    assert settings["recipe"]["smoothing"] == 0.05
    status, _, err = run(*command, "--num-classes", "7", "--loss", "labels", "-o", tmp_path / "seven")
    assert status == 2 and "--dataset" in err and "7" in err and not (tmp_path / "seven").exists()


def test_train_between_schedules(run, ran, tmp_path, digits_vit):
    depth = len(digits_vit.blocks)
    files = []
    for index, last in enumerate((40, 20)):
        counts = [65 - (65 - last) * block // (depth - 1) for block in range(depth)]
        tokcomp.CompressionSchedule(counts, counts).save(tmp_path / f"{index}.json")
        files.append(tmp_path / f"{index}.json")
    command = ("tocom", "train", *DIGITS, "-b", "32", "--epochs", "0.03", "--method", "diffrate")
    ran(*command, "--schedules", *files, "-o", tmp_path / "run", "--amp", "--grad-checkpointing")
    trained = tmp_path / "run" / "tocom.safetensors"
    assert tokcomp.ToCom.load(trained, digits_vit).max_degree == 2
    scored = ("tocom", "evaluate", *DIGITS, "--num-samples", "10", "--plugin", trained, "--method", "diffrate")
    out, _ = ran(*scored, "--schedules", *files, "--json")
    cells = json.loads(out)["cells"]
    assert [cell["target"] for cell in cells] == [0, 1, 2]
    assert cells[0]["gflops"] > cells[1]["gflops"] > cells[2]["gflops"]
    status, _, err = run(*scored, "--schedules", files[0])
    assert status == 2 and "--schedules must be 2, one per degree of the plugin above 0, got 1" in err
    status, _, err = run(*command, "--schedules", *files, "--max-degree", "3", "-o", tmp_path / "other")
    assert status == 2 and "--max-degree must be the number of --schedules, 2, got 3" in err


def test_apply(run, tmp_path, digits_vit, plugin):
    written = tmp_path / "folded.safetensors"
    command = ("tocom", "apply", *MODEL, "--plugin", tmp_path / "plugin.safetensors", "--scale", "0.05")
    status, out, err = run(*command, "--source", "1", "--target", "5", "-o", written)
    assert status == 0 and out == f"written: {written} (degree 1 to 5 at scale 0.05)\n", err
    folded = timm.create_model("tokcomp_digits_vit", checkpoint_path=str(written)).eval()
    plugin.fold(digits_vit, 1, 5, 0.05)
    for name, tensor in digits_vit.state_dict().items():
        assert torch.equal(folded.state_dict()[name], tensor), name


def test_apply_goes_on_from_the_degree_it_wrote(run, ran, tmp_path, digits_vit, plugin):
    command = ("tocom", "apply", "-m", "tokcomp_digits_vit", "--plugin", tmp_path / "plugin.safetensors")
    at = {degree: tmp_path / f"{degree}.safetensors" for degree in (4, 6)}
    assert run(*command, "--pretrained", "--source", "0", "--target", "4", "-o", at[4])[0] == 0
    status, _, err = run(*command, "--checkpoint", at[4], "--source", "0", "--target", "6", "-o", at[6])
    assert status == 2 and not at[6].exists()
    assert "--source must be 4, the degree that a plugin in" in err and "got 0; start from the weights without" in err
    ran(*command, "--checkpoint", at[4], "--source", "4", "--target", "6", "-o", at[6])
    plugin.fold(digits_vit, 0, 6)
    found = load_file(at[6])["blocks.1.attn.qkv.weight"]
    torch.testing.assert_close(found, digits_vit.blocks[1].attn.qkv.weight.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [((), "cuda", True), ((), "cpu", False), (("--no-amp",), "cuda", False), (("--amp",), "cpu", True)],
)
def test_mixed_precision_is_the_default_on_a_gpu(given, device, expected):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    job = Job(parser.parse_args(["DATA", *given]), torch.device(device), ALONE)
    assert job.amp_dtype is (torch.bfloat16 if expected else None)


def test_evaluate(run, ran, tmp_path, digits_vit, plugin):
    pytest.importorskip("matplotlib")
    weights = tmp_path / "at6.safetensors"
    trained = ("--plugin", tmp_path / "plugin.safetensors")
    assert run("tocom", "apply", *MODEL, *trained, "--source", "0", "--target", "6", "-o", weights)[0] == 0
    command = ("tocom", "evaluate", "-m", "tokcomp_digits_vit", "--dataset", "digits", "-j", "0", *trained)
    options = ("--device", "cpu", "--num-samples", "40", "--checkpoint", weights, "--scale", "0.3")
    files = ("--heat-map", tmp_path / "gains.png", "--results-file", tmp_path / "result.json")
    out, _ = ran(*command, *options, "--source", "6", f"2={weights}", "--targets", "0,6", *files)
    lines = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert lines[3:9] == ["6", "6 + ToCom", "2", "2 + ToCom", "GFLOPs", "images/s"]
    assert (tmp_path / "gains.png").read_bytes()[:4] == b"\x89PNG"
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert [(cell["source"], cell["target"]) for cell in cells] == [(6, 0), (6, 6), (2, 0), (2, 6)]
    assert cells[1]["without"] == cells[1]["with_tocom"]
    # By hand, for one cell.
    from tokcomp.runs.data import Part, open_dataset, spread_sample
    from tokcomp.runs.recipe import plain_transform

    model = timm.create_model("tokcomp_digits_vit", checkpoint_path=str(weights)).eval()
    dataset = open_dataset("digits", None, split="validation")
    config = timm.data.resolve_model_data_config(model)
    part = Part(dataset, spread_sample(dataset, 40, 0), plain_transform(config))
    plugin.fold(model, 2, 6, 0.3)
    tokcomp.compress(model, tokcomp.ToMe(6))
    images, labels = zip(*part, strict=True)
    with torch.no_grad():
        right = (model(torch.stack(images)).argmax(-1) == torch.tensor(labels)).double().mean()
    assert cells[3]["with_tocom"] == pytest.approx(100 * right.item())
    assert any(cell["without"] != cell["with_tocom"] for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--dataset", "digits"), "training a plugin needs a trained model, got none; pass --pretrained"),
        (("train", *DIGITS, "-b", "7"), "--batch-size: the batch size must be a multiple of 2"),
        (("train", *DIGITS, "--opt", "typo"), "opt must be an optimizer that timm knows, got 'typo'"),
        (("train", *DIGITS, "--no-fuse"), "--no-fuse belongs to --method evit, got --method tome"),
        (("train", *DIGITS, "--method", "diffrate"), "--method diffrate needs --schedules FILE ..., got none"),
        (("train", *DIGITS, "--max-degree", "0"), "argument --max-degree: must be a whole number above 0, got '0'"),
        (("train", *DIGITS, "--min-lr", "1"), "--min-lr must not be above --lr, got 1 and 0.001"),
        (("train", *DIGITS, "--resume"), "--resume: the checkpoint must be a file, got "),
        (("train", "-m", "resnet18", "--pretrained"), "DATA must be a folder of images, got nothing"),
        (
            ("apply", *MODEL, "--plugin", "none", "--source", "0", "--target", "2"),
            "--plugin must be a file, got 'none'",
        ),
        (
            ("apply", "-m", "tokcomp_digits_vit", "--plugin", "PLUGIN", "--source", "0", "--target", "2"),
            "a plugin needs trained weights, got none; pass --checkpoint FILE or --pretrained",
        ),
        (
            ("apply", *MODEL, "--plugin", "PLUGIN", "--source", "0", "--target", "7"),
            "--source and --target: target must be a degree from 0 to 6, got 7",
        ),
        (
            (*("apply", "-m", "deit_tiny_patch16_224", "--checkpoint", "WEIGHTS"), *STEP, "--plugin", "PLUGIN"),
            "does not fit deit_tiny_patch16_224",
        ),
        (
            ("evaluate", *DIGITS, "--plugin", "PLUGIN", "--targets", "0,9"),
            "--targets must be from 0 to 6, as the plugin's",
        ),
        (("evaluate", *DIGITS, "--plugin", "PLUGIN", "--source", "2", "2"), "--source must name each degree once"),
        (
            ("evaluate", *DIGITS, "--plugin", "PLUGIN", "--source", "2", "3=x"),
            "--pretrained and checkpoints by --source",
        ),
        (
            ("evaluate", "-m", "tokcomp_digits_vit", "--dataset", "digits", "--plugin", "PLUGIN"),
            "--source 0 takes the model's own weights, got none",
        ),
        (
            ("evaluate", *DIGITS, "--plugin", "PLUGIN", "--source", "7", "--targets", "0"),
            "--source must be from 0 to 6, as the plugin's",
        ),
        (("evaluate", *DIGITS, "--plugin", "TOME", "--method", "evit"), "--method must be tome, which the plugin was"),
        (
            (*("evaluate", "-m", "tokcomp_digits_vit", "--dataset", "digits", "--plugin", "PLUGIN"), "--source", "2=x"),
            "--source 2 must name a file, got 'x', which does not exist",
        ),
        (("evaluate", *DIGITS, "--plugin", "WEIGHTS"), "must be a ToCom plugin, got a file of"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistakes_are_named_before_anything_is_written(
    run, tmp_path, monkeypatch, plugin, digits_vit, arguments, message
):
    from safetensors.torch import save_file

    save_file(digits_vit.state_dict(), tmp_path / "weights.safetensors")
    places = {name: tmp_path / f"{name.lower()}.safetensors" for name in ("PLUGIN", "TOME", "WEIGHTS")}
    plugin.method = "tome"
    plugin.save(places["TOME"])
    # Nothing is scored before all that can be refused is.
    monkeypatch.setattr("tokcomp.measure.evaluate.evaluate", lambda *_, **__: pytest.fail("scored"))
    arguments = [places.get(argument, argument) for argument in arguments]
    output = () if arguments[0] == "evaluate" else ("-o", tmp_path / "out")
    status, out, err = run("tocom", *arguments, *output)
    assert status == 2 and message in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists()


def test_without_an_action(run, refused):
    assert "the following arguments are required: ACTION" in refused("tocom")
    status, out, _ = run("tocom", "--help")
    assert status == 0 and all(action in out for action in ("train", "apply", "evaluate"))

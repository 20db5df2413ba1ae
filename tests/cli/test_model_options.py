"""--gp, --model-kwargs and --checkpoint: models that differ from timm's defaults, from the command line."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tokcomp.cli import COMMANDS, main
from tokcomp.cli.misfits import misfits

SHAPE = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
KWARGS = ("--model-kwargs", *(f"{name}={value}" for name, value in SHAPE.items()))
MAE = ("-m", "vit_base_patch16_224.mae", "--img-size", "32", "--device", "cpu")
DIGITS = ("--dataset", "digits", "-j", "0", "-b", "8")


@pytest.fixture
def weights(tmp_path):
    """An average-pooled classifier as MAE's fine-tuning writes it: fc_norm, and the tensors under ``model``."""
    model = timm.create_model("vit_base_patch16_224.mae", img_size=32, num_classes=10, global_pool="avg", **SHAPE)
    assert {"fc_norm.weight", "head.weight"} <= model.state_dict().keys() and "norm.weight" not in model.state_dict()
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    return tmp_path / "mae.pth"


def test_an_average_pooled_classifier_is_evaluated(ran, weights):
    """Its logits are those of the model that was saved."""
    options = (*DIGITS, *MAE, *KWARGS, "--gp", "avg", "--num-classes", "10", "--num-samples", "16", "--json")
    out, _ = ran("evaluate", "--checkpoint", weights, *options)
    found = json.loads(out)
    assert found["model_settings"] == {"global_pool": "avg", **SHAPE}
    out, _ = ran("evaluate", "--checkpoint", weights, *options, "--method", "tome", "--r", "2")
    assert json.loads(out)["gflops"] < found["gflops"]


def test_the_error_names_the_options_that_are_missing(run, refused, weights):
    given = ("evaluate", "--checkpoint", weights, *DIGITS, *MAE)
    err = refused(*given, *KWARGS)
    assert "does not fit vit_base_patch16_224.mae as it was built: its norm comes after pooling (fc_norm)" in err
    assert "it has 10 classes; add --gp avg --num-classes 10" in err
    shallow = (*KWARGS[:2], "depth=3", *KWARGS[3:])
    _, _, err = run(*given[:-4], "--img-size", "48", *given[-2:], *shallow, "--gp", "avg", "--num-classes", "10")
    assert "it has 2 blocks, it is for images of 32 x 32; add --img-size 32 --model-kwargs depth=2" in err


def test_pretrained_weights_that_do_not_fit_are_not_blamed_on_the_network(run):
    given = ("evaluate", *DIGITS, "-m", "tokcomp_digits_vit", "--pretrained", "--num-samples", "8")
    status, _, err = run(*given, "--gp", "avg")
    assert status == 2 and "'tokcomp_digits_vit' do not fit it as it was built (Missing key(s) in state_dict" in err
    assert "add --model-kwargs fc_norm=False, which leaves a ViT's norm before its pooling" in err
    assert run(*given, "--gp", "avg", "--model-kwargs", "fc_norm=False")[0] == 0
    _, _, err = run(*given, "--model-kwargs", "depth=7")
    assert "do not fit it as it was built" in err and "leave out the options that make it another model" in err


CURES = {
    "--gp token": ({"global_pool": "token"}, {"global_pool": "avg"}),
    "--model-kwargs reg_tokens=4": ({"reg_tokens": 4}, {}),
    "--model-kwargs class_token=False": ({"class_token": False, "global_pool": "avg"}, {"global_pool": "avg"}),
    "--model-kwargs init_values=1e-5": ({"init_values": 1e-5}, {}),
    "--model-kwargs qk_norm=True": ({"qk_norm": True}, {}),
    "--model-kwargs pre_norm=True": ({"pre_norm": True}, {}),
    "--img-size 64": ({"img_size": 64}, {}),
    "--num-classes 7": ({"num_classes": 7}, {}),
}


@pytest.mark.parametrize("cure", CURES)
def test_what_a_checkpoint_says_of_its_model(cure):
    base = dict(img_size=32, num_classes=5, **SHAPE)
    saved, built = (VisionTransformer(**{**base, **options}) for options in CURES[cure])
    assert [flag for _, flag in misfits(built, saved.state_dict())] == [cure]
    assert misfits(saved, saved.state_dict()) == []
    assert misfits(VisionTransformer(**{**base, "embed_dim": 12}), saved.state_dict()) == []  # another model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model-kwargs", "depth"), "argument --model-kwargs: must be NAME=VALUE, got 'depth'"),
        (("--model-kwargs", "num_classes=3"), "--model-kwargs must not set num_classes, which is for --num-classes"),
        (("--model-kwargs", "global_pool=avg"), "which is for --gp; got global_pool='avg'"),
        (("--model-kwargs", "breadth=3"), "could not be built with {'breadth': 3"),
        (("--gp", "median"), "--gp must be a pooling that tokcomp_digits_vit knows"),
    ],
)
def test_mistakes_are_named(run, options, message):
    status, out, err = run("evaluate", *DIGITS, "-m", "tokcomp_digits_vit", "--device", "cpu", *options)
    assert status == 2 and out == ""
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    ["evaluate", "search", "finetune", "visualize", "bench", "export", "serve-sim"]
    + [f"tocom {action}" for action in ("train", "apply", "evaluate")],
)
def test_every_command_takes_them(command, capsys):
    assert command.split()[0] in COMMANDS
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    for option in ("--gp POOL", "--model-kwargs", "--checkpoint FILE"):
        assert option in text

"""AdaptFormer on the command line: training the branches, and running models with them."""

from __future__ import annotations

import json

import pytest
import timm
import tokcomp
import torch
from safetensors.torch import load_file, save_file
from tokcomp import adaptformer, assets  # noqa: F401  registers the digits model with timm

MODEL = ("-m", "tokcomp_digits_vit", "--device", "cpu")
DIGITS = (*MODEL, "--dataset", "digits", "-j", "0", "--pretrained")
#: 1437 images: 11 steps an epoch.
SHORT = ("--adaptformer", "--bottleneck", "8", "-b", "128", "--epochs", "0.3", "--method", "tome", "--r", "12")


@pytest.fixture
def adapter(tmp_path):
    """Branches for the digits model that change its answers."""
    model = adaptformer.attach(timm.create_model("tokcomp_digits_vit", pretrained=True).eval(), 4, 1.0)
    torch.manual_seed(0)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.adapter.up.weight.normal_()
    adaptformer.save(model, tmp_path / "adapter.safetensors")
    return model


@pytest.mark.slow
def test_finetune_and_evaluate(run, ran, tmp_path, few_images):
    arguments = ("--lr", "0.01", "--adapter-scale", "0.5", "-o", tmp_path / "run")
    out, _ = ran("finetune", *DIGITS, *SHORT, *arguments)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    trained = 6 * (2 * 64 * 8 + 64 + 8) + 64 * 10 + 10
    assert f"AdaptFormer: {trained} parameters trained, the others frozen" in out
    assert summary["adaptformer"] == {"bottleneck": 8, "scale": 0.5, "trained_parameters": trained}
    recipe = summary["settings"]["recipe"]
    assert (recipe["lr"], recipe["weight_decay"], recipe["smoothing"]) == (0.01, 1e-4, 0)
    weights = tmp_path / "run" / "last.safetensors"
    assert sum(tensor.numel() for tensor in load_file(weights).values()) == trained
    model = timm.create_model("tokcomp_digits_vit", pretrained=True)
    assert adaptformer.load(weights, model).blocks[0].mlp.adapter.up.weight.any()
    out, _ = ran("evaluate", *DIGITS, "--method", "tome", "--r", "12", "--adapter", weights, "--json")
    result = json.loads(out)
    assert result["weights"] == f"pretrained weights, branches from {weights}"
    assert result["gflops"] == pytest.approx(summary["gflops"])
    expected = _top1(tokcomp.compress(model.eval(), tokcomp.ToMe(12)))
    assert result["top1"] == pytest.approx(expected)
    # Another bottleneck is another run.
    status, _, err = run("finetune", *DIGITS, *SHORT, *arguments, "--bottleneck", "4", "--resume")
    assert status == 2 and "a resumed run must keep its settings, got adaptformer" in err


def _top1(model):
    from tokcomp.demo import digits_batches
    from tokcomp.measure.evaluate import evaluate

    return evaluate(model, digits_batches(model), device=torch.device("cpu")).top1


@pytest.mark.slow
def test_tocom_evaluate(ran, tmp_path, adapter):
    plugin = tokcomp.ToCom(adapter, max_degree=6)
    torch.manual_seed(0)
    with torch.no_grad():
        for up in (*plugin.q_up, *plugin.v_up):
            up.normal_()
    plugin.save(tmp_path / "plugin.safetensors")
    files = ("--plugin", tmp_path / "plugin.safetensors", "--adapter", tmp_path / "adapter.safetensors")
    out, _ = ran("tocom", "evaluate", *DIGITS, *files, "--scale", "0.5", "--targets", "6", "--json")
    cell = json.loads(out)["cells"][0]
    tokcomp.compress(adapter, tokcomp.ToMe(6))
    assert cell["without"] == pytest.approx(_top1(adapter), abs=1e-3)
    plugin.fold(adapter, 0, 6, 0.5)
    assert cell["with_tocom"] == pytest.approx(_top1(adapter), abs=1e-3)
    assert cell["without"] != cell["with_tocom"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", *DIGITS, "--bottleneck", "8"), "--bottleneck belongs to --adaptformer, which is not given"),
        (("finetune", *DIGITS, "--adapter-scale", "1"), "--adapter-scale belongs to --adaptformer, which is not given"),
        (
            ("finetune", *MODEL, "--dataset", "digits", "--adaptformer", "--from-scratch"),
            "--adaptformer leaves the model's weights as they are, got --from-scratch too; leave one out",
        ),
        (
            ("finetune", "--dataset", "digits", "-m", "resnet18", "--checkpoint", "RESNET", "--adaptformer"),
            "--model 'resnet18': a timm.models.resnet.ResNet is not a model that tokcomp understands",
        ),
        (
            ("evaluate", *DIGITS, "--adapter", "nothing"),
            "--adapter must be a file, got 'nothing', which does not exist",
        ),
        (("evaluate", *DIGITS, "--adapter", "OTHER"), "must be an AdaptFormer file, got a file of 1 other tensors"),
        (
            ("evaluate", *MODEL, "--dataset", "digits", "--checkpoint", "ADAPTER"),
            "--checkpoint must have a model's weights, got AdaptFormer branches in",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(run, tmp_path, adapter, arguments, message):
    save_file({"some": torch.ones(1)}, tmp_path / "other.safetensors")
    if "RESNET" in arguments:
        save_file(timm.create_model("resnet18", num_classes=10).state_dict(), tmp_path / "resnet.safetensors")
        arguments = (*arguments, "--num-classes", "10")
    places = {name: tmp_path / f"{name.lower()}.safetensors" for name in ("OTHER", "ADAPTER", "RESNET")}
    output = ("-o", tmp_path / "out") if arguments[0] == "finetune" else ()
    status, out, err = run(*(places.get(argument, argument) for argument in arguments), *output)
    assert status == 2 and message in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "out").exists()

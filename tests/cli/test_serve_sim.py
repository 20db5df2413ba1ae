from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import tokcomp
import torch
from tokcomp import assets  # noqa: F401  registers the digits model with timm

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
FILES = {"results.json", "table.txt", "serve-sim.png", "requests.csv"}
SHORT = ("--num-samples", "20", "--seconds", "0.2", "--rate", "150", "-b", "4", "--device", "cpu")


def command(*arguments):
    return [sys.executable, "-m", "tokcomp", "serve-sim", *map(str, arguments)]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_it_writes_everything_and_its_numbers_agree(tmp_path):
    arguments = (*SHORT, "--degrees", "0,8", "--up", "3", "--down", "1", "-o", tmp_path / "out")
    done = subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "images/s with a full queue" in done.stderr and "3/3 adaptive" in done.stderr
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (tmp_path / "out" / "table.txt").read_text() in done.stdout
    assert result["weights"] == "pretrained weights" and result["thresholds"] == {"up": [3], "down": [1]}
    with (tmp_path / "out" / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [one["policy"] for one in result["policies"]] == ["fixed 0", "fixed 8", "adaptive"]
    requests = {}
    for one in result["policies"]:
        own = [row for row in rows if row["policy"] == one["policy"]]
        requests[one["policy"]] = [(row["image"], row["arrival"]) for row in own]
        assert len(own) == one["requests"] and one["requests"] > 5
        latency = [1000 * (float(row["finished"]) - float(row["arrival"])) for row in own]
        assert one["p95_ms"] == pytest.approx(float(np.percentile(latency, 95)), abs=0.01)
        assert one["top1"] == pytest.approx(100 * np.mean([row["answer"] == row["label"] for row in own]), abs=1e-3)
        for degree, share in one["degrees"].items():
            assert share == pytest.approx(np.mean([row["degree"] == degree for row in own]), abs=1e-4)
    assert requests["fixed 0"] == requests["fixed 8"] == requests["adaptive"]  # the same load for all


@pytest.mark.slow
def test_a_plugin_other_images_and_json(ran, tmp_path, image_folder):
    from safetensors.torch import save_file

    model = timm.create_model("tokcomp_digits_vit", num_classes=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    plugin = tokcomp.ToCom(model, max_degree=6)
    with torch.no_grad():
        for up in (*plugin.q_up, *plugin.v_up):
            up.normal_()
    plugin.method = "evit"
    plugin.save(tmp_path / "plugin.safetensors")
    own = ("--num-classes", "2", "--checkpoint", tmp_path / "weights.safetensors")
    arguments = (image_folder, "-j", "0", *own, "--plugin", tmp_path / "plugin.safetensors", "--method", "evit")
    out, _ = ran("serve-sim", *arguments, *SHORT, "--model-dtype", "bfloat16", "-o", tmp_path, "--json")
    result = json.loads(out)
    assert result["dtype"] == "bfloat16" and list(result["methods"]) == ["0", "6"]
    assert "EViT(num_pruned=6" in result["methods"]["6"] and result["data"] == str(image_folder)
    assert json.loads((tmp_path / "results.json").read_text()) == result


@pytest.mark.slow
def test_ctrl_c_leaves_no_files(tmp_path):
    arguments = (*SHORT[:2], *SHORT[4:], "--seconds", "600", "--degrees", "0,8", "-o", tmp_path / "out")
    process = subprocess.Popen(
        command(*arguments),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has its children ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for line in process.stderr:
            if line.startswith("load:"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert process.stderr.read().endswith("tokcomp serve-sim: interrupted\n")
    finally:
        process.kill()
        process.stderr.close()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--degrees", "8,0"), "--degrees must be two or more, rising, got 8,0"),
        (("--degrees", "4"), "--degrees must be two or more, rising, got 4"),
        (("--up", "9,5,20,30"), "--up and --down: up must rise, got [9, 5, 20, 30]"),
        (("--up", "9"), "--up and --down: up must have one number per step between degrees, 4, got 1"),
        (("--base", "2"), "--base must not be above --peak, got 2 and 1.5"),
        (("--plugin", "nothing"), "--plugin must be a file, got 'nothing'"),
        (("--plugin", "PLUGIN", "--degrees", "0,7"), "--degrees must be from 0 to 6, as the plugin's are, got 7"),
        (("--plugin", "PLUGIN", "--source", "9"), "--source must be from 0 to 6, as the plugin's are, got 9"),
        (("--plugin", "PLUGIN", "--method", "evit"), "trained with the method tome, got a model compressed by evit"),
        (("-m", "resnet18"), "--model 'resnet18'"),
        (
            ("-m", "tokcomp_digits_vit", "--num-classes", "3"),
            "the model must have a class for each of the data set's 10, got a model of 3",
        ),
        (("/no/such/folder",), "DATA must be a folder or archive of images, got '/no/such/folder'"),
        (("--schedules", "x.json"), "--schedules belongs to --method diffrate"),
        (("--seconds", "0"), "argument --seconds: must be a number above 0, got '0'"),
        (
            ("--seconds", "0.01", "--rate", "10", "--degrees", "0,8", "-b", "2"),
            "--seconds must be long enough for 10 requests or more",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_named_before_anything_is_served(run, tmp_path, arguments, message):
    if "PLUGIN" in arguments:
        plugin = tokcomp.ToCom(timm.create_model("tokcomp_digits_vit"), max_degree=6)
        plugin.method = "tome"
        plugin.save(tmp_path / "plugin.safetensors")
    arguments = [tmp_path / "plugin.safetensors" if argument == "PLUGIN" else argument for argument in arguments]
    status, out, err = run("serve-sim", *arguments, "--device", "cpu", "-o", tmp_path / "out")
    assert status == 2 and message in err and "Traceback" not in err and out == ""
    assert "adaptive" not in err and not (tmp_path / "out").exists()

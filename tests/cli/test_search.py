from __future__ import annotations

import json
import os
import signal
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from tokcomp import CompressionSchedule
from tokcomp.cli.search_report import _miss
from tokcomp.runs.checkpoint import load_checkpoint
from tokcomp.runs.recipe import SEARCH_RECIPE

SHORT = ("-b", "8", "--steps", "6", "--log-interval", "1", "--checkpoint-interval", "2", "--eval-interval", "0")
MODEL = ("-m", "tokcomp_digits_vit", "--device", "cpu", "-j", "0")
DIGITS = ("search", "--dataset", "digits", *MODEL, "--pretrained", *SHORT)
TARGET = ("--target-gflops", "0.0105")


def searched(ran, folder, *options):
    return ran(*DIGITS, *TARGET, "-o", folder, *options)


@pytest.mark.slow
def test_digits(run, ran, tmp_path):
    out, err = searched(ran, tmp_path / "run", "--eval-interval", "3", "--steps", "6")
    schedule = CompressionSchedule.load(tmp_path / "run" / "schedule.json")
    assert {"schedule.json", "log.csv", "kept.png", "summary.json", "checkpoint.pt"} <= set(
        os.listdir(tmp_path / "run")
    )
    assert schedule.provenance["settings"]["model"] == "tokcomp_digits_vit"
    assert schedule.provenance["settings"]["held_out_images"] == 360 and schedule.provenance["top1"] > 90
    assert "--resume" not in schedule.provenance["command"]
    for text in ("uncompressed", "0.02261", "schedule.json", f"written: {tmp_path / 'run'}", "tokcomp evaluate"):
        assert text in out
    assert "search longer" in out  # six steps move next to nothing
    assert "search step 3/6: top-1 9" in err and "kept 65 " in err and "step 1/6" not in err
    (following,) = [line for line in out.splitlines() if line.startswith("Next: tokcomp ")]
    status, out, _ = run(*following.split()[2:], "--json")
    found = json.loads(out)
    assert status == 0
    assert found["top1"] == pytest.approx(schedule.provenance["top1"], abs=1e-4)
    assert found["gflops"] == pytest.approx(schedule.provenance["gflops"], abs=1e-6)


@pytest.mark.parametrize(
    ("cost", "more", "said"),
    [
        (1.01, {}, None),
        (1.3, {"searched": True}, "1.3 ms is 30% above 1: search longer"),
        (0.7, {}, "0.7 ms is 30% below 1: the target is met; --steps or --lr may bring it nearer"),
        (0.7, {"searched": True}, "0.7 ms is 30% below 1: the hardware found meets the target"),
    ],
)
def test_a_target_that_is_met_wants_no_longer_search(cost, more, said):
    line = _miss(cost, {"target": 1.0, "unit": "ms", **more})
    assert line is None if said is None else line.startswith(said)


@pytest.mark.slow
def test_several_targets_and_json(run, tmp_path):
    status, out, _ = run(*DIGITS, "--target-gflops", "0.012", "0.015", "--steps", "2", "-o", tmp_path, "--json")
    summary = json.loads(out)
    assert status == 0 and summary == json.loads((tmp_path / "summary.json").read_text())
    assert [target["name"] for target in summary["targets"]] == ["0.012", "0.015"]
    assert [target["budgets"][0]["target"] for target in summary["targets"]] == [0.012, 0.015]
    assert {"schedule-0.012.json", "schedule-0.015.json", "log-0.012.csv"} <= set(os.listdir(tmp_path))


@pytest.fixture
def latency_table(tmp_path):
    """Of a device where a part takes as many milliseconds as tokens, in steps of 8; batches of 4."""
    import timm
    import tokcomp.assets  # noqa: F401
    from tokcomp.budgets import LatencyTable
    from tokcomp.budgets.vit_parts import uniform_blocks

    counts = sorted({2, 65, *range(8, 65, 8), *range(9, 65, 8)})
    times = [float(-(-count // 8)) for count in counts]
    block = uniform_blocks(timm.create_model("tokcomp_digits_vit"))._asdict()
    fixed = {"depth": 6, "num_tokens": 65, "num_prefix_tokens": 1, "block": block, "batch_size": 4, "dtype": "float32"}
    parts = {"attention_ms": times, "reduce_ms": [0.0] * len(times), "mlp_ms": times, "head_ms": [0.0] * len(times)}
    LatencyTable(**fixed, embed_ms=0.0, counts=counts, **parts).save(tmp_path / "table.json")
    return tmp_path / "table.json"


@pytest.mark.slow
def test_latency_by_a_table(run, ran, tmp_path, latency_table):
    """Uncompressed: 6 blocks of 9 + 9 ms. Both kinds of budget, summed, and their costs beside each other."""
    options = (*DIGITS, "--latency-table", latency_table, "--granularity", "1", "--lr", "0.3", "--steps", "40")
    out, _ = ran(*options, "--target-ms", "80", "60", "-o", tmp_path / "run", "--json")
    costs = {target["name"]: target["costs"]["latency"] for target in json.loads(out)["targets"]}
    assert costs == {"80ms": pytest.approx(80, abs=4), "60ms": pytest.approx(60, abs=4)}
    out, _ = ran(*options, "--target-images-per-s", "50", "--target-gflops", "0.015", "-o", tmp_path / "both")
    budgets = json.loads((tmp_path / "both" / "summary.json").read_text())["targets"][0]["budgets"]
    assert [(budget["budget"], budget["target"]) for budget in budgets] == [("flops", 0.015), ("latency", 80.0)]
    assert "cost" in out
    status, _, err = run(*options, "--target-ms", "1000", "-o", tmp_path / "new")
    assert status == 2 and "--target-ms: target_ms must lie between 108" in err and not (tmp_path / "new").exists()
    status, _, err = run(*options, "--target-ms", "80", "--latency-batch-size", "1", "-o", tmp_path / "new")
    assert status == 2 and "was measured with batch_size 4, got batch_size 1" in err


@pytest.mark.slow
def test_hardware_is_searched_and_resumed(run, tmp_path, monkeypatch):
    from tokcomp.search.run import SearchRun

    options = (*DIGITS, *TARGET, "--hardware", "gemmini", "--target-ms", "0.5", "--target-mw", "60")
    options += ("--lr", "0.2", "--hardware-point", "mesh_rows=8,mesh_columns=8")
    whole, killed, checkpoints = tmp_path / "whole", tmp_path / "killed", []

    def keep(run, evaluated):
        checkpoints.append((run.output / "checkpoint.pt").read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "saved", keep)
        status, out, err = run(*options, "-o", whole)
    assert status == 0, err
    summary = json.loads((whole / "summary.json").read_text())
    budgets = {budget["budget"]: budget for budget in summary["targets"][0]["budgets"]}
    assert budgets.keys() == {"flops", "gemmini_latency", "gemmini_power"}
    assert budgets["gemmini_power"]["start"]["mesh_rows"] == 8 and budgets["gemmini_power"]["target"] == 60
    found = budgets["gemmini_latency"]["hardware"]
    assert found != budgets["gemmini_latency"]["start"] and f"gemmini: tile_rows {found['tile_rows']:g}" in out
    killed.mkdir()
    (killed / "log.csv").write_bytes((whole / "log.csv").read_bytes())
    (killed / "checkpoint.pt").write_bytes(checkpoints[2])
    assert load_checkpoint(killed / "checkpoint.pt", "search")["step"] == 4
    assert run(*options, "-o", killed, "--resume")[0] == 0
    assert (killed / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    states = [
        load_checkpoint(folder / "checkpoint.pt", "search")["targets"][0]["budgets"][1] for folder in (whole, killed)
    ]
    assert states[0]["hardware"] == states[1]["hardware"]
    assert all(torch.equal(logits, states[1]["logits"][name]) for name, logits in states[0]["logits"].items())
    status, _, err = run(*options, "-o", killed, "--resume", "--hardware-point", "mesh_rows=16,mesh_columns=16")
    assert status == 2 and "a resumed run must keep its settings, got targets = " in err


@pytest.mark.slow
def test_fixed_hardware_stays(ran, tmp_path):
    ran(*DIGITS, "--hardware", "gemmini", "--target-ms", "0.4", "--fix-hardware", "-o", tmp_path)
    budget = json.loads((tmp_path / "summary.json").read_text())["targets"][0]["budgets"][0]
    assert budget["hardware"] == budget["start"] and not budget["searched"]


@pytest.mark.slow
def test_latency_is_measured_once(run, tmp_path, monkeypatch, latency_table):
    from tokcomp.budgets import LatencyTable

    table, measured = LatencyTable.load(latency_table), []
    monkeypatch.setattr("tokcomp.budgets.measure.measure_latency", lambda model, **o: measured.append(o) or table)
    options = (*DIGITS, "--target-ms", "80", "--latency-batch-size", "4", "-o", tmp_path / "run")
    assert run(*options, "--steps", "2")[0] == 0
    assert len(measured) == 1 and measured[0]["batch_size"] == 4 and measured[0]["dtype"] == "float32"
    assert LatencyTable.load(tmp_path / "run" / "latency.json") == table
    assert run(*options, "--steps", "2", "--resume")[0] == 0
    assert run(*options, "--steps", "2", "--latency-table", latency_table, "--resume")[0] == 0
    assert len(measured) == 1


def test_stopped_while_measuring(run, tmp_path, monkeypatch):
    def measure(model, *, stop, **options):
        from tokcomp.budgets import MeasurementStopped

        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        raise MeasurementStopped

    monkeypatch.setattr("tokcomp.budgets.measure.measure_latency", measure)
    status, _, err = run(*DIGITS, "--target-ms", "80", "-o", tmp_path / "run")
    assert status == 128 + signal.SIGTERM and "stopped while the latency was being measured; nothing was written" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_folders_of_images(run, ran, training_folder, tmp_path):
    """With timm's augmentation: however images are loaded, the same search; a subset keeps the number of steps."""
    options = ("search", "--data", training_folder, "-m", "tokcomp_digits_vit", "--num-classes", "2", "--device", "cpu")
    options += ("--target-gflops", "0.015", "-b", "4", "--epochs", "2", "--log-interval", "1")
    logs = {}
    for name, more in {
        "one": ("-j", "0"),
        "workers": ("-j", "2", "--checkpoint-interval", "1"),
        "seed": ("-j", "0", "--seed", "1"),
        "subset": ("-j", "0", "--images", "4", "--aa", "none", "--held-out", "4"),
    }.items():
        _, err = ran(*options, "-o", tmp_path / name, *more)
        assert "the weights are random" in err
        logs[name] = (tmp_path / name / "log.csv").read_bytes()
    assert logs["one"] == logs["workers"] != logs["seed"]
    settings = {name: json.loads((tmp_path / name / "summary.json").read_text())["settings"] for name in logs}
    assert settings["one"]["held_out_images"] == 1 and settings["one"]["num_images"] == 15
    assert settings["subset"]["num_images"] == 4 and settings["subset"]["held_out_images"] == 4
    # 15 images are 3 batches of 4 an epoch; 12 of 16 are 3 too, also where the search sees but 4 of them.
    assert settings["one"]["steps"] == settings["subset"]["steps"] == 6
    assert settings["one"]["aa"] == SEARCH_RECIPE.aa and settings["subset"]["aa"] is None
    status, _, err = run(
        *options, "-j", "0", "--val-split", "validation", "--steps", "1", "-o", tmp_path / "val", "--epochs", "1"
    )
    assert status == 2 and "--steps and --epochs both set the length of the search" in err
    status, _, err = run(
        *options[:-4], "-j", "0", "--val-split", "validation", "--steps", "1", "-o", tmp_path / "val", "-b", "4"
    )
    assert status == 0
    assert json.loads((tmp_path / "val" / "summary.json").read_text())["settings"]["held_out_images"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "a search needs a budget, got none; pass --target-gflops G"),
        (("--target-gflops", "9"), "--target-gflops: target_gflops must"),
        (("--target-gflops", "0.001"), "--target-gflops: target_gflops must"),
        (("--target-gflops", "0.012", "0.0120"), "targets must differ from each other, got 0.012 0.012"),
        (
            ("--target-ms", "1", "--target-images-per-s", "9"),
            "--target-ms and --target-images-per-s are the same budget",
        ),
        ((*TARGET, "--latency-batch-size", "2"), "--latency-batch-size goes with --target-ms or --target-images-per-s"),
        (
            ("--target-gflops", "0.012", "0.013", "--target-ms", "1", "2", "3"),
            "as many as the others, got 2 of --target-gflops, 3 of --target-ms",
        ),
        (("--target-mw", "9"), "--target-mw goes with --hardware gemmini, got none"),
        ((*TARGET, "--fix-hardware"), "--fix-hardware goes with --hardware gemmini, got none"),
        ((*TARGET, "--hardware", "gemmini"), "--hardware needs --target-ms or --target-mw, got neither"),
        (("--hardware", "gemmini", "--target-images-per-s", "9"), "--hardware takes --target-ms, of an image, got"),
        (
            ("--hardware", "gemmini", "--target-ms", "1", "--latency-dtype", "float16"),
            "--latency-dtype goes with --target-ms or --target-images-per-s, got --hardware, which is not measured",
        ),
        (("--hardware", "gemmini", "--target-ms", "1000"), "--hardware gemmini: target_ms must lie between"),
        (
            ("--hardware", "gemmini", "--target-ms", "1", "--hardware-point", "mesh_rows=5"),
            "--hardware-point: mesh_rows must be one of 4, 8, 16, 32, got 5",
        ),
        (
            ("--hardware", "gemmini", "--target-ms", "1", "--hardware-point", "meshes=5"),
            "argument --hardware-point: must name parameters of tile_rows, ",
        ),
        ((*TARGET, "--latency-weight", "2"), "--latency-weight goes with --target-ms or --target-images-per-s"),
        (("--target-ms", "1", "--latency-table", "."), "--latency-table must be a file, got the folder '.'"),
        (("--target-gflops", "-1"), "argument --target-gflops: must be a number above 0, got '-1'"),
        ((*TARGET, "-b", "7"), "--batch-size: the batch size must be a multiple of 2 (1 processes x 1 accumulated"),
        ((*TARGET, "--grad-accum-steps", "3"), "multiple of 6"),
        ((*TARGET, "--num-classes", "3"), "as many classes as the model's head, 3, got 10"),
        ((*TARGET, "--images", "2000"), "--images must be at most the 1437 images there are to search on, got 2000"),
        ((*TARGET, "--held-out", "1437"), "--held-out must leave images to search on, got 1437 of 1437"),
        ((*TARGET, "--held-out", "9", "--val-split", "x"), "--held-out and --val-data or --val-split both say"),
        ((*TARGET, "--val-data", "nowhere"), "--val-data must be a folder or archive of images, got 'nowhere'"),
        ((*TARGET, "--aa", "v0"), "--aa has no effect with --dataset digits"),
        ((*TARGET, "--lr", "0.0001", "--min-lr", "0.001"), "--min-lr must not be above --lr, got 0.001 and 0.0001"),
        ((*TARGET, "--opt", "nope"), "opt must be an optimizer that timm knows, got 'nope'"),
        ((*TARGET, "--granularity", "65"), "granularity must be between 1 and the model's 64 patches, got 65"),
        ((*TARGET, "--budget-warmup-epochs", "9"), "budget_warmup_epochs must leave steps for the budget"),
        ((*TARGET, "--smoothing", "1"), "recipe: smoothing must be in [0, 1), got 1.0"),
        ((*TARGET, "-m", "resnet18"), "--model 'resnet18': "),
        ((*TARGET, "-m", "deit_tiny_patch16_224"), "as many classes as the model's head, 1000, got 10"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(run, tmp_path, options, message):
    argv = [word for word in DIGITS if "-m" not in options or word != "--pretrained"]
    status, out, err = run(*argv, "-o", tmp_path / "run", *options)
    assert status == 2
    assert message in err
    assert "Traceback" not in err and out == ""
    assert not (tmp_path / "run").exists()


def test_unfit_folders_are_named(refused, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    options = ("search", *MODEL, *TARGET, *SHORT, "-o", tmp_path / "run")
    assert f"DATA '{flat}' could not be opened as a data set" in refused(*options, flat)
    Image.new("RGB", (32, 32)).save(flat / "0.png")  # a picture, in no class's folder
    assert f"DATA '{flat}'" in refused(*options, flat)
    assert not (tmp_path / "run").exists()


def test_output_is_checked_before_the_work(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("work began"))
    assert "--output must be a folder, got" in refused(*DIGITS, *TARGET, "-o", tmp_path / "file" / "run")


def test_a_folder_that_cannot_be_written_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=PermissionError("read-only")))
    status, _, err = run(*DIGITS, *TARGET, "-o", tmp_path)
    assert status == 2 and f"--output must be writable, got '{tmp_path}' (read-only); choose another folder" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_run_is_refused_unless_resumed(run, refused, ran, tmp_path):
    searched(ran, tmp_path, "--steps", "2")
    assert "the output folder must not hold another run" in refused(*DIGITS, *TARGET, "-o", tmp_path, "--steps", "2")
    status, _, err = run(*DIGITS, *TARGET, "-o", tmp_path, "--steps", "3", "--resume")
    assert status == 2 and "a resumed run must keep its settings, got steps = 3" in err
    assert "got mixup = 0.5" in refused(*DIGITS, *TARGET, "-o", tmp_path, "--steps", "2", "--mixup", "0.5", "--resume")
    searched(ran, tmp_path, "--steps", "2", "--resume")


def test_weights_that_are_no_numbers_stop_the_search(run, tmp_path):
    import timm
    import tokcomp.assets  # noqa: F401
    from safetensors.torch import save_file

    weights = timm.create_model("tokcomp_digits_vit", pretrained=True).state_dict()
    weights["blocks.2.attn.qkv.weight"][0] = float("nan")
    save_file(weights, tmp_path / "broken.safetensors")
    argv = [word for word in DIGITS if word != "--pretrained"]
    folder = tmp_path / "run"
    status, out, err = run(*argv, "--checkpoint", tmp_path / "broken.safetensors", *TARGET, "-o", folder)
    assert status == 1 and out == ""
    assert f"not finite at step 1; the last good checkpoint is {folder / 'checkpoint.pt'}" in err
    assert load_checkpoint(folder / "checkpoint.pt", "search")["step"] == 0

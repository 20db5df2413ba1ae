from __future__ import annotations

import pytest
import tokcomp


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "deit_smal_patch16_224"), "--model must be a name that timm knows, got 'deit_smal_patch16_224'"),
        (("--schedule", "nowhere.json"), "--schedule must be a JSON file, got 'nowhere.json', which does not exist"),
        (("--gflops", "9"), "gflops for deit_small_patch16_224 must be one of 2.3"),
        (("-m", "vit_tiny_patch16_224"), "--schedule is needed: no schedule was published for vit_tiny_patch16_224"),
        (("--device", "abacus"), "--device must be a device of this machine, got 'abacus'"),
        (("--results", __file__), "--results must be a folder, got"),
        (("-b", "0"), "--batch-size and --rounds must be at least 1"),
    ],
)
def test_mistakes_are_named(refused, options, message):
    err = refused("bench", *options, "--rounds", "1")
    assert message in err and "Traceback" not in err


@pytest.mark.slow
def test_a_schedule_for_other_tokens_runs_rescaled(run, ran, tmp_path):
    path = tmp_path / "plan.json"
    tokcomp.CompressionSchedule([17] * 6, [17, 14, 11, 8, 5, 3], num_tokens=17).save(path)
    small = (
        "bench",
        "-m",
        "tokcomp_digits_vit",
        "--schedule",
        path,
        "-b",
        "1",
        "--rounds",
        "1",
        "--no-rivals",
        "--device",
        "cpu",
    )
    status, _, err = run(*small)
    assert (
        status == 2 and "the schedule is for 17 tokens, and 65 enter tokcomp_digits_vit" in err and "--rescale" in err
    )
    out, _ = ran(*small, "--rescale", "--gp", "avg", "--model-kwargs", "depth=6", "num_heads=4")
    assert "DiffRate plan.json" in out

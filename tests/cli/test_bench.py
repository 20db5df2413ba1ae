from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-m", "deit_smal_patch16_224"), "--model must be a name that timm knows, got 'deit_smal_patch16_224'"),
        (("--schedule", "nowhere.json"), "--schedule must be a JSON file, got 'nowhere.json', which is not there"),
        (("--gflops", "9"), "gflops for deit_small_patch16_224 must be one of 2.3"),
        (("-m", "vit_tiny_patch16_224"), "--schedule is needed: no schedule was published for vit_tiny_patch16_224"),
        (("--device", "abacus"), "--device must be a device of this machine, got 'abacus'"),
        (("--results", __file__), "--results must be a folder, got"),
        (("-b", "0"), "--batch-size"),
    ],
)
def test_mistakes_are_named(run, options, message):
    status, _, err = run("bench", *options, "--rounds", "1")
    assert status == 2
    assert message in err and "Traceback" not in err


def test_runs_what_bench_runs(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("tokcomp.bench.cli.run", lambda args: seen.append(args) or 0)
    status, _, _ = run("bench", "-b", "1", "4", "--results", tmp_path)
    assert status == 0
    assert seen[0].batch_size == [1, 4] and seen[0].results == tmp_path

"""Searches that are stopped or killed, as commands, and go on as if nothing had happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from tokcomp import CompressionSchedule
from tokcomp.runs.checkpoint import load_checkpoint
from tokcomp.runs.log import read_log
from tokcomp.search.run import SearchRun

INTERVALS = ("--log-interval", "1", "--checkpoint-interval", "2", "--eval-interval", "0")
SEARCH = ("search", "--dataset", "digits", "-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "-j", "0")
SEARCH += ("-b", "8", "--held-out", "20", *INTERVALS, "--target-gflops", "0.0105")


def assert_same(folder, other):
    assert (folder / "log.csv").read_bytes() == (other / "log.csv").read_bytes()
    schedules = [CompressionSchedule.load(one / "schedule.json") for one in (folder, other)]
    assert schedules[0] == schedules[1] and schedules[0].provenance["top1"] == schedules[1].provenance["top1"]


@pytest.mark.slow
def test_a_killed_search_loses_no_more_than_its_checkpoint_interval(run, tmp_path):
    folder, steps = tmp_path / "killed", ("--steps", "40")
    command = [sys.executable, "-m", "tokcomp", *SEARCH, *steps, "-o", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not [row for row in read_log(folder / "log.csv") if row["step"] >= 5]:
            assert time.monotonic() < deadline and process.poll() is None, "the search ended or hung"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    reached = read_log(folder / "log.csv")[-1]["step"]
    assert 5 <= reached <= 2 + load_checkpoint(folder / "checkpoint.pt", "search")["step"]
    assert not (folder / "summary.json").exists()
    assert run(*SEARCH, *steps, "-o", folder, "--resume")[0] == run(*SEARCH, *steps, "-o", tmp_path / "whole")[0] == 0
    assert_same(folder, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_search_loses_nothing(run, tmp_path, monkeypatch, number):
    folder, steps, step = tmp_path / "stopped", ("--steps", "6"), SearchRun.step

    def interrupted(self, *batch):
        if self.step_number == 2:
            signal.raise_signal(number)
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "step", interrupted)
        status, out, err = run(*SEARCH, *steps, "-o", folder)
    assert status == 128 + number and out == ""
    assert "stopped after step 3 of 6; the same command with --resume continues from there" in err
    assert load_checkpoint(folder / "checkpoint.pt", "search")["step"] == 3
    assert run(*SEARCH, *steps, "-o", folder, "--resume")[0] == run(*SEARCH, *steps, "-o", tmp_path / "whole")[0] == 0
    assert_same(folder, tmp_path / "whole")

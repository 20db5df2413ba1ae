"""The log, the seeds, the wish to stop, and processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from tokcomp.runs import distributed
from tokcomp.runs.log import RunLog, read_log
from tokcomp.runs.steps import Progress, StopRequest, derived_seed, seed_all, seeded

from tests.threads import in_threads


def test_the_log_reads_back_exactly(tmp_path):
    log = RunLog(tmp_path / "log.csv", ["loss", "kept_0", "accuracy"])
    log.write(1, {"loss": 0.1 + 0.2, "kept_0": 17})
    log.write(2, {"loss": 1e-30, "accuracy": 50.0, "kept_0": None})
    assert read_log(log.path) == [
        {"step": 1, "loss": 0.1 + 0.2, "kept_0": 17},
        {"step": 2, "loss": 1e-30, "accuracy": 50.0},
    ]
    with pytest.raises(ValueError, match="named as the log's columns, got typo"):
        log.write(3, {"typo": 1.0})
    log.close()


def test_a_resumed_log_is_the_uninterrupted_one(tmp_path):
    whole = RunLog(tmp_path / "whole.csv", ["loss"])
    for step in range(1, 7):
        whole.write(step, {"loss": 1 / step})
    whole.close()
    path = tmp_path / "log.csv"
    first = RunLog(path, ["loss"])
    for step in range(1, 5):
        first.write(step, {"loss": 1 / step})
    first.close()
    with path.open("a") as file:
        file.write("5,0.")  # killed in the middle of a line
    second = RunLog(path, ["loss"], resume_step=2)
    for step in range(3, 7):
        second.write(step, {"loss": 1 / step})
    second.close()
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"step,loss\n1,0.5,7\n", b"step,loss\n1,much\n", b"loss\n0.5\n", b"step\n\xff\n"],
    ids=["too many cells", "a word", "no steps", "no text"],
)
def test_what_is_no_log_is_named(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"log\.csv: must be the log of a run, got"):
        read_log(tmp_path / "log.csv")


def test_a_new_log_replaces_an_old_one(tmp_path):
    RunLog(tmp_path / "log.csv", ["loss"]).write(1, {"loss": 1.0})
    RunLog(tmp_path / "log.csv", ["other"]).close()
    assert (tmp_path / "log.csv").read_text() == "step,other\n"


class _Writer:
    made: ClassVar[list[_Writer]] = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, [], False
        self.made.append(self)

    def add_scalar(self, name, value, step):
        self.rows.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("tokcomp.runs.log.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=_Writer))
    for resume_step in (None, 1):
        log = RunLog(tmp_path / "log.csv", ["loss", "top1"], resume_step=resume_step, tensorboard=tmp_path / "board")
        log.write(2, {"loss": 0.5, "top1": None})
        log.close()
    assert [writer.purge_step for writer in _Writer.made] == [None, 2]  # rows after the checkpoint are hidden
    assert all(writer.rows == [("loss", 0.5, 2)] and writer.closed for writer in _Writer.made)
    monkeypatch.setattr("tokcomp.runs.log.find_spec", lambda name: None)
    RunLog(tmp_path / "log.csv", ["loss"], tensorboard=tmp_path / "board").close()
    assert len(_Writer.made) == 2


def test_seeds_differ_in_every_number():
    seeds = {derived_seed(*numbers) for numbers in [(0,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1), (2**40, 0)]}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)


def drawn():
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_seeding_covers_all_generators_and_can_be_undone():
    seed_all(3, 4)
    first = drawn()
    with seeded(9):
        inside = drawn()
    after = drawn()
    seed_all(3, 4)
    assert drawn() == first and drawn() == after
    with seeded(9):
        assert drawn() == inside


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.wanted and stop.exit_status == 0
        os.kill(os.getpid(), number)
        assert stop.wanted and stop.exit_status == 128 + number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_other_threads_take_no_signals():
    def work(_):
        with StopRequest() as stop:
            assert not stop.wanted

    in_threads(work, range(1))


def test_progress_off_a_terminal_prints_notes_alone(capsys):
    progress = Progress(4, label="search")
    progress.status("unseen")
    progress.advance()
    progress.note(1, "loss 0.5")
    progress.close()
    silent = Progress(4, show=False)
    silent.note(1, "unseen")
    silent.close()
    captured = capsys.readouterr()
    assert captured.err == "search step 1/4: loss 0.5\n" and captured.out == ""


def test_alone_nothing_is_reduced(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = distributed.join(torch.device("cpu"))
    assert world == distributed.ALONE and world.is_main
    tensor = torch.tensor([1.0, 2.0])
    assert torch.equal(world.mean_(tensor.clone()), tensor) and torch.equal(world.sum_(tensor.clone()), tensor)
    world.barrier()


#: A run of one process, in a group as under torchrun; what imports torch.distributed.nn comes after the group. PyTorch
#: 2.10 gives Gloo's threads no names.
GROUP = """
import pathlib, torch, weakref
from tokcomp.runs import distributed

def gloo():
    return [name for path in pathlib.Path("/proc/self/task").glob("*/comm") if "gloo" in (name := path.read_text())]

distributed.launched_by_torchrun = lambda: True
distributed.join(torch.device("cpu"))
import torch._dynamo, timm
torch.distributed.all_reduce(torch.ones(1))
group = weakref.ref(torch.distributed.group.WORLD)
assert group() is not None
distributed.leave()
assert group() is None and not gloo(), (group(), gloo())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="Linux shows the threads of a process")
def test_leaving_ends_the_threads_of_the_group(tmp_path):
    """One that lets go of a tensor while Python ends aborts the process."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", GROUP], env={**os.environ, **place}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

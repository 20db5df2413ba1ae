"""The loop of every run, on a run whose steps cost nothing."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from tokcomp.runs.batches import TensorBatches
from tokcomp.runs.checkpoint import CheckpointError, load_checkpoint
from tokcomp.runs.distributed import World
from tokcomp.runs.log import read_log
from tokcomp.runs.loop import Run
from tokcomp.runs.steps import DivergedError, StopRequest

CPU = torch.device("cpu")


class Walk(Run):
    """Adds up the labels that it sees; two losses a step."""

    kind = label = "walk"

    def __init__(self, folder, *, bad=(), stop_after=None, **options):
        batches = TensorBatches(torch.zeros(12, 1), torch.arange(12), 4, 0)
        steps = dict(total_steps=8, checkpoint_steps=3, log_steps=2, evaluate_steps=4)
        super().__init__(batches, folder, settings={"lr": 1}, device=CPU, **{**steps, **options})
        self.done, self.sum, self.seen, self.bad = 0, 0, [], dict(bad)
        self.stop, self.stop_after = StopRequest(), stop_after

    @property
    def step_number(self):
        return self.done

    def step(self, images, labels):
        self.done += 1
        self.sum += int(labels.sum()) * self.done
        self.stop.signal = 15 if self.done == self.stop_after else None
        return torch.tensor([1.0 / self.done, self.bad.get(self.done, 0.0)])

    def note(self, step, losses):
        self.seen.append((step, losses[0]))

    def begin(self):
        return [{"sum": 0}]

    def rows(self, step, evaluates):
        return [{"sum": self.sum, "seen": len(self.seen) if evaluates else None}]

    def log_files(self):
        return [(self.output / "log.csv", ("sum", "seen"), self.output / "tensorboard")]

    def is_finite(self):
        return self.done not in self.bad

    def diverged(self, step, number, loss):
        return DivergedError(f"loss {number} of step {step} is {loss}", step)

    def state(self):
        return {"step": self.done, "sum": self.sum, "seen": [list(pair) for pair in self.seen]}

    def load_state(self, state):
        self.done, self.sum, self.seen = state["step"], state["sum"], [tuple(pair) for pair in state["seen"]]

    def finish(self):
        (self.output / "summary.json").write_text(json.dumps(self.sum))

    def go(self, **options):
        return self.train(self.stop, **options)


def saved(folder):
    return load_checkpoint(folder / "checkpoint.pt", "walk")["step"]


def test_when_what_is_written(tmp_path, monkeypatch):
    steps, save = [], Walk._save
    monkeypatch.setattr(
        Walk, "_save", lambda self, evaluated: steps.append((self.done, evaluated)) or save(self, evaluated=evaluated)
    )
    assert Walk(tmp_path).go()
    assert steps == [(0, False), (3, False), (4, True), (6, False), (8, True)]
    assert [(row["step"], row.get("seen")) for row in read_log(tmp_path / "log.csv")] == [
        *((0, None), (2, None), (4, 4), (6, None), (8, 8)),
    ]


@pytest.mark.parametrize("stop_after", range(1, 8))
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, stop_after):
    whole, parts = Walk(tmp_path / "whole"), Walk(tmp_path / "parts", stop_after=stop_after)
    assert whole.go() and not parts.go() and saved(tmp_path / "parts") == stop_after
    rest = Walk(tmp_path / "parts")
    assert rest.go(resumed=True) and rest.state() == whole.state()
    for name in ("log.csv", "summary.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_killed_before_its_first_step_is_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Walk, "step", lambda *batch: (_ for _ in ()).throw(SystemExit(9)))
        with pytest.raises(SystemExit):
            Walk(tmp_path).go()
    assert saved(tmp_path) == 0
    monkeypatch.setattr(Walk, "begin", lambda self: pytest.fail("it began anew"))
    assert Walk(tmp_path).go(resumed=True)
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [0, 2, 4, 6, 8]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    Walk(tmp_path, stop_after=2).go()
    (tmp_path / ".checkpoint.pt.half.tmp").write_bytes(b"half")
    Walk(tmp_path).go(resumed=True)
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_an_os_error_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    """torch's writer raises a RuntimeError of its own over the file's."""
    run = Walk(tmp_path)
    run.state = lambda: {**Walk.state(run), "large": torch.zeros(1 << 16)}

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 1 << (20 if run.done < 6 else 10)

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    write = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: write(state, Full(file)))
    with pytest.raises(OSError, match="No space left on device"):
        run.go()
    assert saved(tmp_path) == 4 and not list(tmp_path.glob(".*"))


def test_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the checkpoint must be a file, got"):
        Walk(tmp_path / "new").go(resumed=True)
    assert not (tmp_path / "new").exists()
    Walk(tmp_path, stop_after=2).go()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"must not hold another run, got '.*'; continue that run with --resume"):
        Walk(tmp_path).go()
    other = Walk(tmp_path)
    other.settings = {"lr": 2}
    with pytest.raises(CheckpointError, match="a resumed run must keep its settings, got lr = 2"):
        other.go(resumed=True)
    other = Walk(tmp_path)
    other.load_state = lambda state: state["weights"]
    with pytest.raises(CheckpointError, match=r"checkpoint.pt: does not fit this run \(KeyError: 'weights'\)"):
        other.go(resumed=True)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("step", "kept"), [(1, 0), (4, 3), (7, 6), (8, 6)])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, step, kept):
    run = Walk(tmp_path, bad={step: float("nan")})
    with pytest.raises(DivergedError, match=f"loss 1 of step {step} is nan") as caught:
        run.go()
    assert caught.value.step == step and saved(tmp_path) == kept
    assert all(row["step"] < step for row in read_log(tmp_path / "log.csv"))


@pytest.mark.parametrize("step", [3, 4])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, step):
    with pytest.raises(DivergedError, match=f"the weights are not finite numbers after step {step}; the checkpoint"):
        Walk(tmp_path, bad={step: 0.0}).go()
    assert saved(tmp_path) < step


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Walk(None, evaluate_steps=None)
    run.log_files = lambda: pytest.fail("a log was asked for")
    run.finish = lambda: None
    assert run.go() and len(run.seen) == 8 and not list(tmp_path.iterdir())


def test_what_the_main_process_refuses_every_process_refuses(tmp_path):
    class Other(World):
        def from_main(self, make):
            raise BlockingIOError("another run is writing into it")

    with pytest.raises(BlockingIOError):
        Walk(tmp_path, world=Other(1, 2)).go()

"""Every long command: killed, stopped, out of space, without a place to write, and with a rival in its folder."""

from __future__ import annotations

import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tokcomp.reading import digest, read_tensors

from tests.attack.parts import MINUTES, Part, alone

ROOT = Path(__file__).parents[2]
DIGITS = ("-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "--dataset", "digits", "-j", "0")
OFTEN = ("--log-interval", "1", "--checkpoint-interval", "1")
TOME = ("--method", "tome", "--r", "12")
SEGMENTER = ("--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "--img-size", "48", "--head", "linear")
PICTURES = ("-b", "2", "--device", "cpu", "--train-images", "6", "--num-samples", "3")
SMALL = ("--images", "64", "--speed-batch", "0", "--pictures", "1")


class Command(NamedTuple):
    """A command and where its output goes. What is no training starts anew, or goes on, when it is given again."""

    argv: tuple[str, ...]
    trains: bool = False
    output: str = "-o {output}"


#: {folder}: what is there before; the segmenter is the one that "dense" trained.
TRAINED = "{folder}/whole-dense/segmenter.safetensors"
SEGMENTS = (TRAINED, "--device", "cpu", "--tokens-per-degree", "2", "-b", "2")
COMMANDS = {
    "search": Command(
        ("search", *DIGITS, "-b", "8", "--steps", "6", "--eval-interval", "0", "--target-gflops", "0.0105"), True
    ),
    "finetune": Command(("finetune", *DIGITS, "-b", "256", "--epochs", "0.6", *TOME, "--model-ema-decay", "0.9"), True),
    "tocom": Command(("tocom", "train", *DIGITS, "-b", "64", "--epochs", "0.15", "--max-degree", "6"), True),
    "dense": Command(("dense", "train", *SEGMENTER, *PICTURES, "--steps", "6"), True),
    "dense tocom": Command(
        ("dense", "tocom", *SEGMENTS, "--train-images", "6", "--max-degree", "2", "--steps", "6"),
        True,
    ),
    "compare": Command(
        ("compare", *DIGITS, *SMALL, "--gflops", "0.012", "0.009", "--methods", "tome", "evit", "uniform")
    ),
    "evaluate": Command(("evaluate", *DIGITS, *TOME), output="--results-file {output}/results.json"),
    "dense evaluate": Command(
        ("dense", "evaluate", *SEGMENTS, "--num-samples", "12", "--degrees", "0,1,2"),
        output="--results-file {output}/results.json",
    ),
    "visualize": Command(("visualize", "{folder}/pictures", *DIGITS[:5], *TOME)),
}
#: In the suite one command stands for all: they share the loop.
NAMES = list(COMMANDS) if MINUTES else ["search"]
TRAINING = [name for name in NAMES if COMMANDS[name].trains]
#: What a run must write alike whatever happened to it.
RESULTS = ("*.safetensors", "log.csv", "schedule.json", "results.json", "*.png")
#: Entries of results.json that say how long it took, or what was typed.
TIMES = {"images_per_second", "command", "seconds"}
#: Commands that write single files into any folder.
SHARED = {"evaluate", "dense evaluate", "visualize"}
STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM}


class Nursery:
    """Commands in processes of their own, each begun by a fork."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, itertools.count()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.attack.nursery"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        self.begun: queue.Queue[int] = queue.Queue()
        self.ended: dict[int, queue.Queue[int]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            news = json.loads(line)
            if "status" in news:
                self.ended.setdefault(news["pid"], queue.Queue()).put(news["status"])
            else:
                self.ended.setdefault(news["pid"], queue.Queue())
                self.begun.put(news["pid"])

    def start(self, name: str, folder: Path, *more: str, fsize: int | None = None) -> tuple[int, Path]:
        """Begin a command that writes into a folder. Its process id and the file of what it prints."""
        output, command = self.folder / f"output-{next(self.number)}", COMMANDS[name]
        argv = [*command.argv, *(OFTEN if command.trains else ()), *command.output.split(), *more]
        argv = [word.format(folder=self.folder, output=folder) for word in argv]
        order = {"argv": argv, "fsize": fsize, "output": str(output)}
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.begun.get(timeout=60), output

    def wait(self, pid: int) -> int:
        return self.ended[pid].get(timeout=300)

    def run(self, name: str, folder: Path, *more: str, fsize: int | None = None) -> tuple[int, str]:
        pid, output = self.start(name, folder, *more, fsize=fsize)
        status = self.wait(pid)
        time.sleep(0.05 if fsize else 0)  # the pipe's last words
        return status, output.read_text() if output.exists() else ""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    (nursery.folder / "pictures").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(nursery.folder / "pictures" / f"{number}.png")
    yield nursery
    nursery.process.kill()
    nursery.process.wait()


@pytest.fixture(scope="module")
def whole(nursery: Nursery) -> dict[str, dict[str, Any]]:
    """What each command writes undisturbed, and how long that takes."""
    found = {}
    for name in NAMES:
        folder, begun = nursery.folder / f"whole-{name}", time.monotonic()
        status, output = nursery.run(name, folder)
        assert status == 0, output
        found[name] = {"seconds": time.monotonic() - begun, "results": results(folder)}
        assert found[name]["results"]
    return found


def without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: without_times(value) for name, value in data.items() if name not in TIMES}
    return [without_times(value) for value in data] if isinstance(data, list) else data


def results(folder: Path) -> dict[str, Any]:
    """Every tensor's bits, the log's bytes, a schedule's counts: what is left out of the files are times."""
    found: dict[str, Any] = {}
    for path in (path for pattern in RESULTS for path in folder.glob(pattern)):
        if path.suffix == ".safetensors":
            found[path.name] = digest(read_tensors(path, "a result")[0])
        elif path.name == "schedule.json":
            schedule = json.loads(path.read_bytes())
            found[path.name] = [schedule["num_prune_kept"], schedule["num_merge_kept"]]
        elif path.suffix == ".json":
            found[path.name] = without_times(json.loads(path.read_bytes()))
        else:
            found[path.name] = path.read_bytes()
    return found


def finish(nursery: Nursery, name: str, folder: Path, want: dict[str, Any]) -> None:
    """Go on with what there is, to the same bits, with nothing left lying about."""
    resume = ("--resume",) if (folder / "checkpoint.pt").is_file() else ()
    if COMMANDS[name].trains and not resume:
        shutil.rmtree(folder, ignore_errors=True)
    status, output = nursery.run(name, folder, *resume)
    assert status == 0, output
    assert results(folder) == want
    # A folder that a run does not have for itself may hold others' drafts: they are left alone.
    assert name in SHARED or not list(folder.rglob(".*.tmp"))
    assert not (folder / ".lock").exists()


def test_killed_and_stopped(nursery: Nursery, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    def check(rng: random.Random) -> str:
        name, folder = rng.choice(NAMES), tmp_path / str(rng.randrange(2**40))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        pid, output = nursery.start(name, folder)
        time.sleep(rng.uniform(0.0, 1.05 * whole[name]["seconds"]))
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            number = None
        status = nursery.wait(pid)
        # Before a command listens to signals they end it as they end any program.
        assert status in {0, -9, -15, 70, *STOPPED}, output.read_text()
        if status == 0:
            assert results(folder) or number is None
            shutil.rmtree(folder)
            return "ended before"
        if name in SHARED:  # each file is whole, or not there
            assert results(folder).items() <= whole[name]["results"].items()
        finish(nursery, name, folder, whole[name]["results"])
        shutil.rmtree(folder)
        return f"{name}: resumed to the same bits"

    Part("killed", share=0.28, few=1).each(check)


@alone
def test_out_of_space(nursery: Nursery, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """No file may grow beyond a limit. The error is one sentence, and what was there before is kept."""

    def check(rng: random.Random) -> str:
        name, folder = rng.choice(NAMES), tmp_path / str(rng.randrange(2**40))
        limit = rng.choice([1, 100, 5000, 20_000, 60_000, 150_000])
        status, output = nursery.run(name, folder, fsize=limit)
        assert "Traceback" not in output, f"{name} with {limit} bytes: {output[-1500:]}"
        assert not folder.exists() or not list(folder.rglob(".*.tmp"))
        if status == 0:
            return "had enough"
        assert status in (1, 2) and "error" in output and str(folder) in output, output
        if (folder / "checkpoint.pt").is_file():
            finish(nursery, name, folder, whole[name]["results"])
            return "resumed to the same bits"
        return "refused"

    Part("full disk", share=0.05, few=1).each(check)


def test_nowhere_to_write(nursery: Nursery, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    def check(rng: random.Random) -> None:
        name, folder = (
            rng.choice(NAMES),
            rng.choice([tmp_path / "file", tmp_path / "file" / "in it", Path("/proc/out")]),
        )
        status, output = nursery.run(name, folder)
        assert status in (1, 2) and "Traceback" not in output and str(folder) in output, output
        assert (tmp_path / "file").read_text() == "mine"

    Part("read-only", share=0.01, few=1).each(check)


@alone
def test_two_writers(nursery: Nursery, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """One of them writes; the other is told so."""

    def check(rng: random.Random) -> str:
        name, folder = rng.choice(TRAINING), tmp_path / str(rng.randrange(2**40))
        first = nursery.start(name, folder)
        time.sleep(rng.uniform(0, 0.8 * whole[name]["seconds"]))
        second = nursery.start(name, folder)
        statuses = sorted((nursery.wait(pid), output.read_text()) for pid, output in (first, second))
        assert [status for status, _ in statuses] in ([0, 1], [0, 2]), statuses
        refusal = statuses[1][1]
        assert "another run is writing" in refusal or "must not hold another run" in refusal, refusal
        assert results(folder).keys() == whole[name]["results"].keys()
        assert results(folder)["log.csv"] == whole[name]["results"]["log.csv"]
        shutil.rmtree(folder)
        return "refused by the lock" if "is writing" in refusal else "refused by the files"

    Part("two writers", share=0.04, few=1).each(check)

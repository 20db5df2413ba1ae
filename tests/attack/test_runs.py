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
from typing import Any

import pytest
from tokcomp.reading import digest, read_tensors

from tests.attack.parts import MINUTES, Part, alone

ROOT = Path(__file__).parents[2]
DIGITS = ("-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "--dataset", "digits", "-j", "0")
OFTEN = ("--log-interval", "1", "--checkpoint-interval", "1")
TOME = ("--method", "tome", "--r", "12")
SEGMENTER = ("--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "--img-size", "48", "--head", "linear")
PICTURES = ("-b", "2", "--device", "cpu", "--train-images", "6", "--num-samples", "3")
COMMANDS = {
    "search": ("search", *DIGITS, "-b", "8", "--steps", "6", "--eval-interval", "0", "--target-gflops", "0.0105"),
    "finetune": ("finetune", *DIGITS, "-b", "256", "--epochs", "0.6", *TOME, "--model-ema-decay", "0.9"),
    "tocom": ("tocom", "train", *DIGITS, "-b", "64", "--epochs", "0.15", "--max-degree", "6"),
    "dense": ("dense", "train", *SEGMENTER, *PICTURES, "--steps", "6"),
}
#: In the suite one command stands for all: they share the loop.
NAMES = list(COMMANDS) if MINUTES else ["search"]
#: What a run must write alike whatever happened to it.
RESULTS = ("*.safetensors", "log.csv", "schedule.json")
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

    def start(self, *argv: object, fsize: int | None = None) -> tuple[int, Path]:
        """The process id and the file of what it prints."""
        output = self.folder / f"output-{next(self.number)}"
        order = {"argv": [str(one) for one in argv], "fsize": fsize, "output": str(output)}
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.begun.get(timeout=60), output

    def wait(self, pid: int) -> int:
        return self.ended[pid].get(timeout=300)

    def run(self, *argv: object, fsize: int | None = None) -> tuple[int, str]:
        pid, output = self.start(*argv, fsize=fsize)
        status = self.wait(pid)
        time.sleep(0.05 if fsize else 0)  # the pipe's last words
        return status, output.read_text() if output.exists() else ""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.process.kill()
    nursery.process.wait()


@pytest.fixture(scope="module")
def whole(nursery: Nursery) -> dict[str, dict[str, Any]]:
    """What each command writes undisturbed, and how long that takes."""
    found = {}
    for name in NAMES:
        folder, begun = nursery.folder / f"whole-{name}", time.monotonic()
        status, output = nursery.run(*COMMANDS[name], *OFTEN, "-o", folder)
        assert status == 0, output
        found[name] = {"seconds": time.monotonic() - begun, "results": results(folder)}
        assert found[name]["results"]
    return found


def results(folder: Path) -> dict[str, Any]:
    """Every tensor's bits, the log's bytes, a schedule's counts: what is left out of the files are times."""
    found: dict[str, Any] = {}
    for path in (path for pattern in RESULTS for path in folder.glob(pattern)):
        if path.suffix == ".safetensors":
            found[path.name] = digest(read_tensors(path, "a result")[0])
        elif path.suffix == ".json":
            schedule = json.loads(path.read_bytes())
            found[path.name] = [schedule["num_prune_kept"], schedule["num_merge_kept"]]
        else:
            found[path.name] = path.read_bytes()
    return found


def finish(nursery: Nursery, name: str, folder: Path, want: dict[str, Any]) -> None:
    """Go on with what there is, to the same bits, with nothing left lying about."""
    resume = ("--resume",) if (folder / "checkpoint.pt").is_file() else ()
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    status, output = nursery.run(*COMMANDS[name], *OFTEN, "-o", folder, *resume)
    assert status == 0, output
    assert results(folder) == want
    assert not list(folder.rglob(".*.tmp")) and not (folder / ".lock").exists()


def test_killed_and_stopped(nursery: Nursery, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    def check(rng: random.Random) -> str:
        name, folder = rng.choice(NAMES), tmp_path / str(rng.randrange(2**40))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        pid, output = nursery.start(*COMMANDS[name], *OFTEN, "-o", folder)
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
        finish(nursery, name, folder, whole[name]["results"])
        shutil.rmtree(folder)
        return f"{name}: resumed to the same bits"

    Part("killed", share=0.25, few=1).each(check)


@alone
def test_out_of_space(nursery: Nursery, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """No file may grow beyond a limit. The error is one sentence, and what was there before is kept."""

    def check(rng: random.Random) -> str:
        name, folder = rng.choice(NAMES), tmp_path / str(rng.randrange(2**40))
        limit = rng.choice([1, 100, 5000, 20_000, 60_000, 150_000])
        status, output = nursery.run(*COMMANDS[name], *OFTEN, "-o", folder, fsize=limit)
        assert "Traceback" not in output, f"{name} with {limit} bytes: {output[-1500:]}"
        assert not folder.exists() or not list(folder.rglob(".*.tmp"))
        if status == 0:
            return "had enough"
        assert status in (1, 2) and "error" in output and str(folder) in output, output
        if (folder / "checkpoint.pt").is_file():
            finish(nursery, name, folder, whole[name]["results"])
            return "resumed to the same bits"
        return "refused"

    Part("full disk", share=0.08, few=1).each(check)


def test_nowhere_to_write(nursery: Nursery, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    def check(rng: random.Random) -> None:
        name, folder = (
            rng.choice(NAMES),
            rng.choice([tmp_path / "file", tmp_path / "file" / "in it", Path("/proc/out")]),
        )
        status, output = nursery.run(*COMMANDS[name], *OFTEN, "-o", folder)
        assert status in (1, 2) and "Traceback" not in output and str(folder) in output, output
        assert (tmp_path / "file").read_text() == "mine"

    Part("read-only", share=0.01, few=1).each(check)


@alone
def test_two_writers(nursery: Nursery, whole: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """One of them writes; the other is told so."""

    def check(rng: random.Random) -> str:
        name, folder = rng.choice(NAMES), tmp_path / str(rng.randrange(2**40))
        first = nursery.start(*COMMANDS[name], *OFTEN, "-o", folder)
        time.sleep(rng.uniform(0, 0.8 * whole[name]["seconds"]))
        second = nursery.start(*COMMANDS[name], *OFTEN, "-o", folder)
        statuses = sorted((nursery.wait(pid), output.read_text()) for pid, output in (first, second))
        assert [status for status, _ in statuses] in ([0, 1], [0, 2]), statuses
        refusal = statuses[1][1]
        assert "another run is writing" in refusal or "must not hold another run" in refusal, refusal
        assert results(folder).keys() == whole[name]["results"].keys()
        assert results(folder)["log.csv"] == whole[name]["results"]["log.csv"]
        shutil.rmtree(folder)
        return "while it ran" if "is writing" in refusal else "after it"

    Part("two writers", share=0.07, few=1).each(check)

"""Commands under torchrun: two processes over gloo find what one process finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

CANDIDATES = "24"
DIGITS = ("--dataset", "digits", "-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "-j", "0")
SHORT = ("--steps", "2", "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--refine-images", "40")
COMPARE = ("compare", *DIGITS, *SHORT, "--methods", "search", "refine", "tome", "random:1", "--gflops", "0.009")
COMPARE += ("-b", "8", "--images", "31", "--search-images", "16", "--search-batch-size", "8", "--speed-batch", "0")
COMPARE += ("--refine-candidates", CANDIDATES, "--pictures", "0")
SEARCH = ("search", *DIGITS, *SHORT, "-b", "8", "--images", "60", "--eval-interval", "0", "--target-gflops", "0.009")
SEARCH += ("--refine", CANDIDATES)
TUNE = ("finetune", *DIGITS, "-b", "64", "--epochs", "0.1", "--method", "tome", "--gflops", "0.009")
PLUGIN = ("tocom", "train", *DIGITS, "-b", "64", "--epochs", "0.15", "--max-degree", "6", "--log-interval", "1")
#: Not --r, which torchrun takes for an abbreviation of its own options.
EVALUATE = ("evaluate", *DIGITS, "--method", "tome", "--gflops", "0.009", "-b8", "--json", "--num-samples")
#: One process draws in two pieces what two draw.
PIECES = ("--grad-accum-steps", "2")


#: What every process runs: the commands of a file in turn, in one group of processes, which cannot be made twice. The
#: first ends what each prints with a form feed; another's would fall anywhere in it.
SCRIPT = """
import json, os, sys
from tokcomp.cli import main
from tokcomp.runs import distributed

leave, distributed.leave = distributed.leave, lambda: None
for command in json.load(open(sys.argv[1])):
    if status := main(command):
        break
    if os.environ["RANK"] == "0":
        print(end="\\f", flush=True)
leave()
sys.exit(status)
"""
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder with the commands' outputs by two processes, and what each printed."""
    folder = tmp_path_factory.mktemp("both")
    named = {"compare": COMPARE, "search": SEARCH, "finetune": TUNE, "tocom": PLUGIN}
    commands = [[*command, "-o", str(folder / name)] for name, command in named.items()]
    (folder / "commands.json").write_text(json.dumps([*commands, [*EVALUATE, "41"]]))
    (folder / "script.py").write_text(SCRIPT)
    argv = [*LAUNCHER, str(folder / "script.py"), str(folder / "commands.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, dict(zip([*named, "evaluate"], done.stdout.split("\f")[:-1], strict=True))


def state_of(path: Path) -> dict[str, Any]:
    """A refinement's state without what depends on time, on the folder, or on how many processes share the images."""
    state = json.loads(path.read_text())
    assert int(CANDIDATES) * 40 > state["images"] > 0  # some candidates were given up after the first images
    return {name: state[name] for name in ("step", "seen")} | {
        "best": [{name: value for name, value in one.items() if name != "loss"} for one in state["best"]]
    }


@pytest.mark.slow
def test_compare(ran, tmp_path, both):
    ran(*COMPARE, *PIECES, "-o", tmp_path)
    folder, printed = both
    assert printed["compare"].count("compare.html") == 1
    found = [json.loads((path / "results.json").read_text()) for path in (tmp_path, folder / "compare")]
    assert all(one["finished"] and one["num_images"] == 31 for one in found)
    rows = [[one["uncompressed"], *one["budgets"][0]["rows"]] for one in found]
    assert [row.get("name") for row in rows[0]] == [None, "search", "refine", "tome", "random, median of 1"]
    for ours, theirs in zip(*rows, strict=True):
        assert {**ours, "cross_entropy": 0} == {**theirs, "cross_entropy": 0}
        # Products of batches of other sizes round otherwise.
        assert ours["cross_entropy"] == pytest.approx(theirs["cross_entropy"], rel=1e-4)
    states = [state_of(next((path / "refined").glob("*.json"))) for path in (tmp_path, folder / "compare")]
    assert states[0] == states[1] and states[0]["step"] == int(CANDIDATES)


@pytest.mark.slow
def test_search_and_refine(ran, tmp_path, both):
    ran(*SEARCH, *PIECES, "-o", tmp_path)
    folder = both[0] / "search"
    for name in ("schedule.json", "refined.json"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (tmp_path, folder))
        assert {**ours, "provenance": None} == {**theirs, "provenance": None}, name
    assert state_of(tmp_path / "refine-state.json") == state_of(folder / "refine-state.json")


@pytest.mark.slow
def test_finetune(ran, tmp_path, both):
    """Two processes draw what one process draws in two pieces, and count every validation image once."""
    ran(*TUNE, *PIECES, "-o", tmp_path)
    folder, printed = both
    assert printed["finetune"].count("written:") == 1
    alone, together = (json.loads((path / "summary.json").read_text()) for path in (tmp_path, folder / "finetune"))
    assert together["settings"]["processes"] == 2 and together["steps"] == alone["steps"] == 2
    assert together["before"] == alone["before"] and together["last"]["top1"] == alone["last"]["top1"]


@pytest.mark.slow
def test_tocom_train(ran, tmp_path, both):
    ran(*PLUGIN, *PIECES, "-o", tmp_path)
    folder, printed = both
    assert printed["tocom"].count("written:") == 1
    alone, together = (load_file(path / "tocom.safetensors") for path in (tmp_path, folder / "tocom"))
    # Adam divides by the gradient's size, so an element whose gradient is rounding error may go either way; few do.
    off = sum(int((together[name] - tensor).abs().gt(1e-5).sum()) for name, tensor in alone.items())
    assert off < 0.01 * sum(tensor.numel() for tensor in alone.values())


def same_accuracy(run, printed: str, num_samples: str) -> None:
    alone, together = json.loads(run(*EVALUATE, num_samples)[1]), json.loads(printed)
    assert together["processes"] == 2 and alone["processes"] == 1
    for name in ("top1", "top5", "num_images", "gflops"):
        assert together[name] == alone[name]


@pytest.mark.slow
def test_evaluate(run, both):
    same_accuracy(run, both[1]["evaluate"], "41")


@pytest.mark.slow
def test_torchrun_starts_the_command_itself(run):
    """On one image, of which the second process has none."""
    done = subprocess.run([*LAUNCHER, "-m", "tokcomp", *EVALUATE, "1"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    same_accuracy(run, done.stdout, "1")

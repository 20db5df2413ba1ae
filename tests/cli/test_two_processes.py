"""compare and search --refine under torchrun: two processes over gloo find what one process finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CANDIDATES = "24"
DIGITS = ("--dataset", "digits", "-m", "tokcomp_digits_vit", "--pretrained", "--device", "cpu", "-j", "0")
SHORT = ("--steps", "2", "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--refine-images", "40")
COMPARE = ("compare", *DIGITS, *SHORT, "--methods", "search", "refine", "tome", "random:1", "--gflops", "0.009")
COMPARE += (
    "-b",
    "8",
    "--images",
    "31",
    "--search-images",
    "16",
    "--search-batch-size",
    "8",
    "--refine-candidates",
    CANDIDATES,
)
COMPARE += ("--speed-batch", "0", "--pictures", "0")
SEARCH = ("search", *DIGITS, *SHORT, "-b", "8", "--images", "60", "--eval-interval", "0", "--target-gflops", "0.009")
SEARCH += ("--refine", CANDIDATES)
#: One process draws in two pieces what two draw.
PIECES = ("--grad-accum-steps", "2")


#: What every process runs: the commands of a file in turn, in one group of processes, which cannot be made twice.
SCRIPT = """
import json, sys
from tokcomp.cli import main
from tokcomp.runs import distributed

leave, distributed.leave = distributed.leave, lambda: None
status = max(map(main, json.load(open(sys.argv[1]))))
leave()
sys.exit(status)
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, str]:
    """The folder with both commands' outputs by two processes, and what was printed."""
    folder = tmp_path_factory.mktemp("both")
    commands = [[*COMPARE, "-o", str(folder / "compare")], [*SEARCH, "-o", str(folder / "search")]]
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*launcher, str(folder / "script.py"), str(folder / "commands.json")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def state_of(path: Path) -> dict[str, Any]:
    """A refinement's state without what depends on time, on the folder, or on how many processes share the images."""
    state = json.loads(path.read_text())
    assert int(CANDIDATES) * 40 > state["images"] > 0  # some candidates were given up after the first images
    return {name: state[name] for name in ("step", "seen")} | {
        "best": [{name: value for name, value in one.items() if name != "loss"} for one in state["best"]]
    }


@pytest.mark.slow
def test_compare(run, tmp_path, both):
    status, _, err = run(*COMPARE, *PIECES, "-o", tmp_path)
    assert status == 0, err
    folder, printed = both
    assert printed.count("compare.html") == 1
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
def test_search_and_refine(run, tmp_path, both):
    status, _, err = run(*SEARCH, *PIECES, "-o", tmp_path)
    assert status == 0, err
    folder = both[0] / "search"
    for name in ("schedule.json", "refined.json"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (tmp_path, folder))
        assert {**ours, "provenance": None} == {**theirs, "provenance": None}, name
    assert state_of(tmp_path / "refine-state.json") == state_of(folder / "refine-state.json")

"""Calls of operators in a process whose CPU kernels were compiled with sanitizers; run as a module, that process.

It reads a line of JSON for each call and answers with one. A sanitizer that finds something ends it with a report.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import tokcomp_kernels
from tests.attack import calls

ROOT = Path(__file__).parents[2]
#: What each build must report, and its words for it.
PROBES = {
    "address,undefined": {
        "write_outside": "heap-buffer-overflow",
        "read_outside": "heap-buffer-overflow",
        "overflow": "signed integer overflow",
    },
    "thread": {"race": "data race"},
}
#: What torch and Python never give back is theirs. An allocation that is too large is an error, as it is without.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}


class Sanitized:
    """The process, begun again after each report.

    Args:
        kinds: "address,undefined" or "thread". It is built first; what did not change is not compiled again.
    """

    def __init__(self, kinds: str) -> None:
        self.kinds = kinds
        build = [sys.executable, str(ROOT / "build_backend/native.py")]
        made = subprocess.run(
            build, env={**os.environ, "TOKCOMP_SANITIZE": kinds}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert made.returncode == 0, made.stdout.decode()[-3000:]
        self.folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{kinds.replace(',', '-')}"
        self.process: subprocess.Popen[str] | None = None

    def call(self, seed: float) -> str:
        """One call drawn from the seed. What came of it; AssertionError with the report, or with what is not right."""
        return self._ask(seed=seed)["came"]

    def check_probes(self) -> None:
        """The sanitizers report what they must: otherwise nothing that they do not report means anything."""
        for name, words in PROBES[self.kinds].items():
            try:
                answer = self._ask(probe=name)
            except AssertionError as error:
                assert words in str(error), error
            else:
                raise AssertionError(f"{self.kinds}: no report of {name}, got {answer}")

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
            self.report.close()

    def _ask(self, **order: Any) -> dict[str, Any]:
        process = self.process = self.process or self._begin()
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(order), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            process.wait()
            self.report.seek(0)
            said = self.report.read()
            self.end()
            raise AssertionError(f"{order} ended the process: {said[:6000]}")
        answer = json.loads(line)
        assert "wrong" not in answer, answer["wrong"]
        return answer

    def _begin(self) -> subprocess.Popen[str]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TOKCOMP_")},
            **OPTIONS,
            "LD_PRELOAD": (self.folder / "preload.txt").read_text().strip(),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'python'}",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self.report = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed where the process ends
        return subprocess.Popen(
            [sys.executable, "-m", "tests.attack.sanitized", self.kinds],
            cwd=self.folder,  # which Python looks into first, so it holds the tokcomp_kernels that are imported
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.report, text=True,
        )  # fmt: skip


def two_callers(rng: random.Random) -> str:
    """Two threads make the same call at once, and have the same bits."""
    sample = calls.spoilt(rng, calls.draw(rng))
    with ThreadPoolExecutor(2) as pool:
        first, second = [future.result() for future in [pool.submit(calls.run, sample) for _ in range(2)]]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num()), sample
    return "two callers"


def answer(order: dict[str, Any], kinds: str) -> dict[str, str]:
    if "probe" in order:
        outcome = getattr(torch.ops.tokcomp_probe, order["probe"])(
            2**62 if order["probe"] == "overflow" else torch.zeros(3, dtype=torch.int64)
        )
        return {"came": f"nothing: {outcome}"}
    rng = random.Random(order["seed"])
    ways = [two_callers] if kinds == "thread" else [calls.ordinary, calls.out_of_any_range, calls.wrong]
    way: Any = rng.choice(ways)
    try:
        return {"came": way(rng) or way.__name__.replace("_", " ")}
    except Exception as error:
        return {"wrong": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    built = tokcomp_kernels.build_info().get("sanitize")
    assert built == sys.argv[1], (built, tokcomp_kernels.load_error, tokcomp_kernels.__file__)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), sys.argv[1])), flush=True)

"""The CI workflows do their work by make targets, and only by ones that exist; the other files of the project agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def targets_of(job: dict) -> set[str]:
    """The make targets that a job calls, those of its matrix included."""
    targets = set()
    for command in (step["run"] for step in job["steps"] if "run" in step):
        called = re.fullmatch(r"make (?:([\w-]+)|\$\{\{ matrix\.(\w+) \}\})", command)
        assert called, f"not one make target: {command}"
        targets.update([called[1]] if called[1] else job["strategy"]["matrix"][called[2]])
    return targets


def test_there_are_workflows():
    assert WORKFLOWS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_only_make_targets_that_exist(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    for name, job in jobs.items():
        assert targets_of(job), f"{name} does nothing"
        assert targets_of(job) <= TARGETS, name


def test_the_oldest_versions_are_those_that_are_allowed():
    lines = (ROOT / ".github" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', project[project.index("dependencies = [") :], re.M))
    for name, version in pinned.items():
        assert re.fullmatch(rf"{re.escape(allowed[name])}(\.0)*", version), name


def test_the_citation_is_of_this_version():
    from tokcomp_kernels import _version

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == _version.__version__ and citation["license"] == "Apache-2.0"
    assert {reference["year"] for reference in citation["references"]} == {2022, 2023, 2024}

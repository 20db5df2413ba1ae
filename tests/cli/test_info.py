from __future__ import annotations

import json

import torch

from tokcomp_kernels._schema import OPERATORS


def test_json_holds_versions_and_a_backend_per_operator(run):
    status, out, _ = run("info", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == {operator.name for operator in OPERATORS if operator.public}
    for chosen in found["backends"].values():
        assert chosen["cpu"] in ("cpp", "triton", "reference") and chosen["cuda"] in ("cuda", "triton", "reference")


def test_table_says_the_same(run):
    _, text, _ = run("info")
    _, out, _ = run("info", "--json")
    found = json.loads(out)
    lines = [line.split() for line in text.splitlines()]
    for name, chosen in found["backends"].items():
        assert [name, chosen["cpu"], chosen["cuda"]] in lines
    assert ("compiled kernels: none loaded" in text) == bool(found["not_loaded"])


def test_settings_are_shown(run, monkeypatch):
    monkeypatch.setenv("TOKCOMP_BACKEND", "reference")
    _, out, _ = run("info", "--json")
    found = json.loads(out)
    assert found["settings"]["TOKCOMP_BACKEND"] == "reference"
    assert {chosen["cpu"] for chosen in found["backends"].values()} == {"reference"}


def test_wrong_setting_is_a_user_error(run, monkeypatch):
    monkeypatch.setenv("TOKCOMP_BACKEND", "fast")
    status, _, err = run("info")
    assert status == 2
    assert "TOKCOMP_BACKEND must be one of auto, cuda, triton, reference, got 'fast'" in err

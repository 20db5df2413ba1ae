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


def test_product_types_and_their_reasons(run, set_products):
    set_products(bfloat16="float32")
    _, text, _ = run("info")
    _, out, _ = run("info", "--json")
    rows = {entry["dtype"]: entry for entry in json.loads(out)["cpu_products"]}
    assert list(rows) == ["float64", "float32", "bfloat16", "float16"]
    assert rows["float32"]["products"] == "float32" and rows["bfloat16"]["products"] == "float32"
    lines = [line.split(maxsplit=2) for line in text.splitlines()]
    for entry in rows.values():
        assert [entry["dtype"], entry["products"], entry["reason"]] in lines


def test_settings_are_shown(run, monkeypatch):
    monkeypatch.setenv("TOKCOMP_BACKEND", "reference")
    _, out, _ = run("info", "--json")
    found = json.loads(out)
    assert found["settings"]["TOKCOMP_BACKEND"] == "reference"
    assert {chosen["cpu"] for chosen in found["backends"].values()} == {"reference"}


def test_wrong_setting_is_a_user_error(refused, monkeypatch):
    monkeypatch.setenv("TOKCOMP_BACKEND", "fast")
    err = refused("info")
    assert "TOKCOMP_BACKEND must be one of auto, cuda, triton, reference, got 'fast'" in err

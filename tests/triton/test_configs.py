"""The tables of tile sizes: every problem finds an entry, and the batch never has a say."""

import json

import pytest

pytest.importorskip("triton")

from tokcomp_kernels.triton import _configs

TABLES = sorted(path.stem for path in _configs.CONFIG_DIR.glob("*.json"))


@pytest.mark.parametrize("op", TABLES)
def test_every_list_ends_in_an_entry_for_everything(op):
    table = _configs.load(op)
    assert _configs.DEFAULT in table
    for kernels in table.values():
        assert kernels.keys() <= table[_configs.DEFAULT].keys()
        for entries in kernels.values():
            assert "when" not in entries[-1]
            for entry in entries:
                assert not {"B", "batch", "H"} & set(entry.get("when", {}))
                assert all(value & (value - 1) == 0 for name, value in entry.items() if name.startswith("BLOCK_"))


def test_the_first_entry_whose_bounds_hold_is_taken(tmp_path, monkeypatch):
    entries = [{"when": {"N": 32}, "BLOCK_N": 32}, {"when": {"N": 64, "D": 64}, "BLOCK_N": 64}, {"BLOCK_N": 16}]
    special = {"kernel": [{"BLOCK_N": 128}]}
    (tmp_path / "some_op.json").write_text(json.dumps({"default": {"kernel": entries}, "Some GPU": special}))
    monkeypatch.setattr(_configs, "CONFIG_DIR", tmp_path)

    def block(gpu, **shape):
        return _configs._lookup("some_op", "kernel", gpu, tuple(shape.items()))["BLOCK_N"]

    assert block("default", N=32, D=128) == 32
    assert block("default", N=33, D=64) == 64
    assert block("default", N=33, D=65) == 16
    assert block("a GPU nobody measured", N=64, D=64) == 64
    assert block("Some GPU", N=64, D=64) == 128

"""Files that may be anybody's: nested too deeply, damaged, or without a digest."""

from __future__ import annotations

import json

import pytest
import tokcomp
import torch
from safetensors.torch import save_file
from tokcomp.budgets.latency import LatencyTable
from tokcomp.reading import DIGEST, digest, parse_json, read_metadata, read_tensors, tensors_to_bytes

TENSORS = {"b": torch.arange(40.0, dtype=torch.float64), "a": torch.ones(3, 2, dtype=torch.bfloat16)}
ABOUT = {"format": "x", "depth": "4"}


@pytest.mark.parametrize("load", [tokcomp.CompressionSchedule.load, LatencyTable.load], ids=["schedule", "latency"])
@pytest.mark.parametrize("depth", [65, 10**5])
def test_deeply_nested_json_is_refused(tmp_path, load, depth):
    path = tmp_path / "one.json"
    path.write_text("[" * depth + "]" * depth)
    with pytest.raises(ValueError, match=r"one\.json: not a JSON file \(it must be nested 64 deep at most"):
        load(path)


def test_a_number_beyond_any_float_is_refused(tmp_path):
    path = tmp_path / "one.json"
    times = {f"{part}_ms": [1.0] for part in ("attention", "reduce", "mlp", "head")}
    table = dict(
        depth=1, num_tokens=2, num_prefix_tokens=1, block={}, batch_size=1, dtype="float32", counts=[2], **times
    )
    path.write_text(json.dumps({"format": "tokcomp.LatencyTable", "version": 1, **table}))
    with pytest.raises(ValueError, match=r"one\.json: not a valid latency table"):
        LatencyTable.load(path)


def test_json_of_any_bytes():
    assert parse_json("[" * 64 + "]" * 64) and parse_json(b'{"a": {"b": [1]}}') == {"a": {"b": [1]}}
    for text in (b"\xff\xfe\x00", "{", "", "9" * 5000, '{"a": 1} x'):
        with pytest.raises(ValueError):
            parse_json(text)


def test_tensors_come_back(tmp_path):
    path = tmp_path / "one.safetensors"
    path.write_bytes(tensors_to_bytes(TENSORS, ABOUT))
    tensors, about = read_tensors(path, "a file")
    assert about == ABOUT and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert read_metadata(path) == {**ABOUT, DIGEST: digest([ABOUT, TENSORS])}
    assert tensors_to_bytes(dict(reversed(TENSORS.items())), dict(reversed(ABOUT.items()))) == path.read_bytes()
    save_file(TENSORS, path, ABOUT)  # as other programs do
    assert read_tensors(path, "a file")[1] == ABOUT
    assert read_metadata(tmp_path / "none") == {}


def test_any_damage_is_seen(tmp_path):
    """Every byte. One in the digest's own name leaves a file without a digest, whose tensors are as written."""
    path = tmp_path / "one.safetensors"
    whole = tensors_to_bytes(TENSORS, ABOUT)
    name = whole.index(DIGEST.encode())
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if name <= place < name + len(DIGEST):
            assert all(torch.equal(found, TENSORS[key]) for key, found in read_tensors(path, "a file")[0].items())
            continue
        try:
            tensors, about = read_tensors(path, "a file")
        except ValueError as error:
            assert "one.safetensors: must be" in str(error)
        else:  # white space that another white space takes the place of
            assert whole[place : place + 1].isspace() and about == ABOUT
            assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)


def test_digests_tell_values_apart():
    values = [1, 1.0, "1", True, None, [1], {"a": 1}, {"a": [1]}, torch.ones(1), torch.ones(1, 1), torch.ones(()), b"1"]
    assert len({digest(value) for value in [*values, torch.ones(1).half(), [1, [2]], [[1], 2], []]}) == len(values) + 4
    assert digest({"a": 1, "b": torch.zeros(0)}) == digest({"b": torch.zeros(0), "a": 1})

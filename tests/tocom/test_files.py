"""save and load."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import tokcomp
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokcomp.reading import DIGEST

from tests.tocom.test_fold import wide_block


def equal(ours, theirs):
    return list(ours) == list(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plugin.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_round_trip(make_vit, make_plugin, path, dtype):
    plugin = make_plugin(make_vit(), rank=3, max_degree=5).to(dtype)
    plugin.method, plugin.provenance = "tome", {"steps": 12, "data": "digits"}
    plugin.save(path)
    loaded = tokcomp.ToCom.load(str(path), make_vit(seed=1))
    assert equal(loaded.state_dict(), plugin.state_dict())
    assert (loaded.rank, loaded.max_degree) == (3, 5) and loaded.q_up[0].dtype == dtype
    assert (loaded.method, loaded.provenance) == ("tome", {"steps": 12, "data": "digits"})
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_metadata(make_vit, make_plugin, path):
    make_plugin(make_vit()).save(path)
    with safe_open(path, framework="pt") as file:
        assert {name: text for name, text in file.metadata().items() if name != DIGEST} == {
            **{"format": "tokcomp.tocom", "version": "1", "rank": "2", "max_degree": "4"},
            **{"depth": "4", "width": "24", "attention_width": "24"},
        }
    model = make_vit(block_fn=wide_block)
    make_plugin(model).save(path)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata()["width"], file.metadata()["attention_width"]) == ("24", "48")
    assert tokcomp.ToCom.load(path, model).v_up[1].shape == (48, 8)


def test_copies_and_pickles(make_vit, make_plugin):
    plugin = make_plugin(make_vit())
    for twin in (copy.deepcopy(plugin), pickle.loads(pickle.dumps(plugin))):
        assert equal(twin.state_dict(), plugin.state_dict()) and twin.max_degree == 4
    assert "rank=2, max_degree=4, 4 blocks of width 24" in repr(plugin)


def test_a_save_that_fails_leaves_the_old_file(make_vit, make_plugin, path):
    plugin = make_plugin(make_vit())
    plugin.save(path)
    before = path.read_bytes()
    plugin.provenance = {"set": {1, 2}}
    with pytest.raises(TypeError, match="provenance must be JSON data"):
        plugin.save(path)
    plugin.provenance, plugin.method = None, 3
    with pytest.raises(TypeError, match="method must be a name or None, got 3"):
        plugin.save(path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == [path.name]


def rewrite(path, change):
    """Save the plugin again with other tensors or metadata."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = {name: text for name, text in file.metadata().items() if name != DIGEST}
    change(tensors, metadata)
    save_file(tensors, path, metadata)


SPOILT = {
    "newer": (lambda tensors, metadata: metadata.update(version="3"), "version must be 1 or 2, got 3"),
    "arithmetic": (
        lambda tensors, metadata: metadata.update(version="2", arithmetic="both"),
        "arithmetic must be one of steps, two_way, shared, shared_by_distance, got 'both'",
    ),
    "no rank": (lambda tensors, metadata: metadata.pop("rank"), "metadata must say rank"),
    "rank": (lambda tensors, metadata: metadata.update(rank="3"), r"q_down\.0 must be \(12, 24\), got \(8, 24\)"),
    "depth": (lambda tensors, metadata: metadata.update(depth="9999999999"), "9999999999 blocks in 16 tensors"),
    "deep": (lambda tensors, metadata: metadata.update(provenance="[" * 10**5), "must be nested 64 deep at most"),
    "nan": (lambda tensors, metadata: tensors["q_up.1"].fill_(float("nan")), r"q_up\.1 must be finite, got values"),
    "zero": (lambda tensors, metadata: metadata.update(rank="0"), "rank and max_degree must be at least 1, got 0"),
    "words": (lambda tensors, metadata: metadata.update(max_degree="four"), "metadata must say rank, max_degree"),
    "widths": (lambda tensors, metadata: metadata.update(width="[24, 24]"), "one for each of 4 blocks"),
    "missing": (lambda tensors, metadata: tensors.pop("v_up.2"), r"v_up\.2 must be \(24, 8\), got nothing"),
    "extra": (lambda tensors, metadata: tensors.update(x=torch.zeros(1)), r"x must be absent, got \(1,\)"),
    "integers": (
        lambda tensors, metadata: tensors.update({"q_up.1": torch.zeros(24, 8, dtype=torch.int32)}),
        r"q_up\.1 must be of a floating-point type, got torch\.int32",
    ),
    "foreign": (lambda tensors, metadata: metadata.update(format="x"), "must be a ToCom plugin, got a file of 16"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_files_that_do_not_fit_together(make_vit, make_plugin, path, case):
    change, message = SPOILT[case]
    make_plugin(make_vit()).save(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"plugin\.safetensors: .*{message}"):
        tokcomp.ToCom.load(path, make_vit())


def test_truncated_and_foreign_files(make_vit, make_plugin, path, tmp_path):
    model = make_vit()
    make_plugin(model).save(path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"plugin\.safetensors: must be a ToCom plugin, got a file that does not"):
            tokcomp.ToCom.load(path, model)
    path.write_bytes(b"once upon a time")
    with pytest.raises(ValueError, match="got a file that does not load"):
        tokcomp.ToCom.load(path, model)
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="must be a ToCom plugin, got a file of 1 other tensors"):
        tokcomp.ToCom.load(path, model)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="got a file that does not load"):
        tokcomp.ToCom.load(path, model)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must be a ToCom plugin, got a list"):
        tokcomp.ToCom.load(path, model)
    with pytest.raises(FileNotFoundError):
        tokcomp.ToCom.load(tmp_path / "nothing.safetensors", model)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_no_code_is_run(make_vit, path, capsys):
    torch.save({"blocks.0.attn.q_tocom.adapter_down.weight": Evil()}, path)
    with pytest.raises(ValueError, match="got a file that does not load"):
        tokcomp.ToCom.load(path, make_vit())
    assert "code ran" not in capsys.readouterr().out


def test_plugin_for_another_model(make_vit, make_plugin, path):
    make_plugin(make_vit()).save(path)
    for options, found in ((dict(depth=3), "3 blocks of width 24"), (dict(embed_dim=48), "4 blocks of width 48")):
        with pytest.raises(ValueError, match=f"the plugin was made for 4 blocks of width 24, got a model of {found}"):
            tokcomp.ToCom.load(path, make_vit(**options))


def test_equal_plugins_are_equal_files(make_vit, make_plugin, path, tmp_path):
    for name in ("a", "b", "c"):
        plugin = make_plugin(make_vit())
        plugin.method, plugin.provenance = "tome", {"é": 1}
        plugin.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert tokcomp.ToCom.load(tmp_path / "a", make_vit()).provenance == {"é": 1}


def test_metadata_is_plain_text(make_vit, make_plugin, path):
    plugin = make_plugin(make_vit())
    plugin.provenance = {"paper": "Eq. 8-9"}
    plugin.save(path)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["provenance"]) == {"paper": "Eq. 8-9"}


@pytest.mark.parametrize("layout", ["safetensors", "torch", "torch, before 1.6"])
def test_truncated_anywhere(make_vit, make_plugin, path, layout):
    """Of all three kinds of files; torch's reader fails in many ways of its own."""
    model = make_vit(depth=1)
    if layout == "safetensors":
        make_plugin(model).save(path)
    else:
        shapes = {"down": (8, 24), "up": (24, 8)}
        names = {f"blocks.0.attn.{part}_tocom.adapter_{side}.weight": side for part in "qv" for side in shapes}
        tensors = {name: torch.zeros(shapes[side]) for name, side in names.items()}
        torch.save(tensors, path, _use_new_zipfile_serialization=layout == "torch")
    assert tokcomp.ToCom.load(path, model).max_degree == 4
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"plugin\.safetensors: must be a ToCom plugin, got a file that does not"):
            tokcomp.ToCom.load(path, model)

from __future__ import annotations

import pytest
import torch
from tokcomp.runs.checkpoint import CheckpointError, check_same_settings, load_checkpoint, save_checkpoint

STATE = {"step": 3, "logits": {"prune.0.logits": torch.arange(4.0)}, "settings": {"lr": 0.01, "aa": None}}


def test_what_was_saved_comes_back(tmp_path):
    path = tmp_path / "new" / "checkpoint.pt"
    save_checkpoint(path, "search", STATE)
    found = load_checkpoint(path, "search")
    assert found["step"] == 3 and found["settings"] == STATE["settings"]
    assert torch.equal(found["logits"]["prune.0.logits"], torch.arange(4.0))


def test_failed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "search", STATE)

    def half(data, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, "search", {**STATE, "step": 4})
    assert load_checkpoint(path, "search")["step"] == 3
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match=r"must be a file, got '.*checkpoint\.pt', which does not exist"):
        load_checkpoint(path, "search")
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: must be a checkpoint of tokcomp search, got a file that"):
        load_checkpoint(path, "search")
    save_checkpoint(path, "finetune", STATE)
    with pytest.raises(ValueError, match=r"must be a checkpoint of tokcomp search, got tokcomp\.finetune"):
        load_checkpoint(path, "search")
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="got another kind of file"):
        load_checkpoint(path, "search")
    torch.save({"format": "tokcomp.search", "version": 9, "state": {}}, path)
    with pytest.raises(ValueError, match="version must be 1, got 9"):
        load_checkpoint(path, "search")


class _Evil:
    def __reduce__(self):
        return (exec, ("raise AssertionError('code ran')",))


def test_no_code_of_a_checkpoint_runs(tmp_path):
    torch.save({"format": "tokcomp.search", "version": 1, "state": _Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="does not load"):
        load_checkpoint(tmp_path / "checkpoint.pt", "search")


def test_any_damage_is_a_checkpoint_error(tmp_path):
    """Of the pickle, of the archive around it and of the tensors' own data, which torch just reads."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "search", {**STATE, "logits": torch.arange(300.0)})
    whole = path.read_bytes()
    loaded = 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        try:
            state = load_checkpoint(path, "search")
        except CheckpointError:
            continue
        loaded += 1  # a byte that says nothing: padding, a time stamp
        assert torch.equal(state["logits"], torch.arange(300.0)) and state["settings"] == STATE["settings"]
    assert loaded < len(whole) / 7 / 2


def test_checkpoints_without_a_digest_are_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "tokcomp.search", "version": 1, "state": STATE}, path)
    assert load_checkpoint(path, "search")["step"] == 3


@pytest.mark.parametrize("state", [{**STATE, 3: 4}, {**STATE, "settings": {1: 2}}, {**STATE, "settings": 5}, [STATE]])
def test_states_of_another_kind_are_refused(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "tokcomp.search", "version": 1, "state": state}, path)
    with pytest.raises(CheckpointError, match="must hold a run's state and settings"):
        load_checkpoint(path, "search")


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"lr": 0.1, "seed": 0}, r"got lr = 0\.1, but out was started with 0\.01; restore it, or choose another"),
        ({"lr": 0.01}, "got seed = None, but out was started with 0"),
        ({"lr": 0.01, "seed": 0, "aa": "v0"}, "got aa = 'v0', but out was started with None"),
    ],
)
def test_other_settings_are_refused_by_name(now, message):
    saved = {"lr": 0.01, "seed": 0}
    check_same_settings(saved, {**saved, "new": {}, "newer": None}, where="out")
    with pytest.raises(ValueError, match=message):
        check_same_settings(saved, now, where="out")

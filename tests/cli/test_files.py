from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tokcomp.cli.errors import UserError, check_output_file, check_output_folder
from tokcomp.files import write_whole


def test_write_makes_folders_and_ordinary_files(tmp_path: Path):
    target = tmp_path / "new" / "folder" / "result.json"
    write_whole(target, "text")
    assert target.read_text() == "text"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch, fault):
    target = tmp_path / "result.json"
    target.write_text("before")

    def fail(handle: int) -> None:
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(fault):
        write_whole(target, "after")
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output must be a folder, got '.*file/sub' and '.*file' is a file; choose"):
        check_output_folder("--output", tmp_path / "file" / "sub")


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch):
    # Root may write anywhere, so permission bits alone would not show it.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"--output must be writable, got '.*'; choose another|is not; choose another"):
        check_output_folder("--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--results-file must be a file, got the folder"):
        check_output_file("--results-file", tmp_path)

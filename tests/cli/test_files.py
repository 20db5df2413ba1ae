from __future__ import annotations

import os
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest
import tokcomp
from tokcomp.cli.errors import UserError, check_output_file, check_output_folder
from tokcomp.files import sole_writer, write_whole


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

    monkeypatch.setattr(os, "fsync", Mock(side_effect=fault))
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


HOLD = """
import sys
from pathlib import Path
from tokcomp.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """Hold a folder in another process, until the test ends."""
    with ExitStack() as stack:

        def start(folder: Path) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", HOLD, str(folder)]
            path = os.pathsep.join(str(Path(tokcomp.__file__).parents[1] / up) for up in ("", ".."))
            env = {**os.environ, "PYTHONPATH": path}
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
            stack.callback(holder.communicate)
            assert holder.stdout.readline() == "held\n"
            return holder

        yield start


def test_a_folder_has_one_writer(tmp_path, hold):
    folder = tmp_path / "new" / "run"
    holder = hold(folder)
    with pytest.raises(BlockingIOError, match="another run is writing into"), sole_writer(folder):
        pass
    holder.kill()
    holder.wait()
    with sole_writer(folder):  # a killed run holds nothing
        (folder / "log.csv").write_text("step\n")
    assert os.listdir(folder) == ["log.csv"]


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with sole_writer(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    with sole_writer(tmp_path):
        pass
    assert tmp_path.exists()


def test_a_second_search_into_a_folder_is_refused(run, refused, tmp_path, hold):
    command = ["search", "--dataset", "digits", "-m", "tokcomp_digits_vit", "--pretrained", "-b", "32", "-j", "0"]
    command += ["--target-gflops", "0.012", "--eval-interval", "0", "--held-out", "0", "-o", tmp_path]
    assert run(*command, "--steps", "2")[0] == 0
    before = (tmp_path / "log.csv").read_text()
    hold(tmp_path)
    assert "another run is writing into" in refused(*command, "--steps", "2", "--resume")
    assert (tmp_path / "log.csv").read_text() == before


def test_a_result_that_finds_no_room_is_shown_all_the_same(run, tmp_path, monkeypatch):
    """A disk that is full when an evaluation ends takes the file, not the figures."""

    target = tmp_path / "result.json"
    target.write_text("before")
    monkeypatch.setattr("tokcomp.files.os.fsync", Mock(side_effect=OSError(28, "No space left on device")))
    command = ["evaluate", "--dataset", "digits", "-m", "tokcomp_digits_vit", "--pretrained", "-j", "0"]
    status, out, err = run(*command, "--results-file", target)
    assert status == 1 and "top-1" in out
    assert f"--results-file: '{target}' could not be written: [Errno 28]" in err and "Traceback" not in err
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["result.json"]

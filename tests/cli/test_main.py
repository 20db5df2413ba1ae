from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import pytest
from tokcomp.cli import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_example(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    assert f"usage: tokcomp {command}" in out
    assert "examples:" in out and out.count(f"tokcomp {command}") >= 3


def test_overview_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    for command, (_, summary) in COMMANDS.items():
        assert command in out and summary in out


def test_no_command_prints_the_overview_and_fails(run):
    status, out, _ = run()
    assert status == 2 and "commands:" in out


def test_version(run):
    from tokcomp import __version__

    assert run("--version") == (0, f"tokcomp {__version__}\n", "")


def test_unknown_command_suggests_the_nearest(refused):
    err = refused("evalute")
    assert "COMMAND must be one of demo, info" in err and "got 'evalute'; did you mean 'evaluate'?" in err


def test_unknown_option_is_refused_in_two_lines(refused):
    err = refused("info", "--jsonn")
    assert err.splitlines() == [
        "tokcomp info: error: unrecognized arguments: --jsonn",
        "Try 'tokcomp info --help'.",
    ]


def test_interrupt_is_one_line_and_130(monkeypatch, capsys):
    monkeypatch.setattr("tokcomp.cli.info.run", Mock(side_effect=KeyboardInterrupt))
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "\ntokcomp info: interrupted\n"


def test_help_needs_no_torch():
    """Help must answer at once, so it must not import torch."""
    script = (
        "import sys; sys.modules['torch'] = None; sys.modules['timm'] = None\n"
        "from tokcomp.cli import main\n"
        "for command in ('', 'evaluate', 'demo', 'visualize', 'finetune', 'search', 'tocom train', 'dense train'):\n"
        "    try: main([*command.split(), '--help'])\n"
        "    except SystemExit as error: assert error.code == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: tokcomp") == 8
    told = " ".join(done.stdout.split())
    for default in ("highest learning rate (default: 2e-05; 5e-4 x batch size / 512)", "images (default: 30; 300)"):
        assert default in told
    assert told.count("highest learning rate (default: 0.01)") == 1  # the search's

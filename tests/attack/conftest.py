"""The table of an attack, after its tests."""

from __future__ import annotations

import pytest

from tests.attack import parts
from tests.library.conftest import make_vit, meta_model, published  # noqa: F401


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if parts.DONE and parts.MINUTES:
        path = parts.OUT / "attack.json"
        parts.write_figures(path)
        terminalreporter.section("attack")
        for line in [*parts.table(), f"written: {path}"]:
            terminalreporter.line(line)

"""The page of promises names every part that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.attack.page import PAGE, PROMISES, rows


def test_every_part_has_its_promise() -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert set(re.findall(r'Part\("([^"]+)", share', sources)) == set(PROMISES)
    page = PAGE.read_text(encoding="utf-8")
    nothing = {part: {"tried": 0, "failed": 0} for part in PROMISES}
    for row in rows(nothing):
        assert row.split("| 0 |")[0] in page, "make attack, then python -m tests.attack.page attack-output/attack.json"


def test_a_table_is_of_one_run() -> None:
    with pytest.raises(ValueError, match="got none of operators, values, arguments"):
        rows({"killed": {"tried": 3, "failed": 0}})

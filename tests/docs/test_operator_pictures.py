"""The pictures of the operators are what the operators give."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

import tokcomp_kernels
from tools.operator_pictures import FOLDER, pictures

NUMBER = re.compile(r"(?<![\w#])-?\d+(?:\.\d+)?")
DRAWN = pictures()


def test_there_are_pictures_of_operators_alone():
    assert {path.stem for path in FOLDER.glob("*.svg")} == DRAWN.keys() <= set(tokcomp_kernels.__all__)


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_drawn_from_the_outputs(name):
    written, drawn = (FOLDER / f"{name}.svg").read_text(), DRAWN[name]()
    assert NUMBER.sub("", re.sub("#[0-9a-f]{6}", "", written)) == NUMBER.sub("", re.sub("#[0-9a-f]{6}", "", drawn))
    numbers = [[float(one) for one in NUMBER.findall(text)] for text in (written, drawn)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.11)  # of one decimal, on whatever CPU
    assert ElementTree.fromstring(written).tag.endswith("svg")

"""The documentation's Python runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def python_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))


def test_adding_a_method_works_as_written():
    exec(compile(python_of(ROOT / "docs" / "adding-a-method.md"), "adding-a-method.md", "exec"), {})


def test_adding_a_model_family_works_as_written(monkeypatch):
    """The page's family compresses, is searched, counted and restored like any other."""
    import tokcomp
    import torch
    from tokcomp import adapters

    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    page = {}
    exec(compile(python_of(ROOT / "docs" / "adding-a-model-family.md"), "adding-a-model-family.md", "exec"), page)
    model, images = page["ToyViT"]().eval().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = model(images)
    torch.testing.assert_close(tokcomp.compress(model, tokcomp.ToMe(0))(images), plain)
    assert tokcomp.trace(tokcomp.compress(model, tokcomp.ToMe(2)), images)[-1].max() == 17 - 6 - 1
    assert tokcomp.flops(model) < tokcomp.flops(tokcomp.restore(model)) and torch.equal(model(images), plain)
    logits, _ = tokcomp.DiffRateSearch(model)(images)
    assert logits.shape == (2, 5)


def test_readme_works_as_written(capsys):
    # The weights are not to be downloaded in a test, and the numbers do not depend on them.
    source = python_of(ROOT / "README.md").replace("pretrained=True", "pretrained=False")
    exec(compile(source, "README.md", "exec"), {})
    promised = re.findall(r"print\(.*?#\s*(\d+)", source)
    assert capsys.readouterr().out.split() == promised and len(promised) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page.name}: {target}"


def test_command_line_page_names_every_command():
    from tokcomp.cli import COMMANDS

    text = (ROOT / "docs" / "command-line.md").read_text()
    for command in COMMANDS:
        assert f"    tokcomp {command} " in text and f"## {command}\n" in text

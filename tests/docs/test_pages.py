"""The documentation's Python runs, and its links lead somewhere."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import timm
import tokcomp
import torch
import yaml
from tokcomp import adapters
from tokcomp.assets import DIGITS_SCHEDULE
from tokcomp.budgets import GemminiSearch, LatencyTable
from tokcomp.budgets.vit_parts import uniform_blocks

import tokcomp_kernels as kernels

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: Sizes that make a page's code quick; everything else runs as written. The digits model is not downloaded.
SMALLER = {
    "README.md": {"pretrained=True": "pretrained=False"},
    "budgets.md": {"model, 2.9": "model, 0.0105"},
    "searching.md": {"2.3e9": "0.0105e9", "2.3, starts": "0.0105, starts", "200": "2", "2.9": "0.0105", "1000": "2"},
    "caformer.md": {"pretrained=True": "pretrained=False"},
    "dense.md": {
        "pretrained=True, ": "",
        "img_size=512": "img_size=512, embed_dim=24, depth=2, num_heads=2",
        "num_tokens=32 * 44": "num_tokens=4 * 4",
        "(images)                              # [B, 150, 512, 704]": "(images[..., :64, :64])  #",
    },
    "deploying.md": {
        ", pretrained=True).eval().cuda().half()": ", embed_dim=24, num_heads=2).eval()",
        "[1, 8, 64]": "[1, 2]",
    },
    "int8.md": {"pretrained=True": "embed_dim=24, num_heads=2"},
    "serving.md": {"max_batch=16": "max_batch=2"},
}


def blocks_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    for written, smaller in SMALLER.get(page.name, {}).items():
        assert any(written in block for block in blocks), f"{page.name} no longer says {written}"
        blocks = [block.replace(written, smaller) for block in blocks]
    return blocks


def run(page: Path, **names: Any) -> dict[str, Any]:
    """What the page's code leaves behind, given the names that its prose introduces; each block gets a plain model."""
    found = {"tokcomp": tokcomp, "timm": timm, "torch": torch, **names}
    for number, block in enumerate(blocks_of(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), found)
        if isinstance(found.get("model"), torch.nn.Module):
            tokcomp.restore(found["model"])
    return found


def digits() -> Any:
    return timm.create_model("tokcomp_digits_vit", pretrained=True).eval()


def plugin_file(model: Any) -> None:
    tokcomp.ToCom(model, max_degree=16).save("deit_base.safetensors")


def given_budgets() -> dict[str, Any]:
    """With a table that is already measured: 900 ms uncompressed."""
    model = digits()
    times = {f"{part}_ms": [1.0, 100.0] for part in ("attention", "mlp")} | {
        f"{part}_ms": [0.0, 0.0] for part in ("reduce", "head")
    }
    shape = dict(depth=6, num_tokens=65, num_prefix_tokens=1, block=uniform_blocks(model)._asdict())
    LatencyTable(**shape, batch_size=16, dtype="float32", embed_ms=0.0, counts=[1, 65], **times).save("latency.json")
    return {"model": model}


def given_tocom() -> dict[str, Any]:
    model, images = digits(), torch.rand(2, 3, 32, 32)
    plugin_file(model)
    return {"model": model, "images": images, "teacher": torch.zeros(2, 10)}


def given_searching() -> dict[str, Any]:
    given = given_schedule()
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    batches = [(images, labels)]
    schedule = tokcomp.CompressionSchedule.load("run/schedule.json")
    given |= {"images": images, "labels": labels, "batches": batches, "held_out_batches": batches}
    return {"searched_method": tokcomp.DiffRate(schedule), **given}


def given_finetuning() -> dict[str, Any]:
    return {"model": digits(), "other": digits()}


def given_schedule() -> dict[str, Any]:
    Path("run").mkdir()
    Path("run/schedule.json").write_bytes(DIGITS_SCHEDULE.read_bytes())
    return {"model": digits()}


def given_served_budget() -> dict[str, Any]:
    model = digits()
    Path("plugin").mkdir()
    tokcomp.ToCom(model, max_degree=16).save("plugin/tocom.safetensors")
    return {"model": model, "images": torch.rand(12, 3, 32, 32)}


def given_serving() -> dict[str, Any]:
    model = digits()
    return {"model": model, "plugin": tokcomp.ToCom(model, max_degree=16), "image": torch.rand(3, 32, 32)}


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "budgets.md": given_budgets,
    "caformer.md": lambda: {"images": torch.rand(1, 3, 224, 224)},
    "dense.md": lambda: {"images": torch.rand(1, 3, 512, 512)},
    "find-your-schedule.md": given_schedule,
    "finetuning.md": given_finetuning,
    "int8.md": dict,
    "methods.md": lambda: {"model": digits(), "batches": [torch.rand(4, 3, 32, 32)]},
    "searching.md": given_searching,
    "serve-with-a-budget.md": given_served_budget,
    "serving.md": given_serving,
    "sharing.md": given_finetuning,
    "tocom.md": given_tocom,
}
#: Pages whose code has a test of its own, which looks at what it leaves behind.
ELSEWHERE = {
    *("README.md", "adding-a-method.md", "adding-a-model-family.md", "deploying.md", "first-hour.md", "operators.md")
}


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_page_works_as_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The model of an accelerator costs every point of its space first; tests/budgets does so.
    monkeypatch.setattr("tokcomp.budgets.GemminiSearch", create_autospec(GemminiSearch))
    run(ROOT / "docs" / name, **GIVEN[name]())


def test_every_page_with_python_is_run() -> None:
    assert {page.name for page in PAGES if blocks_of(page)} == GIVEN.keys() | ELSEWHERE


def test_deploying_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the compilers, which have tests of their own and take half a minute each."""
    packages = {}

    def export(model: Any, path: str) -> None:
        packages[path] = copy.deepcopy(model)

    class InferenceSession:
        def __init__(self, path: str) -> None:
            self.model = packages[path]

        def run(self, outputs: None, inputs: dict[str, Any]) -> list[Any]:
            return [self.model(torch.from_numpy(inputs["images"]))]

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph, dynamic: model)
    monkeypatch.setattr(tokcomp, "export", export)
    monkeypatch.setattr(tokcomp, "load_exported", packages.__getitem__)
    runtime = SimpleNamespace(InferenceSession=InferenceSession)
    found = run(ROOT / "docs" / "deploying.md", onnxruntime=runtime, images=torch.rand(2, 3, 224, 224))
    assert found["logits"].shape == (2, 1000) and packages.keys() == {"model.pt2", "model.onnx"}


def test_the_first_hour_works_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    found = run(ROOT / "docs" / "first-hour.md")
    lines = capsys.readouterr().out.splitlines()
    costs = [float(re.search(r"([\d.]+) M", line)[1]) for line in lines[:4]]  # type: ignore[index]
    scores = [float(re.search(r"([\d.]+) %", line)[1]) for line in lines[:4]]  # type: ignore[index]
    assert max(costs[1:]) < 0.6 * costs[0] and min(scores) > 93, lines
    assert found["features"].shape == (1, 41, 384)


def test_adding_a_method_works_as_written() -> None:
    run(ROOT / "docs" / "adding-a-method.md")


def test_adding_a_model_family_works_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's family compresses, is searched, counted and restored like any other."""
    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    page = run(ROOT / "docs" / "adding-a-model-family.md")
    model, images = page["ToyViT"]().eval().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = model(images)
    torch.testing.assert_close(tokcomp.compress(model, tokcomp.ToMe(0))(images), plain)
    assert tokcomp.trace(tokcomp.compress(model, tokcomp.ToMe(2)), images)[-1].max() == 17 - 6 - 1
    assert tokcomp.flops(model) < tokcomp.flops(tokcomp.restore(model)) and torch.equal(model(images), plain)
    logits, _ = tokcomp.DiffRateSearch(model)(images)
    assert logits.shape == (2, 5)


def test_readme_works_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "README.md"
    run(page)
    promised = re.findall(r"print\(.*?#\s*(\d+)", page.read_text())
    assert capsys.readouterr().out.split() == promised and len(promised) == 2


def anchors(page: Path) -> set[str]:
    """The fragments of a page, by the rule of GitHub and of the site: of its headings, and those set by hand."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    slugs = {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if fragment:
            assert fragment in anchors(file), f"{page.name}: {target}"


def test_command_line_page_names_every_command() -> None:
    from tokcomp.cli import COMMANDS

    text = (ROOT / "docs" / "command-line.md").read_text()
    for command in COMMANDS:
        assert f"    tokcomp {command} " in text and f"## {command}\n" in text


def site_pages(entries: list[Any]) -> set[str]:
    """The pages that a part of the site's navigation names."""
    pages: set[str] = set()
    for entry in entries:
        for where in entry.values():
            pages |= {where} if isinstance(where, str) else site_pages(where)
    return pages


def test_the_site_has_every_page_and_public_name() -> None:
    """What `make docs` does not say, and some of what it does, where MkDocs is not installed."""
    at_the_root = {"index.md", "contents.md", "contributing.md", "security.md", "changelog.md"}
    files = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert site_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]) == files | at_the_root
    named = re.findall(r"^::: ([\w.]+)$", "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md")), re.M)
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
    everything = {f"tokcomp.{name}" for name in tokcomp.__all__} | {
        f"tokcomp_kernels.{name}" for name in kernels.__all__
    }
    missing = everything - {"tokcomp.__version__", "tokcomp_kernels.load_error"} - set(named)
    assert not missing, f"a page of docs/api needs ::: and these names: {missing}"

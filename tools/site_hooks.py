"""MkDocs hooks: pages that live at the root of the repository are pages of the site, and links to them work in both."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
#: Where on the site a page of the repository is. The site opens with the README; docs/index.md lists every page.
PLACES = {
    "README.md": "index.md",
    "docs/index.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
#: A link, or code that looks like one and stays as it is.
LINK_OR_CODE = re.compile(
    r"^```.*?^```"
    r"|(?P<text>\[(?:[^\]`]|`[^`]*`)*\])\((?P<path>[^)\s#:]+)(?P<fragment>#[^)\s]*)?\)"
    r"|`[^`\n]+`",
    re.DOTALL | re.MULTILINE,
)
ROLE = re.compile(r":(?:class|func|meth|attr|mod):<code>~?([^<]*)</code>")


#: Operators that have a picture get a page each: their section of docs/operators.md and their rows of the results.
PICTURES = ROOT / "docs" / "images" / "operators"


def on_config(config: Any) -> Any:
    """Anchors as GitHub writes them, so that one link serves both; the operators' own pages in the navigation."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    operators = next(part["Operators"] for part in config.nav if "Operators" in part)
    operators.insert(1, {"One by one": [{name: f"operators/{name}.md"} for name in operator_sections()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    files.remove(files.get_file_from_path("index.md"))
    for source, place in PLACES.items():
        text = rewritten((ROOT / source).read_text("utf-8"), source)
        first_page = "---\nhide: [navigation]\n---\n" if place == "index.md" else ""
        files.append(File.generated(config, place, content=first_page + text))
    for name, section in operator_sections().items():
        files.append(File.generated(config, f"operators/{name}.md", content=operator_page(name, section)))
    return files


def operator_sections() -> dict[str, str]:
    """What docs/operators.md says of each operator that has a picture, in its order."""
    parts = re.split(r"^## (.+)\n", (ROOT / "docs" / "operators.md").read_text("utf-8"), flags=re.MULTILINE)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: section for name, section in named.items() if (PICTURES / f"{name}.svg").exists()}


def operator_page(name: str, section: str) -> str:
    """The page of an operator: picture, shapes and rules, where its function is, what was measured and predicted."""
    section = re.sub(r"\]\(#", "](operators.md#", section)
    picture = (PICTURES / f"{name}.svg").read_text("utf-8").strip()
    parts = [f"# {name}", f"<div class='operator' data-search-exclude>{picture}</div>"]
    parts.append(rewritten(section, "docs/operators.md", here=f"operators/{name}.md").strip())
    function = f"[`tokcomp_kernels.{name}`](../api/operators.md#tokcomp_kernels.{name})"
    parts.append(f"In Python: {function}. [Rules for all operators](../operators.md#rules-for-all-operators).")
    return "\n\n".join([*parts, *operator_results(name)]) + "\n"


def operator_results(name: str) -> list[str]:
    """An operator's rows of the tables in docs/results.md, under the headings that they have there."""
    found, titles, header = [], {2: "", 3: ""}, []
    rows: list[str] = []
    for line in [*(ROOT / "docs" / "results.md").read_text("utf-8").splitlines(), ""]:
        if title := re.match(r"(##|###) (.*)", line):
            titles[len(title[1])] = title[2]
        if line.startswith("| operator |"):
            header, rows = [line], []
        elif header and len(header) < 2:
            header.append(line)
        elif header and line.startswith("|"):
            rows += [line] if line.split("|")[1].strip() == name else []
        elif header:
            if rows:
                found += [f"## {titles[2]}: {titles[3]}", "\n".join([*header, *rows])]
            header = []
    return [*found, "How to read these: [results](../results.md)."] if found else []


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    if place in PLACES.values() or place.startswith("operators/"):
        return markdown
    return rewritten(markdown, f"docs/{place}")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings mark names as Sphinx does (``:class:`ToMe```); the site shows the name."""
    return ROLE.sub(r"<code>\1</code>", html)


def rewritten(markdown: str, source: str, here: str | None = None) -> str:
    """``markdown`` of ``source`` with its links as they are on the site; what is not on the site loses its link.

    ``here``: the page that it becomes part of, if that is not the one of ``source``.
    """
    at = here or PLACES.get(source, source.removeprefix("docs/"))

    def link(match: re.Match[str]) -> str:
        if match["text"] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        place = PLACES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if place is None:
            return match["text"][1:-1]
        relative = posixpath.relpath(place, posixpath.dirname(at) or ".")
        return f"{match['text']}({relative}{match['fragment'] or ''})"

    return LINK_OR_CODE.sub(link, markdown)

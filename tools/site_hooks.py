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


def on_config(config: Any) -> Any:
    """Anchors as GitHub writes them, so that one link serves both."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    files.remove(files.get_file_from_path("index.md"))
    for source, place in PLACES.items():
        text = rewritten((ROOT / source).read_text("utf-8"), source)
        first_page = "---\nhide: [navigation]\n---\n" if place == "index.md" else ""
        files.append(File.generated(config, place, content=first_page + text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = f"docs/{page.file.src_uri}"
    return markdown if page.file.src_uri in PLACES.values() else rewritten(markdown, source)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings mark names as Sphinx does (``:class:`ToMe```); the site shows the name."""
    return ROLE.sub(r"<code>\1</code>", html)


def rewritten(markdown: str, source: str) -> str:
    """``markdown`` of ``source`` with its links as they are on the site; what is not on the site loses its link."""

    def link(match: re.Match[str]) -> str:
        if match["text"] is None:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        place = PLACES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if place is None:
            return match["text"][1:-1]
        here = PLACES.get(source, source.removeprefix("docs/"))
        relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{match['text']}({relative}{match['fragment'] or ''})"

    return LINK_OR_CODE.sub(link, markdown)

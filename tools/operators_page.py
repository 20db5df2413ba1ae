"""``python tools/operators_page.py``: draw the tables and signatures of docs/operators.md again, from _schema.py.

The prose is the page's own. A test compares what stands there with what this draws.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "operators.md"
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tokcomp_kernels._schema import OPERATORS, Operator  # noqa: E402


def drawn(page: str) -> str:
    """The page with its tables and signatures as the table of operators has them."""
    for name, table in {"operators": _operators(), "backends": _backends(), "backward": _backward()}.items():
        page = _replaced(page, rf"(<!-- {name}: [^\n]*-->\n).*?(?=\n\n|\Z)", table, f"a comment <!-- {name}: ... -->")
    for operator in OPERATORS:
        if operator.public:
            pattern = rf"(\n## {operator.name}\n\n```\n)[^`]*(?=\n```\n)"
            page = _replaced(page, pattern, signature(operator), f"a section {operator.name} opening with a fence")
    return page


def _replaced(page: str, pattern: str, text: str, what: str) -> str:
    page, count = re.subn(pattern, lambda found: found.group(1) + text, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"docs/operators.md must have {what} once, got {count}; add the section or the mark")
    return page


def signature(operator: Operator, width: int = 118) -> str:
    """The schema over as many lines as it needs, its arguments below each other."""
    arguments, returned = operator.schema.replace("1e-06", "1e-6").split(" -> ")
    whole = f"{arguments} -> {returned}"
    if len(whole) <= width:
        return whole
    # An argument stays in one piece: only the space after a comma may break.
    pieces = arguments.replace(", ", ",\0").replace(" ", "\xa0").replace("\0", " ")
    lines = textwrap.wrap(pieces, width, subsequent_indent=" " * (len(operator.name) + 1), break_long_words=False)
    return "\n".join([*lines, f"    -> {returned}"]).replace("\xa0", " ")


def _operators() -> str:
    rows = ["| operator | what it does | differentiable in |", "|---|---|---|"]
    for operator in OPERATORS:
        if operator.public:
            inputs = _code(operator.differentiable)
            rows.append(f"| [`{operator.name}`](#{operator.name}) | {operator.doc} | {inputs} |")
    return "\n".join(rows)


def _backward() -> str:
    rows = ["| operator | what it does |", "|---|---|"]
    rows += [f"| `{signature(operator, 1000)}` | {operator.doc} |" for operator in OPERATORS if not operator.public]
    return "\n".join(rows)


def _backends() -> str:
    composed = _code(operator.name for operator in OPERATORS if not operator.native)
    cuda = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    compiled = _code(op.name for op in OPERATORS if re.search(rf"TOKCOMP_(REGISTER|OFFER)_CUDA\({op.name},", cuda))
    return "\n".join(
        [
            "| backend | where | operators |",
            "|---|---|---|",
            f"| C++ | CPU | all but {composed} |",
            "| Triton | CUDA | all |",
            f"| CUDA C++ | CUDA | {compiled}; attention in half precision, heads of up to 80 numbers |",
            "| reference (PyTorch) | anywhere | all: the specification, and what runs where nothing else can |",
        ]
    )


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))

"""Records of measurements as Markdown tables: any record, by the columns that its rows have."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokcomp.measure.instruction_sets import in_words

from benchmarks.page.ratios import with_ratios

#: Suite -> heading and what its table shows. A suite that is not here is shown under its own name.
SUITES = {
    "models": (
        "Whole models",
        "Everyone in one run, in turns; each precision against its own kind, the published pipeline's float32 beside.",
    ),
    "table-1": (
        "The rows of DiffRate's Table 1",
        "Baseline, EViT, ToMe and DiffRate at the published budgets, batch 1024, float16; the paper's are an A100's.",
    ),
    "batch-sweep": (
        "Batch sizes",
        "DiffRate's published schedules from one image up, against the published pipeline in the same precision.",
    ),
    "stock-attention": (
        "The model's own attention",
        'Our kernels beside `attention="stock"`: PyTorch\'s attention with the sizes as a mask on the keys, on '
        "timm's model and on the same weights in transformers, and there FlexAttention; whole and at 2.3 G.",
    ),
    "runtimes": (
        "Compressed files in other runtimes",
        "ONNX files of the whole model and of compressed ones in ONNX Runtime and OpenVINO, and ours in PyTorch. "
        "*Over itself*: over the whole model in the same runtime and precision.",
    ),
    "training": ("Training steps", "Whole steps of the fine-tuning recipe (the paper's Table 11)."),
    "tocom": ("ToCom: inference against r", "ToMe at every degree, with the plugin folded into the weights."),
    "tocom-training": ("ToCom: training against r", "Fine-tuning steps under ToMe at every source degree."),
    "search-step": ("Search steps", "One step of the schedule search: forward, backward, update."),
    "operators": (
        "Operators",
        "Through the dispatcher, against the chain of eager PyTorch calls of the published code, block by block.",
    ),
}
#: Suites of whole models, whose ratios are worked out here from the rounds.
_OF_MODELS = ("models", "batch-sweep")
#: What a row's ``speedup`` is over, where that is not the published pipeline.
_SPEEDUP_OVER = dict.fromkeys(("table-1", "tocom", "stock-attention", "runtimes"), "over timm")
#: Columns in the order of tables: keys (the first that a row has), heading, how a value is written.
_TIMES = "times"
_SHARE = "share"
COLUMNS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("title", "model"), "model", "text"),
    (("operator",), "operator", "text"),
    (("block",), "block", "text"),
    (("budget",), "budget, G", "number"),
    (("method",), "method", "text"),
    (("r",), "r", "number"),
    (("name", "entry"), "entry", "text"),
    (("batch",), "batch", "number"),
    (("precision", "dtype"), "precision", "text"),
    (("gflops",), "GFLOPs", "number"),
    (("images_per_second",), "images/s", "number"),
    (("paper_gflops",), "paper: GFLOPs", "number"),
    (("paper_images_per_second",), "images/s", "number"),
    (("microseconds",), "us", "number"),
    (("speedup",), "", _TIMES),
    (("speedup_over_eager",), "over eager", _TIMES),
    (("speedup_over_timm", "over_timm"), "over timm", _TIMES),
    (("over_timm_compiled",), "over timm compiled", _TIMES),
    (("over_published", "speedup_over_published"), "over published", _TIMES),
    (("over_published_float32",), "over its float32", _TIMES),
    (("over_best_rival",), "over the best rival", _TIMES),
    (("best_rival",), "which is", "text"),
    (("same_answers",), "same answers", _SHARE),
    (("speedup_over_uncompressed", "speedup_over_r0"), "over ours, uncompressed", _TIMES),
    (("over_itself",), "over itself, whole", _TIMES),
    (("paper_speedup",), "paper", _TIMES),
    (("share_of_ideal",), "of ideal", _SHARE),
    (("share_of_matrix_rate",), "of matrix rate", _SHARE),
    (("share_of_floor",), "of floor", _SHARE),
    (("share_of_copy_rate",), "of copy rate", _SHARE),
    (("efficiency",), "efficiency", _SHARE),
    (("tax",), "tax", _SHARE),
    (("memory",), "memory, MB", "megabytes"),
)
#: Of a row's identity: a later record's row with the same replaces an earlier one's.
_IDENTITY = (
    "model", "operator", "block", "budget", "method", "r", "name", "entry", "backend", "batch", "precision",
    "dtype", "search",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One run's file."""

    path: str  # from the folder of results
    data: Mapping[str, Any]

    @property
    def device(self) -> str:
        """The folder that it is in."""
        return self.path.split("/")[0]

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.data["provenance"]

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.provenance

    @property
    def machine(self) -> str:
        """The device, and of a CPU the instructions that it was allowed, where the record knows."""
        words = "" if self.on_gpu else in_words(self.provenance["host"].get("instruction_sets", {}))
        return ", ".join(filter(None, [str(self.provenance["device"]), words]))

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """Its rows, those of whole models with their ratios."""
        for suite, group in itertools.groupby(self.data["rows"], suite_of):
            rows = list(group)
            yield from with_ratios(rows) if suite in _OF_MODELS else rows


def read_records(folder: Path) -> list[Record]:
    """Every run's record under a folder of results, oldest first.

    Raises:
        ValueError: a file there is no JSON.
    """
    records = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not a JSON file ({error})") from error
        if isinstance(data, dict) and {"provenance", "rows"} <= data.keys():
            records.append(Record(path.relative_to(folder).as_posix(), data))
    return sorted(records, key=lambda record: (record.provenance["date"], record.path))


def suite_of(row: Mapping[str, Any]) -> str:
    """The benchmark that a row is of; rows of older records are told by what they hold."""
    if "suite" in row:
        return str(row["suite"])
    if "operator" in row:
        return "operators"
    if "search" in row:
        return "search-step"
    return "training" if "speedup_over_timm" in row else "models"


def rows_by_suite(records: Iterable[Record]) -> dict[str, list[tuple[Record, Mapping[str, Any]]]]:
    """Suite -> the latest of every row with the record that it is from, in the order of :data:`SUITES`."""
    latest: dict[tuple[str, ...], tuple[Record, Mapping[str, Any]]] = {}
    for record in records:
        for row in record.rows():
            identity = (suite_of(row), *(json.dumps(row.get(key)) for key in _IDENTITY))
            latest.pop(identity, None)
            latest[identity] = (record, row)
    suites: dict[str, list[tuple[Record, Mapping[str, Any]]]] = {name: [] for name in SUITES}
    for identity, found in latest.items():
        suites.setdefault(identity[0], []).append(found)
    return {name: rows for name, rows in suites.items() if rows}


def not_measured(records: Iterable[Record], suite: str) -> list[Mapping[str, Any]]:
    """A suite's entries without a figure, as the latest record that tried says."""
    latest: dict[tuple[str, ...], Mapping[str, Any] | None] = {}
    for record in records:
        tried = [(row, None) for row in record.data["rows"] if suite_of(row) == suite]
        tried += [(one, one) for one in record.data.get("not_measured", []) if one.get("suite") == suite]
        for row, missing in tried:
            latest[tuple(json.dumps(row.get(key)) for key in ("model", "name", "batch", "precision"))] = missing
    return [missing for missing in latest.values() if missing is not None]


def suite_table(suite: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A suite's rows as a Markdown table."""
    if suite == "operators":
        rows = [_operator_row(row) for row in rows if row["backend"] == "dispatched"]
    over = _SPEEDUP_OVER.get(suite, "over published")
    return markdown([(heading or over, cell) for heading, cell in columns_of(rows)], rows)


def _operator_row(row: Mapping[str, Any]) -> dict[str, Any]:
    seconds = sorted(row["seconds"])
    return {**row, "microseconds": 1e6 * seconds[len(seconds) // 2]}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Callable[[Mapping[str, Any]], str]]]:
    """Heading ("": depends on the suite) and cell of every known column that some row has a value for."""
    found: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    for keys, heading, kind in COLUMNS:
        if any(row.get(key) is not None for row in rows for key in keys):

            def cell(row: Mapping[str, Any], keys: tuple[str, ...] = keys, kind: str = kind) -> str:
                return format_value(next((row[key] for key in keys if row.get(key) is not None), None), kind)

            found.append((heading, cell))
    return found


def format_value(value: Any, kind: str) -> str:
    """A cell: ratios as median and range, shares in per cent, figures with three digits or more."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        middle, least, most = (format_value(one, kind) for one in value)
        return middle if middle == least == most else f"{middle} ({least} - {most})"
    if kind == _TIMES:
        return f"{value:.2f}x"
    if kind == _SHARE:
        return f"{100 * value:.1f} %"
    if kind == "megabytes":
        return f"{value / 1e6:.0f}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    return str(value)


def number(value: float) -> str:
    """Three digits at least, no exponent, thousands apart by commas."""
    if isinstance(value, int) or value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def markdown(columns: Sequence[tuple[str, Callable[[Any], str]]], rows: Sequence[Any]) -> str:
    """A table; columns of figures are aligned to the right."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    right = [
        all(line[index][:1].isdigit() or line[index][:1] in ("", "-", "*") for line in cells)
        for index in range(len(columns))
    ]
    head = "| " + " | ".join(heading for heading, _ in columns) + " |"
    rule = "| " + " | ".join("---:" if figures else "---" for figures in right) + " |"
    return "\n".join([head, rule, *("| " + " | ".join(line) + " |" for line in cells)])


def paragraph(*sentences: str) -> str:
    """Sentences as lines of a width that reads well in the source of a page."""
    return textwrap.fill(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def replace_block(text: str, begin: str, end: str, block: str) -> str:
    """A page's text with what lies between two marked lines drawn again.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must hold the lines {begin} and {end} once each, around what is drawn there")
    return text[: text.index(begin) + len(begin)] + f"\n{block}\n" + text[text.index(end) :]

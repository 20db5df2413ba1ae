"""A run's log: CSV, flushed line by line, and TensorBoard's files if that is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokcomp.files import write_whole


class RunLog:
    """Rows of numbers by step. A resumed run continues from its checkpoint: later rows are removed first.

    Numbers are written so that they read back exactly, and nothing depends on the clock, so the log of a resumed run
    equals that of an uninterrupted one. None is written as an empty cell.

    Args:
        path: the CSV file.
        fields: its columns; ``step`` comes before them.
        resume_step: rows after this step are dropped; None starts a new log.
        tensorboard: folder for TensorBoard's files, or None for none. Needs the package ``tensorboard``.
    """

    def __init__(
        self, path: Path, fields: Sequence[str], *, resume_step: int | None = None, tensorboard: Path | None = None
    ) -> None:
        self.path, self.fields = path, ["step", *fields]
        kept = [] if resume_step is None else [row for row in read_log(path) if row["step"] <= resume_step]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(self.fields)
        for row in kept:
            self._write(text, row)
        write_whole(path, text.getvalue())
        self._file = path.open("a", encoding="utf-8", newline="")
        self._board: Any = None
        if tensorboard is not None and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            self._board = SummaryWriter(str(tensorboard), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Add a row. Columns that are not named stay empty.

        Raises:
            ValueError: a name that is not one of the columns.
        """
        unknown = values.keys() - set(self.fields)
        if unknown:
            raise ValueError(f"values must be named as the log's columns, got {', '.join(sorted(unknown))}")
        self._write(self._file, {"step": step, **values})
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _write(self, file: Any, row: Mapping[str, float | None]) -> None:
        cells = (row.get(field) for field in self.fields)
        csv.writer(file, lineterminator="\n").writerow("" if cell is None else repr(cell) for cell in cells)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV log: whole numbers as int, others as float, empty cells left out.

    An incomplete last line, which a killed run may leave, is ignored. A missing file has no rows.

    Raises:
        ValueError: the file is no such log: no text, no column ``step``, or cells that are no numbers; it is named.
    """
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = [{name: _number(cell) for name, cell in row.items() if cell} for row in reader]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: must be the log of a run, got other text ({error})") from error
    if any("step" not in row for row in rows):
        raise ValueError(f"{path}: must be the log of a run, got rows without a step")
    return rows


def _number(cell: str) -> int | float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)

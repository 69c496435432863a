"""CSV files as samples: a line a sample, a column a feature, and a column for the label.

Columns are parted by commas, semicolons or tabs, whichever the first line has most of; it may name the columns. Numbers
are parsed by NumPy; nothing in the file can run code, and what it may take of memory is bounded as it is read.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import DataError, FileError
from .classes import Classes, numbered

__all__ = ["MAX_LINE", "Table", "is_table", "read_table"]


def is_table(path: Path) -> bool:
    """Whether a file is a CSV file, by its name."""
    return path.suffix.lower() in (".csv", ".tsv") and not path.is_dir()


MAX_LINE = 1 << 22
"""Most characters in a line."""


@dataclass(frozen=True)
class Table:
    """The samples of a CSV file.

    Attributes:
        x: (T, N) float32.
        y: (T,) integers, or float64 (T, n) where numbers were asked for; None where labels were not asked for.
        classes: names of the classes.
        columns: other columns that were asked for, by what they were asked for with: (T,) float64.
    """

    x: NDArray[np.float32]
    y: NDArray[Any] | None
    classes: Classes
    columns: dict[str, NDArray[Any]]


def read_table(
    path: Path,
    label: str | None,
    labels: bool,
    known: Classes,
    most_bytes: int,
    N: int | None = None,
    numbers: bool = False,
    others: Sequence[str] = (),
) -> Table:
    """Read a CSV file.

    Args:
        label: name or number (from 0; -1 is the last) of the label's column; several with commas between them where
            `numbers` are asked for; None: the last.
        labels: whether labels are needed. If not, the label's column may be there, and is left out.
        known: names the classes are known by.
        most_bytes: that the features may take.
        N: features the network wants; None: any number. Tells whether there is a label's column where none is needed.
        numbers: whether labels are numbers, not classes.
        others: names or numbers of further columns, which are no features.

    Raises:
        FileError: missing, no text, or a line is too long.
        DataError: a cell is no number, lines differ in their columns, or there is no such column.
    """
    files.regular_size(path, "a CSV file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            first = _line(f, path)
        if not first.strip():
            raise DataError(f"a CSV file must begin with a line of values or names, but {path} does not")
        delimiter = max(",;\t", key=first.count)
        cells = _cells(first, delimiter)
        width = len(cells)
        extra = [_column(name, cells, path, "--groups or --sample-weights") for name in others]
        drop = label is not None or labels or (N is not None and width - len(extra) == N + 1)
        chosen = [_column(name, cells, path, "--label") for name in (label or "-1").split(",")] if drop else []
        features = [k for k in range(width) if k not in (*chosen, *extra)]
        if not features:
            raise DataError(f"a CSV file must have columns beside that of the label, but {path} has {width}")
        named = not all(_is_number(cells[k]) for k in features)
        x = _parsed(path, delimiter, width, named, features, np.float32, most_bytes)
        y: NDArray[Any] | None = None
        classes: Classes = known
        if labels and numbers:
            y = _parsed(path, delimiter, width, named, chosen, np.float64, most_bytes)
        elif labels:
            if len(chosen) != 1:
                raise DataError(f"--label must be one column for classes, not {label}")
            with path.open(encoding="utf-8-sig", newline="") as f:
                lines = _lines(f, path, delimiter, width, named)
                texts = [_cells(line, delimiter)[chosen[0]].strip() for line in lines]
            y, classes = numbered(texts, texts, known, str(path))
        further = {
            name: _parsed(path, delimiter, width, named, [k], np.float64, most_bytes)[:, 0]
            for name, k in zip(others, extra, strict=True)
        }
    except UnicodeDecodeError:
        raise FileError(f"a CSV file must be UTF-8 text, but {path} is not") from None
    except OSError as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"a CSV file must be readable, but {path} is not: {files.reason(e)}") from None
    whole = {name: v.astype(np.int64) if (v == np.rint(v)).all() else v for name, v in further.items()}
    return Table(x, y, classes, whole)


def _parsed(
    path: Path,
    delimiter: str,
    width: int,
    named: bool,
    columns: list[int],
    dtype: type[np.floating[Any]],
    most_bytes: int,
) -> NDArray[Any]:
    """Some columns of the file: (rows, columns) numbers."""
    with path.open(encoding="utf-8-sig", newline="") as f:
        lines = _lines(f, path, delimiter, width, named)
        most = most_bytes // (np.dtype(dtype).itemsize * len(columns))
        try:
            values = np.loadtxt(
                lines,
                dtype,
                comments=None,
                delimiter=delimiter,
                quotechar='"',
                usecols=columns,
                max_rows=most + 1,
                ndmin=2,
            )
        except (DataError, FileError, UnicodeDecodeError):
            raise
        except (ValueError, OverflowError) as e:
            words = " ".join(str(e).split("; use `usecols`")[0].split())[:160]
            raise DataError(f"features must be numbers, but {path} has others (rows from 0): {words}") from None
    if len(values) > most:
        raise DataError(f"{path}: features must take at most {most_bytes:,} bytes of memory, but take more")
    return values


def _lines(f: IO[str], path: Path, delimiter: str, width: int, named: bool) -> Iterator[str]:
    """The lines that hold samples, each of `width` cells."""
    number, any_yet = 0, False
    while line := _line(f, path):
        number += 1
        if not line.strip() or (named and not any_yet and number == 1):
            continue
        found = line.count(delimiter) + 1 if '"' not in line else len(_cells(line, delimiter))
        if found != width:
            raise DataError(f"{path}: every line must have {width} columns, but line {number} has {found}")
        any_yet = True
        yield line
    if not any_yet:
        raise DataError(f"a CSV file must hold at least one sample, but {path} holds none")


def _line(f: IO[str], path: Path) -> str:
    line = f.readline(MAX_LINE + 1)
    if len(line) > MAX_LINE:
        raise FileError(f"a line of a CSV file must have at most {MAX_LINE} characters, but {path} has a longer one")
    return line


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line.rstrip("\r\n")], delimiter=delimiter), [])


def _column(name: str, cells: list[str], path: Path, option: str) -> int:
    """The number of a column: by its name in the first line, else by its number."""
    heads = [cell.strip() for cell in cells]
    if name in heads:
        return heads.index(name)
    try:
        k = int(name)
    except ValueError:
        k = len(cells)
    if not -len(cells) <= k < len(cells):
        shown = ", ".join(heads[:8])[:160] + (", …" if len(heads) > 8 else "")
        raise DataError(
            f"{option} must be a column of {path} ({shown}) or a number to {len(cells) - 1}, not {name!r:.60}"
        )
    return k % len(cells)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True

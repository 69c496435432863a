"""Messages from outside: lines of JSON or CSV, files dropped into a folder, MQTT. What cannot be used becomes a
`Skipped` that says why; nothing that comes in can stop the loop, or make it hold more than a line at a time.

A JSON message is one object on one line:

    {"x": [0.1, …], "id": "a7", "label": 3, "user": "anna", "trusted": true}     a sample; all but x may be missing
    {"x": "AAEC…", "dtype": "uint8"}                                             x as base64 of uint8 or float32 values
    {"id": "a7", "label": 3}                                                     the label of an earlier sample
    {"command": "adapt"}, {"command": "rollback", "to": 2}, {"command": "forget", "user": "anna"}

CSV has a header. Columns called id, label, user and trusted are what they say, and may be empty; the others are x in
order. A row without x is a label.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import files
from ..data import as_array, as_samples, load_samples
from ..errors import DataError, FileError, InstantFTError
from ..spec import NetSpec
from .loop import Command, Label, Message, Sample, Skipped

__all__ = ["CsvLines", "JsonLines", "Lines", "longest_line", "read_folder"]

CHUNK = 1 << 16

LONGEST_ID = 200
"""Characters of an id or a user's name."""

VALUE = 32
"""Characters a value may take in a line; a double needs at most 25."""

COLUMNS = ("id", "label", "user", "trusted")


def longest_line(spec: NetSpec) -> int:
    """Bytes of the longest line that a message for this network may need."""
    return 4096 + VALUE * spec.geometry[0].N


class Lines:
    """Lines of bytes as they come, none longer than `longest`; of a longer one, None, however long it is.

    Args:
        feed: the next bytes; empty at the end.
        longest: bytes of a line.
    """

    def __init__(self, feed: Callable[[], bytes], longest: int) -> None:
        self._feed, self._longest = feed, longest

    def __iter__(self) -> Iterator[bytes | None]:
        held, over = bytearray(), False
        while chunk := self._feed():
            *whole, rest = chunk.split(b"\n")
            for part in whole:
                held += part
                yield None if over or len(held) > self._longest else bytes(held)
                held, over = bytearray(), False
            held += rest
            if len(held) > self._longest:
                held, over = bytearray(), True
        if held or over:
            yield None if over else bytes(held)

    @classmethod
    def of(cls, file: IO[bytes], longest: int) -> Lines:
        """Of a pipe or file."""
        fd = file.fileno()
        return cls(lambda: os.read(fd, CHUNK), longest)


class JsonLines:
    """Lines of JSON to messages.

    Args:
        spec: the network.
        mean, std: what samples are centred on and divided by.
    """

    def __init__(self, spec: NetSpec, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> None:
        self._spec, self._mean, self._std = spec, mean, std

    def __call__(self, line: bytes | None) -> Message | None:
        """The message in a line; None where it is blank."""
        if line is None:
            return Skipped("too long", f"a line must have at most {longest_line(self._spec)} bytes")
        if not line.strip():
            return None
        try:
            held = json.loads(line)
        except (ValueError, RecursionError) as e:
            return Skipped("not JSON", f"a line must be JSON, but: {str(e)[:80]}: {line[:40]!r}")
        if not isinstance(held, dict):
            return Skipped("not JSON", f"a line must be a JSON object, not {type(held).__name__}")
        try:
            return self._message(held)
        except DataError as e:
            return Skipped("unusable", str(e))

    def _message(self, held: dict[str, Any]) -> Message:
        if "command" in held:
            name = held.pop("command")
            return Command(name if isinstance(name, str) else "", held)
        name, user, trusted = _text(held, "id"), _text(held, "user") or "", held.get("trusted", False)
        if type(trusted) is not bool:
            raise DataError(f"trusted must be true or false, not {str(trusted)[:40]!r}")
        label = held.get("label")
        if label is not None and (type(label) is not int or not 0 <= label < self._spec.C):
            raise DataError(f"a label must be a whole number, 0 to {self._spec.C - 1}, not {str(label)[:40]!r}")
        if "x" not in held:
            if name is None or label is None:
                raise DataError("a message must have x, or id and label, or command")
            return Label(name, label, trusted)
        return sample_of(_values(held), self._spec, self._mean, self._std, name, label, user, trusted)


class CsvLines:
    """Lines of CSV to messages; arguments as of `JsonLines`."""

    def __init__(self, spec: NetSpec, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> None:
        self._spec, self._mean, self._std = spec, mean, std
        self._header: list[str] | None = None

    def __call__(self, line: bytes | None) -> Message | None:
        """The message in a line; None where it is blank, or the header."""
        if line is None:
            return Skipped("too long", f"a line must have at most {longest_line(self._spec)} bytes")
        try:
            cells = next(csv.reader([line.decode("utf-8-sig")], strict=True), [])
        except (csv.Error, UnicodeDecodeError) as e:
            return Skipped("not CSV", f"a line must be CSV, but: {str(e)[:100]}")
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            return None
        if self._header is None:
            self._header = cells
            return None
        if len(cells) != len(self._header):
            return Skipped("not CSV", f"a row must have {len(self._header)} cells as the header has, not {len(cells)}")
        try:
            return self._message(cells, self._header)
        except DataError as e:
            return Skipped("unusable", str(e))

    def _message(self, cells: list[str], header: list[str]) -> Message:
        named = {name: cell for name, cell in zip(header, cells, strict=True) if name in COLUMNS and cell}
        values = [cell for name, cell in zip(header, cells, strict=True) if name not in COLUMNS]
        name, user = _text(named, "id"), _text(named, "user") or ""
        trusted, text = named.get("trusted", "").lower() in ("1", "true", "yes"), named.get("label")
        label = None
        if text is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < self._spec.C):
                raise DataError(f"a label must be a whole number, 0 to {self._spec.C - 1}, not {text[:40]!r}")
            label = int(text)
        if not any(values):
            if name is None or label is None:
                raise DataError("a row without values must have id and label")
            return Label(name, label, trusted)
        try:
            x = np.array([float(value) for value in values], np.float64)
        except ValueError as e:
            raise DataError(f"values must be numbers, but: {str(e)[:100]}") from None
        return sample_of(x, self._spec, self._mean, self._std, name, label, user, trusted)


def sample_of(
    values: Any,
    spec: NetSpec,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    name: str | None = None,
    label: int | None = None,
    user: str = "",
    trusted: bool = False,
) -> Sample:
    """A sample of one array of values, checked, scaled and normalised.

    Raises:
        DataError: it cannot be used.
    """
    array = as_array(values, "x")
    if array.ndim not in (1, 2, 3):
        raise DataError(f"x must be one sample, not {array.ndim} dimensions deep")
    rows, _ = as_samples(array[None], spec, mean, std)
    return Sample(rows[0], name, label, user, trusted)


def _text(held: dict[str, Any], key: str) -> str | None:
    value = held.get(key)
    if type(value) is int and abs(value) < 1 << 63:
        value = str(value)
    if value is not None and (not isinstance(value, str) or not 0 < len(value) <= LONGEST_ID):
        raise DataError(f"{key} must be text of 1 to {LONGEST_ID} characters, not {str(value)[:40]!r}")
    return value


def _values(held: dict[str, Any]) -> Any:
    x, dtype = held["x"], held.get("dtype", "float32")
    if isinstance(x, str):
        if dtype not in ("uint8", "float32"):
            raise DataError(f"dtype must be uint8 or float32, not {str(dtype)[:40]!r}")
        try:
            return np.frombuffer(base64.b64decode(x, validate=True), "<f4" if dtype == "float32" else "u1")
        except (ValueError, binascii.Error):
            raise DataError("x must be base64 of whole values, or a list of numbers") from None
    if not isinstance(x, list):
        raise DataError(f"x must be a list of numbers or base64, not {type(x).__name__}")
    try:
        return np.array(x, np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DataError("x must be a list of numbers, all rows of one length") from None


READ = "read"
"""Folder that files go to once they have been read."""

SUFFIXES = (".npz", ".jsonl", ".csv")


def read_folder(folder: Path, spec: NetSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[Message]:
    """Messages of the files that lie in a folder, by name; each file moves to ``read/`` in it once it has been read.

    ``.npz`` files hold x and, if they have one, y; a sample's id is the file's name and its place in it, as in
    ``a.npz:3``. ``.jsonl`` and ``.csv`` files hold lines. Others are left alone, and so are names that begin with a
    dot: write a file under such a name and rename it when it is whole.

    Raises:
        FileError: the folder cannot be read, or its files not moved.
    """
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES and p.name[0] != "." and p.is_file())
    except OSError as e:
        raise FileError(f"the folder must be readable, but {folder} is not: {files.reason(e)}") from None
    for name in names:
        path = folder / name
        try:
            yield from _read_npz(path, spec, mean, std) if path.suffix == ".npz" else _read_lines(path, spec, mean, std)
        except (InstantFTError, OSError) as e:
            yield Skipped("bad file", str(e))
        try:
            (folder / READ).mkdir(exist_ok=True)
            os.replace(path, folder / READ / name)
        except OSError as e:
            raise FileError(
                f"files that were read must be moved to {folder / READ}, but that fails: {files.reason(e)}"
            ) from None


def _read_npz(path: Path, spec: NetSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[Message]:
    try:
        held = load_samples(path, spec, mean, std)
        labels: list[int | None] = list(held.labels.tolist())
    except DataError as e:
        if "lacks y" not in str(e):
            raise
        held = load_samples(path, spec, mean, std, labels=False)
        labels = [None] * len(held.x)
    for i, label in enumerate(labels):
        yield Sample(held.x[i], f"{path.name}:{i}"[-LONGEST_ID:], label)


def _read_lines(path: Path, spec: NetSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> Iterator[Message]:
    parse = (CsvLines if path.suffix == ".csv" else JsonLines)(spec, mean, std)
    with path.open("rb") as file:
        for line in Lines.of(file, longest_line(spec)):
            message = parse(line)
            if message is not None:
                yield message

"""The formats in which the public data sets are published, read without trust.

What a file announces is checked before memory is taken. Archives are read in memory, member by member, by names known
beforehand, so nothing of theirs is written to the disk; nothing is unpickled.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import FileError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_BYTES", "read_fan", "read_har", "read_idx", "read_svhn", "stop_onset"]

MAX_BYTES = 1 << 31
"""Most bytes the values of one file, or the text of one member of an archive, may have: SVHN's `extra` has 1.6e9."""

HAR_FEATURES = 561
FAN_BINS = 512
FAN_ROWS = 235
FAN_LAST_SPEEDS = 120


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    files.regular_size(path, what)
    try:
        yield
    except FileError:
        raise
    except OSError as e:
        raise FileError(f"{what} must be readable, but {path} is not: {files.reason(e)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, TypeError, KeyError, RuntimeError,
            NotImplementedError, MemoryError) as e:  # fmt: skip
        words = (str(e) or type(e).__name__).splitlines()[0][:160]
        raise FileError(f"{what} must be whole, but {path} is not: {words}") from None


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The bytes of a gzipped IDX file, as MNIST and Fashion-MNIST come.

    Args:
        path: the file.
        ndim: how many dimensions it must have: 3 for images (T, height, width), 1 for labels (T,).

    Raises:
        FileError: it is no such file, or longer or shorter than it announces.
    """
    with _reading(path, "an IDX file"), gzip.open(path, "rb") as f:
        head = f.read(4 + 4 * ndim)
        magic, *shape = struct.unpack(f">{1 + ndim}I", head)
        if magic != 0x0800 + ndim:
            raise FileError(
                f"an IDX file must be of {ndim} dimensions of bytes, but {path} begins with {head[:4].hex()}"
            )
        count = math.prod(shape)
        if not 0 < count <= MAX_BYTES:
            raise FileError(f"an IDX file must hold 1 to {MAX_BYTES} values, but {path} announces {shape}")
        values = f.read(count + 1)
    if len(values) != count:
        raise FileError(f"an IDX file must hold what it announces, but {path} does not hold {shape} bytes")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_svhn(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images (T, 32, 32, 3) and labels (T,), 0 to 9, of a file of SVHN's second format (MATLAB 5, read by scipy).

    Raises:
        UsageError: scipy is not installed.
        FileError: it is no such file.
    """
    try:
        import scipy.io
    except ImportError:
        raise UsageError("SVHN comes as MATLAB files: pip install 'instantft[svhn]' (scipy) to read them") from None
    with _reading(path, "an SVHN file"):
        announced = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
        shape, kind = announced.get("X", ((), ""))
        T = shape[3] if len(shape) == 4 else 0
        if shape != (32, 32, 3, T) or kind != "uint8" or not 0 < math.prod(shape) <= MAX_BYTES:
            raise FileError(f"an SVHN file must hold X, uint8 (32, 32, 3, T), but {path} announces {announced!r:.120}")
        if announced.get("y", ((), ""))[0] != (T, 1):
            raise FileError(f"an SVHN file must hold y ({T}, 1), but {path} announces {announced!r:.120}")
        held = scipy.io.loadmat(path, variable_names=["X", "y"])
        x, y = held["X"], held["y"]
        if x.shape != shape or y.shape != (T, 1) or x.dtype != np.uint8 or y.dtype.kind not in "iuf":
            raise FileError(f"an SVHN file must hold what it announces, but {path} does not")
        digits = y[:, 0] % 10  # the digit 0 is called 10 there
        if not np.isin(y, np.arange(1, 11)).all():
            raise FileError(f"an SVHN file must have labels 1 to 10, but {path} has others")
    return x.transpose(3, 0, 1, 2), digits.astype(np.uint8)


def read_har(path: Path, progress: Callable[[float], None]) -> dict[str, NDArray[Any]]:
    """UCI HAR from its archive: the published features, the training part first, then the test part.

    Args:
        path: the archive as the UCI serves it, with "UCI HAR Dataset.zip" inside.
        progress: is told which share of the text is read, 0 to 1.

    Returns:
        x (T, 561) float32; y (T,) 0 to 5; subject (T,) 1 to 30; split (T,) 0 or 1; feature_names (561,).

    Raises:
        FileError: it is no such archive.
    """
    parts: dict[str, list[NDArray[Any]]] = {"x": [], "y": [], "subject": [], "split": []}
    with (
        _reading(path, "the HAR archive"),
        zipfile.ZipFile(path) as outer,
        zipfile.ZipFile(io.BytesIO(_member(outer, "UCI HAR Dataset.zip", path))) as archive,
    ):
        names = _member(archive, "UCI HAR Dataset/features.txt", path).decode("ascii").split("\n")
        features = [line.split()[1] for line in names if line.strip()]
        if len(features) != HAR_FEATURES:
            raise FileError(f"the HAR archive must name {HAR_FEATURES} features, but {path} names {len(features)}")
        for k, part in enumerate(("train", "test")):
            x, y, subject = (
                _numbers(_member(archive, f"UCI HAR Dataset/{part}/{name}_{part}.txt", path))
                for name in ("X", "y", "subject")
            )
            T = len(y)
            if x.shape != (T, HAR_FEATURES) or subject.shape != (T, 1) or y.shape != (T, 1):
                raise FileError(
                    f"the HAR archive must have {HAR_FEATURES} features, a label and a subject for every row, but "
                    f"{path} has {list(x.shape)}, {list(y.shape)} and {list(subject.shape)} in its {part} part"
                )
            if not (np.isfinite(x).all() and np.isin(y, range(1, 7)).all() and np.isin(subject, range(256)).all()):
                raise FileError(f"the HAR archive must hold finite features and labels 1 to 6, but {path} does not")
            parts["x"].append(x)
            parts["y"].append((y[:, 0] - 1).astype(np.uint8))
            parts["subject"].append(subject[:, 0].astype(np.uint8))
            parts["split"].append(np.full(T, k, np.uint8))
            progress((0.7, 1.0)[k])
    return {key: np.concatenate(values) for key, values in parts.items()} | {"feature_names": np.array(features)}


def read_fan(path: Path) -> NDArray[np.float32]:
    """The spectra of one recording of the cooling fan, in order of time: (235, 512) float32 of 0 to 512 Hz.

    The archive has one CSV a spectrum, named by date and time, with a line "bin, value" each.

    Raises:
        FileError: it is no such archive.
    """
    with _reading(path, "a fan recording"), zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if re.fullmatch(r"[^/]+/\d{4}(-\d\d){5}\.csv", n))
        if len(names) != FAN_ROWS:
            raise FileError(
                f"a fan recording must hold {FAN_ROWS} CSV files named by time, but {path} has {len(names)}"
            )
        rows = []
        for name in names:
            table = _numbers(_member(archive, name, path, 1 << 20), ",")
            if table.shape != (FAN_BINS, 2) or (table[:, 0] != np.arange(FAN_BINS)).any():
                raise FileError(f"a spectrum must have bins 0 to {FAN_BINS - 1}, but {name} in {path} has others")
            rows.append(table[:, 1])
    spectra = np.array(rows, np.float32)
    if not np.isfinite(spectra).all():
        raise FileError(f"a fan recording must hold finite values, but {path} holds others")
    return spectra


def stop_onset(spectra: NDArray[np.float32]) -> int:
    """The row from which the fan stands still.

    The last two of four speeds, 1500 and 0 rpm, begin at about rows 120 and 178: from row 120 on, two levels are fitted
    to the sums of the spectra, by least squares.
    """
    level = spectra[FAN_LAST_SPEEDS:].sum(axis=1, dtype=np.float64)
    T = len(level)
    n, left = np.arange(1, T), np.cumsum(level)[:-1]
    # Of n values with sum s, the squared error about their mean is Σv² - s²/n, and Σv² is the same for all cuts.
    explained = left**2 / n + (level.sum() - left) ** 2 / (T - n)
    return FAN_LAST_SPEEDS + int(explained.argmax()) + 1


def _member(archive: zipfile.ZipFile, name: str, path: Path, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a member; no more than the archive's index announces, which is at most `limit`."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise FileError(f"the archive must hold {name}, but {path} does not") from None
    if info.file_size > limit:
        raise FileError(f"{name} in {path} must have at most {limit} bytes, not {info.file_size}")
    with archive.open(info) as f:
        raw = f.read(info.file_size + 1)
    if len(raw) != info.file_size:
        raise FileError(f"{name} in {path} must be whole, but is not")
    return raw


def _numbers(text: bytes, delimiter: str | None = None) -> NDArray[np.float32]:
    """The numbers of a text file: (rows, columns) float32."""
    lines: IO[str] = io.TextIOWrapper(io.BytesIO(text), encoding="ascii")
    return np.loadtxt(lines, np.float32, comments=None, delimiter=delimiter, ndmin=2)

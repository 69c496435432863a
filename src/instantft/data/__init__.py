"""Samples in, checked. After this file they are finite float32 rows and labels in range.

Samples are in an ``.npz``, in a CSV file (`tables`) or in a folder of images (`pictures`). An ``.npz`` has ``x``
float32 or uint8, (T, N) or (T, channels, height, width) or (T, height, width), and ``y`` integer (T,). uint8 is scaled
by 1/255; then the mean is taken off and the standard deviation divided by, per channel, where given. Nothing in a file
of samples can run code, and what it announces is checked before memory is taken.
"""

from __future__ import annotations

import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import files
from ..errors import DataError, FileError, UsageError
from ..spec import NetSpec
from ..tasks import TASKS, Task
from . import pictures, tables
from .classes import Classes

__all__ = [
    "MAX_BYTES",
    "Form",
    "Samples",
    "announced",
    "as_array",
    "as_groups",
    "as_labels",
    "as_samples",
    "load_samples",
    "warn_if_poor",
]

Floats = NDArray[np.float32]

MAX_BYTES = 1 << 30
"""Most memory the samples of one file may take as float32: over 300,000 images of 28x28."""

BYTE_LIKE = 64
"""A largest value of float images above which they are probably bytes that nobody scaled."""

MAX_CLASSES = 1 << 16
"""Largest number of classes that labels may imply where no network says how many there are."""


class Form(Protocol):
    """What a network says of how samples come (`Network`)."""

    @property
    def keys(self) -> tuple[str, ...]: ...
    def pack(self, x: Any) -> ArrayLike: ...
    def flat(
        self, rows: Floats, y: NDArray[Any], groups: Any = None, weights: Any = None
    ) -> tuple[Floats, NDArray[Any], Any, Any]: ...


@dataclass(frozen=True)
class Samples:
    """Checked samples.

    Attributes:
        x: (T, N) float32, C-contiguous, scaled and normalised.
        y: (T,) int32 or (T, C) float32 (`as_labels`), or None where labels were not asked for.
        shape: (N,) or (channels, height, width) of one sample.
        groups: (T,) integers, or None where they were not asked for.
        weights: (T,) numbers, or None where they were not asked for.
        classes: name of class 0, 1, …; empty where classes have no names.
        names: (T,) the file of every image, where the samples are a folder of them.
    """

    x: Floats
    y: NDArray[Any] | None
    shape: tuple[int, ...]
    groups: NDArray[Any] | None = None
    weights: NDArray[Any] | None = None
    classes: Classes = ()
    names: tuple[str, ...] = ()

    @property
    def labels(self) -> NDArray[Any]:
        """`y`, where it must be there.

        Raises:
            DataError: the samples were loaded without labels.
        """
        if self.y is None:
            raise DataError("the samples must have labels (y), but have none")
        return self.y


def as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """`values` as a NumPy array.

    Raises:
        DataError: they are none, as where rows differ in length.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as e:
        raise DataError(f"{name} must be an array, but is none: {' '.join(str(e).split())[:120]}") from None


def as_samples(
    x: ArrayLike,
    spec: NetSpec | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    name: str = "x",
) -> tuple[Floats, tuple[int, ...]]:
    """Samples as the engines want them.

    Args:
        x: float or uint8, (T, N), (T, channels, height, width) or (T, height, width).
        spec: the network they are for; None: any shape will do.
        mean, std: one value, or one a channel (one a feature for vectors); empty: not applied.
        name: what to call x in messages.

    Returns:
        x (T, N) float32 C-contiguous; the shape of one sample.

    Raises:
        DataError: wrong type or shape, no samples, or NaN or Inf among the values.
        UsageError: too many or too few values of mean or std.
    """
    values = as_array(x, name)
    if values.dtype != np.uint8 and values.dtype.kind != "f":
        raise DataError(f"{name} must be float32 or uint8, not {values.dtype}")
    if values.ndim not in (2, 3, 4):
        raise DataError(
            f"{name} must be (T, N), (T, height, width) or (T, channels, height, width), not {list(values.shape)}"
        )
    if values.size == 0:
        raise DataError(f"{name} must hold at least one sample of at least one value, not {list(values.shape)}")
    if spec is None and values.ndim == 4 and values.shape[3] in (1, 3, 4) and values.shape[1] not in (1, 3, 4):
        raise DataError(
            f"{name} must be (T, channels, height, width), not {list(values.shape)}, which looks like channels last: "
            f"use {name}.transpose(0, 3, 1, 2)"
        )
    T = values.shape[0]
    shape = values.shape[1:] if values.ndim != 3 else (1, *values.shape[1:])
    if spec is not None:
        shape = _fit_shape(shape, spec.input_shape, name)
    with np.errstate(over="ignore", invalid="ignore"):
        rows = values.reshape(T, -1).astype(np.float32)  # a copy, so that what follows may work in place
    if values.dtype == np.uint8:
        rows *= np.float32(1 / 255)
    elif not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise DataError(
            f"{name} must hold finite values only, but sample {row} holds NaN, Inf or a value beyond float32"
        )
    elif len(shape) == 3 and not len(std) and rows.max() > BYTE_LIKE and rows.min() >= 0:
        warnings.warn(
            f"{name}: float images are taken as they are, and these have values up to {rows.max():g}: "
            "networks want 0 to 1 mostly; divide by 255 (--std 255), or give uint8",
            stacklevel=2,
        )
    _normalise(rows, shape, mean, std)
    return np.ascontiguousarray(rows), shape


def _fit_shape(shape: tuple[int, ...], wanted: tuple[int, ...], name: str) -> tuple[int, ...]:
    """A sample must have the network's shape; where one of the two is flat, the number of values decides."""
    same_size = math.prod(shape) == math.prod(wanted)
    if shape == wanted or (same_size and 1 in (len(shape), len(wanted))):
        return wanted
    raise DataError(f"{name}: a sample must be {list(wanted)} as the network's input is, not {list(shape)}")


def _normalise(rows: Floats, shape: tuple[int, ...], mean: Sequence[float], std: Sequence[float]) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, shape[0]):
            raise UsageError(f"{name} must have one value or one a channel ({shape[0]}), not {len(values)}")
    by_channel = rows.reshape(rows.shape[0], shape[0], -1)
    if len(mean):
        by_channel -= np.asarray(mean, np.float32).reshape(1, -1, 1)
    if len(std):
        with np.errstate(over="ignore", invalid="ignore"):
            by_channel /= np.asarray(std, np.float32).reshape(1, -1, 1)
    if (len(mean) or len(std)) and not np.isfinite(rows).all():
        raise DataError("samples must stay finite after --mean and --std, but some became NaN or Inf")


def as_labels(
    y: ArrayLike, T: int, spec: NetSpec | None = None, name: str = "y", task: Task = "classification"
) -> NDArray[Any]:
    """Labels as the engines want them.

    Args:
        y: (T,) integers from 0 to C-1; of regression (T, C) finite numbers, or (T,) for one output; of multi-label
            (T, C) zeros and ones.
        T: number of samples.
        spec: the network, which says what C is; None: any.
        name: what to call y in messages.
        task: what is to be learnt.

    Returns:
        (T,) int32; of regression and multi-label (T, C) float32.

    Raises:
        DataError: of another type or shape, or out of range.
    """
    labels = as_array(y, name)
    if task != "classification":
        return _as_rows(labels, T, spec, name, task)
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name} must be integers, not {labels.dtype}")
    if labels.shape != (T,):
        raise DataError(f"{name} must be ({T},), one label a sample, not {tuple(labels.shape)}")
    C = MAX_CLASSES if spec is None else spec.C
    bad = np.flatnonzero((labels < 0) | (labels >= C))
    if bad.size:
        hint = " (a network of one output has no classes: its tasks are regression and multi-label)" if C == 1 else ""
        raise DataError(f"{name} must be 0 to {C - 1}, but the label of sample {bad[0]} is {labels[bad[0]]}{hint}")
    return labels.astype(np.int32)


def _as_rows(values: NDArray[Any], T: int, spec: NetSpec | None, name: str, task: Task) -> Floats:
    """Labels of several outputs."""
    if values.dtype.kind not in "iufb":
        raise DataError(f"{name} must be numbers, not {values.dtype}")
    if values.ndim == 1 and task == "regression":
        values = values[:, None]
    C = None if spec is None else spec.C
    if values.ndim != 2 or len(values) != T or values.shape[1] != (C or values.shape[1]) or values.shape[1] == 0:
        one = "numbers, one" if task == "regression" else "zeros and ones, one"
        hint = "" if C is None else f" (Network.with_outputs and --outputs give a network a new head of other than {C})"
        if spec is not None and not spec.own:
            hint = f" (only who made the model can give it a head of other than {C})"
        if spec is not None and spec.positions > 1:
            wanted, each, found = f"(T, {spec.positions}, {C})", "position", f"{list(values.shape[1:])} a position"
        else:
            wanted, each, found = f"({T}, {C or 'C'})", "sample", str(list(values.shape))
        raise DataError(f"{name} must be {wanted} {one} a {each} and output, not {found}{hint}")
    if task == "multi-label":
        wrong = np.flatnonzero(~((values == 0) | (values == 1)).all(axis=1))
        if wrong.size:
            raise DataError(f"{name} must be zeros and ones, but the labels of sample {wrong[0]} hold others")
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise DataError(f"{name} must be finite in float32, but sample {row} has NaN, Inf or a value beyond it")
    return rows


def as_groups(groups: ArrayLike, T: int, name: str = "groups") -> NDArray[Any]:
    """One label a sample, by which samples that resemble each other are known: (T,) integers.

    Raises:
        DataError: not integers, not (T,), or all alike, so that nothing would be left where one group is left out.
    """
    labels = as_array(groups, name)
    if labels.dtype.kind not in "iu" or labels.shape != (T,):
        raise DataError(f"{name} must be ({T},) integers, one a sample, not {labels.dtype} {list(labels.shape)}")
    if T > 1 and (labels == labels[0]).all():
        raise DataError(f"{name} must be of two groups or more, one of which can be left out, not all {labels[0]}")
    return labels


def warn_if_poor(y: NDArray[Any], batch_size: int, C: int = 0) -> None:
    """Warn of data that can be used, but are probably not what was meant; C: how many classes there should be."""
    if len(y) < batch_size:
        warnings.warn(f"fewer samples ({len(y)}) than a batch ({batch_size}): one batch of {len(y)}", stacklevel=3)
    if y.ndim == 2:
        if len(y) and (alike := np.flatnonzero((y == y[0]).all(axis=0))).size:
            some = f"every sample has {y[0, alike[0]]:g} as target {alike[0]}"
            warnings.warn(f"{some}: nothing else can be learnt of it", stacklevel=3)
        return
    if y.size and (y == y[0]).all():
        warnings.warn(f"every label is {y[0]}: with one class only, that class is all that can be learnt", stacklevel=3)
    elif missing := [str(c) for c in range(C) if c not in set(y.tolist())]:
        named = ", ".join(missing[:8]) + (", …" if len(missing) > 8 else "")
        warnings.warn(f"no sample is of class {named}: what is missing from the samples is forgotten", stacklevel=3)


def load_samples(
    path: str | PathLike[str],
    spec: NetSpec | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    labels: bool = True,
    groups: str | None = None,
    weights: str | None = None,
    task: Task = "classification",
    label: str | None = None,
    size: int | None = None,
    classes: Classes = (),
    progress: Callable[[float], None] | None = None,
    form: Form | None = None,
) -> Samples:
    """Read and check samples.

    Args:
        path: an ``.npz`` with x and, where labels are asked for, y; a CSV file; a folder of images.
        spec: the network the samples are for; None: any shape and any labels from 0.
        mean, std: as in `as_samples`.
        labels: whether y is needed.
        groups: the key of an integer a sample, where such are asked for.
        weights: the key of a number a sample, where such are asked for; checked by `tasks.targets`.
        task: what is to be learnt, which says what y must be.
        label: the label's column in a CSV file (`tables.read_table`); None: the last.
        size: pixels to which images are scaled (`pictures.read_folder`); None: the network's.
        classes: names the classes are known by, for folders and CSV files; empty: the names found, sorted.
        progress: is told the share of the images that is read.
        form: the network, where an ``.npz`` may hold several inputs by their names, or labels of positions.

    Raises:
        FileError: missing, unreadable, of none of these kinds, damaged, or larger than MAX_BYTES.
        DataError: a key is missing, or the samples or labels cannot be used.
        UsageError: an option that is for another kind, or Pillow is needed and not there.
    """
    path = Path(path)
    is_folder, is_table = path.is_dir(), tables.is_table(path)
    if label is not None and not is_table:
        raise UsageError(f"--label must go with a CSV file, not with {path}")
    if size is not None and not is_folder:
        raise UsageError(f"--size must go with a folder of images, not with {path}")
    if is_folder:
        if groups or weights or (labels and task != TASKS[0]):
            raise UsageError(
                f"--groups, --sample-weights and --task must go with .npz or CSV, not with the folder {path}"
            )
        wanted = spec.input_shape if spec else None
        images = pictures.read_folder(path, wanted, size, labels, classes, MAX_BYTES, progress)
        _normalise(images.x, images.shape if spec is None else spec.input_shape, mean, std)
        found = as_labels(images.y, len(images.x), spec, name=f"{path}: y") if labels and images.y is not None else None
        return Samples(images.x, found, images.shape, None, None, images.classes, images.names)
    if is_table:
        others = [key for key in (groups, weights) if key]
        N = math.prod(spec.input_shape) if spec else None
        held = tables.read_table(path, label, labels, classes, MAX_BYTES, N, task != TASKS[0], others)
        x, shape = as_samples(held.x, spec, mean, std, name=str(path))
        y = None if held.y is None else as_labels(held.y, len(x), spec, name=f"{path}: the label", task=task)
        together = as_groups(held.columns[groups], len(x), name=f"{path}: {groups}") if groups else None
        return Samples(x, y, shape, together, held.columns[weights] if weights else None, held.classes)
    extra = tuple(key for key in (groups, weights) if key)
    keys = form.keys if form else ("x",)
    arrays = _read_npz(path, (*keys, *(("y",) if labels else ()), *extra))
    given: Any = arrays["x"] if keys == ("x",) else {key: arrays[key] for key in keys}
    x, shape = as_samples(form.pack(given) if form else given, spec, mean, std, name=f"{path}: x")
    y, of, counts = arrays.get("y"), arrays.get(groups or ""), arrays.get(weights or "")
    if labels and form:
        x, y, of, counts = form.flat(x, arrays["y"], of, counts)
    if y is not None:
        y = as_labels(y, len(x), spec, name=f"{path}: y", task=task)
    together = None if of is None else as_groups(of, len(x), name=f"{path}: {groups or 'samples'}")
    return Samples(x, y, shape, together, counts)


def announced(path: str | PathLike[str]) -> tuple[int, int] | None:
    """How many samples an ``.npz`` says that it holds, and bytes a value of x, without reading them; None if none."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("x.npy") as f:
            shape, _, dtype, _ = _read_header(f, "x", Path(path))
    except (OSError, KeyError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None
    except FileError:  # who reads it will say so
        return None
    return (shape[0], dtype.itemsize) if shape else None


def _read_npz(path: Path, keys: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    files.regular_size(path, "a sample file")
    try:
        if not zipfile.is_zipfile(path):
            raise FileError(
                f"a sample file must be an .npz archive, but {path} is none (a .csv or a folder will do too)"
            )
        with zipfile.ZipFile(path) as archive:
            present = {info.filename: info for info in archive.infolist()}
            for key in keys:
                if f"{key}.npy" not in present:
                    found = ", ".join(sorted(n.removesuffix(".npy") for n in present)) or "nothing"
                    raise DataError(
                        f"a sample file must hold {' and '.join(keys)}, but {path} lacks {key} and holds {found:.100}"
                    )
            return {key: _read_array(archive, present[f"{key}.npy"], key, path) for key in keys}
    except (DataError, FileError):
        raise
    except OSError as e:
        raise FileError(f"a sample file must be readable, but {path} is not: {files.reason(e)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError, KeyError) as e:
        words = (str(e) or type(e).__name__).splitlines()[0][:120]
        raise FileError(f"a sample file must be a whole .npz archive, but {path} is damaged: {words}") from None


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, key: str, path: Path) -> NDArray[Any]:
    """One array; its header is checked against the archive's index before anything is allocated."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise FileError(f"a sample file must be stored or deflated, but {path} uses another compression for {key}")
    if info.file_size > MAX_BYTES + (1 << 16):
        raise FileError(
            f"a sample file must hold at most {MAX_BYTES} bytes a key, but {key} in {path} has {info.file_size}"
        )
    with archive.open(info) as f:
        shape, order, dtype, start = _read_header(f, key, path)
        if dtype.kind not in "biufc":
            raise DataError(
                f"{path}: {key} must be plain numbers, not {str(dtype)[:60]}; pickled objects are never loaded"
            )
        count = math.prod(shape)
        if count * max(4, dtype.itemsize) > MAX_BYTES:
            raise FileError(
                f"a sample file must take at most {MAX_BYTES} bytes of memory a key, but {key} in {path} is "
                f"{str(list(shape))[:80]} of {dtype}"
            )
        if count * dtype.itemsize != info.file_size - start:
            raise FileError(
                f"a sample file must hold what it announces, but {key} in {path} announces {str(list(shape))[:80]} of "
                f"{dtype} and has {info.file_size - start} bytes"
            )
        raw = f.read(count * dtype.itemsize + 1)  # one more, so that the archive's checksum is looked at
    if len(raw) != count * dtype.itemsize:
        raise FileError(f"a sample file must be whole, but {key} in {path} is cut short")
    array = np.frombuffer(raw, dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_header(f: IO[bytes], key: str, path: Path) -> tuple[tuple[int, ...], Any, np.dtype[Any], int]:
    try:
        version = np.lib.format.read_magic(f)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(f)
    except OSError:
        raise
    except Exception as e:
        # NumPy evaluates the header as a Python literal; there are many ways for that to fail, all of them damage.
        words = (str(e) or type(e).__name__).splitlines()[0][:100]
        raise FileError(f"a sample file must hold .npy arrays, but {key} in {path} is damaged: {words}") from None
    if any(n < 0 for n in shape):
        raise FileError(
            f"a sample file must announce sizes of 0 or more, but {key} in {path} is {str(list(shape))[:80]}"
        )
    return shape, ("F" if fortran else "C"), dtype, f.tell()

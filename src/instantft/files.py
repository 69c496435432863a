"""Files in and out, safely: tensors read from strangers, and files that are replaced whole or not at all.

Reading checks the size and every name, shape and type against what the header announces before any memory is taken.
Writing goes to a temporary file beside the target, to the disk, and only then under the target's name.

This file knows nothing about networks or adapters.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from .errors import FileError

__all__ = [
    "cache_folder",
    "check_directory",
    "check_file",
    "decode_json",
    "encode_tensors",
    "frozen",
    "read_small",
    "read_tensors",
    "reason",
    "regular_size",
    "replace_directory",
    "sync_directory",
    "write_and_sync",
    "write_through",
    "write_whole",
]

Floats = NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]

MAX_HEADER = 1 << 20
"""Largest header of a tensor file, in bytes; ours have a few kilobytes."""

MAX_SMALL = 1 << 20
"""Largest text file that is read whole, in bytes."""

UNABLE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What fsync of a folder says on file systems that know no such thing. Their names are as safe as they ever are; any
other error means that the disk has failed or is full."""


def cache_folder() -> Path:
    """Where this program keeps what it can make again: instantft/ in the user's cache folder ($XDG_CACHE_HOME)."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if folder else Path.home() / ".cache") / "instantft"


def reason(e: OSError) -> str:
    """The system's words for an error, without number and path."""
    return e.strerror or str(e)


def regular_size(path: Path, what: str) -> int:
    """Size in bytes of the regular file `path`.

    Asking before opening matters: opening a named pipe waits for ever.

    Raises:
        FileError: there is no such file, or it is no regular file.
    """
    try:
        status = path.stat()
    except OSError as e:
        raise FileError(f"{what} must be a readable file, but {path} is not: {reason(e)}") from None
    except ValueError as e:
        raise FileError(f"{what} must be a readable file, but {str(path)!r} is not: {e}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise FileError(f"{what} must be a regular file, but {path} is {kind}")
    return status.st_size


def read_small(path: Path, what: str) -> bytes:
    """The bytes of a small file.

    Raises:
        FileError: missing, unreadable, or larger than MAX_SMALL.
    """
    size = regular_size(path, what)
    if size > MAX_SMALL:
        raise FileError(f"{what} must be at most {MAX_SMALL} bytes, but {path} has {size}")
    try:
        return path.read_bytes()
    except OSError as e:
        raise FileError(f"{what} must be a readable file, but {path} is not: {reason(e)}") from None


def decode_json(raw: bytes, what: str, path: Path) -> dict[str, Any]:
    """The JSON object in `raw`.

    Raises:
        FileError: it is none.
    """
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise FileError(f"{what} must hold JSON, but {path} is damaged: {_first_line(e)}") from None
    if not isinstance(value, dict):
        raise FileError(f"{what} must hold a JSON object, but {path} holds {type(value).__name__}")
    return value


def _first_line(e: BaseException) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:120]


def read_tensors(
    path: Path, what: str, expect: Callable[[dict[str, str]], Shapes]
) -> tuple[dict[str, Floats], dict[str, str]]:
    """The float32 tensors and the metadata of a safetensors file.

    Args:
        path: the file.
        what: how to call it in messages, as in "a base file".
        expect: from the metadata, the names and shapes the file must hold, neither more nor fewer. Called before
            anything but the header has been read.

    Returns:
        tensors in the order of `expect`, read-only; metadata.

    Raises:
        FileError: missing, truncated, damaged, of another format, or with values that are not finite.
    """
    size = regular_size(path, what)
    try:
        with path.open("rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise FileError(f"{what} must be a .safetensors file, but {path} is truncated or something else")
            raw = f.read(length)
            header = decode_json(raw, what, path)
            metadata = _metadata(header.pop("__metadata__", {}), what, path)
            shapes = expect(metadata)
            _check_header(header, shapes, what, path)
            needed = 8 + length + 4 * sum(prod(s) for s in shapes.values())
            if size != needed:
                raise FileError(f"{what} must have {needed} bytes, but {path} has {size}: it is truncated or damaged")
            data = f.read()
    except OSError as e:
        if isinstance(e, FileError):
            raise
        raise FileError(f"{what} must be a readable file, but {path} is not: {reason(e)}") from None
    return _decode(start + raw + data, shapes, what, path), metadata


def _metadata(value: Any, what: str, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise FileError(f"{what} must have text as metadata, but {path} has something else")
    return value


def _check_header(header: dict[str, Any], shapes: Shapes, what: str, path: Path) -> None:
    missing = [name for name in shapes if name not in header]
    extra = [name for name in header if name not in shapes]
    if missing:
        raise FileError(f"{what} must hold the tensor {missing[0]}, but {path} does not")
    if extra:
        raise FileError(f"{what} must hold no tensor {extra[0][:80]!r}, but {path} does")
    for name, shape in shapes.items():
        entry = header[name]
        found = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else entry
        if found != ("F32", list(shape)):
            raise FileError(f"{what}: {name} must be F32 {list(shape)}, but in {path} it is {str(found)[:80]}")


def _decode(raw: bytes, shapes: Shapes, what: str, path: Path) -> dict[str, Floats]:
    from safetensors import SafetensorError, deserialize

    try:
        found: dict[str, Any] = dict(deserialize(raw))  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError) as e:
        raise FileError(f"{what} must be a .safetensors file, but {path} is damaged: {_first_line(e)}") from None
    tensors: dict[str, Floats] = {}
    for name, shape in shapes.items():
        values = np.frombuffer(found[name]["data"], dtype="<f4").astype(np.float32).reshape(shape)
        if not np.isfinite(values).all():
            raise FileError(f"{what} must hold finite values only, but {name} in {path} holds NaN or Inf")
        values.flags.writeable = False
        tensors[name] = values
    return tensors


def frozen(values: Floats) -> Floats:
    """The array, C-contiguous and read-only; a copy unless it already is both."""
    if values.flags.writeable or not values.flags.c_contiguous:
        values = values.copy(order="C")
        values.flags.writeable = False
    return values


def encode_tensors(tensors: Mapping[str, Floats], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file with these tensors and this metadata."""
    from safetensors.numpy import save

    return bytes(save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata=metadata))


def check_directory(directory: Path, what: str) -> None:
    """See, before any work is done, that files can be written into `directory`, which need not be there yet.

    Raises:
        FileError: it is a file or below one, or cannot be written.
    """
    import tempfile

    try:
        target = Path(os.path.realpath(directory))
        parent = next(p for p in (target, *target.parents) if p.exists())
        if not parent.is_dir():
            raise FileError(f"{what} must be in a directory, but {parent} is a file")
        with tempfile.TemporaryFile(dir=parent):
            pass  # permissions alone say little: root has all of them, even in /proc
    except FileError:
        raise
    except (OSError, ValueError) as e:
        words = reason(e) if isinstance(e, OSError) else str(e)
        raise FileError(f"{what} must be in a writable directory, not {str(directory)!r:.80}: {words}") from None


def check_file(path: Path, what: str) -> None:
    """See, before any work is done, that a file can be written to `path`.

    Raises:
        FileError: it is a directory or device, or in no writable directory.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir() or (target.exists() and not target.is_file()):
            raise FileError(f"{what} must be a regular file, but {path} is a directory or device")
    except FileError:
        raise
    except (OSError, ValueError) as e:
        words = reason(e) if isinstance(e, OSError) else str(e)
        raise FileError(f"{what} must be a usable file name, not {str(path)!r:.80}: {words}") from None
    check_directory(target.parent, what)


def write_whole(path: Path, data: bytes, what: str) -> None:
    """Write `data` under `path`: all of it, or nothing.

    Raises:
        FileError: as `write_through`.
    """
    write_through(path, lambda f: f.write(data), what)


def write_through(path: Path, write: Callable[[IO[bytes]], object], what: str) -> None:
    """Let `write` write a file under `path`, for what is too large to be in memory twice: all of it, or nothing.

    Raises:
        FileError: the disk is full, the directory cannot be written, or the target is no regular file. If it was the
            last step that failed, to wait for the disk to have the name, all of it is there, but perhaps not after a
            power cut.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Replacing a device such as /dev/full by a file would succeed for root, and that is never what was meant.
        if target.exists() and not target.is_file():
            raise FileError(f"{what} must be written to a regular file, but {path} is something else")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_and_sync(temporary, write)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(target.parent)
    except FileError:
        raise
    except (OSError, ValueError) as e:
        words = reason(e) if isinstance(e, OSError) else str(e)
        raise FileError(f"{what} must be written to a writable place, but {path} is not: {words}") from None


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    _write_and_sync(path, lambda f: f.write(data))


def _write_and_sync(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    with path.open("wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in this directory, where its file system can (`UNABLE`).

    Raises:
        OSError: the disk refuses.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in UNABLE:
            raise
    finally:
        os.close(fd)


def replace_directory(target: Path, contents: Mapping[str, bytes], what: str) -> None:
    """Put a directory with these files, by relative path, at `target`, in one step where one stood before.

    Raises:
        FileError: the place cannot be written; then what stood there stands there again.
    """
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        try:
            for name, data in contents.items():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                write_and_sync(fresh / name, data)
            for folder in {(fresh / name).parent for name in contents} | {fresh}:
                sync_directory(folder)
            there = target.exists()
            if there:
                _exchange(fresh, target)
            else:
                os.rename(fresh, target)
            try:
                sync_directory(target.parent)
            except OSError:
                if there:
                    _exchange(fresh, target)
                else:
                    os.rename(target, fresh)
                raise
        finally:
            # After an exchange this is what was there, after a failure the new one; after a plain rename, nothing.
            shutil.rmtree(fresh, ignore_errors=True)
    except OSError as e:
        raise FileError(f"{what} must be written to a writable place, but {target} is not: {reason(e)}") from None


def _exchange(fresh: Path, target: Path) -> None:
    """Swap two directories. Linux does it in one step; elsewhere there is a moment with neither name."""
    at_cwd, exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        if renameat2(at_cwd, os.fsencode(fresh), at_cwd, os.fsencode(target), exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code))
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    os.rename(target, old)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(old, target)
        raise
    os.rename(old, fresh)

"""Samples on disk, that survive a restart: the replay store, of labelled ones; and in a file of the same form those
that wait for their label (docs/formats.md).

One file of fixed size with a record a slot, each with a checksum of its own, so that a crash costs the record that was
being written and no other. When all slots are taken **the oldest sample goes, but of no class the last few** (a quarter
of the room, shared evenly), so that a class that has not been seen for long is not forgotten.

A sample that is dropped on request is overwritten with zeros, on the disk too.

T samples, N values each, K slots, C classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import FileError

__all__ = ["Replay", "digest"]

Floats = NDArray[np.float32]
Slots = NDArray[np.intp]

MAGIC = b"IFTREPLY"
VERSION = 1
MAX_CAPACITY = 1 << 24

PAGE = 4096
"""Bytes in front of the first record, which hold the header."""

PROTECTED = 4
"""One slot in so many is for the newest samples of each class, trusted or not, however old those are."""

TRUSTED = 1
"""Flag of a sample whose label is beyond doubt."""


def digest(name: str | bytes) -> bytes:
    """16 bytes that stand for an id or a user's name, or are such bytes already; the name itself is not kept."""
    if isinstance(name, bytes):
        return name
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class Replay:
    """The replay store in the file `path`, which is made if it is not there.

    Args:
        path: of the file.
        N: values a sample.
        C: classes.
        capacity: K; None: that of the file. A file with another one is written anew with the newest that fit.

    Attributes:
        number: (K,) int64, when the sample came, counted from 1; 0 where the slot is empty.
        label: (K,) int32.
        trusted: (K,) bool.
        version: (K,) int64, of the adapter that gave the label, where it is a prediction; else 0.
        damaged: records that were found damaged on opening, and dropped.

    Raises:
        FileError: the file cannot be made, read or written, or does not fit on the disk.
    """

    def __init__(self, path: Path, N: int, C: int, capacity: int | None) -> None:
        self._path, self._N, self._C = path, N, C
        self._dtype = np.dtype(
            [
                ("crc", "<u4"),
                ("label", "<i4"),
                ("number", "<i8"),
                ("time", "<f8"),
                ("id", "u1", 16),
                ("user", "u1", 16),
                ("flags", "<u4"),
                ("version", "<u4"),
                ("x", "<f4", N),
            ]
        )
        self._fd, self._dirty, self.damaged = -1, False, 0
        try:
            self._open(capacity)
        except OSError as e:
            self.close()
            if isinstance(e, FileError):
                raise
            raise FileError(
                f"the samples must be in a readable and writable file, but {path} is not: {files.reason(e)}"
            ) from None

    # -- what is asked of it ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return int(np.count_nonzero(self.number))

    @property
    def stride(self) -> int:
        """Bytes a sample."""
        return int(self._dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, which never change."""
        return PAGE + self.capacity * self.stride

    def add(
        self,
        number: int,
        time: float,
        x: Floats,
        label: int,
        *,
        name: str | bytes,
        user: str | bytes = "",
        trusted: bool = False,
        version: int = 0,
    ) -> int:
        """Keep a sample; what has been written is on the disk after `sync`.

        Args:
            number: greater than those of all samples before it, or that of one whose label came late.
            time: seconds since 1970.
            x: (N,) as the network sees it.
            name, user: by which it can be forgotten, or their digests.
            version: of the adapter that gave the label, where it is a prediction.

        Returns:
            Its slot.

        Raises:
            FileError: the disk refuses; then the slot is empty.
        """
        slot = self._slot(label, trusted)
        record = np.zeros((), self._dtype)
        record["label"], record["number"], record["time"], record["flags"] = label, number, time, trusted * TRUSTED
        record["version"] = version
        record["id"], record["user"] = (np.frombuffer(digest(text), np.uint8) for text in (name, user))
        record["x"] = x
        raw = bytearray(record.tobytes())
        raw[:4] = struct.pack("<I", zlib.crc32(raw[4:]))
        self.number[slot] = 0  # until it is written whole
        self._write(slot, bytes(raw))
        self._index(slot, record)
        return slot

    def rows(self, slots: Slots) -> tuple[Floats, Slots]:
        """x (T, N) of the samples in these slots, and the slots themselves without those found damaged meanwhile."""
        x, good = np.empty((len(slots), self._N), np.float32), np.zeros(len(slots), bool)
        for i, slot in enumerate(slots.tolist()):
            record = self._read(slot)
            if record is None or int(record["number"]) != int(self.number[slot]):
                self._lost(slot)
                continue
            x[i], good[i] = record["x"], True
        return x[good], slots[good]

    def find(self, *, name: str | bytes | None = None, user: str | bytes | None = None) -> Slots:
        """Slots of the samples with this id, or of this user; of all where neither is given."""
        found = self.number > 0
        for text, column in ((name, self._ids), (user, self._users)):
            if text is not None:
                found &= (column == np.frombuffer(digest(text), np.uint8)).all(axis=1)
        return np.flatnonzero(found)

    def forget(self, slots: Slots) -> None:
        """Overwrite the samples in these slots with zeros; when this returns the disk has them.

        Raises:
            FileError: the disk refuses.
        """
        for slot in slots.tolist():
            self.drop(slot)
        self.sync()

    def drop(self, slot: int) -> None:
        """Overwrite the sample in a slot with zeros, which the disk has after `sync`.

        Raises:
            FileError: the disk refuses.
        """
        self._write(slot, bytes(self.stride))
        self.number[slot] = 0

    def owner(self, slot: int) -> tuple[bytes, bytes]:
        """Digests of the id and the user of the sample in a slot."""
        return self._ids[slot].tobytes(), self._users[slot].tobytes()

    def sync(self) -> None:
        """Wait until the disk has what was written.

        Raises:
            FileError: the disk refuses.
        """
        if not self._dirty:
            return
        try:
            os.fsync(self._fd)
        except OSError as e:
            raise self._failed(e) from None
        self._dirty = False

    def close(self) -> None:
        """Let go of the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # -- inside -------------------------------------------------------------------------------------------------------

    def _slot(self, label: int, trusted: bool) -> int:
        """Where the next sample goes."""
        empty = np.flatnonzero(self.number == 0)
        if len(empty):
            return int(empty[0])
        kinds = self.label + self._C * self.trusted
        counts = np.bincount(kinds, minlength=2 * self._C)
        counts[label + self._C * trusted] += 1  # the new one is the newest of its kind
        few = max(1, self.capacity // (PROTECTED * 2 * self._C))
        free = counts[kinds] > few
        return int(np.argmin(np.where(free, self.number, np.iinfo(np.int64).max) if free.any() else self.number))

    def _index(self, slot: int, record: Any) -> None:
        self.number[slot], self.label[slot] = record["number"], record["label"]
        self.trusted[slot], self.version[slot] = bool(record["flags"] & TRUSTED), record["version"]
        self._ids[slot], self._users[slot] = record["id"], record["user"]

    def _lost(self, slot: int) -> None:
        self.number[slot] = 0
        self.damaged += 1

    def _write(self, slot: int, raw: bytes) -> None:
        try:
            at = PAGE + slot * self.stride
            self._dirty = True
            while raw:
                done = os.pwrite(self._fd, raw, at)
                at, raw = at + done, raw[done:]
        except OSError as e:
            raise self._failed(e) from None

    def _failed(self, e: OSError) -> FileError:
        return FileError(f"samples must reach the disk, but writing {self._path} failed: {files.reason(e)}")

    def _read(self, slot: int) -> Any:
        """The record in a slot; None if it is damaged or empty."""
        try:
            return self._parsed(os.pread(self._fd, self.stride, PAGE + slot * self.stride))
        except OSError:
            return None  # a bad block is one damaged record

    def _parsed(self, raw: bytes) -> Any:
        if len(raw) < self.stride or not any(raw[:16]):
            return None
        record = np.frombuffer(raw, self._dtype)[0]
        good = (
            zlib.crc32(raw[4:]) == int(record["crc"])
            and int(record["number"]) > 0
            and 0 <= int(record["label"]) < self._C
            and bool(np.isfinite(record["x"]).all())
        )
        return record if good else None

    def _header(self) -> bytes:
        body = json.dumps({"values": self._N, "classes": self._C, "capacity": self.capacity}).encode()
        head = struct.pack("<II", VERSION, len(body))
        return (MAGIC + head + struct.pack("<I", zlib.crc32(head + body)) + body).ljust(PAGE, b"\0")

    def _open(self, capacity: int | None) -> None:
        if not self._path.exists():
            if capacity is None:
                raise FileError(f"the samples must be there, but {self._path} is not")
            self._create(capacity, [])
        files.regular_size(self._path, "the samples")
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        size = os.fstat(self._fd).st_size
        announced = self._announced()
        if announced is None:
            # Each record is checked by itself, so that a damaged header costs nothing.
            announced = capacity or max(1, (size - PAGE) // self.stride)
        if capacity is not None and announced != capacity:
            self.capacity = min(announced, max(1, (size - PAGE) // self.stride + 1))
            numbers = [(int(r["number"]), i) for i in range(self.capacity) if (r := self._read(i)) is not None]
            self._create(capacity, [slot for _, slot in sorted(numbers)[-capacity:]])
            os.close(self._fd)
            self._fd = -1
            return self._open(capacity)
        self._empty(announced)
        if size != self.nbytes:
            os.ftruncate(self._fd, min(self.nbytes, size))
            _allocate(self._fd, self.nbytes)
        if os.pread(self._fd, PAGE, 0) != self._header():
            os.pwrite(self._fd, self._header(), 0)
        empty = bytes(self.stride)
        for slot in range(self.capacity):
            try:
                raw = os.pread(self._fd, self.stride, PAGE + slot * self.stride)
            except OSError:
                continue  # a bad block is one damaged record
            if raw == empty:
                continue
            record = self._parsed(raw)
            if record is not None:
                self._index(slot, record)
            else:
                # What a crash has left half written is wiped, so that nothing of it can be read later.
                self._lost(slot)
                self._write(slot, empty)
        return self.sync()

    def _empty(self, capacity: int) -> None:
        self.capacity = capacity
        self.number = np.zeros(capacity, np.int64)
        self.label = np.zeros(capacity, np.int32)
        self.trusted = np.zeros(capacity, bool)
        self.version = np.zeros(capacity, np.int64)
        self._ids = np.zeros((capacity, 16), np.uint8)
        self._users = np.zeros((capacity, 16), np.uint8)

    def _announced(self) -> int | None:
        """How many slots the file says it has; None where its header is damaged.

        Raises:
            FileError: it is for samples of another kind.
        """
        raw = os.pread(self._fd, PAGE, 0)
        if len(raw) < 20 or raw[:8] != MAGIC:
            return None
        version, n, crc = struct.unpack("<III", raw[8:20])
        body = raw[20 : 20 + n]
        if n > PAGE - 20 or zlib.crc32(raw[8:16] + body) != crc:
            return None
        if version != VERSION:
            raise FileError(f"the samples must be of version {VERSION}, but {self._path} has {version}: delete it")
        try:
            found = json.loads(body)
            values, classes, capacity = (int(found[key]) for key in ("values", "classes", "capacity"))
        except (ValueError, TypeError, KeyError):
            return None
        if (values, classes) != (self._N, self._C):
            raise FileError(
                f"the samples must have {self._N} values and {self._C} classes, but those in {self._path} have "
                f"{values} and {classes}: use another state folder"
            )
        return capacity if 1 <= capacity <= MAX_CAPACITY else None

    def _create(self, capacity: int, slots: list[int]) -> None:
        """Write the file anew, with the records in these slots of the old one, and rename it when it is whole."""
        self.capacity = capacity
        temporary = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.tmp")
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _allocate(fd, self.nbytes)
            os.pwrite(fd, self._header(), 0)
            for new, old in enumerate(slots):
                os.pwrite(fd, os.pread(self._fd, self.stride, PAGE + old * self.stride), PAGE + new * self.stride)
            os.fsync(fd)
            os.replace(temporary, self._path)
            files.sync_directory(self._path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)


def _allocate(fd: int, size: int) -> None:
    """Take the whole room at once, so that a disk that is full later refuses no sample."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)

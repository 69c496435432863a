"""Where records are kept: by sample number, in memory or in a file, O(1).

Both stores are direct-mapped: sample number i lives in slot i mod capacity. **Eviction rule**: of two samples that
share a slot, the one with the higher number stays. So what a full store holds does not depend on the order in which
samples were met, and going through the samples again and again never makes two of them chase each other out.

The C core reads and writes `data` and `owner` in place; a store only owns the memory, keeps the rule, and counts.

A cache file (little endian):

    "IFTCACHE"  u32 version  u32 n  u32 crc32 of the JSON   JSON, n bytes   zeros up to a multiple of 64
    i64 owner[capacity]      sample number held in each slot, −1 where empty
    u32 crc32[capacity]      over the owner (8 bytes) and the record (stride bytes)      zeros up to a multiple of 64
    u8  data[capacity][stride]    64 bytes of slack

A record counts only with an owner that belongs in its slot and a checksum that matches, so a crash between two writes
costs records, never correctness. One process at a time should use a file. Nothing read from it is run.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import secrets
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import files
from ..errors import FileError, MismatchError, UsageError
from ..spec import RecordSpec
from .codecs import Codec, codec

__all__ = ["DiskStore", "Store", "memory_store", "open_store"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]

SLACK = 64
"""Bytes behind the last record that may be read (not used): vector loads run past the end."""

MAX_CAPACITY = 1 << 40

MAGIC = b"IFTCACHE"
VERSION = 1
MAX_HEADER = 1 << 20


class Store:
    """The forward cache (Skip-Cache, Skip2-LoRA §4.2) in memory.

    Attributes:
        codec: how records are written.
        record: layout of the rows.
        capacity: number of slots.
        data: (capacity, stride) uint8, C-contiguous, 64-byte aligned, with 64 bytes of slack behind it.
        owner: (capacity,) int64, the sample number in each slot, −1 where it is empty.
        hits: accesses of a training that were served from here.
        misses: forward passes of the frozen network that were run, one a sample. hits + misses = accesses: what `fill`
            computes beforehand is a miss whose access is still to come, so until then hits may be below zero.
        damaged: records that were found damaged on opening, and dropped.
    """

    def __init__(self, codec: Codec, record: RecordSpec, data: Bytes, owner: Numbers) -> None:
        self.codec = codec
        self.record = record
        self.capacity = len(owner)
        self.data = data
        self.owner = owner
        self.hits = 0
        self.misses = 0
        self.damaged = 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything: records with padding, owners, checksums where there are any."""
        return self.data.nbytes + self.owner.nbytes

    def slots(self, numbers: ArrayLike) -> NDArray[np.intp]:
        """Slot of each sample number, (n,).

        Raises:
            UsageError: a number is negative or not an integer.
        """
        return np.asarray(_numbers(numbers) % self.capacity, np.intp)

    def held(self, numbers: ArrayLike) -> Mask:
        """(n,): whether the record of each sample is here."""
        numbers = _numbers(numbers)
        return np.asarray(self.owner[self.slots(numbers)] == numbers)

    def admits(self, numbers: ArrayLike) -> Mask:
        """(n,): whether each sample would be here after `write(numbers, …)`, by the eviction rule."""
        numbers = _numbers(numbers)
        slots = self.slots(numbers)
        used, place = np.unique(slots, return_inverse=True)
        highest = self.owner[used].copy()
        np.maximum.at(highest, place, numbers)
        return np.asarray(numbers == highest[place])

    def read(self, numbers: ArrayLike) -> Floats:
        """Record rows (n, record.width) of samples, all of which must be held.

        Raises:
            UsageError: one of them is not.
        """
        numbers = _numbers(numbers)
        missing = numbers[~self.held(numbers)]
        if missing.size:
            raise UsageError(f"samples must be in the cache to be read, but number {missing[0]} is not")
        return self.codec.decode(self.data[self.slots(numbers)], self.record)

    def in_place(self, numbers: ArrayLike) -> Floats | None:
        """As `read`, where the rows lie and read-only; None where they are encoded, or not one behind the other."""
        numbers = _numbers(numbers)
        slots = self.slots(numbers)
        if not (self.codec.plain and len(slots) and (np.diff(slots) == 1).all() and self.held(numbers).all()):
            return None
        rows = self.data[slots[0] : slots[-1] + 1].view(np.float32)
        rows.flags.writeable = False
        return rows

    def write(self, numbers: ArrayLike, rows: Floats) -> None:
        """Keep the record rows (n, record.width) of samples, as far as the eviction rule admits them.

        Raises:
            UsageError: rows and numbers do not go together.
        """
        numbers = _numbers(numbers)
        if np.shape(rows) != (len(numbers), self.record.width):
            raise UsageError(
                f"{len(numbers)} records must be rows of shape {[len(numbers), self.record.width]}, "
                f"not {list(np.shape(rows))}"
            )
        kept = self.admits(numbers)
        self.write_encoded(numbers[kept], self.codec.encode(rows[kept], self.record))

    def write_encoded(self, numbers: ArrayLike, data: Bytes) -> None:
        """As `write`, of samples (n, stride) that the codec, or who repeats its arithmetic, has encoded."""
        numbers = _numbers(numbers)
        kept = self.admits(numbers)
        slots = self.slots(numbers)[kept]
        self._unseal(slots)
        self.data[slots] = data[kept]
        self.owner[slots] = numbers[kept]

    def forget(self, numbers: ArrayLike) -> None:
        """Drop samples, and overwrite their bytes with zeros; those not held are left out silently."""
        numbers = _numbers(numbers)
        slots = self.slots(numbers)[self.held(numbers)]
        self._unseal(slots)
        self.owner[slots] = -1
        self.data[slots] = 0

    def flush(self) -> None:
        """Make everything written so far last; in memory there is nothing to do."""

    def _unseal(self, slots: NDArray[np.intp]) -> None:
        """The records in `slots` are about to change."""


class DiskStore(Store):
    """The forward cache in a memory-mapped file; `flush` makes what was written last.

    Made by `open_store`.
    """

    def __init__(self, codec: Codec, record: RecordSpec, capacity: int, mapped: mmap.mmap, layout: _Layout) -> None:
        whole = np.frombuffer(mapped, np.uint8)
        owner = whole[layout.owner : layout.owner + 8 * capacity].view(np.int64)
        data = whole[layout.data : layout.data + layout.stride * capacity].reshape(capacity, layout.stride)
        super().__init__(codec, record, data, owner)
        self._mapped = mapped
        self._crc = whole[layout.crc : layout.crc + 4 * capacity].view(np.uint32)
        self._sealed: Numbers = np.full(capacity, -1, np.int64)
        """The owner that each checksum in the file was made for; −1: none, or the record changed since."""
        self._check()

    @property
    def nbytes(self) -> int:
        """Bytes of everything: records with padding, owners, checksums."""
        return super().nbytes + self._crc.nbytes

    def flush(self) -> None:
        """Seal the records written since the last time with their checksums, and write the file to disk.

        Raises:
            FileError: the disk refuses.
        """
        for slot in np.flatnonzero((self.owner >= 0) & (self.owner != self._sealed)).tolist():
            self._crc[slot] = self._checksum(slot)
        self._sealed[:] = self.owner
        try:
            self._mapped.flush()
        except OSError as e:
            raise FileError(f"the cache file must reach the disk, but writing it failed: {_why(e)}") from None

    def _unseal(self, slots: NDArray[np.intp]) -> None:
        self._sealed[slots] = -1

    def _checksum(self, slot: int) -> int:
        return zlib.crc32(self.data[slot], zlib.crc32(struct.pack("<q", int(self.owner[slot]))))

    def _check(self) -> None:
        """Drop what is damaged: an owner of another slot, or a checksum that does not match."""
        for slot in np.flatnonzero(self.owner != -1).tolist():
            number = int(self.owner[slot])
            if number < 0 or number % self.capacity != slot or self._checksum(slot) != int(self._crc[slot]):
                self.owner[slot] = -1
                self.data[slot] = 0
                self.damaged += 1
        self._sealed[:] = self.owner


class _Layout:
    """Offsets in a cache file, in bytes."""

    def __init__(self, header: int, capacity: int, stride: int) -> None:
        self.stride = stride
        self.owner = _aligned(20 + header)
        self.crc = self.owner + 8 * capacity
        self.data = _aligned(self.crc + 4 * capacity)
        self.end = self.data + capacity * stride + SLACK


def memory_store(codec_name: str, record: RecordSpec, capacity: int) -> Store:
    """An empty store in memory.

    Args:
        codec_name: a name in `codecs.CODECS`.
        record: layout of the rows.
        capacity: number of samples it has room for.

    Raises:
        UsageError: no such codec, or a capacity below 1 or beyond the machine's memory.
    """
    c = codec(codec_name)
    _check_capacity(capacity)
    stride = c.stride(record)
    size = capacity * (stride + 8) + 2 * SLACK
    too_much = f"a cache of {capacity} samples must fit in memory, but needs {size} bytes: use a smaller capacity"
    if size > _physical_memory():
        raise UsageError(too_much)
    try:
        buffer = np.zeros(capacity * stride + 2 * SLACK, np.uint8)
        owner = np.full(capacity, -1, np.int64)
    except MemoryError:
        raise UsageError(too_much) from None
    start = -buffer.ctypes.data % 64
    return Store(c, record, buffer[start : start + capacity * stride].reshape(capacity, stride), owner)


def open_store(
    path: str | os.PathLike[str], codec_name: str, record: RecordSpec, capacity: int, base_hash: str, data_hash: str
) -> DiskStore:
    """The store in the file `path`, which is made if it is not there.

    Args:
        path: of the cache file.
        codec_name, record, capacity: as for `memory_store`.
        base_hash: names the frozen network whose records these are.
        data_hash: names the data set whose samples are numbered.

    Returns:
        The store, with whatever valid records it held; `damaged` says how many were dropped.

    Raises:
        UsageError: no such codec, or a capacity out of range.
        MismatchError: the file was made for another network, data set, codec, layout or capacity.
        FileError: it is damaged or no cache file, or cannot be made, read or written.
    """
    path = Path(path)
    c = codec(codec_name)
    _check_capacity(capacity)
    wanted: dict[str, Any] = {
        "base_hash": base_hash,
        "data_hash": data_hash,
        "codec": c.name if c.version == 1 else f"{c.name} {c.version}",
        "record": [[s.name, s.size, s.groups, s.nonnegative, s.offset] for s in record.segments],
        "capacity": capacity,
        "stride": c.stride(record),
    }
    header = json.dumps(wanted, separators=(",", ":")).encode()
    if len(header) > MAX_HEADER:
        raise UsageError(f"the hashes of a cache file must be short, not {len(base_hash)} and {len(data_hash)} long")
    layout = _Layout(len(header), capacity, c.stride(record))
    try:
        if path.exists():
            files.regular_size(path, "a cache file")
        else:
            _create(path, header, layout)
        with path.open("r+b") as file:
            _check_header(path, file, wanted, layout)
            mapped = mmap.mmap(file.fileno(), layout.end)
    except FileError:
        raise
    except (OSError, ValueError, OverflowError) as e:
        raise FileError(f"the cache file {path} must be readable and writable, but: {_why(e)}") from None
    return DiskStore(c, record, capacity, mapped, layout)


_WORDS = {
    "base_hash": "network",
    "data_hash": "data set",
    "codec": "codec",
    "record": "record layout",
    "capacity": "capacity",
    "stride": "bytes a record",
}


def _check_header(path: Path, file: BinaryIO, wanted: dict[str, Any], layout: _Layout) -> None:
    """Refuse a file that is not a whole cache file made for `wanted`."""
    start = file.read(20)
    if len(start) < 20 or start[:8] != MAGIC:
        raise FileError(f"a cache file must begin with {MAGIC.decode()}, but {path} does not: it is no cache file")
    version, n, crc = struct.unpack("<III", start[8:])
    if version != VERSION:
        raise FileError(f"a cache file must have version {VERSION}, but {path} has {version}: make a new one")
    header = file.read(n) if n <= MAX_HEADER else b""
    try:
        if len(header) != n or zlib.crc32(header) != crc:
            raise ValueError
        found = json.loads(header)
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            raise ValueError
    except (ValueError, RecursionError):
        raise FileError(f"a cache file must have an intact header, but {path} does not: delete it") from None
    for key, value in wanted.items():
        if found[key] != value:
            raise MismatchError(
                f"the cache file {path} must be for {_WORDS[key]} {value}, but it was made for {found[key]}: "
                "use another file"
            )
    size = os.fstat(file.fileno()).st_size
    if size > layout.end:
        raise FileError(f"the cache file {path} must have {layout.end} bytes, but it has {size}: delete it")
    if size < layout.end:  # a power cut: the checksums tell which records are still there
        _allocate(file, layout.end)


def _create(path: Path, header: bytes, layout: _Layout) -> None:
    """Make an empty cache file of full size under a temporary name, and rename it."""
    free = shutil.disk_usage(path.parent).free
    if layout.end > free:
        raise FileError(f"the cache file {path} must fit on its disk, but needs {layout.end} bytes of {free} free")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            _allocate(file, layout.end)
            file.write(MAGIC + struct.pack("<III", VERSION, len(header), zlib.crc32(header)) + header)
            file.seek(layout.owner)
            _write_repeated(file, b"\xff", layout.crc - layout.owner)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _allocate(file: BinaryIO, size: int) -> None:
    """Take the room on the disk, so that writing to the mapped file later cannot fail; what is new is zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    file.seek(0, os.SEEK_END)
    _write_repeated(file, b"\0", size - file.tell())
    file.flush()
    file.seek(0)


def _write_repeated(file: BinaryIO, byte: bytes, n: int) -> None:
    chunk = 1 << 20
    for start in range(0, n, chunk):
        file.write(byte * min(chunk, n - start))


def _check_capacity(capacity: int) -> None:
    if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= MAX_CAPACITY:
        raise UsageError(f"a cache's capacity must be 1 to {MAX_CAPACITY} samples, not {capacity!r}")


def _numbers(numbers: ArrayLike) -> Numbers:
    array = np.atleast_1d(np.asarray(numbers))
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"sample numbers must be a row of integers, not {array.dtype} of shape {list(array.shape)}")
    if int(array.min()) < 0 or int(array.max()) >= 1 << 63:
        raise UsageError(f"sample numbers must be 0 to 2^63-1, not {array.min()}")
    return array.astype(np.int64)


def _physical_memory() -> float:
    """Bytes of memory this machine has; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _aligned(n: int) -> int:
    return -(-n // 64) * 64


def _why(e: Exception) -> str:
    """The reason alone, on one line."""
    return (e.strerror if isinstance(e, OSError) and e.strerror else str(e)).replace("\n", " ")

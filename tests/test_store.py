"""One battery for the store in memory and the one on disk, and what only the file must do."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from instantft.cache.codecs import CODECS, codec
from instantft.cache.store import DiskStore, Store, memory_store, open_store
from instantft.errors import FileError, MismatchError, UsageError
from instantft.spec import RecordSpec, dnn

RECORD = dnn(16, 3, 24).record

Make = Callable[..., Store]


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes empty stores of either kind."""
    made = 0

    def make(codec_name: str = "fp32", capacity: int = 8, record: RecordSpec = RECORD) -> Store:
        nonlocal made
        made += 1
        if request.param == "memory":
            return memory_store(codec_name, record, capacity)
        return open_store(tmp_path / f"cache{made}", codec_name, record, capacity, "net", "data")

    return make


def rows_for(numbers: ArrayLike, record: RecordSpec = RECORD) -> np.ndarray:
    """A row of its own for each number."""
    rows = np.zeros((len(np.atleast_1d(numbers)), record.width), np.float32)
    for row, number in zip(rows, np.atleast_1d(numbers), strict=True):
        rng = np.random.default_rng(int(number))
        for s in record.segments:
            row[s.offset : s.offset + s.size] = rng.normal(size=s.size)
    return rows


# --- the battery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_what_is_written_is_read(make: Make, name: str) -> None:
    store = make(name)
    numbers = np.array([3, 0, 6])
    store.write(numbers, rows_for(numbers))
    c = codec(name)
    expected = c.decode(c.encode(rows_for(numbers), RECORD), RECORD)
    np.testing.assert_array_equal(store.read(numbers), expected)
    np.testing.assert_array_equal(store.read(numbers[::-1]), expected[::-1])
    np.testing.assert_array_equal(store.held(np.arange(8)), [True, False, False, True, False, False, True, False])


def test_empty(make: Make) -> None:
    store = make()
    assert not store.held(np.arange(20)).any()
    assert store.admits(np.arange(12, 20)).all()
    assert (store.hits, store.misses, store.damaged, store.capacity) == (0, 0, 0, 8)
    assert store.read(np.array([], np.int64)).shape == (0, RECORD.width)
    with pytest.raises(UsageError, match="must be in the cache to be read, but number 5 is not"):
        store.read([5])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("capacity", [1, 3, 8, 100])
def test_memory_is_as_the_core_wants_it(make: Make, name: str, capacity: int) -> None:
    store = make(name, capacity)
    stride = codec(name).stride(RECORD)
    assert store.data.shape == (capacity, stride)
    assert store.data.dtype == np.uint8
    assert store.data.flags.c_contiguous
    assert store.data.flags.writeable
    assert store.data.ctypes.data % 64 == 0
    assert store.owner.shape == (capacity,)
    assert store.owner.dtype == np.int64
    assert store.owner.flags.writeable
    assert (store.owner == -1).all()
    base = store.data
    while isinstance(base.base, np.ndarray):
        base = base.base
    behind = base.ctypes.data + base.nbytes - (store.data.ctypes.data + store.data.nbytes)
    assert behind >= 64
    assert store.nbytes >= store.data.nbytes + store.owner.nbytes


def test_eviction_rule(make: Make) -> None:
    """Of two samples that share a slot the one with the higher number stays, whichever came first."""
    store = make()
    store.write([10], rows_for([10]))
    assert not store.admits([2]).any()
    store.write([2], rows_for([2]))
    np.testing.assert_array_equal(store.held([2, 10]), [False, True])
    np.testing.assert_array_equal(store.read([10]), rows_for([10]))
    assert store.admits([10, 18]).tolist() == [False, True], "within one call too"
    assert store.admits([10]).all()
    store.write([18, 10, 26], rows_for([18, 10, 26]))
    np.testing.assert_array_equal(store.held([2, 10, 18, 26]), [False, False, False, True])
    np.testing.assert_array_equal(store.read([26]), rows_for([26]))


def test_samples_that_are_encoded_already(make: Make) -> None:
    numbers, c = np.array([10, 2, 3]), codec("nf4")
    store, same = make("nf4"), make("nf4")
    store.write_encoded(numbers, c.encode(rows_for(numbers), RECORD))
    same.write(numbers, rows_for(numbers))
    np.testing.assert_array_equal(store.owner, same.owner)
    np.testing.assert_array_equal(store.data, same.data)
    assert store.held(numbers).tolist() == [True, False, True]


@settings(max_examples=30, deadline=None)
@given(calls=st.lists(st.lists(st.integers(0, 40), max_size=12), max_size=6), capacity=st.integers(1, 9))
def test_content_does_not_depend_on_the_order(calls: list[list[int]], capacity: int) -> None:
    """After any writes a slot holds the highest number that came by, with its own row; `admits` said so before."""
    store = memory_store("fp32", RECORD, capacity)
    highest: dict[int, int] = {}
    for numbers in calls:
        admitted = store.admits(np.array(numbers, np.int64))
        for n in numbers:
            highest[n % capacity] = max(n, highest.get(n % capacity, -1))
        assert admitted.tolist() == [highest[n % capacity] == n for n in numbers]
        store.write(np.array(numbers, np.int64), rows_for(numbers))
    kept = sorted(highest.values())
    assert sorted(store.owner[store.owner >= 0].tolist()) == kept
    if kept:
        np.testing.assert_array_equal(store.read(kept), rows_for(kept))


def test_forget(make: Make) -> None:
    store = make()
    store.write(np.arange(8), rows_for(np.arange(8)))
    store.forget([3, 5, 11])  # 11 shares a slot with 3, but is not here
    assert store.held(np.arange(8)).tolist() == [True, True, True, False, True, False, True, True]
    assert not store.data[[3, 5]].any(), "forgotten bytes must be gone"
    assert store.data[4].any()
    store.write([3], rows_for([3]))
    np.testing.assert_array_equal(store.read([3]), rows_for([3]))
    store.forget([11])
    assert store.held([3]).all()


def test_flush_keeps_everything(make: Make) -> None:
    store = make()
    store.write([1, 9], rows_for([1, 9]))
    store.flush()
    np.testing.assert_array_equal(store.read([9]), rows_for([9]))


def test_numbers_are_checked(make: Make) -> None:
    store = make()
    for numbers, message in (
        ([-1], "must be 0 to 2.*, not -1"),
        ([0.5], "must be a row of integers, not float64"),
        ([[1]], "must be a row of integers, not int64 of shape"),
    ):
        for f in (store.slots, store.held, store.admits, store.read, store.forget):
            with pytest.raises(UsageError, match=message):
                f(numbers)
    with pytest.raises(UsageError, match=rf"2 records must be rows of shape \[2, {RECORD.width}\], not \[1, "):
        store.write([0, 1], rows_for([0]))
    assert store.slots(np.array([9, 16], np.int32)).tolist() == [1, 0]


@pytest.mark.parametrize("capacity", [0, -1, 1 << 62, True, 2.0, None])
def test_capacity_is_checked(make: Make, capacity: object) -> None:
    with pytest.raises(UsageError, match=r"^a cache's capacity must be 1 to \d+ samples, not "):
        make(capacity=capacity)


def test_unknown_codec(make: Make) -> None:
    with pytest.raises(UsageError, match="codec must be one of"):
        make("zip")


def test_memory_must_suffice() -> None:
    with pytest.raises(UsageError, match=r"^a cache of 1000000000000 samples must fit in memory, but needs \d+ bytes"):
        memory_store("fp32", RECORD, 10**12)


def test_memory_is_asked_for_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems hand out more memory than they have; so the machine's size counts, not what it promises."""
    monkeypatch.setattr("instantft.cache.store._physical_memory", lambda: 10_000.0)
    memory_store("fp32", RECORD, 8)
    with pytest.raises(UsageError, match="a cache of 100 samples must fit in memory"):
        memory_store("fp32", RECORD, 100)


def test_disk_must_suffice(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"must fit on its disk, but needs \d+ bytes of \d+ free"):
        open_store(tmp_path / "cache", "fp32", RECORD, 10**12, "net", "data")
    assert not list(tmp_path.iterdir())


# --- the file ---------------------------------------------------------------------------------------------------------


def opened(path: Path, **changes: object) -> DiskStore:
    arguments: dict[str, Any] = {
        "codec_name": "nf4", "record": RECORD, "capacity": 8, "base_hash": "net-a", "data_hash": "data-a", **changes
    }  # fmt: skip
    return open_store(path, **arguments)


def filled(path: Path) -> DiskStore:
    """A store with samples 4 … 9, flushed."""
    store = opened(path)
    store.write(np.arange(10), rows_for(np.arange(10)))
    store.forget([2, 3])
    store.flush()
    return store


def test_a_file_of_an_older_way_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nf4-hw once wrote the output in 4 bits: here as many bytes a record as now, and other values."""
    with monkeypatch.context() as then:
        then.setitem(CODECS, "nf4-hw", replace(CODECS["nf4-hw"], version=1, kept="none"))
        stride = open_store(tmp_path / "old", "nf4-hw", RECORD, 8, "net", "data").codec.stride(RECORD)
    assert stride == codec("nf4-hw").stride(RECORD)
    with pytest.raises(MismatchError, match=r"for codec nf4-hw 2, but it was made for nf4-hw: use another file$"):
        open_store(tmp_path / "old", "nf4-hw", RECORD, 8, "net", "data")
    open_store(tmp_path / "new", "nf4-hw", RECORD, 8, "net", "data")
    open_store(tmp_path / "new", "nf4-hw", RECORD, 8, "net", "data")


def data_offset(path: Path) -> int:
    """Where the records begin, from the description of the format, not from the code."""
    blob = path.read_bytes()
    assert blob[:8] == b"IFTCACHE"
    version, n, crc = struct.unpack("<III", blob[8:20])
    header = json.loads(blob[20 : 20 + n])
    assert (version, crc) == (1, zlib.crc32(blob[20 : 20 + n]))
    owners = -(-(20 + n) // 64) * 64
    return -(-(owners + 12 * header["capacity"]) // 64) * 64


def test_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    before = filled(path)
    rows = before.read(np.arange(4, 10))
    del before
    store = opened(path)
    assert store.damaged == 0
    assert store.held(np.arange(12)).tolist() == [False] * 4 + [True] * 6 + [False] * 2
    np.testing.assert_array_equal(store.read(np.arange(4, 10)), rows)
    assert path.stat().st_size == data_offset(path) + store.data.nbytes + 64
    assert [p.name for p in tmp_path.iterdir()] == ["cache"], "no temporary file stays"


def test_records_written_past_the_store_are_sealed_by_flush(tmp_path: Path) -> None:
    """The core writes data and owner itself; flush must find what it wrote."""
    path = tmp_path / "cache"
    store = opened(path)
    encoded = codec("nf4").encode(rows_for([13, 6]), RECORD)
    store.data[[5, 6]], store.owner[[5, 6]] = encoded, [13, 6]
    store.flush()
    again = opened(path)
    assert again.damaged == 0
    assert again.held([13, 6]).all()
    np.testing.assert_array_equal(again.data[[5, 6]], encoded)


def test_records_that_were_not_flushed_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    store = filled(path)
    store.write([12], rows_for([12]))  # evicts 4
    again = opened(path)
    assert again.damaged == 1
    assert not again.held([4, 12]).any()
    assert again.held([5, 6, 7, 8, 9]).all()


def test_rewritten_and_forgotten_records_survive_a_flush(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    store = filled(path)
    store.write([5], rows_for([500]))
    store.forget([6])
    store.write([6], rows_for([600]))
    store.forget([7])
    store.flush()
    again = opened(path)
    assert again.damaged == 0
    assert again.held([5, 6, 7]).tolist() == [True, True, False]
    np.testing.assert_array_equal(again.read([5, 6]), store.read([5, 6]))
    assert not again.data[7].any()


@pytest.mark.parametrize("where", ["data", "owner", "crc"])
def test_a_flipped_bit_drops_that_record(tmp_path: Path, where: str) -> None:
    path = tmp_path / "cache"
    store = filled(path)
    stride = store.data.shape[1]
    del store
    start = data_offset(path)
    owners = start - -(-12 * 8 // 64) * 64
    offset = {"data": start + 6 * stride + 11, "owner": owners + 6 * 8, "crc": owners + 8 * 8 + 6 * 4}[where]
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))
    again = opened(path)
    assert again.damaged == 1
    assert again.owner[6] == -1
    assert not again.data[6].any()
    assert again.held([4, 5, 7, 8, 9]).all()
    again.flush()
    assert opened(path).damaged == 0


def test_an_owner_outside_its_slot_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    store = filled(path)
    store.owner[2], store.owner[3] = 5, -7
    store.flush()
    again = opened(path)
    assert again.damaged == 2
    assert again.held([5]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_hash": "net-b"}, "network net-b, but it was made for net-a"),
        ({"data_hash": "data-b"}, "data set data-b, but it was made for data-a"),
        ({"codec_name": "int8"}, "codec int8, but it was made for nf4"),
        ({"capacity": 9}, "capacity 9, but it was made for 8"),
        ({"record": dnn(16, 5, 24).record}, "record layout .*, but it was made for"),
    ],
)
def test_a_file_made_for_something_else(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "cache"
    filled(path)
    before = path.read_bytes()
    with pytest.raises(MismatchError, match=f"must be for {words}") as e:
        opened(path, **change)
    assert "\n" not in str(e.value)
    assert path.read_bytes() == before


def test_a_file_that_a_power_cut_shortened_keeps_its_other_records(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    store = filled(path)
    size, held = path.stat().st_size, np.flatnonzero(store.owner >= 0)
    assert len(held) > 2
    last, stride = held[-1], store.codec.stride(store.record)
    path.write_bytes(path.read_bytes()[: size - 64 - (store.capacity - last) * stride + 1])
    again = opened(path)
    assert path.stat().st_size == size
    assert again.damaged == 1
    assert np.flatnonzero(again.owner >= 0).tolist() == held[:-1].tolist()


@pytest.mark.parametrize("keep", [0, 5, 19, 30])
def test_a_truncated_header(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cache"
    filled(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileError, match=r"must (begin with|have)") as e:
        opened(path)
    assert "\n" not in str(e.value)
    assert not isinstance(e.value, MismatchError)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    filled(path)
    good = path.read_bytes()
    n = struct.unpack("<I", good[12:16])[0]
    deep = b"[" * n

    def with_header(header: bytes) -> bytes:
        return good[:12] + struct.pack("<II", len(header), zlib.crc32(header)) + header + good[20 + len(header) :]

    for blob, words in (
        (b"PK\3\4" + good[4:], "must begin with IFTCACHE"),
        (good[:8] + b"\2" + good[9:], "must have version 1, but .* has 2"),
        (good[:12] + b"\xff\xff\xff\xff" + good[16:], "intact header"),
        (good[:30] + b"?" + good[31:], "intact header"),
        (with_header(deep), "intact header"),
        (with_header(b"[]" + b" " * (n - 2)), "intact header"),
        (with_header(b"\xff" * n), "intact header"),
        (with_header(b"{}" + b" " * (n - 2)), "intact header"),
        (good + b"\0", "must have .* bytes, but it has"),
    ):
        path.write_bytes(blob)
        with pytest.raises(FileError, match=words):
            opened(path)


def test_places_where_no_file_can_be(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "cache", Path("/proc/nothing/cache")):
        with pytest.raises(FileError, match=f"^the cache file {path} must be readable and writable, but: ") as e:
            opened(path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
def test_only_regular_files(tmp_path: Path, kind: str) -> None:
    """A named pipe must not be opened: that waits for ever."""
    path = Path("/dev/null") if kind == "device" else tmp_path / "cache"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    with pytest.raises(FileError, match=f"a cache file must be a regular file, but {path} is") as e:
        opened(path)
    assert "\n" not in str(e.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="Permission denied"):
        opened(tmp_path / "cache")


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(FileError, match="No space left on device"):
        opened(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_where_nothing_preallocates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems without posix_fallocate get the same file."""
    filled(tmp_path / "one")
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    filled(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_process_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    filled(path)
    code = (
        "import sys; from instantft.cache.store import open_store; from instantft.spec import dnn;"
        "s = open_store(sys.argv[1], 'nf4', dnn(16, 3, 24).record, 8, 'net-a', 'data-a');"
        "print(s.owner.tolist(), s.damaged)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[8, 9, -1, -1, 4, 5, 6, 7] 0"


def test_in_place() -> None:
    """What `read` gives, without a copy, for rows that are not encoded and lie one behind the other; else nothing."""
    record = RECORD
    rows = np.zeros((8, record.width), np.float32)
    rows[:] = np.arange(8)[:, None]
    store = memory_store("fp32", record, 10)
    store.write(np.arange(8), rows)
    seen = store.in_place(np.arange(2, 6))
    assert seen is not None
    assert np.shares_memory(seen, store.data)
    np.testing.assert_array_equal(seen, store.read(np.arange(2, 6)))
    with pytest.raises(ValueError, match="read-only"):
        seen[0, 0] = 1
    for numbers in ([3, 2], [1, 3], [7, 8], []):
        assert store.in_place(np.array(numbers, np.int64)) is None
    encoded = memory_store("fp16", record, 10)
    encoded.write(np.arange(8), rows)
    assert encoded.in_place(np.arange(8)) is None

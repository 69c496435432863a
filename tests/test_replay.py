from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instantft.errors import FileError
from instantft.watch.replay import PAGE, Replay

N, C = 5, 3


def put(replay: Replay, number: int, label: int = 0, **more: object) -> np.ndarray:
    x = np.random.default_rng(number).random(N).astype(np.float32)
    replay.add(number, 1.5, x, label, name=f"s{number}", **more)  # type: ignore[arg-type]
    return x


def held(replay: Replay) -> dict[int, np.ndarray]:
    x, slots = replay.rows(replay.find())
    return {int(replay.number[slot]): row for slot, row in zip(slots, x, strict=True)}


def test_samples_survive_closing(tmp_path: Path) -> None:
    replay = Replay(tmp_path / "s", N, C, 10)
    rows = {n: put(replay, n, n % 3, user="anna" if n % 2 else "bo", trusted=n == 4) for n in range(1, 8)}
    size = (tmp_path / "s").stat().st_size
    replay.close()
    again = Replay(tmp_path / "s", N, C, 10)
    assert size == again.nbytes == (tmp_path / "s").stat().st_size
    assert len(again) == 7
    assert again.damaged == 0
    for n, x in held(again).items():
        assert (x == rows[n]).all()
    slot = again.find(name="s4")
    assert again.number[slot].tolist() == [4]
    assert again.label[slot].tolist() == [1]
    assert again.trusted[slot].tolist() == [True]
    assert sorted(again.number[again.find(user="anna")].tolist()) == [1, 3, 5, 7]
    again.close()


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, C - 1), min_size=1, max_size=80))
def test_the_oldest_goes_but_of_no_class_the_last(tmp_path_factory: pytest.TempPathFactory, labels: list[int]) -> None:
    replay = Replay(tmp_path_factory.mktemp("r") / "s", N, C, 12)
    for n, label in enumerate(labels, 1):
        put(replay, n, label)
    kept = set(held(replay))
    assert len(kept) == min(12, len(labels))
    assert len(labels) in kept
    for label in set(labels):
        newest = max(n for n, other in enumerate(labels, 1) if other == label)
        assert newest in kept
    replay.close()


def test_damage_costs_the_record_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "s"
    replay = Replay(path, N, C, 8)
    rows = {n: put(replay, n) for n in range(1, 9)}
    replay.close()
    raw = bytearray(path.read_bytes())
    for slot, at in ((2, 70), (5, 3)):
        raw[PAGE + slot * replay.stride + at] ^= 1
    path.write_bytes(raw)
    again = Replay(path, N, C, 8)
    assert again.damaged == 2
    assert set(held(again)) == {1, 2, 4, 5, 7, 8}
    assert all((x == rows[n]).all() for n, x in held(again).items())
    assert not any(path.read_bytes()[PAGE + 2 * replay.stride :][: replay.stride])  # wiped, not only ignored
    again.close()


@settings(max_examples=60, deadline=None)
@example(cut=PAGE + 8 * (64 + 4 * N), at=9, junk=b"\1")  # another version, it seems
@given(
    cut=st.integers(0, PAGE + 8 * (64 + 4 * N)),
    at=st.integers(0, PAGE + 8 * (64 + 4 * N) - 1),
    junk=st.binary(max_size=99),
)
def test_torn_files_open(tmp_path_factory: pytest.TempPathFactory, cut: int, at: int, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("r") / "s"
    replay = Replay(path, N, C, 8)
    rows = {n: put(replay, n) for n in range(1, 9)}
    replay.close()
    raw = bytearray(path.read_bytes())
    raw[at : at + len(junk)] = junk
    path.write_bytes(raw[:cut])
    for capacity in (8, 8, None):
        again = Replay(path, N, C, capacity)
        for n, x in held(again).items():
            assert (x == rows[n]).all()
        put(again, 100 + (capacity or 0))
        assert len(held(again)) >= 1
        again.forget(again.find(name=f"s{100 + (capacity or 0)}"))
        again.close()


def test_another_capacity_keeps_the_newest(tmp_path: Path) -> None:
    replay = Replay(tmp_path / "s", N, C, 8)
    rows = {n: put(replay, n) for n in range(1, 7)}
    replay.close()
    for capacity, kept in ((4, {3, 4, 5, 6}), (9, {3, 4, 5, 6})):
        again = Replay(tmp_path / "s", N, C, capacity)
        assert {n: x.tolist() for n, x in held(again).items()} == {n: rows[n].tolist() for n in kept}
        assert again.nbytes == (tmp_path / "s").stat().st_size
        again.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_what_is_forgotten_is_gone_from_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "s"
    replay = Replay(path, N, C, 8)
    rows = {n: put(replay, n, user="anna" if n < 4 else "bo") for n in range(1, 8)}
    assert all(x.tobytes() in path.read_bytes() for x in rows.values())
    replay.forget(replay.find(user="anna"))
    raw = path.read_bytes()
    assert [n for n, x in rows.items() if x.tobytes() in raw] == [4, 5, 6, 7]
    replay.forget(replay.find())
    assert not any(path.read_bytes()[PAGE:])
    assert len(replay) == 0
    replay.close()


def test_other_kinds_of_samples_are_refused(tmp_path: Path) -> None:
    Replay(tmp_path / "s", N, C, 8).close()
    with pytest.raises(FileError, match=r"5 values and 2 classes, but those in .* have 5 and 3"):
        Replay(tmp_path / "s", N, 2, 8)
    with pytest.raises(FileError, match="regular file"):
        Replay(tmp_path, N, C, 8)


def test_a_full_disk_costs_the_sample_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(tmp_path / "s", N, C, 4)
    rows = {n: put(replay, n) for n in range(1, 5)}

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "pwrite", full)
        with pytest.raises(FileError, match="No space left"):
            put(replay, 5)
    assert set(held(replay)) == {2, 3, 4}
    put(replay, 6)
    replay.close()
    again = Replay(tmp_path / "s", N, C, 4)
    assert all((x == rows[n]).all() for n, x in held(again).items() if n in rows)
    assert 6 in held(again)
    again.close()


def test_a_disk_that_fails_on_reading_costs_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay(tmp_path / "s", N, C, 4)
    put(replay, 1)

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    assert held(replay) == {}
    assert replay.damaged == 1

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft import files
from instantft.adapters import Adapter
from instantft.errors import FileError, MismatchError, UsageError
from instantft.watch.journal import SWITCHES, Journal, Version, ask, read_state

from .samples import adapter, base
from .watched import journal_in, trained

MADE = Version(0, 0, 5.0, 100, 0.5, 0.8, 0.2, 0.4, 90, 0.01, None, 0)


def commit(journal: Journal, seed: int = 1) -> Adapter:
    made = adapter(trained(), seed=seed)
    journal.commit(made, MADE, "better")
    return made


def same(a: Adapter | None, b: Adapter | None) -> bool:
    if a is None or b is None:
        return a is b
    return all((a.tensors[name] == b.tensors[name]).all() for name in a.tensors)


def test_a_new_folder_holds_the_frozen_network(tmp_path: Path) -> None:
    journal = journal_in(tmp_path / "s")
    assert journal.live is None
    assert journal.state.live == 0
    journal.close()
    assert read_state(tmp_path / "s") == journal.state


def test_versions_survive_and_are_gone_back_to(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    made = [commit(journal, seed) for seed in (1, 2, 3)]
    assert journal.state.live == 3
    journal.close()
    journal = journal_in(tmp_path)
    assert same(journal.live, made[2])
    assert journal.notes == []
    journal.roll_back(9.0, "worse")
    assert same(journal.live, made[1])
    journal.roll_back(9.0, "worse still", 1)
    four = commit(journal, 4)
    assert journal.state.versions[4].parent == 1
    journal.close()
    journal = journal_in(tmp_path)
    assert same(journal.live, four)
    journal.roll_back(9.0, "no")
    assert same(journal.live, made[0])
    journal.roll_back(9.0, "no")
    assert journal.live is None
    with pytest.raises(UsageError, match="frozen network is in use"):
        journal.roll_back(9.0, "no")
    with pytest.raises(UsageError, match="must be one of 0, 1, 2, 3, 4, not 7"):
        journal.roll_back(9.0, "no", 7)
    assert [(s.old, s.new) for s in journal.state.switches][-3:] == [(1, 4), (4, 1), (1, 0)]
    journal.close()


def test_versions_are_bounded_in_number_and_bytes(tmp_path: Path) -> None:
    journal = journal_in(tmp_path / "a", versions=3)
    for seed in range(6):
        commit(journal, seed)
    assert list(journal.state.versions) == [4, 5, 6]
    assert sorted(p.name for p in (tmp_path / "a" / "adapters").iterdir()) == ["000004", "000005", "000006"]
    size = journal.state.versions[6].size
    assert size == sum(p.stat().st_size for p in (tmp_path / "a" / "adapters" / "000006").iterdir())
    journal.roll_back(1.0, "", 4)
    commit(journal, 9)
    assert set(journal.state.versions) == {4, 6, 7}  # the live one's parent stays
    journal.close()
    journal = journal_in(tmp_path / "b", max_bytes=int(2.5 * size))
    for seed in range(4):
        commit(journal, seed)
    assert list(journal.state.versions) == [3, 4]
    journal.close()
    journal = journal_in(tmp_path / "c", max_bytes=size // 2)
    with pytest.raises(FileError, match="must fit in"):
        commit(journal)
    assert journal.state.live == 0
    journal.close()


def test_the_list_of_switches_is_bounded(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    commit(journal)
    first = journal.state.switches[0]
    journal.state = replace(journal.state, switches=journal.state.switches * SWITCHES)
    journal.roll_back(1.0, "x" * 10_000)
    assert len(journal.state.switches) == SWITCHES
    assert journal.state.switches[0] == first
    assert len(journal.state.switches[-1].why) == 300
    journal.close()


def test_the_longest_journal_can_still_be_read(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    commit(journal)
    journal.state = replace(journal.state, switches=(replace(journal.state.switches[0], why="😀" * 300),) * SWITCHES)
    journal.roll_back(1.0, "😀" * 299 + "\udc80")
    journal.close()
    again = journal_in(tmp_path)
    assert again.notes == []
    assert again.state == journal.state
    again.close()


def test_one_at_a_time(tmp_path: Path) -> None:
    journal = journal_in(tmp_path)
    with pytest.raises(FileError, match="somebody else works in"):
        journal_in(tmp_path)
    journal.close()
    journal_in(tmp_path).close()


def test_another_network_is_refused(tmp_path: Path) -> None:
    journal_in(tmp_path).close()
    with pytest.raises(MismatchError, match="base_hash"):
        Journal(tmp_path, base(), keep=10)
    with pytest.raises(MismatchError, match="mean"):
        Journal(tmp_path, trained(), (0.5,), keep=10)
    journal = Journal(tmp_path, None)
    assert journal.replay.capacity == 600
    journal.close()
    with pytest.raises(FileError, match="readable journal"):
        Journal(tmp_path / "none", None)


CALLS = ("replace", "rename", "fsync", "pwrite", "mkdir", "open")
"""What is counted: whatever changes the disk, and what comes before it."""


def switch(folder: Path) -> None:
    journal = journal_in(folder, versions=2)
    commit(journal, 3)
    journal.roll_back(1.0, "back")
    commit(journal, 4)
    journal.replay.add(7, 1.0, np.ones(6, np.float32), 1, name="a")
    journal.close()


def prepared(folder: Path) -> None:
    journal = journal_in(folder, versions=2)
    commit(journal, 1)
    commit(journal, 2)
    journal.replay.add(1, 1.0, np.zeros(6, np.float32), 0, name="b")
    journal.close()


def killed_at(n: int, job: Callable[[], None], torn: bool) -> bool:
    """Do the job in a process that dies at the n-th call; False if it got to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(name: str) -> Callable[..., object]:
            real = getattr(os, name)

            def call(*args: object, **more: object) -> object:
                nonlocal count
                count += 1
                if count == n:
                    if torn and name == "pwrite":
                        fd, raw, at = args
                        real(fd, raw[: len(raw) // 2], at)  # type: ignore[index,arg-type]
                    os._exit(9)
                return real(*args, **more)

            return call

        for name in CALLS:
            setattr(os, name, counted(name))
        try:
            job()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_killed_at_any_moment_loses_nothing(tmp_path: Path, step: int) -> None:
    prepared(tmp_path / "before")
    trained()
    allowed = [adapter(trained(), seed=seed) for seed in (1, 2, 3, 4)]
    deaths = 0
    for n in range(1, 500, step):
        folder = tmp_path / "s"
        shutil.copytree(tmp_path / "before", folder)
        died = killed_at(n, lambda: switch(tmp_path / "s"), torn=True)
        journal = journal_in(folder, versions=2)
        assert any(same(journal.live, one) for one in allowed)
        assert not [note for note in journal.notes if "cannot be read" in note or "copies" in note]
        on_disk = {p.name for p in (folder / "adapters").iterdir()}
        assert on_disk == {f"{number:06d}" for number in journal.state.versions}
        assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
        assert len(journal.replay) in (1, 2)
        commit(journal, 9)  # and it goes on
        journal.close()
        shutil.rmtree(folder)
        deaths += died
        if not died:
            break
    else:
        pytest.fail("the job never got to its end")
    assert deaths * step > 50


class Failing:
    """`os` calls that fail from the n-th on: once, or for good."""

    def __init__(self, real: Callable[..., object], n: int, lasting: bool) -> None:
        self.real, self.n, self.lasting, self.count = real, n, lasting, 0

    def __call__(self, *args: object, **more: object) -> object:
        self.count += 1
        if self.count == self.n or (self.lasting and self.count > self.n):
            raise OSError(28, "No space left on device")
        return self.real(*args, **more)


@pytest.mark.parametrize("name", ["replace", "rename", "fsync", "mkdir", "open"])
def test_a_disk_that_refuses_leaves_the_old_adapter(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call fails once, with what follows it working again or not."""
    prepared(tmp_path / "before")
    for lasting in (False, True):
        for n in range(1, 60):
            folder = tmp_path / "s"
            shutil.copytree(tmp_path / "before", folder)
            journal = journal_in(folder, versions=2)
            expected, call = journal.live, Failing(getattr(os, name), n, lasting)
            with monkeypatch.context() as m:
                m.setattr(os, name, call)
                with contextlib.suppress(FileError):
                    expected = commit(journal, 3)
            assert same(journal.live, expected)
            journal.close()
            again = journal_in(folder, versions=2)
            assert same(again.live, expected)
            again.close()
            shutil.rmtree(folder)
            if call.count < n:
                break
        else:
            pytest.fail("the switch never got to its end")
        assert n > 1


def test_a_full_disk_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_in(tmp_path)
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, 1, True))
    with pytest.raises(FileError, match=r"writable place, but .*: No space left"):
        commit(journal)
    assert list((tmp_path / "adapters").iterdir()) == []
    journal.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    prepared(folder)
    return folder


@pytest.mark.parametrize("seed", range(40))
def test_any_file_may_be_torn(tmp_path: Path, whole: Path, seed: int) -> None:
    folder, rng = tmp_path / "s", np.random.default_rng(seed)
    shutil.copytree(whole, folder)
    every = sorted(p for p in folder.rglob("*") if p.is_file())
    for i in rng.choice(len(every), rng.integers(1, len(every) + 1), replace=False):
        raw = every[i].read_bytes()
        every[i].write_bytes(raw[: rng.integers(0, len(raw) + 1)] + rng.bytes(rng.choice([0, 20])))
    good = []
    for number in (1, 2):
        with contextlib.suppress(FileError):
            good.append((number, Adapter.load(folder / "adapters" / f"{number:06d}", trained())))
    journal = journal_in(folder, versions=2)
    assert journal.state.live == (good[-1][0] if good else 0)
    assert same(journal.live, good[-1][1] if good else None)
    commit(journal, 5)
    journal.close()
    again = journal_in(folder, versions=2)
    assert again.notes == []
    again.close()


@settings(max_examples=40, deadline=None)
@given(
    state=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    ),
    key=st.sampled_from(["versions", "switches", "live", "next", "mean", "sequence", "wanted", "format_version"]),
)
def test_journals_that_make_no_sense_are_damaged(
    tmp_path_factory: pytest.TempPathFactory, whole: Path, state: object, key: str
) -> None:
    """Even with a checksum that matches."""
    folder = tmp_path_factory.mktemp("odd") / "s"
    shutil.copytree(whole, folder)
    body = json.loads((folder / "journal.json").read_bytes())["state"]
    body[key] = state
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, RecursionError):
        return
    for name in ("journal.json", "journal.bak"):
        (folder / name).write_text(json.dumps({"crc32": zlib.crc32(text), "state": body}))
    try:
        journal = journal_in(folder)
    except FileError:
        assert key in ("format_version", "mean")
        return
    journal.close()


def test_a_later_format_is_left_alone(tmp_path: Path) -> None:
    prepared(tmp_path)
    body = json.loads((tmp_path / "journal.json").read_bytes())["state"]
    body["format_version"] = 2
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    for name in ("journal.json", "journal.bak"):
        (tmp_path / name).write_text(json.dumps({"crc32": zlib.crc32(text), "state": body}))
    before = (tmp_path / "journal.json").read_bytes()
    with pytest.raises(FileError, match=r"version 1, but .* has 2"):
        journal_in(tmp_path)
    assert (tmp_path / "journal.json").read_bytes() == before


def test_requests_are_for_whoever_holds_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="readable journal"):
        ask(tmp_path, {"command": "adapt"})
    journal = journal_in(tmp_path)
    assert journal.request() is None
    name = ask(tmp_path, {"command": "rollback", "to": 0})
    assert journal.request() == {"command": "rollback", "to": 0, "request": name}
    journal.answered({"request": name, "done": True})
    assert json.loads((tmp_path / "answer.json").read_bytes()) == {"request": name, "done": True}
    assert journal.request() is None
    (tmp_path / "request.json").write_bytes(b"\xff[")
    assert journal.request() is None
    assert not (tmp_path / "request.json").exists()
    ask(tmp_path, {"command": "rollback", "to": 0})
    journal.close()
    journal = journal_in(tmp_path)
    assert journal.request() is None  # it was for the watcher that is gone
    journal.close()
    assert not ask(tmp_path, {"command": "adapt"})


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="state folder must be writable"):
        journal_in(tmp_path / "file")
    prepared(tmp_path / "s")

    def refused(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as m:
        m.setattr(os, "open", refused)
        with pytest.raises(FileError, match=r"writable, but .*: Permission denied"):
            journal_in(tmp_path / "s")
    journal_in(tmp_path / "s").close()
    assert files.read_small(tmp_path / "s" / "journal.json", "")


def test_a_folder_from_before_there_were_waiting_samples(tmp_path: Path) -> None:
    journal_in(tmp_path).close()
    (tmp_path / "waiting.bin").unlink()
    journal = Journal(tmp_path, None, pending=None)
    assert journal.waiting.capacity == 1
    journal.close()
    journal = journal_in(tmp_path, pending=30)
    assert journal.waiting.capacity == 30
    assert journal.notes == []
    journal.close()
    with pytest.raises(UsageError, match="pending 1, versions 2, bytes 1, not 600, 0"):
        journal_in(tmp_path, pending=0)

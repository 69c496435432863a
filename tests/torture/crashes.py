"""kill -9, power cuts and disks that refuse, while caches are filled, adapters trained, saved and switched."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from instantft import files
from instantft.adapters import Adapter
from instantft.cache.store import DiskStore
from instantft.errors import FileError, InstantFTError
from instantft.tuner import FineTuner
from instantft.watch.journal import Journal, Version, read_state
from instantft.watch.loop import Command, Label

from ..samples import adapter
from ..test_watching import command, environment, lines
from ..watched import at_once, journal_in, loop_on, named, run, samples, trained, world
from .work import Seen, scratch, trials, unexpected

__all__ = ["kills", "power_cuts", "refusals", "small_disks"]

Tell = Callable[[str], None]

KEEP, VERSIONS = 200, 3
MADE = Version(0, 0, 5.0, 100, 0.5, 0.8, 0.2, 0.4, 90, 0.01, None, 0)


def fingerprint(of: Adapter | None) -> str:
    """Stands for the adapter's tensors; "frozen" without one."""
    if of is None:
        return "frozen"
    return hashlib.sha256(b"".join(of.tensors[name].tobytes() for name in sorted(of.tensors))).hexdigest()[:16]


def teller(fd: int, write: Callable[[int, bytes], int] = os.write) -> Tell:
    """Tells into a pipe."""

    def tell(line: str) -> None:
        write(fd, line.encode() + b"\n")

    return tell


@functools.cache
def few() -> tuple[Any, Any]:
    return world(1, 120, seed=3)


def tuned(cache_file: Path | None = None, **more: Any) -> FineTuner:
    """An adapter by SGD, whose records come from a cache; the same whatever that held before."""
    tuner = FineTuner(trained(), method="skip2-lora", epochs=3, cache="fp32", cache_file=cache_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuner.fit_prepared(*few(), **more)


@functools.cache
def reference() -> str:
    return fingerprint(tuned().adapter)


# -- what is going on when the end comes ----------------------------------------------------------------------------


def open_told(folder: Path, tell: Tell) -> Journal:
    """A journal that tells of every switch, before and after."""
    journal = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
    commit, back, add, sync = journal.commit, journal.roll_back, journal.replay.add, journal.replay.sync

    def commits(made: Adapter, version: Version, why: str) -> None:
        tell(f"? {fingerprint(made)}")
        commit(made, version, why)
        tell(f"= {fingerprint(made)}")

    def goes_back(at: float, why: str, to: int | None = None, since: int | None = None) -> None:
        target = journal.state.behind if to is None else to
        tell(f"? {fingerprint(journal.adapter(target))}")
        back(at, why, to, since)
        tell(f"= {fingerprint(journal.live)}")

    def adds(*values: Any, **named: Any) -> None:
        tell("sample")
        add(*values, **named)

    def syncs() -> None:
        sync()
        tell(f"kept {len(journal.replay)}")

    for part, name, call in (
        (journal, "commit", commits), (journal, "roll_back", goes_back),
        (journal.replay, "add", adds), (journal.replay, "sync", syncs),
    ):  # fmt: skip
        setattr(part, name, call)
    tell(f"= {fingerprint(journal.live)}")
    return journal


def looping(folder: Path, seed: int, tell: Tell) -> None:
    """The watcher's loop with an adaptation in the background."""
    journal = open_told(folder, tell)
    with ThreadPoolExecutor(1) as pool:
        loop = loop_on(journal, work=pool.submit, labels=30, clock=time.time)
        for k in range(1000):
            tell("phase loop")
            kind = int(np.random.default_rng([seed, k]).integers(3))
            waiting = [
                replace(s, name=f"{seed}-{k}-{i}", label=None) for i, s in enumerate(samples(kind, 20, seed + k))
            ]
            loop.feed([*samples(kind, 60, seed + k), *waiting])
            loop.keep()
            tell("waits " + " ".join(str(s.name) for s in waiting))
            for s in waiting[:10]:
                tell(f"labels {s.name}")
                loop.feed([Label(str(s.name), 0)])
            loop.feed([Command("adapt", {})])
            tell("phase adaptation")
            while loop.busy:
                loop.poll()
            journal.replay.sync()


def switching(folder: Path, seed: int, tell: Tell) -> None:
    """One switch after the other."""
    journal = open_told(folder, tell)
    rng, number = np.random.default_rng(seed), int(journal.replay.number.max())
    for k in range(1000):
        tell("phase samples")
        for x, y in zip(*world(k % 3, 12, seed), strict=True):
            number += 1
            journal.replay.add(number, 1.0, x, int(y), name=str(number))
        journal.replay.sync()
        tell("phase switch")
        journal.commit(adapter(trained(), seed=int(rng.integers(1 << 30))), MADE, "better")
        if rng.random() < 0.4:
            journal.roll_back(1.0, "worse")
        journal.note(number, bool(k % 2))


def training(folder: Path, seed: int, tell: Tell) -> None:
    """A cache file is filled, an adapter trained, and saved where one stands."""
    place = folder / "adapter"
    for k in range(1000):
        tell("phase fill")
        if (seed + k) % 3 == 0:
            (folder / "cache").unlink(missing_ok=True)
        found = tuned(folder / "cache", filling=lambda *_: None, progress=lambda *_: tell("phase train"))
        tell("phase save")
        made = Adapter(
            "skip2-lora", found.adapter.rank, trained().spec, trained().hash, found.adapter.tensors, {"k": k}
        )
        made.save(place)
        tell("saved")


JOBS = (looping, switching, training)


# -- what must be true afterwards -------------------------------------------------------------------------------------


def judged(folder: Path, told: list[str], torn: bool) -> str:
    """See that nothing is lost and that it goes on; returns what it was doing.

    Args:
        torn: whether the power was cut, so that samples that were not synchronised may be lost.
    """
    phase = next((line[6:] for line in reversed(told) if line.startswith("phase")), "start")
    if (folder / "state").exists():
        journal = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
        switches = [line for line in told if line[0] in "?="]
        committed = [i for i, line in enumerate(switches) if line[0] == "="]
        if committed:
            allowed = {line[2:] for line in switches[committed[-1] :]}
            assert fingerprint(journal.live) in allowed, f"lost: {fingerprint(journal.live)} of {allowed}"
        lost = [n for n in journal.notes if "cannot be read" in n or "copies" in n or "damaged:" in n]
        assert not lost, f"not readable: {lost}"
        for number in journal.state.versions:
            journal.adapter(number)
        synced = [i for i, line in enumerate(told) if line.startswith("kept")]
        if synced:
            since = told[synced[-1] :].count("sample")
            least = int(told[synced[-1]][5:]) - (since if torn else 1)
            assert len(journal.replay) >= least, f"samples lost: {len(journal.replay)} of {least}"
        assert not [p for p in (folder / "state").iterdir() if p.name.endswith(".tmp")], "half-written files stay"
        loop = loop_on(journal, work=at_once, labels=30)
        waits = next((line.split()[1:] for line in reversed(told) if line.startswith("waits")), [])
        wanted = [Label(name, 0) for name in waits if f"labels {name}" not in told]
        loop.feed(wanted)
        assert loop.counts["labels"] == len(wanted), f"waiting samples lost: {loop.counts['labels']} of {len(wanted)}"
        asked = [Command("adapt", {})] if len(told) % 4 == 0 else []  # takes longer than all the rest
        events = loop.feed([*samples(0, 8, 1), *asked]) + loop.poll()
        assert len(named(events, "prediction")) == 8, "it does not go on"
        assert not named(events, "error"), str(named(events, "error"))
        journal.close()
    if (folder / "adapter").exists():
        assert fingerprint(Adapter.load(folder / "adapter", trained())) == reference(), "another adapter"
    elif "saved" in told:
        raise AssertionError("the saved adapter is gone")
    if (folder / "cache").exists():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tuner = FineTuner(trained(), method="skip2-lora", epochs=3, cache="fp32", cache_file=folder / "cache")
            assert fingerprint(tuner.fit_prepared(*few()).adapter) == reference(), "the cache holds wrong records"
        if any("were damaged" in str(w.message) for w in caught):
            return f"{phase} with damaged records"
    return phase


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def kill(i: int, folder: Path) -> str:
    """Kill a process at a random moment; the next trial of this worker goes on in the same folder."""
    rng = np.random.default_rng([i, 1])
    if i % 10 == 9:
        return kill_program(rng, folder)
    job = JOBS[i % len(JOBS)]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        status = 3
        try:
            job(folder, i, teller(write))
        except BaseException as e:
            os.write(write, f"broken {type(e).__name__} {e}\n".encode())
        finally:
            os._exit(status)
    os.close(write)
    told, end = b"", time.monotonic() + 30
    while b"\n" not in told and time.monotonic() < end:
        told += os.read(read, 1 << 12)
    time.sleep(rng.exponential(0.02) if rng.random() < 0.5 else rng.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    while chunk := os.read(read, 1 << 16):
        told += chunk
    os.close(read)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = [line for line in told.decode().split("\n")[:-1] if line]
    assert code == -signal.SIGKILL, f"the job ended by itself: {said[-1:]}"
    return judged(folder, said, torn=False)


@functools.cache
def base_file() -> Path:
    path = scratch() / "base.safetensors"
    trained().save(path)
    return path


def kill_program(rng: np.random.Generator, folder: Path) -> str:
    """The same to the program itself, as a user starts it."""
    state = folder / "program"
    before = read_state(state) if state.exists() else None
    watcher = subprocess.Popen(
        command("watch", base_file(), "--state", state, "--labels", 60, "--keep", 300),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    watcher.stdin.write(lines(1 + int(rng.integers(2)), 150, seed=int(rng.integers(99))) + b'{"command": "adapt"}\n')
    watcher.stdin.flush()
    first = watcher.stdout.readline()
    assert b"prediction" in first or b"recovered" in first, first
    select.select([], [], [], rng.uniform(0, 0.3))
    watcher.kill()
    rest, err = watcher.communicate()
    assert not unexpected(err), err[-200:]
    journal = journal_in(state, keep=300)
    notes, after = journal.notes, journal.state
    journal.close()
    assert not notes, notes
    if before is not None and after.live != before.live:
        assert after.switches[: len(before.switches)] == before.switches, "another history"
        assert len(after.switches) > len(before.switches), "lost"
    for line in rest.splitlines():
        event = json.loads(line) if line.startswith(b'{"event": "adapted"') and line.endswith(b"}") else {}
        assert event.get("version", 0) < after.next, "a version that was told of is lost"
    return "the program"


def kills(count: int) -> Seen:
    reference()
    base_file()
    return trials(kill, count)


# -- power cuts -------------------------------------------------------------------------------------------------------

SECTOR = 512


@dataclass
class Disk:
    """Knows what a disk would still have when the power goes: what was synchronised, and any part of the rest.

    It cuts the power before the n-th call that has to do with the disk: of every file, each sector written since the
    last fsync is new, old, or half of each; the file is as long as it was, is, or something between; of the
    names changed since the last fsync of their folder, the last ones are undone.
    """

    root: Path
    n: int
    rng: np.random.Generator
    count: int = 0
    synced: dict[int, bytes] = field(default_factory=dict)
    renamed: list[tuple[Path, Path, bytes | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path in self.files():
            self.synced[path.stat().st_ino] = path.read_bytes()

    def files(self) -> list[Path]:
        return [p for p in sorted(self.root.rglob("*")) if p.is_file() and not p.is_symlink()]

    def step(self) -> None:
        self.count += 1
        if self.count == self.n:
            self.cut()
            os._exit(9)

    def fsync(self, real: Callable[..., Any], fd: int) -> None:
        real(fd)
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path.is_dir():
            self.renamed = [r for r in self.renamed if r[1].parent != path]
        else:
            self.keep(path)

    def keep(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.synced[path.stat().st_ino] = path.read_bytes()

    def rename(self, real: Callable[..., Any], old: Any, new: Any) -> None:
        old, new = Path(old), Path(new)
        held = new.read_bytes() if new.is_file() else None
        if held is not None:
            self.synced.pop(new.stat().st_ino, None)
        real(old, new)
        self.renamed.append((old, new, held))

    def unlink(self, real: Callable[..., Any], path: Any, **more: Any) -> None:
        with contextlib.suppress(OSError):
            self.synced.pop(os.stat(path, **more).st_ino, None)
        real(path, **more)

    def cut(self) -> None:
        kept = int(self.rng.integers(len(self.renamed) + 1))
        for old, new, held in reversed(self.renamed[kept:]):
            if new.exists():
                shutil.rmtree(old, ignore_errors=True)
                REAL["rename"](new, old)
                if held is not None:
                    new.write_bytes(held)
                    self.synced[new.stat().st_ino] = held
        for path in self.files():
            written, safe = path.read_bytes(), self.synced.get(path.stat().st_ino, b"")
            if written != safe:
                path.write_bytes(self.torn(safe, written))

    def torn(self, old: bytes, new: bytes) -> bytes:
        between = int(self.rng.integers(min(len(old), len(new)), max(len(old), len(new)) + 1))
        lengths = (len(old), len(new), between)
        n = lengths[int(self.rng.integers(3))]
        out = bytearray(n)
        for at in range(0, n, SECTOR):
            choice = self.rng.random()
            share = SECTOR if choice < 0.45 else 0 if choice < 0.9 else int(self.rng.integers(SECTOR))
            part = old[at : at + SECTOR]
            out[at : at + len(part)] = part
            part = new[at : at + share]
            out[at : at + len(part)] = part
        return bytes(out[:n])


REAL: dict[str, Callable[..., Any]] = {
    name: getattr(os, name)
    for name in ("fsync", "replace", "rename", "unlink", "pwrite", "mkdir", "open", "rmdir", "ftruncate")
}


@contextlib.contextmanager
def on(disk: Disk) -> Iterator[None]:
    """`os` as it is on this disk."""
    special: dict[str, Callable[..., None]] = {
        "fsync": disk.fsync,
        "replace": disk.rename,
        "rename": disk.rename,
        "unlink": disk.unlink,
    }

    def call(name: str) -> Callable[..., Any]:
        def made(*args: Any, **more: Any) -> Any:
            disk.step()
            if name in special and not ("dir_fd" in more and name != "unlink"):
                return special[name](REAL[name], *args, **more)
            return REAL[name](*args, **more)

        return made

    exchange, flush = files._exchange, DiskStore.flush

    def exchanged(fresh: Path, target: Path) -> None:
        disk.step()
        exchange(fresh, target)  # one step on the disk, too
        disk.renamed = [r for r in disk.renamed if r[1].parent != target.parent]

    def flushed(store: DiskStore) -> None:
        disk.step()
        flush(store)
        for path in disk.files():
            if path.name == "cache":
                disk.keep(path)
        disk.step()

    with contextlib.ExitStack() as stack:
        for name in REAL:
            stack.enter_context(mock.patch.object(os, name, call(name)))
        stack.enter_context(mock.patch.object(files, "_exchange", exchanged))
        stack.enter_context(mock.patch.object(DiskStore, "flush", flushed))
        yield


def power_cut(i: int, folder: Path) -> str:
    """Cut the power at a random moment, or tear the ends of files that were good; then see what is left."""
    if i % 2:
        return torn_ends(i, folder)
    rng = np.random.default_rng([i, 2])
    job = JOBS[(i // 2) % len(JOBS)]
    shutil.rmtree(folder / "cut", ignore_errors=True)
    (folder / "cut").mkdir()
    read, write = os.pipe()
    told: list[str] = []
    for cuts in range(2):  # once more in what the first left over
        child = os.fork()
        if child == 0:
            status = 3
            try:
                REAL_WRITE(write, b"phase start\n")
                with on(Disk((folder / "cut").resolve(), int(rng.integers(1, 160)) + cuts, rng)):
                    job(folder / "cut", i, teller(write))
            except BaseException as e:
                REAL_WRITE(write, f"broken {type(e).__name__} {e}\n".encode())
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told = os.read(read, 1 << 20).decode().split("\n")[:-1]
        assert code == 9, f"the job ended by itself: {told[-1:]}"
        phase = judged(folder / "cut", told, torn=True)
    os.close(read)
    os.close(write)
    return phase


REAL_WRITE = os.write


@functools.cache
def whole() -> Path:
    """A state folder with three versions, and a cache file."""
    folder = scratch()
    journal = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
    for seed in (1, 2, 3):
        journal.commit(adapter(trained(), seed=seed), MADE, "better")
    for k, (x, y) in enumerate(zip(*world(0, 60), strict=True)):
        journal.replay.add(k + 1, 1.0, x, int(y), name=str(k))
    journal.close()
    tuned(folder / "cache")
    return folder


def torn_ends(i: int, folder: Path) -> str:
    """Some files, which were whole, lose their last blocks or have garbage there; the others must serve."""
    rng, place = np.random.default_rng([i, 3]), folder / "torn"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole(), place)
    every = sorted(p for p in place.rglob("*") if p.is_file())
    hit = rng.choice(len(every), rng.integers(1, len(every) + 1), replace=False)
    for k in hit:
        raw = every[k].read_bytes()
        at = max(0, len(raw) - int(rng.integers(1, 8)) * SECTOR - int(rng.integers(SECTOR)))
        end = rng.bytes(len(raw) - at) if rng.random() < 0.5 else b"\0" * int(rng.integers(len(raw) - at + 1))
        every[k].write_bytes(raw[:at] + end[: 0 if rng.random() < 0.3 else None])
    readable = [0]
    for number in (1, 2, 3):
        with contextlib.suppress(FileError):
            Adapter.load(place / "state" / "adapters" / f"{number:06d}", trained())
            readable.append(number)
    journal = journal_in(place / "state", keep=KEEP, versions=VERSIONS)
    assert journal.state.live == readable[-1], f"version {journal.state.live} instead of {readable[-1]}"
    journal.commit(adapter(trained(), seed=9), MADE, "better")
    journal.close()
    again = journal_in(place / "state", keep=KEEP, versions=VERSIONS)
    assert not again.notes, again.notes
    again.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuner = FineTuner(trained(), method="skip2-lora", epochs=3, cache="fp32", cache_file=place / "cache")
        assert fingerprint(tuner.fit_prepared(*few()).adapter) == reference(), "the cache holds wrong records"
    damaged = any("were damaged" in str(w.message) for w in caught)
    return "torn ends, records recomputed" if damaged else "torn ends"


def power_cuts(count: int) -> Seen:
    reference()
    whole()
    return trials(power_cut, count)


# -- disks that refuse ------------------------------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES)


class Refusing:
    """Calls that write; from the n-th on they fail, once or for good."""

    def __init__(self, n: int, code: int, lasting: bool) -> None:
        self.n, self.code, self.lasting, self.count = n, code, lasting, 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.n or (self.lasting and self.count > self.n):
            raise OSError(self.code, os.strerror(self.code))

    def wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.step()
            return real(*args, **more)

        return call

    def made(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, flags: int, *args: Any, **more: Any) -> Any:
            if flags & os.O_CREAT:
                self.step()
            return real(path, flags, *args, **more)

        return call

    def opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(path, mode, *args, **more)
            self.step()
            return _File(real(path, mode, *args, **more), self)

        return call


class _File:
    """An open file whose writes may fail."""

    def __init__(self, real: Any, refusing: Refusing) -> None:
        self._real, self._refusing = real, refusing

    def write(self, data: Any) -> Any:
        self._refusing.step()
        return self._real.write(data)

    def flush(self) -> None:
        self._refusing.step()
        self._real.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._real.close()


WRITES = ("fsync", "replace", "rename", "pwrite", "mkdir", "ftruncate", "posix_fallocate", "write")


def _commit(folder: Path) -> None:
    journal = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
    try:
        journal.commit(adapter(trained(), seed=7), MADE, "better")
    finally:
        journal.close()


def _back(folder: Path) -> None:
    journal = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
    try:
        journal.roll_back(1.0, "worse")
    finally:
        journal.close()


def _wipe(folder: Path) -> None:
    journal = journal_in(folder / "state", keep=KEEP + 10, versions=VERSIONS)  # written anew, larger
    try:
        journal.note(5, True)
        journal.replay.forget(journal.replay.find(name="3"))
    finally:
        journal.close()


def _save(folder: Path) -> None:
    adapter(trained(), seed=7).save(folder / "state" / "adapters" / "000003")


def _base(folder: Path) -> None:
    trained().save(folder / "base.safetensors")


def _cache(folder: Path) -> None:
    (folder / "cache").unlink()
    tuned(folder / "cache")


def _loop(folder: Path) -> None:
    """Once it runs, nothing but messages comes of a disk that refuses."""
    refusing = ACTIVE[0]
    n, refusing.n = refusing.n, 1 << 60  # not yet
    journal = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
    loop = loop_on(journal, labels=30)
    refusing.n, refusing.count = n, 0
    before = fingerprint(journal.live)
    events = run(loop, [*samples(1, 60, 3), Command("adapt", {}), *samples(1, 10, 4)])
    switched = named(events, "adapted") + named(events, "rolled back")
    assert fingerprint(journal.live) == before or switched, "another adapter, and no word of it"
    assert len(named(loop.feed(samples(1, 5, 5)), "prediction")) == 5, "no more predictions"
    journal.close()
    if refusing.count >= refusing.n and not named(events, "error") + named(events, "recovered"):
        refusing.n, refusing.lasting = 1 << 60, False
        again = journal_in(folder / "state", keep=KEEP, versions=VERSIONS)
        assert again.state == journal.state, "no word of an error, and the disk has something else"
        assert not again.notes, again.notes
        again.close()


ACTIVE: list[Refusing] = []
TASKS: tuple[Callable[[Path], None], ...] = (_commit, _back, _wipe, _save, _base, _cache, _loop)


def refusal(i: int, folder: Path) -> str:
    """One task on a disk that refuses the n-th write, for every n until the task gets through."""
    task = TASKS[i % len(TASKS)]
    code, lasting = ERRORS[(i // len(TASKS)) % len(ERRORS)], bool(i // len(TASKS) // len(ERRORS))
    place, refused = folder / "s", 0
    for n in range(1, 400):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(whole(), place)
        before = read_live(place)
        refusing = Refusing(n, code, lasting)
        ACTIVE[:] = [refusing]
        with contextlib.ExitStack() as stack:
            for name in WRITES:
                stack.enter_context(mock.patch.object(os, name, refusing.wrapped(getattr(os, name))))
            stack.enter_context(mock.patch.object(os, "open", refusing.made(os.open)))
            stack.enter_context(mock.patch.object(io, "open", refusing.opened(io.open)))
            try:
                task(place)
                done = True
                said = os.strerror(code)
            except InstantFTError as e:
                done, said = False, str(e)
                refused += 1
        assert os.strerror(code) in said, f"no reason: {said}"
        assert "\n" not in said, said
        after = read_live(place)
        if task in (_commit, _back) and not done:
            assert after == before, f"write {n} of {task.__name__} failed, but another adapter is live"
        if task in (_wipe, _base, _cache):
            assert after == before, f"{task.__name__} changed the live adapter"
        if task is _save:
            assert done or after == before, "half saved"
        if refusing.count < n:
            return f"writes refused in {task.__name__[1:]}: {n - 1}, {refused} told as errors"
    raise AssertionError("the task never got to its end")


def read_live(place: Path) -> str:
    """The live adapter's fingerprint; opening it again must work."""
    journal = journal_in(place / "state", keep=KEEP, versions=VERSIONS)
    try:
        return fingerprint(journal.live)
    finally:
        journal.close()


def refusals(count: int) -> Seen:
    """All writes of all tasks; count: in how many of 6 ways, three errors, once or for good."""
    reference()
    whole()
    return trials(refusal, len(TASKS) * max(1, min(count, 2 * len(ERRORS))), limit=300)


# -- real disks -------------------------------------------------------------------------------------------------------


def small_disk(i: int, folder: Path) -> str:
    """A watcher on a tmpfs that is too small, is read-only, or becomes somebody else's."""
    place = folder / "mounted"
    place.mkdir(exist_ok=True)
    kind = i % 3
    mount("size=4m" if kind else f"size={4096 * (4 + i // 3 % 16)}", place)
    try:
        try:
            journal = journal_in(place / "state", keep=KEEP, versions=VERSIONS)
        except FileError as e:
            if "No space left" in str(e):
                return "a full disk told at the start"
            raise
        loop = loop_on(journal, labels=30)
        run(loop, samples(0, 40))
        before = fingerprint(journal.live)
        if kind == 1:
            journal.close()
            mount("remount,ro", place)
            with pytest.raises(FileError, match="Read-only"):
                journal_in(place / "state", keep=KEEP, versions=VERSIONS)
            mount("remount,rw", place)
            assert read_live(place) == before, "another adapter"
            return "a read-only disk told at the start"
        if kind == 2:
            os.seteuid(65534)
        events = run(loop, [*samples(1, 60, 3), Command("adapt", {}), *samples(1, 10, 4)])
        errors, switched = named(events, "error"), named(events, "adapted")
        assert len(named(loop.feed(samples(1, 5, 5)), "prediction")) == 5, "no more predictions"
        assert switched or fingerprint(journal.live) == before, "another adapter"
        if kind == 2:
            assert errors, "no word of it"
            assert not switched, "a version on a disk that cannot be written"
        wanted = "Permission denied" if kind else "No space left"
        assert all(wanted in e["why"] for e in errors), errors
        os.seteuid(0)
        live = fingerprint(journal.live)
        journal.close()
        assert read_live(place) == live, "another adapter after a restart"
        return f"a running watcher told: {wanted}" if errors else "it fitted"
    finally:
        os.seteuid(0)
        subprocess.run(["umount", "-l", place], check=True, timeout=30)


def mount(options: str, place: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True, capture_output=True, timeout=30)


def small_disks(count: int) -> Seen:
    with tempfile.TemporaryDirectory() as probe:
        try:
            mount("size=64k", Path(probe))
            subprocess.run(["umount", probe], check=True, timeout=30)
        except (OSError, subprocess.SubprocessError):
            return Seen(0, skipped="mounting a tmpfs is not allowed here")
    with tempfile.TemporaryDirectory() as warm:  # whoever has no rights cannot import what comes late
        journal = journal_in(Path(warm), keep=KEEP)
        run(loop_on(journal, labels=30), [*samples(1, 60, 3), Command("adapt", {})])
        journal.close()
    return trials(small_disk, count)

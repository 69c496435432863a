"""The state folder of a watcher: which adapters there are, which is live, and how that came about (docs/formats.md).

    journal.json, journal.bak    what is committed, twice
    adapters/000003/             an adapter; never changed once it is there
    samples.bin                  labelled samples (`replay`)
    waiting.bin                  samples that wait for their label, in the same form
    lock                         held by whoever works in the folder
    request.json                 what a command asks of the watcher that holds the lock
    token                        of the page, for its owner's eyes

A switch is: the adapter's folder, written beside, synchronised and renamed; then the journal, in the same way, which
commits it; then the journal's second copy; then whatever is too much goes. A crash before the commit leaves a folder
that nobody mentions, which the next start removes; a crash after it leaves nothing to do but the rest. A journal counts
if its checksum matches, and of two the one with the higher sequence. If the live adapter cannot be read, its parent is
taken, and so on down to version 0, the frozen network, which needs no file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import files
from ..adapters import Adapter
from ..backbones.builtin import Network
from ..errors import FileError, InstantFTError, MismatchError, UsageError
from .replay import Replay

__all__ = ["FROZEN", "Journal", "State", "Switch", "Version", "ask", "held", "read_state"]

FORMAT = "instantft-watch"
VERSION = 1

FROZEN = 0
"""The version that is the network itself, without an adapter."""

JOURNALS = ("journal.json", "journal.bak")
ADAPTERS, SAMPLES, WAITING, LOCK = "adapters", "samples.bin", "waiting.bin", "lock"
REQUEST, ANSWER, TOKEN = "request.json", "answer.json", "token"

PENDING = 4096
"""Samples that wait for their label at most."""

PENDING_BYTES = 64 << 20
"""Most room for them, in memory and on the disk."""

BRIEFLY = 0.5
"""Seconds that a folder may be locked by somebody who only looks whether it is."""

SWITCHES = 500
"""How many switches are remembered: the newest."""

LONGEST = 300
"""Characters of a reason."""


@dataclass(frozen=True)
class Version:
    """An adapter that the gate has let through.

    Attributes:
        number: from 1.
        parent: the version it replaced.
        made: when, in seconds since 1970.
        samples: how many it was fitted to.
        before, after: accuracies on samples left out, of what it replaced and of its own.
        low, high: 95 % interval of the difference.
        judged: how many samples were left out.
        seconds: that fitting and judging took.
        joules: that the machine used meanwhile; None where it has no sensor of power.
        size: bytes on disk.
    """

    number: int
    parent: int
    made: float
    samples: int
    before: float
    after: float
    low: float
    high: float
    judged: int
    seconds: float
    joules: float | None
    size: int


@dataclass(frozen=True)
class Switch:
    """A change of the live version: when (seconds since 1970), from which to which, and why."""

    time: float
    old: int
    new: int
    why: str


@dataclass(frozen=True)
class State:
    """What the journal holds.

    Attributes:
        sequence: one more with each commit.
        base_hash, values, classes, mean, std: the network that all of it belongs to, values a sample, its classes,
            and the preprocessing.
        live: the version in use.
        next: the number of the next version.
        versions: those that are kept, by number.
        switches: the newest, oldest first.
        since: number of the first sample of the world as it is now.
        wanted: whether there is something to adapt to.
        needed: labelled samples of that world which the next adaptation waits for; 0: as many as the first.
    """

    sequence: int
    base_hash: str
    values: int
    classes: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    live: int = FROZEN
    next: int = 1
    versions: Mapping[int, Version] = field(default_factory=dict)
    switches: tuple[Switch, ...] = ()
    since: int = 0
    wanted: bool = False
    needed: int = 0

    @property
    def behind(self) -> int:
        """The version to go back to from the live one: the nearest before it that is kept; 0 in the end."""
        parent = self.versions[self.live].parent if self.live in self.versions else FROZEN
        return parent if parent in self.versions else max((v for v in self.versions if v < parent), default=FROZEN)


class Journal:
    """A state folder, locked.

    Args:
        folder: made if it is not there.
        base: the network; None: whichever the folder belongs to, which must be there then.
        mean, std: what samples are centred on and divided by, where there is a base.
        keep: labelled samples that are kept; None: as many as before.
        pending: samples that wait for their label at most, if they fit in PENDING_BYTES; None: as many as before.
        versions: adapters that are kept at most, at least 2.
        max_bytes: of all adapters together.

    Attributes:
        state: what is committed.
        replay: the labelled samples.
        waiting: those that wait for their label. What stands for it is the prediction, and the version that made it.
        live: the adapter in use; None: the frozen network.
        notes: what had to be put right, in words; whoever reads it may empty it.

    Raises:
        FileError: the folder cannot be written, or somebody else works in it.
        MismatchError: it belongs to another network or preprocessing.
    """

    def __init__(
        self,
        folder: Path,
        base: Network | None,
        mean: tuple[float, ...] = (),
        std: tuple[float, ...] = (),
        *,
        keep: int | None = None,
        pending: int | None = PENDING,
        versions: int = 8,
        max_bytes: int = 64 << 20,
    ) -> None:
        if (keep is not None and keep < 1) or (pending is not None and pending < 1) or versions < 2 or max_bytes < 1:
            given = f"{keep}, {pending}, {versions}, {max_bytes}"
            raise UsageError(f"keep must be at least 1, pending 1, versions 2, bytes 1, not {given}")
        self.folder, self._most, self._max_bytes = folder, versions, max_bytes
        self.notes: list[str] = []
        fresh = (
            read_state(folder) if base is None else State(1, base.hash, base.spec.geometry[0].N, base.spec.C, mean, std)
        )
        self._lock = _lock(folder, BRIEFLY)
        try:
            self.state = self._recovered(fresh)
            with contextlib.suppress(OSError):
                (folder / REQUEST).unlink(missing_ok=True)  # whoever still waits asks again
            self._clean()
            self.live = self._usable()
            if pending is not None:
                pending = max(1, min(pending, PENDING_BYTES // (4 * fresh.values)))
            elif not (folder / WAITING).exists():
                pending = 1  # of a folder that an earlier version of this program made
            self.replay = Replay(folder / SAMPLES, fresh.values, fresh.classes, keep)
            try:
                self.waiting = Replay(folder / WAITING, fresh.values, fresh.classes, pending)
            except BaseException:
                self.replay.close()
                raise
            damaged = self.replay.damaged + self.waiting.damaged
            if damaged:
                self.notes.append(f"{damaged} samples were damaged or unfinished: they are dropped")
        except BaseException:
            os.close(self._lock)
            raise

    def close(self) -> None:
        """Write what is still to be written, and let others work here."""
        for store in (self.replay, self.waiting):
            with contextlib.suppress(FileError):
                store.sync()
            store.close()
        os.close(self._lock)

    def commit(self, adapter: Adapter, version: Version, why: str) -> None:
        """Make a new adapter the live one.

        Args:
            version: what is known of it; number, parent and size are filled in here.

        Raises:
            FileError: it cannot be written; then the old one stays live, here and on the disk.
        """
        old = self.state
        number, place = old.next, self._place(old.next)
        try:
            adapter.save(place)
            size = sum(p.stat().st_size for p in place.iterdir())
            live = old.versions[old.live].size if old.live in old.versions else 0
            if size + live > self._max_bytes:
                raise FileError(
                    f"adapters must fit in {self._max_bytes} bytes, but the new one has {size}, beside {live} of the "
                    "one in use: raise the bound"
                )
            made = replace(version, number=number, parent=old.live, size=size)
            new = replace(old, live=number, next=number + 1, versions={**old.versions, number: made})
            self._switched(_bounded(new, self._most, self._max_bytes), made.made, why)
        except OSError as e:
            if self.state is old:
                shutil.rmtree(place, ignore_errors=True)
            raise e if isinstance(e, FileError) else FileError(f"{place} must be writable: {files.reason(e)}") from None
        self.live = adapter
        self._clean()

    def roll_back(self, at: float, why: str, to: int | None = None, since: int | None = None) -> None:
        """Go back to the version before the live one, or to `to`, at this time (seconds since 1970). With that nothing
        is wanted any more: else the samples which led to the adapter would lead to it again.

        Args:
            since: number of the next sample; None: the one after all that are kept.

        Raises:
            UsageError: there is no such version, or none to go back to.
            FileError: the adapter cannot be read, or the journal not written; then nothing changes.
        """
        state = self.state
        if to is None:
            to = state.behind
        if to != FROZEN and to not in state.versions:
            known = ", ".join(str(v) for v in (FROZEN, *state.versions))
            raise UsageError(f"a version must be one of {known}, not {to}")
        if to == state.live:
            name = "the frozen network" if to == FROZEN else f"version {to}"
            raise UsageError(f"a version to go back to must not be the one in use, but {name} is in use")
        adapter = self.adapter(to)
        since = self.newest + 1 if since is None else since
        self._switched(replace(state, live=to, since=since, wanted=False, needed=0), at, why)
        self.live = adapter

    def note(self, since: int, wanted: bool, needed: int = 0) -> None:
        """Remember where the world of now began, whether there is something to adapt to, and how many labelled samples
        that needs (0: as many as a first time).

        Raises:
            FileError: it cannot be written; until the next commit it is remembered here only.
        """
        state = replace(self.state, since=since, wanted=wanted, needed=needed)
        if state == self.state:
            return
        try:
            self._write(replace(state, sequence=state.sequence + 1))
        except FileError:
            self.state = state
            raise

    def adapter(self, number: int) -> Adapter | None:
        """The adapter of a version; None for the frozen network.

        Raises:
            FileError: it is gone or damaged.
        """
        return None if number == FROZEN else self._load(number)

    def request(self) -> dict[str, Any] | None:
        """What a command asks for; `answered` says what came of it."""
        path = self.folder / REQUEST
        if not path.exists():
            return None
        try:
            return files.decode_json(files.read_small(path, "a request"), "a request", path)
        except FileError:
            self.answered({})
            return None

    def answered(self, outcome: Mapping[str, Any]) -> None:
        """Tell the command that waits: `done`, or `why` not, and which `request` it was."""
        with contextlib.suppress(OSError, FileError):
            files.write_whole(self.folder / ANSWER, json.dumps(dict(outcome)).encode(), "an answer")
        with contextlib.suppress(OSError):
            (self.folder / REQUEST).unlink(missing_ok=True)

    def forget(self, name: str | None, user: str | None) -> tuple[int, int]:
        """Wipe the samples with this id, or of this user, or all: first those that wait for their label.

        Returns:
            How many were labelled, and how many waited.

        Raises:
            FileError: the disk refuses.
        """
        found = [(store, store.find(name=name, user=user)) for store in (self.waiting, self.replay)]
        for store, slots in found:
            store.forget(slots)
        return len(found[1][1]), len(found[0][1])

    @property
    def newest(self) -> int:
        """Number of the last sample that the folder tells of."""
        stores = self.replay, self.waiting
        return max(self.state.since, *(int(store.number.max(initial=0)) for store in stores))

    @property
    def nbytes(self) -> int:
        """Bytes of adapters and samples."""
        return self.replay.nbytes + self.waiting.nbytes + sum(v.size for v in self.state.versions.values())

    # -- inside -------------------------------------------------------------------------------------------------------

    def _place(self, number: int) -> Path:
        return self.folder / ADAPTERS / f"{number:06d}"

    def _load(self, number: int) -> Adapter:
        found = Adapter.load(self._place(number))
        if found.base_hash != self.state.base_hash:
            raise MismatchError(f"version {number} must be of {self.state.base_hash}, not of {found.base_hash}")
        return found

    def _switched(self, new: State, at: float, why: str) -> None:
        why = why[:LONGEST].encode("utf-8", "replace").decode()  # names of files need not be text
        switch = Switch(at, self.state.live, new.live, why)
        switches = (*new.switches, switch)[-SWITCHES:]
        self._write(replace(new, sequence=self.state.sequence + 1, switches=switches))

    def _write(self, new: State) -> None:
        """Commit. The first copy decides; whether it is there is asked of the disk where writing failed."""
        raw, (first, second) = _encoded(new), (self.folder / name for name in JOURNALS)
        try:
            files.write_whole(first, raw, "the journal")
        except FileError as e:
            if _read(first) != new:
                raise
            self.notes.append(f"the switch is made, but may not outlive a power cut: {e}")
        self.state = new
        try:
            files.write_whole(second, raw, "the journal's copy")
        except FileError as e:
            self.notes.append(f"the journal has no second copy: {e}")

    def _recovered(self, fresh: State) -> State:
        """The committed state; `fresh` in a new folder; what can be told from the adapters where both are damaged."""
        there = [path for name in JOURNALS if (path := self.folder / name).exists()]
        found = [state for path in there if (state := _read(path)) is not None]
        if not found:
            self.state = fresh
            if there:
                fresh = self._rebuilt(fresh)
                self.notes.append("both copies of the journal were damaged: the newest adapter that is whole is taken")
            self._write(fresh)
            return fresh
        state = max(found, key=lambda s: s.sequence)
        for name in ("base_hash", "values", "classes", "mean", "std"):
            wanted, held = getattr(fresh, name), getattr(state, name)
            if wanted != held:
                raise MismatchError(
                    f"the state in {self.folder} must be of the {name} {wanted or 'none'}, but it was made with "
                    f"{held or 'none'}: use another folder"
                )
        if len(found) < len(JOURNALS) or found[0] != found[1]:
            if len(found) < len(there):
                self.notes.append("one copy of the journal was damaged: the other one serves")
            self.state = state
            self._write(state)
        return state

    def _rebuilt(self, state: State) -> State:
        versions: dict[int, Version] = {}
        for place in sorted((self.folder / ADAPTERS).glob("[0-9]" * 6)):
            number = int(place.name)
            with contextlib.suppress(InstantFTError, OSError):
                adapter = self._load(number)
                said = adapter.config.get("estimate")
                after = said.get("accuracy") if isinstance(said, dict) else None
                after = float(after) if isinstance(after, (int, float)) and 0 <= after <= 1 else 0.0
                status = place.stat()
                size = sum(p.stat().st_size for p in place.iterdir())
                parent = max(versions, default=FROZEN)
                versions[number] = Version(
                    number, parent, status.st_mtime, 0, 0.0, after, -1.0, 1.0, 0, 0.0, None, size
                )
        last = max(versions, default=FROZEN)
        return replace(state, live=last, next=last + 1, versions=versions)

    def _usable(self) -> Adapter | None:
        """The live adapter, or the next one behind it that can be read; the journal says so afterwards."""
        state = self.state
        while state.live != FROZEN:
            try:
                adapter = self._load(state.live)
                break
            except InstantFTError as e:
                versions = {n: v for n, v in state.versions.items() if n != state.live}
                self.notes.append(f"version {state.live} cannot be read, version {state.behind} takes its place: {e}")
                state = replace(state, live=state.behind, versions=versions)
        else:
            adapter = None
        if state is not self.state:
            self._switched(state, time.time(), self.notes[-1])
            self._clean()
        return adapter

    def _clean(self) -> None:
        """Remove what nobody mentions: versions that were never committed or are too many, and half-written files."""
        kept = {f"{number:06d}" for number in self.state.versions}
        with contextlib.suppress(OSError):
            for place in (self.folder / ADAPTERS).iterdir():
                ours = re.fullmatch(r"\d{6}|\.\d{6}\.[0-9a-f]{8}\.(new|old)", place.name)
                if ours and place.name not in kept:
                    shutil.rmtree(place, ignore_errors=True)
        names = "|".join(re.escape(name) for name in (*JOURNALS, SAMPLES, WAITING, REQUEST, ANSWER, TOKEN))
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if re.fullmatch(rf"\.({names})\.[0-9a-f]{{8}}\.tmp", path.name):
                    path.unlink(missing_ok=True)


def read_state(folder: Path) -> State:
    """What is committed in a state folder, whoever works in it.

    Raises:
        FileError: there is no readable journal.
    """
    found = [state for name in JOURNALS if (state := _read(folder / name)) is not None]
    if not found:
        raise FileError(f"a state folder must hold a readable journal, but {folder} does not")
    return max(found, key=lambda s: s.sequence)


def ask(folder: Path, request: Mapping[str, Any]) -> str | None:
    """Leave a request for the watcher that holds the folder.

    Returns:
        What its answer names it by; None if nobody works there, so that one may do it oneself.

    Raises:
        FileError: there is no such folder, or it cannot be written.
    """
    read_state(folder)
    if not held(folder):
        return None
    name = secrets.token_hex(8)
    files.write_whole(folder / REQUEST, json.dumps({**request, "request": name}).encode(), "a request")
    return name


def held(folder: Path) -> bool:
    """Whether somebody works in a state folder, or it cannot be written."""
    try:
        os.close(_lock(folder))
    except FileError:
        return True
    return False


def _lock(folder: Path, patience: float = 0.0) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTERS).mkdir(exist_ok=True)
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise FileError(f"a state folder must be writable, but {folder} is not: {files.reason(e)}") from None
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except OSError:
            if time.monotonic() >= until:
                os.close(fd)
                raise FileError(f"a state folder must be free, but somebody else works in {folder}") from None
        time.sleep(0.01)


def _bounded(state: State, most: int, max_bytes: int) -> State:
    """Without the oldest versions that are too many, or too large together; the live one and its parent stay."""
    live = state.versions[state.live]
    kept = {live.number: live}
    newest = sorted(state.versions.values(), key=lambda v: (v.number == live.parent, v.number), reverse=True)
    for version in newest:
        if len(kept) < most and sum(v.size for v in kept.values()) + version.size <= max_bytes:
            kept[version.number] = version
    return replace(state, versions=dict(sorted(kept.items())))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _encoded(state: State) -> bytes:
    body = {
        **asdict(state),
        "format": FORMAT,
        "format_version": VERSION,
        "versions": [asdict(v) for v in state.versions.values()],
    }
    held = {"crc32": zlib.crc32(_canonical(body)), "state": body}
    return json.dumps(held, indent=1, allow_nan=False, ensure_ascii=False).encode("utf-8")  # within files.MAX_SMALL


def _read(path: Path) -> State | None:
    """The state in a journal; None if it is missing, damaged, or makes no sense.

    Raises:
        FileError: a later version of this program wrote it.
    """
    try:
        held = files.decode_json(files.read_small(path, "a journal"), "a journal", path)
        body = held["state"]
        if zlib.crc32(_canonical(body)) != held["crc32"] or body.pop("format") != FORMAT:
            return None
        version = body.pop("format_version")
    except (FileError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return None
    if version != VERSION:
        raise FileError(f"a journal must be of version {VERSION}, but {path} has {str(version)[:40]}")
    try:
        versions = [Version(**v) for v in body.pop("versions")]
        switches = [Switch(**s) for s in body.pop("switches")]
        mean, std = (tuple(float(v) for v in body.pop(key)) for key in ("mean", "std"))
        state = State(**body, mean=mean, std=std, versions={v.number: v for v in versions}, switches=tuple(switches))
    except (TypeError, ValueError, AttributeError):
        return None
    return state if _sensible(state) else None


def _sensible(s: State) -> bool:
    whole = [s.sequence, s.values, s.classes, s.live, s.next, s.since, s.needed]
    numbers: list[float] = []
    for v in s.versions.values():
        whole += [v.number, v.parent, v.samples, v.judged, v.size]
        numbers += [v.made, v.before, v.after, v.low, v.high, v.seconds, v.joules or 0.0]
    for switch in s.switches:
        whole += [switch.old, switch.new]
        numbers.append(switch.time)
    return (
        all(type(n) is int and n >= 0 for n in whole)
        and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        and all(isinstance(switch.why, str) for switch in s.switches)
        and isinstance(s.base_hash, str)
        and type(s.wanted) is bool
        and (s.live == FROZEN or s.live in s.versions)
        and all(0 < n < s.next and v.parent < n for n, v in s.versions.items())
    )

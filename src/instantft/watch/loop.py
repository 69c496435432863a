"""The loop: messages in, events out. It opens no file and waits for nothing; time, disk and threads are given to it.

For every sample the frozen network runs once; its record yields the prediction of the live adapter, that of the one
before while the live one is on probation, and what the detectors look at.

    drift       ADWIN on the live adapter's errors; CUSUM on how unsure it is, and on how far the taps are from those
                of the world before. Each says which samples are of the new world.
    adaptation  when there is a drift, or somebody asks, and enough labelled samples of the new world are there; again
                whenever there are twice as many. Classes that the new world has not shown yet come from the old one.
    gate        `acceptance.decide`, as in `finetune`; without its margin where the new adapter was fitted to what the
                live one was and more of the same world; and no worse than the live one on trusted samples, which
                nothing is ever fitted to. Where the live one is worse than the frozen network, that comes back.
    probation   the first labelled samples under a new adapter are also asked of the one before, and of the last one of
                the world before; if one is better, by the margin of the gate, it comes back.

Samples that cannot be used are counted and skipped. Nothing grows without bound.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..acceptance import continues, decide, frozen_wins, succeeds
from ..adapters import Adapter
from ..backbones.builtin import Network
from ..engine import Engine, Floats
from ..errors import FileError, InstantFTError, UsageError
from ..solvers.calibration import softmax
from ..solvers.gate import INTERVAL, SURE, Decision, gate
from ..tuner import FineTuner
from .detectors import Adwin, Seen, World
from .journal import FROZEN, Journal, Version
from .replay import digest

__all__ = ["Command", "Event", "Label", "Loop", "Message", "Sample", "Skipped", "Work"]

Event = dict[str, Any]
Work = Callable[[Callable[[], Any]], "Future[Any]"]
"""Starts a job in the background."""

Meter = Callable[[], Callable[[], float | None]]
"""Starts to measure energy; what it returns ends that, and says how many joules it was, or None."""

LABELS = 100
"""Labelled samples of the new world that an adaptation needs."""

LOOKS = (32, 64, 128, 256, 512)
"""Labelled samples under a new adapter after which it is compared with the one before; after the last it stays."""

PROMISE = 256
"""Samples that an estimated accuracy counts for at most, before the live adapter's errors are known."""

WRITTEN = 320 << 10
"""Bytes of samples that wait for their label which go to the disk with one SYNC: 64 KiB a second wear out no flash."""

SHOWN = 10
"""Skipped messages of one kind that are told one by one; the rest are counted."""

SYNC = 5.0
"""Seconds after which labelled samples are surely on the disk."""

LISTED = 20
"""Adaptations that the page shows: the newest."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample: x (N,) float32 as the network sees it."""

    x: Floats
    name: str | None = None
    label: int | None = None
    user: str = ""
    trusted: bool = False


@dataclass(frozen=True)
class Label:
    """The label of an earlier sample."""

    name: str
    label: int
    trusted: bool = False


@dataclass(frozen=True)
class Command:
    """adapt, rollback or forget, with arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Skipped:
    """A message that could not be used: of what kind, and in words."""

    kind: str
    why: str


Message = Sample | Label | Command | Skipped


@dataclass(eq=False)
class _Pending:
    """A sample whose label is still to come, what was predicted of it and by which version, digests of its id and its
    user, and where in the journal's `waiting` it is; -1: not yet."""

    number: int
    x: Floats
    version: int
    predicted: int
    id: bytes
    user: bytes
    slot: int = -1


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What an adaptation found; onward: whether it went on from the live adapter; trusted: how many of the trusted
    samples the live adapter or, if that is more, the frozen network gets right, the new one does, and there are;
    frozen: for the frozen network against the live adapter, where that is one and trusted samples do not object."""

    adapter: Adapter
    decision: Decision
    onward: bool
    trusted: tuple[int, int, int]
    frozen: Decision | None

    @property
    def refuted(self) -> bool:
        """Whether what there is gets more of the trusted samples right. Their labels are beyond doubt, so that no
        margin is needed; with one, a few could never object."""
        old, new, _ = self.trusted
        return old > new

    seconds: dict[str, float]
    joules: float | None
    samples: int


class Trace:
    """A course of values in bounded memory: the mean, or with `highest` the maximum, of blocks that grow with it."""

    MOST = 400

    def __init__(self, block: int = 25, highest: bool = False) -> None:
        self._block, self._highest, self._n, self._seen, self._value = block, highest, 0, 0, 0.0
        self.points: list[tuple[int, float]] = []

    def add(self, value: float) -> None:
        """The next value."""
        self._n, self._seen = self._n + 1, self._seen + 1
        self._value = max(self._value, value) if self._highest else self._value + (value - self._value) / self._n
        if self._n == self._block:
            self.points.append((self._seen, self._value))
            self._n, self._value = 0, 0.0
        if len(self.points) >= self.MOST:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(b[0], max(a[1], b[1]) if self._highest else (a[1] + b[1]) / 2) for a, b in pairs]
            self._block *= 2


class Loop:
    """The state of a watcher.

    Args:
        base: the network.
        engine: bound to it.
        journal: its state folder.
        work: starts an adaptation in the background.
        method, cache, seed: as for `FineTuner`; a method that leaves the network as it is.
        labels: labelled samples of the new world that the first adaptation needs.
        known: what the world looked like to the network that it was trained in; None: as the base says, or not known.
        allow_missing: whether to adapt though no sample of some class was ever seen.
        clock: seconds since 1970.
        meter: measures energy.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(
        self,
        base: Network,
        engine: Engine,
        journal: Journal,
        work: Work,
        *,
        method: str = "auto",
        cache: str | None = None,
        seed: int = 0,
        labels: int = LABELS,
        known: Seen | None = None,
        allow_missing: bool = False,
        clock: Callable[[], float] = time.time,
        meter: Meter = lambda: lambda: None,
    ) -> None:
        if not 2 <= labels <= journal.replay.capacity:
            raise UsageError(f"labels must be 2 to the samples kept, {journal.replay.capacity}, not {labels}")
        self._tuner = FineTuner(base, method=method, cache=cache, seed=seed, engine=engine)
        row = self._tuner.row(labels)
        if not row.rows_only:
            raise UsageError(f"a watcher's method must leave the network as it is, not train its weights: {row.name}")
        self._base, self._engine, self._journal, self._work = base, engine, journal, work
        self._labels, self._allow_missing, self._clock, self._meter = labels, allow_missing, clock, meter
        self._pending: OrderedDict[bytes, _Pending] = OrderedDict()
        self._events: list[Event] = []
        self._job: Future[_Outcome] | None = None
        self._stale = self._full = False
        self._waiting = ""
        self.counts: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.accuracy, self.drift = Trace(), Trace(highest=True)
        self.adaptations: list[Event] = []
        self._spent: tuple[float, float | None] = 0.0, None
        self._known = Seen.read(base.seen, base.spec.tap_widths) if known is None else known
        self._world = World()
        self._began = self._synced = clock()
        self._number = journal.newest
        self._fresh = self._fresh_since(journal.state.since)
        self._next = journal.state.needed or labels
        self._take_live(journal.state.since)
        self._wait_again()
        self._notes()

    # -- what is asked of it ------------------------------------------------------------------------------------------

    @property
    def sees_the_start(self) -> bool:
        """Whether a drift that was there before the first sample can be seen: something tells of the world before."""
        return self._known is not None or bool(self._journal.state.switches)

    @property
    def busy(self) -> bool:
        """Whether an adaptation is going on."""
        return self._job is not None

    def feed(self, messages: Iterable[Message]) -> list[Event]:
        """Take messages in order; returns what came of them."""
        run: list[Sample] = []
        for message in messages:
            if isinstance(message, Sample):
                run.append(message)
                continue
            self._take_samples(run)
            run = []
            if isinstance(message, Label):
                self._take_label(message)
            elif isinstance(message, Command):
                self._obey(message)
            else:
                self.skip(message.kind, message.why)
        self._take_samples(run)
        return self._told()

    def poll(self) -> list[Event]:
        """See whether an adaptation has ended, and whatever else is due."""
        if self._job is not None and self._job.done():
            job, self._job = self._job, None
            self._finish(job)
            self._consider()
        if self._clock() - self._synced >= SYNC:
            self._synced = self._clock()
            self.keep(WRITTEN)
        self._notes()
        return self._told()

    def keep(self, room: int | None = None) -> None:
        """See to it that the disk has the samples: all labelled ones, and of those that wait the newest that fit into
        so many bytes; None: all."""
        waiting = self._journal.waiting
        for p in reversed(self._pending.values()):
            if p.slot >= 0 and room is not None:
                break  # it had its turn, and so had those before
            if p.slot < 0:
                room = None if room is None else room - waiting.stride
                if (room is not None and room < 0) or not self._try(lambda p=p: self._write(p)):  # type: ignore[misc]
                    break
        for store in (self._journal.replay, waiting):
            self._try(store.sync)

    def summary(self) -> dict[str, Any]:
        """What is going on, in JSON values."""
        state, replay = self._journal.state, self._journal.replay
        return {
            "base": self._base.hash,
            "live": state.live,
            "busy": self.busy,
            "wanted": state.wanted,
            "waiting": self._waiting,
            "fresh": self._fresh,
            "needed": self._next,
            "seconds": self._clock() - self._began,
            "samples": self.counts["samples"],
            "labels": self.counts["labels"],
            "right": self.counts["right"],
            "skipped": dict(self.skipped),
            "pending": len(self._pending),
            "drifts": self.counts["drifts"],
            "adaptations": self.counts["adaptations"],
            "switches": self.counts["switches"],
            "rollbacks": self.counts["rollbacks"],
            "errors": self.counts["errors"],
            "drift_score": self._score(),
            "recent_accuracy": 1 - self._errors.mean if self._own else None,
            "accuracy": list(self.accuracy.points),
            "drift": list(self.drift.points),
            "kept": len(replay),
            "capacity": replay.capacity,
            "sample_bytes": replay.nbytes + self._journal.waiting.nbytes,
            "adapter_bytes": sum(v.size for v in state.versions.values()),
            "adaptation_seconds": self._spent[0],
            "joules": self._spent[1],
            "listed": list(self.adaptations),
            "versions": [
                {
                    "version": v.number,
                    "parent": v.parent,
                    "made": v.made,
                    "samples": v.samples,
                    "before": v.before,
                    "after": v.after,
                    "seconds": v.seconds,
                    "joules": v.joules,
                    "bytes": v.size,
                }
                for v in state.versions.values()
            ],
        }

    def skip(self, kind: str, why: str) -> None:
        """Count a message that cannot be used."""
        self.skipped[kind] += 1
        if self.skipped[kind] <= SHOWN:
            last = "; more of this kind are only counted" if self.skipped[kind] == SHOWN else ""
            self._tell("skipped", kind=kind, why=why[:200] + last)

    # -- samples and labels -------------------------------------------------------------------------------------------

    def _take_samples(self, run: Sequence[Sample]) -> None:
        if not run:
            return
        x = np.stack([sample.x for sample in run])
        taps, c = self._taps(x)
        with np.errstate(over="ignore", invalid="ignore"):
            p = softmax(lift.from_taps(self._base.spec, self._tensors, taps, c).astype(np.float64))
            finite = np.isfinite(p).all(axis=1) & np.all([np.isfinite(tap.sum(axis=1)) for tap in (*taps, c)], axis=0)
        if not finite.all():
            good = np.flatnonzero(finite).tolist()
            for _ in range(len(run) - len(good)):
                self.skip("not finite", "what the network makes of a sample must be finite, but is NaN or Inf")
            return self._take_samples([run[i] for i in good])
        rivals = [lift.from_taps(self._base.spec, t, taps, c).argmax(axis=1) for t in self._rivals.values()]
        predicted, confidence, version = p.argmax(axis=1), p.max(axis=1), self._journal.state.live
        for i, sample in enumerate(run):
            self._number += 1
            self.counts["samples"] += 1
            name = str(self._number) if sample.name is None else sample.name
            key = digest(name)
            guess = int(predicted[i])
            self._tell("prediction", id=name, label=guess, confidence=round(float(confidence[i]), 4), version=version)
            self._look(1 - float(confidence[i]), [tap[i : i + 1] for tap in taps])
            seen = _Pending(self._number, sample.x, version, guess, key, digest(sample.user))
            if sample.label is not None:
                self._labelled(seen, sample.label, sample.trusted, [int(said[i]) for said in rivals])
            else:
                self._done_waiting(key)
                if len(self._pending) == self._journal.waiting.capacity:
                    self._done_waiting(next(iter(self._pending)))
                    self.counts["never labelled"] += 1
                self._pending[key] = seen
        return None

    def _wait_again(self) -> None:
        """What waited when the watcher ended. A sample whose label came just before waits no more."""
        waiting, replay = self._journal.waiting, self._journal.replay
        slots = np.flatnonzero(waiting.number)
        x, slots = waiting.rows(slots[np.argsort(waiting.number[slots])])
        labelled = np.isin(waiting.number[slots], replay.number)
        for row, slot, done in zip(x, slots.tolist(), labelled.tolist(), strict=True):
            name, user = waiting.owner(slot)
            number, version, guess = (int(a[slot]) for a in (waiting.number, waiting.version, waiting.label))
            self._done_waiting(name)  # there are no two of one id, unless somebody has made them
            self._pending[name] = _Pending(number, row, version, guess, name, user, slot)
            if done:
                self._done_waiting(name)

    def _write(self, p: _Pending) -> None:
        p.slot = self._journal.waiting.add(
            p.number, self._clock(), p.x, p.predicted, name=p.id, user=p.user, version=p.version
        )

    def _done_waiting(self, name: bytes) -> _Pending | None:
        """The sample of this id, which waits no more, here and on the disk."""
        p = self._pending.pop(name, None)
        if p is not None and p.slot >= 0:
            slot = p.slot
            self._try(lambda: self._journal.waiting.drop(slot))
        return p

    def _take_label(self, message: Label) -> None:
        seen = self._pending.get(digest(message.name))
        if seen is None:
            name = f"{message.name!r:.60}"
            return self.skip("unknown id", f"a label must be of a sample that still waits for one, not of {name}")
        self._labelled(seen, message.label, message.trusted)
        self._done_waiting(seen.id)  # last, so that a crash in between loses nothing
        return None

    def _labelled(self, seen: _Pending, label: int, trusted: bool, rivals: Sequence[int] | None = None) -> None:
        """What follows from knowing a sample's label; `rivals`: what those said of it, if they were asked."""
        live = self._journal.state.live
        self.counts["labels"] += 1
        self.counts["right"] += seen.predicted == label
        self.accuracy.add(float(seen.predicted == label))
        guess = seen.predicted if seen.version == live else self._predict(self._tensors, seen.x)
        if self._try(
            lambda: self._journal.replay.add(
                seen.number, self._clock(), seen.x, label, name=seen.id, user=seen.user, trusted=trusted
            )
        ):
            self._fresh += seen.number >= self._journal.state.since and not trusted
        self._own += 1
        if self._errors.add(float(guess != label)):
            numbers = np.sort(self._journal.replay.number)
            since = int(numbers[-min(len(self._errors), len(numbers))])
            self._drifted("errors", max(since, 1))
        self.drift.add(self._score())
        if self._rivals:
            if rivals is None or seen.version != live:
                rivals = [self._predict(tensors, seen.x) for tensors in self._rivals.values()]
            self._compare(guess == label, [said == label for said in rivals], trusted)
        self._consider()

    def _predict(self, tensors: Mapping[str, Floats], x: Floats) -> int:
        taps, c = self._taps(x[None])
        return int(lift.from_taps(self._base.spec, tensors, taps, c).argmax(axis=1)[0])

    def _taps(self, x: Floats) -> tuple[list[Floats], Floats]:
        """x^0 … x^{L-1}, and the frozen output."""
        spec = self._base.spec
        return lift.taps_of(spec, x, self._engine.records(spec, self._base.tensors, x))

    # -- drift --------------------------------------------------------------------------------------------------------

    def _look(self, doubt: float, taps: list[Floats]) -> None:
        """What can be seen of a sample without its label."""
        by = self._world.add(doubt, taps)
        if by is not None:
            begun = self._world.begun
            self._drifted(by, self._number - begun + 1)
            self._world = World()

    def _score(self) -> float:
        """How near a drift is: 1 is one."""
        return max(self._errors.score, self._world.score)

    def _drifted(self, by: str, since: int) -> None:
        self.counts["drifts"] += 1
        score, self._next, self._full = self._score(), self._labels, False
        self._begin(since)
        self._tell("drift", by=by, since=since, score=round(score, 3), labels=self._fresh, needed=self._next)

    def _begin(self, since: int, needed: int = 0) -> None:
        """From now on the world began with sample `since`, and an adaptation is wanted."""
        self._waiting = ""
        self._try(lambda: self._journal.note(since, True, needed))
        self._fresh = self._fresh_since(since)

    def _fresh_since(self, since: int) -> int:
        replay = self._journal.replay
        return int(np.count_nonzero((replay.number >= max(since, 1)) & ~replay.trusted))

    # -- adaptation ---------------------------------------------------------------------------------------------------

    def _consider(self) -> None:
        """Start an adaptation if there is reason to, and enough to go by."""
        state = self._journal.state
        if not state.wanted or self._job is not None or self._fresh < self._next:
            return
        slots, missing = self._chosen(state.since)
        if missing and not self._allow_missing:
            named = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            waiting = f"no sample of class {named} was ever seen, and without one it would be forgotten"
            if waiting != self._waiting:
                self._tell("waiting", why=waiting)
            self._waiting = waiting
            return
        self._waiting = ""
        x, good = self._journal.replay.rows(slots)
        if len(good) < 2:
            return
        y = self._journal.replay.label[good].copy()
        trusted = np.flatnonzero((self._journal.replay.number >= max(state.since, 1)) & self._journal.replay.trusted)
        x_trusted, trusted = self._journal.replay.rows(trusted)
        y_trusted = self._journal.replay.label[trusted].copy()
        old = self._journal.live
        self._stale, self._full = False, self._fresh >= self._journal.replay.capacity
        self._next = 2 * max(self._fresh, self._labels)
        self.counts["adaptations"] += 1
        self._tell("adapting", samples=len(y), version=state.live)
        self._job = self._work(lambda: self._adapt(x, y, old, x_trusted, y_trusted))

    def _chosen(self, since: int) -> tuple[NDArray[np.intp], list[int]]:
        """Slots of the samples to fit, oldest first, and classes of which there is none.

        Those of the new world; and of each class that it has hardly shown, the newest of the old one.
        """
        replay, C = self._journal.replay, self._base.spec.C
        usable = (replay.number > 0) & ~replay.trusted
        new = usable & (replay.number >= since)
        counts = np.bincount(replay.label[new], minlength=C)
        few = max(2, int(counts.sum()) // (4 * C))
        chosen, missing = [np.flatnonzero(new)], []
        for label in np.flatnonzero(counts < few):
            older = np.flatnonzero(usable & ~new & (replay.label == label))
            older = older[np.argsort(replay.number[older])][-(few - int(counts[label])) :]
            chosen.append(older)
            if counts[label] == 0 and not len(older):
                missing.append(int(label))
        slots = np.concatenate(chosen)
        return slots[np.argsort(replay.number[slots])], missing

    def _adapt(
        self, x: Floats, y: NDArray[np.int32], old: Adapter | None, x_trusted: Floats, y_trusted: NDArray[np.int32]
    ) -> _Outcome:
        """In the background: fit, and ask the gate."""
        stop, began = self._meter(), time.perf_counter()
        tuner = FineTuner(**self._tuner.get_params())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few samples and missing classes: events say so
            tuner.fit_prepared(x, y)
        fitted = time.perf_counter()
        onward = old is not None and old.method == tuner.method_.name and continues(old, x)
        decision = decide(tuner, x, old, onward)
        adapter = tuner.adapter  # with what it said of the samples left out
        models: list[Mapping[str, Floats]] = [{} if old is None else old.tensors, adapter.tensors, {}]
        before, after, network = (int(self._right(x_trusted, y_trusted, tensors).sum()) for tensors in models)
        frozen = frozen_wins(tuner, x, old) if old is not None and network >= before else None
        ended = time.perf_counter()
        seconds = {
            "fill": tuner.result_.seconds.fill,
            "train": tuner.result_.seconds.train,
            "gate": ended - fitted,
            "total": ended - began,
        }
        trusted = max(before, network), after, len(x_trusted)
        return _Outcome(adapter, decision, onward, trusted, frozen, seconds, stop(), len(y))

    def _right(self, x: Floats, y: NDArray[np.int32], tensors: Mapping[str, Floats]) -> NDArray[np.bool_]:
        """(T,) which samples an adapter gets right; without tensors, the frozen network."""
        if not len(x):
            return np.zeros(0, bool)
        return np.asarray(lift.from_taps(self._base.spec, tensors, *self._taps(x)).argmax(axis=1) == y)

    def _finish(self, job: Future[_Outcome]) -> None:
        """An adaptation has ended."""
        state = self._journal.state
        try:
            found = job.result()
        except Exception as e:  # whatever it is, predictions go on
            self.counts["errors"] += 1
            self._answered()
            return self._tell("error", why=f"the adaptation failed, version {state.live} stays: {e}")
        d = found.decision
        entry: Event = {
            "samples": found.samples,
            "estimate": {"before": d.before, "after": d.after, "interval": list(d.interval), "samples": d.n},
            "seconds": found.seconds,
            "joules": found.joules,
        }
        why = self._verdict(found)
        accepted = d.accepted and not self._stale and not found.refuted
        if accepted:
            made = Version(
                0, 0, self._clock(), found.samples, d.before, d.after, *d.interval, d.n,
                found.seconds["total"], found.joules, 0,
            )  # fmt: skip
            said = {"accuracy": d.after, "samples": d.n}
            config = {**found.adapter.config, **self._preprocessing(), "estimate": said}
            accepted = self._try(lambda: self._journal.commit(replace(found.adapter, config=config), made, why))
            why = why if accepted else "the new adapter could not be written"
        self._answered()
        state = self._journal.state
        entry |= {"accepted": accepted, "version": state.live, "why": why}
        self._list({"time": self._clock(), "labels": self.counts["labels"], **entry})
        if not accepted:
            self._tell("kept", **entry)
            f = found.frozen
            if f is not None and f.accepted and not self._stale:
                by = f"{f.after:.1%} against {f.before:.1%} on {f.n} samples"
                self._roll_back(f"the frozen network is better by {SURE} standard errors: {by}", FROZEN)
            return None
        self.counts["switches"] += 1
        self._take_live(state.since)
        return self._tell("adapted", **entry)

    def _answered(self) -> None:
        """Remember, for after a restart too, that there was an adaptation: the next one wants twice the samples, and
        where there is no room for more there is none, since more of the same would be no news."""
        if not self._stale:
            self._try(lambda: self._journal.note(self._journal.state.since, not self._full, self._next))

    def _verdict(self, found: _Outcome) -> str:
        d, (old, new, n) = found.decision, found.trusted
        low, high = (f"{100 * end:+.1f}" for end in d.interval)
        by = f"{d.before:.1%} → {d.after:.1%} on {d.n} samples left out, the difference {low} to {high} points (95 %)"
        if self._stale:
            return "the samples or the live version changed while it was fitted"
        margin = f"by {SURE} standard errors"
        if found.onward:
            margin = f"than the live one, from which it goes on, or not {margin} than the frozen network"
        if not d.accepted:
            return f"the new adapter is not better {margin}: {by}"
        if found.refuted:
            return f"trusted samples say that the old one is better: it gets {old} of {n} right, the new one {new}"
        if found.onward:
            margin = "than the live one, from which it goes on with more samples of the same world"
        return f"the new adapter is better {margin}: {by}"

    def _preprocessing(self) -> dict[str, Any]:
        state = self._journal.state
        if (state.mean, state.std) == (self._base.mean, self._base.std):
            return {}
        return {"mean": list(state.mean), "std": list(state.std)}

    def _list(self, entry: Event) -> None:
        seconds, joules = self._spent
        self._spent = (
            seconds + entry["seconds"]["total"],
            joules if entry["joules"] is None else (joules or 0.0) + entry["joules"],
        )
        self.adaptations.append(entry)
        del self.adaptations[:-LISTED]

    # -- the live version ---------------------------------------------------------------------------------------------

    def _take_live(self, since: int) -> None:
        """Go on with the journal's live version: its errors are unknown yet, and it is on probation. The world is as
        it is now since that sample."""
        state, live = self._journal.state, self._journal.live
        self._tensors: Mapping[str, Floats] = {} if live is None else live.tensors
        self._errors, self._own = Adwin(), 0
        known, accuracy, judged = self._of_frozen(since) if state.live == FROZEN else (None, None, 0)
        self._world = World(known)
        if accuracy is not None:
            self._errors.expect(1 - accuracy, min(judged, PROMISE))
        self._rivals: dict[int, Mapping[str, Floats]] = {}
        self._versus: list[tuple[bool, ...]] = []
        version = state.versions.get(state.live)
        if version is None:
            return
        if version.judged:
            self._errors.expect(1 - version.after, min(version.judged, PROMISE))
        self._rivals = self._predecessors(version, live)

    def _predecessors(self, version: Version, live: Adapter | None) -> dict[int, Mapping[str, Floats]]:
        """By number, what a version can be compared with and go back to: the one before, and, where that learnt from
        the same world, the last one that did not: if labels are lies, all adapters of this world may be."""
        found: dict[int, Mapping[str, Floats]] = {}
        try:
            while live is not None:
                parent = self._journal.adapter(version.parent)
                same = parent is not None and succeeds(live, parent)
                if not found or not same:
                    found[version.parent] = {} if parent is None else parent.tensors
                if not same:
                    break
                version, live = self._journal.state.versions[version.parent], parent
        except (FileError, KeyError):
            pass  # it is not kept any more: nothing to go back to
        return found

    def _of_frozen(self, since: int) -> tuple[Seen | None, float | None, int]:
        """What is to be expected of the frozen network: how its world looks, its accuracy, and by how many samples that
        is known. At first, that it is in the world it was trained in. After a rollback its accuracy is that on the
        labelled samples of the world as it is now, none of which it was fitted to, or on the newest where there is none
        of that; and if that is no lower than chance allows, the world is its own again."""
        known, state, replay = self._known, self._journal.state, self._journal.replay
        accuracy, samples = (None, 0) if known is None else (known.accuracy, known.samples)
        if not state.switches:
            return known, accuracy, samples
        slots = np.flatnonzero(replay.number >= max(since, 1))
        slots = slots if len(slots) else np.flatnonzero(replay.number)
        slots = slots[np.argsort(replay.number[slots])][-PROMISE:]
        x, slots = replay.rows(slots)
        if not len(slots):
            return known, accuracy, samples
        mean, n = float(self._right(x, replay.label[slots], {}).mean()), len(slots)
        least = 1.0 if accuracy is None else accuracy - INTERVAL * math.sqrt(accuracy * (1 - accuracy) / n)
        return known if mean >= least else None, mean, n

    def _compare(self, new_right: bool, old_right: Sequence[bool], trusted: bool) -> None:
        """The live version against those before: on all labelled samples, and on the trusted ones by themselves."""
        self._versus.append((trusted, new_right, *old_right))
        if len(self._versus) not in LOOKS:
            return
        sure, new, *olds = np.array(self._versus).T
        for number, old in zip(self._rivals, olds, strict=True):
            found, kind = gate(new, old), "labelled"
            if not found.accepted and sure.any():
                asked = gate(new[sure], old[sure])
                found, kind = (asked, "trusted") if asked.accepted else (found, kind)
            if found.accepted:
                by = f"{found.before:.1%} against {found.after:.1%} on the {found.n} {kind} samples since"
                self._roll_back(f"the version before is better by {SURE} standard errors: {by}", number)
                return
        if len(self._versus) == LOOKS[-1]:
            self._rivals, self._versus = {}, []
            self._tell("confirmed", version=self._journal.state.live, accuracy=found.before, before=found.after)

    def _roll_back(self, why: str, to: int | None = None) -> bool:
        old, since = self._journal.state.live, self._journal.state.since
        if not self._try(lambda: self._journal.roll_back(self._clock(), why, to, self._number + 1)):
            return False
        self.counts["rollbacks"] += 1
        self.counts["switches"] += 1
        self._stale, self._next, self._fresh, self._waiting = True, self._labels, 0, ""
        self._take_live(since)
        self._rivals = {}  # whoever went back does not want to be sent forward
        self._tell("rolled back", old=old, version=self._journal.state.live, why=why)
        return True

    # -- commands -----------------------------------------------------------------------------------------------------

    def _obey(self, command: Command) -> None:
        given = command.arguments
        if command.name == "adapt":
            self._next = 2
            self._begin(self._journal.state.since, self._next)
            self._tell("asked", what="adapt", labels=self._fresh)
            return self._consider()
        if command.name == "rollback":
            to = given.get("to")
            if to is not None and type(to) is not int:
                return self.skip("command", "a version to go back to must be a whole number")
            self._roll_back("somebody asked for it", to)
            return None
        if command.name == "forget":
            return self._forget(given)
        return self.skip("command", f"a command must be adapt, rollback or forget, not {command.name[:40]!r}")

    def _forget(self, given: Mapping[str, Any]) -> None:
        name, user = given.get("id"), given.get("user")
        if (isinstance(name, str) or isinstance(user, str)) == (given.get("all") is True):
            return self.skip("command", "what is forgotten must be an id, a user, or all")
        name, user = (value if isinstance(value, str) else None for value in (name, user))
        keys = [None if value is None else digest(value) for value in (name, user)]
        gone = [key for key, p in self._pending.items() if keys[0] in (None, key) and keys[1] in (None, p.user)]
        wiped = [0, 0]

        def wipe() -> None:
            wiped[:] = self._journal.forget(name, user)

        self._world.forget()
        done = self._try(wipe)
        for key in gone:
            del self._pending[key]
        if not done:
            return None
        self._stale = True
        self._fresh = self._fresh_since(self._journal.state.since)
        return self._tell("forgot", samples=wiped[0], waiting=len(gone))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _try(self, action: Callable[[], object]) -> bool:
        """Do what may fail without harm: then an event says so, and everything stays as it was."""
        try:
            action()
        except InstantFTError as e:
            self.counts["errors"] += 1
            if self.counts["errors"] <= SHOWN or self.counts["errors"] % 1000 == 0:
                self._tell("error", why=str(e))
            return False
        return True

    def _notes(self) -> None:
        for note in self._journal.notes:
            self._tell("recovered", why=note)
        self._journal.notes.clear()

    def _tell(self, event: str, **what: Any) -> None:
        self._events.append({"event": event, "time": round(self._clock(), 3), **what})

    def _told(self) -> list[Event]:
        events, self._events = self._events, []
        return events

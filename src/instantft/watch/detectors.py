"""Has the world changed? Detectors that look at one number a sample, in memory that does not grow.

`Adwin` knows nothing beforehand: it keeps a window of the newest values, and drops its older part as soon as the two
parts differ by more than chance allows (Bifet and Gavaldà, Learning from Time-Changing Data with Adaptive Windowing,
2007; there the oldest values go one bucket at a time, here all those before the cut where the parts differ most). It is
told the errors of the live adapter, which is what labels are good for.

`Cusum` knows mean and deviation of the world before, and sums up what goes beyond them (Page, Continuous Inspection
Schemes, 1954). It is told how unsure the network is of a sample, and how far the sample's taps are from those of the
training data (kept in the base file) or of the first samples, for which no label is needed.

Both say how many values belong to the new world. A microcontroller has the same in C
(native/embedded/src/instantft_drift.c), which repeats what is here operation by operation: alarms come at the same
samples, and scores are alike to the bit (tests/test_drift_c.py). Change both.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..backbones.builtin import Network
from ..engine import Engine, Floats
from ..solvers.calibration import softmax

__all__ = ["Adwin", "Cusum", "Scale", "Seen", "TapStatistics", "World"]

Array = NDArray[Any]

CONFIDENCE = 0.002
"""δ of ADWIN: chance of an alarm where nothing changes, as in its paper."""

PER_ROW = 5
"""Buckets of one size in ADWIN's histogram, as in its paper (M)."""

ROWS = 16
"""Sizes of buckets, 1 to 2^15 values, so that the window holds 327,675 at most and the oldest go."""

EVERY = 8
"""Values after which ADWIN compares its parts."""

LEAST = 10
"""Values that each of ADWIN's parts must have."""

ALLOWANCE, THRESHOLD = 0.5, 20.0
"""Of CUSUM, in standard deviations: what is forgiven with each value, and the sum that is an alarm. A mean that has
moved by one deviation is noticed after some 40 values; independent normal ones that have not move it there about once
in e^20 values."""

WARM = 256
"""Samples after which mean and deviation of the world as it is now are taken to be known."""

LOOKED = 2048
"""Samples that are looked at to know what a world looks like."""

MOST_KEPT = 600_000
"""Bytes of tap statistics that a base file takes; its header has a bound."""

CLIPPED = 4.0
"""Deviations beyond which a value counts no more, so that one outlier is no drift."""


class Adwin:
    """Values between 0 and 1; a drift is a mean that has risen.

    Attributes:
        score: how far the parts differed at the last comparison, in units of what chance allows; over 1 is a change.
    """

    def __init__(self) -> None:
        self._rows: list[list[float]] = [[]]  # row i: sums of 2^i values each, oldest first
        self._sum, self._n, self._since = 0.0, 0, 0
        self.score = 0.0

    def __len__(self) -> int:
        """Values in the window."""
        return self._n

    @property
    def mean(self) -> float:
        """Of the window; 0 where it is empty."""
        return self._sum / self._n if self._n else 0.0

    def expect(self, mean: float, n: int) -> None:
        """Put n values of this mean before all others: what is known of the world so far."""
        for i in range(n):
            self._push((math.floor((i + 1) * mean) - math.floor(i * mean)) * 1.0)

    def add(self, value: float) -> bool:
        """The next value; True where the mean has risen. The window then holds the values since."""
        self._push(float(value))
        self._since += 1
        if self._since < EVERY:
            return False
        self._since = 0
        risen, self.score = False, 0.0
        while (change := self._change()) is not None:
            difference, older = change
            risen = risen or difference > 0
            while older > 0:
                older -= self._drop_oldest()
        return risen

    def _push(self, value: float) -> None:
        self._sum += value
        self._n += 1
        self._rows[0].append(value)
        for i, row in enumerate(self._rows):
            if len(row) <= PER_ROW:
                break
            if i + 1 == ROWS:
                self._drop_oldest()
                break
            if i + 1 == len(self._rows):
                self._rows.append([])
            self._rows[i + 1].append(row.pop(0) + row.pop(0))

    def _drop_oldest(self) -> int:
        """Drop the oldest bucket; returns how many values it stood for."""
        row, size = self._rows[-1], 1 << (len(self._rows) - 1)
        self._sum -= row.pop(0)
        self._n -= size
        if not row and len(self._rows) > 1:
            self._rows.pop()
        return size

    def _change(self) -> tuple[float, int] | None:
        """How much the newer part is above the older one where they differ most, and how many values the older one
        has; None where chance explains it."""
        n0, sum0, worst = 0, 0.0, 0.0
        change: tuple[float, int] | None = None
        variance = self.mean * (1 - self.mean)
        log = math.log(2 * math.log(max(self._n, 3)) / CONFIDENCE)
        for i in range(len(self._rows) - 1, -1, -1):
            for total in self._rows[i]:
                n0, sum0 = n0 + (1 << i), sum0 + total
                n1 = self._n - n0
                if n0 < LEAST or n1 < LEAST:
                    continue
                m = 1 / (1 / n0 + 1 / n1)
                cut = math.sqrt(2 / m * variance * log) + 2 / (3 * m) * log
                difference = (self._sum - sum0) / n1 - sum0 / n0
                if abs(difference) > worst * cut:
                    worst, change = abs(difference) / cut, (difference, n0)
        self.score = max(self.score, worst)
        return change if worst > 1 else None


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a value in the world before."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, values: Array) -> Scale:
        """Of these values; the deviation is at least a thousandth of the mean, for values that are all alike."""
        mean = float(np.mean(values))
        return cls(mean, max(float(np.std(values)), 1e-3 * abs(mean), 1e-6))


class Cusum:
    """A drift is a mean that has risen, or, with `both`, moved.

    Args:
        scale: of the world before.
        both: whether a fall counts too.

    Attributes:
        begun: values since the sum that stands highest left zero: those of the new world.
    """

    def __init__(self, scale: Scale, both: bool = False) -> None:
        self._scale = scale
        self._signs = (1.0, -1.0) if both else (1.0,)
        self._sums, self._runs = [0.0] * len(self._signs), [0] * len(self._signs)

    @property
    def score(self) -> float:
        """The sum in units of the threshold; 1 is an alarm."""
        return max(self._sums) / THRESHOLD

    @property
    def begun(self) -> int:
        return self._runs[int(np.argmax(self._sums))]

    def add(self, value: float) -> bool:
        """The next value; True where it is an alarm."""
        z = (value - self._scale.mean) / self._scale.deviation
        z = min(max(z, -CLIPPED), CLIPPED)
        for i, sign in enumerate(self._signs):
            self._sums[i] = max(0.0, self._sums[i] + sign * z - ALLOWANCE)
            self._runs[i] = self._runs[i] + 1 if self._sums[i] > 0 else 0
        return max(self._sums) >= THRESHOLD


class TapStatistics:
    """Mean and deviation of every value of the taps in the world before, and how far a sample is from it.

        distance = √(mean_k mean_j min(((x^k_j − μ^k_j) / σ^k_j)², CLIPPED²))

    Every tap counts alike, however wide it is.

    Args:
        means, deviations: μ^k and σ^k of x^0 … x^{L-1}, (N_k,) each.
    """

    def __init__(self, means: Sequence[Floats], deviations: Sequence[Floats]) -> None:
        self.means, self.deviations = list(means), list(deviations)

    @classmethod
    def of(cls, taps: Sequence[Floats]) -> TapStatistics:
        """Of samples with these taps, (n, N_k) each."""
        deviations = []
        for x in taps:
            deviation = x.std(axis=0)
            # A value that never changed before is not infinitely surprising.
            floor = max(0.1 * float(np.sqrt(np.mean(deviation * deviation))) if deviation.size else 0.0, 1e-6)
            deviations.append(np.maximum(deviation, np.float32(floor)))
        return cls([x.mean(axis=0) for x in taps], deviations)

    def distance(self, taps: Sequence[Floats]) -> NDArray[np.float64]:
        """(n,) of samples with these taps, (n, N_k) each."""
        total, used = np.zeros(len(taps[0])), 0
        for x, mean, deviation in zip(taps, self.means, self.deviations, strict=True):
            if not x.shape[1]:
                continue
            z = (x - mean) / deviation
            np.clip(z, -CLIPPED, CLIPPED, out=z)
            total += np.einsum("ij,ij->i", z, z) / x.shape[1]
            used += 1
        return np.sqrt(total / max(used, 1))


@dataclass(frozen=True)
class Seen:
    """What a world looked like to a network: kept in its base file, so that a watcher need not learn it anew.

    Attributes:
        taps: statistics of the training samples' taps.
        distance: mean and deviation of a sample's distance from them.
        doubt: of one minus the largest probability.
        accuracy: fraction that the network gets right; None: not known.
        samples: how many were looked at.
    """

    taps: TapStatistics
    distance: Scale
    doubt: Scale
    accuracy: float | None
    samples: int

    @classmethod
    def by(cls, engine: Engine, base: Network, train: Floats, test: Floats, y: NDArray[np.int32] | None = None) -> Seen:
        """What `base` sees of samples.

        Args:
            engine: bound to it.
            train: (T, N) what it was trained on; at most LOOKED of them count, evenly spread.
            test: (n, N) samples of the same world by which distance and doubt are scaled; best not those it was trained
                on, of which it is too sure.
            y: (n,) their labels, where accuracy is to be known.
        """

        def look(x: Floats) -> tuple[list[Floats], Floats]:
            some = np.ascontiguousarray(x[:: max(1, -(-len(x) // LOOKED))])
            return lift.taps_of(base.spec, some, engine.records(base.spec, base.tensors, some))

        taps = TapStatistics.of(look(train)[0])
        seen, c = look(test)
        doubt = 1 - softmax(c.astype(np.float64)).max(axis=1)
        accuracy = None
        if y is not None:
            accuracy = float((c.argmax(axis=1) == y[:: max(1, -(-len(y) // LOOKED))]).mean())
        return cls(taps, Scale.of(taps.distance(seen)), Scale.of(doubt), accuracy, len(c))

    def text(self) -> str:
        """For a base file; empty where the taps are too wide for one."""
        values = np.concatenate([*self.taps.means, *self.taps.deviations]).astype("<f4")
        if values.nbytes > MOST_KEPT:
            return ""
        held = {
            "accuracy": self.accuracy,
            "samples": self.samples,
            "distance": [self.distance.mean, self.distance.deviation],
            "doubt": [self.doubt.mean, self.doubt.deviation],
            "taps": base64.b64encode(values.tobytes()).decode(),
        }
        return json.dumps(held)

    @classmethod
    def read(cls, text: str, widths: Sequence[int]) -> Seen | None:
        """What `text` wrote, for taps of these widths; None where it makes no sense."""
        try:
            held = json.loads(text)
            values = np.frombuffer(base64.b64decode(held["taps"], validate=True), "<f4").astype(np.float32)
            halves = values.reshape(2, sum(widths))
            means, deviations = (np.split(half, np.cumsum(widths)[:-1]) for half in halves)
            distance, doubt = (Scale(float(held[name][0]), float(held[name][1])) for name in ("distance", "doubt"))
            accuracy, samples = held["accuracy"], int(held["samples"])
            accuracy = None if accuracy is None else float(accuracy)
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):
            return None
        numbers = [distance.mean, distance.deviation, doubt.mean, doubt.deviation]
        good = (
            np.isfinite(values).all()
            and (halves[1] > 0).all()
            and np.isfinite(numbers).all()
            and min(distance.deviation, doubt.deviation) > 0
            and samples > 0
            and (accuracy is None or 0 <= accuracy <= 1)
        )
        return cls(TapStatistics(means, deviations), distance, doubt, accuracy, samples) if good else None


class World:
    """The world as it was when this was made, and whether it still is: what can be seen without labels.

    Args:
        known: what is usual; None: the first WARM samples show it. Then CUSUM watches.

    Attributes:
        begun: samples since the drift began, after an alarm.
    """

    def __init__(self, known: Seen | None = None) -> None:
        self._warm: list[tuple[float, Sequence[Floats]]] = []
        self._taps: TapStatistics | None = None
        self._watched: dict[str, Cusum] = {}
        self.begun = 0
        if known is not None:
            self._know(known.taps, known.doubt, known.distance)

    def _know(self, taps: TapStatistics, doubt: Scale, distance: Scale) -> None:
        self._taps = taps
        self._watched = {"confidence": Cusum(doubt), "taps": Cusum(distance, both=True)}

    @property
    def score(self) -> float:
        """How near an alarm is: 1 is one; 0 while the world is not known."""
        return max((cusum.score for cusum in self._watched.values()), default=0.0)

    def forget(self) -> None:
        """Drop the samples that are held while the world is not known."""
        self._warm = []

    def add(self, doubt: float, taps: Sequence[Floats]) -> str | None:
        """The next sample.

        Args:
            doubt: one minus the largest probability.
            taps: x^0 … x^{L-1}, (1, N_k) each.

        Returns:
            What says that the world has changed: "confidence", "taps", or None.
        """
        if self._taps is None:
            self._warm.append((doubt, taps))
            if len(self._warm) == WARM:
                whole = [np.concatenate(tap) for tap in zip(*(t for _, t in self._warm), strict=True)]
                taps_then = TapStatistics.of(whole)
                doubts = np.array([d for d, _ in self._warm])
                self._know(taps_then, Scale.of(doubts), Scale.of(taps_then.distance(whole)))
                self._warm = []
            return None
        seen = {"confidence": doubt, "taps": float(self._taps.distance(taps)[0])}
        for by, cusum in self._watched.items():
            if cusum.add(seen[by]):
                self.begun = cusum.begun
                return by
        return None

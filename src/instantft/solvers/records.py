"""The records of a fine-tuning set, for solvers that need products of features and not steps: taps, whole or in chunks.

T samples, L taps, N_k their widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import Engine, Floats
from ..spec import NetSpec
from .factor import Rows, runs

__all__ = ["CHUNK", "RUNS", "Records", "subset"]

Array = NDArray[Any]

CHUNK = 1024
"""Samples that are looked at together where not all are."""

RUNS = 32
"""Runs of consecutive samples that a subset consists of."""


class Records:
    """Taps of T samples: x^0 from the data, the others from the store, or from the frozen network where it lacks them.

    Args:
        engine, base, threads: who computes what the store lacks.
        x: (T, N) float32.
        numbers: (T,), the number of each sample in the store.
        store: the forward cache; what it holds is used as its codec gives it.
    """

    def __init__(
        self,
        engine: Engine,
        base: Network,
        x: Floats,
        numbers: NDArray[np.int64],
        store: Store | None,
        threads: int = 1,
    ) -> None:
        self._engine, self._base, self._threads = engine, base, threads
        self._x, self._numbers, self._store = x, numbers, store
        self._rows: Floats | None = None
        self.spec: NetSpec = base.spec
        ends = [s.offset + s.size for s in base.spec.record.segments[:-1]]
        self._places = [(s.offset, s.offset + s.size) for s in base.spec.record.segments[:-1]]
        self._used = ends[-1] if ends else 0

    def __len__(self) -> int:
        return len(self._x)

    def keep(self) -> None:
        """Hold the records of all samples decoded in memory from now on."""
        if self._rows is None:
            self._rows = self._read(slice(0, len(self)))

    def taps(self, which: slice | Rows) -> list[Floats]:
        """x^0 … x^{L-1} of some samples, (n, N_k) each."""
        rows = self._rows[which] if self._rows is not None else self._read(which)
        return [self._x[which], *(rows[:, a:b] for a, b in self._places)]

    def chunks(self) -> Iterator[slice]:
        """All samples, CHUNK at a time."""
        for start in range(0, len(self), CHUNK):
            yield slice(start, min(start + CHUNK, len(self)))

    def gram(self, weights: Sequence[float], dtype: type[np.float32] | type[np.float64]) -> Array:
        """K = Σ_k w_k·X_k·X_kᵀ (T, T), computed in `dtype`.

        Neighbouring taps of one weight are one product: the zeros between them add nothing.
        """
        self.keep()
        assert self._rows is not None
        parts = [(weights[0], self._x)] if weights[0] else []
        behind = itertools.groupby(range(1, len(weights)), key=lambda k: weights[k])
        for weight, run in behind:
            taps = list(run)
            if weight:
                columns = slice(self._places[taps[0] - 1][0], self._places[taps[-1] - 1][1])
                parts.append((weight, self._rows[:, columns]))
        K = np.zeros((0, 0), dtype)
        for weight, part in parts:
            X = part.astype(dtype, copy=False)
            product = X @ X.T
            if weight != 1:
                product *= dtype(weight)
            K = K + product if K.size else product
        return K

    def _read(self, which: slice | Rows) -> Floats:
        """Record rows (n, width)."""
        numbers, x = self._numbers[which], self._x[which]
        store = self._store
        if store is None:
            return self._engine.records(self.spec, self._base.tensors, x, self._threads)
        held = store.held(numbers)
        if held.all():
            return store.read(numbers)
        rows = np.empty((len(x), self.spec.record.width), np.float32)
        rows[held] = store.read(numbers[held])
        fresh = self._engine.records(self.spec, self._base.tensors, np.ascontiguousarray(x[~held]), self._threads)
        rows[~held] = store.codec.decode(store.codec.encode(fresh, store.record), store.record)
        return rows

    def frozen(self, which: slice | Rows) -> Floats:
        """c (n, C), the frozen network's output."""
        rows = self._rows[which] if self._rows is not None else self._read(which)
        last = self.spec.record.segments[-1]
        return rows[:, last.offset : last.offset + last.size]


def subset(T: int, most: int, seed: int) -> tuple[Rows, list[Rows]]:
    """At most `most` rows of T in order: RUNS runs of consecutive samples, spread evenly with a random start.

    Runs, so that samples that resemble their neighbours (consecutive spectra, overlapping windows) do so here too,
    and are left out together.

    Returns:
        The rows, and for each run its place among them.
    """
    n = min(T, most)
    blocks = runs(n, RUNS)
    if n == T:
        return np.arange(T), blocks
    gaps = np.floor((np.arange(RUNS) + np.random.default_rng([seed, 3]).random()) * (T - n) / RUNS)
    return np.concatenate([rows + int(gap) for rows, gap in zip(blocks, gaps, strict=True)]), blocks

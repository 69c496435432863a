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
from ..engine.dense import Dense, DType
from ..spec import NetSpec
from .factor import Rows, runs

__all__ = ["CHUNK", "RUNS", "Records", "alike", "subset"]

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
        self._x0 = x if base.spec.input_tap else x[:, :0]
        self._rows: Floats | None = None
        self.spec: NetSpec = base.spec
        self.dense: Dense = engine.dense
        self._places = [(s.offset, s.offset + s.size) for s in base.spec.record.segments[:-1]]
        self._products: dict[tuple[int, ...], Floats] = {}

    def __len__(self) -> int:
        return len(self._x)

    def keep(self) -> None:
        """Hold the records of all samples decoded in memory from now on; in the store itself if they lie so there."""
        if self._rows is None and self._store is not None:
            self._rows = self._store.in_place(self._numbers)
        if self._rows is None:
            self._rows = self._read(slice(0, len(self)))

    def taps(self, which: slice | Rows) -> list[Floats]:
        """x^0 … x^{L-1} of some samples, (n, N_k) each."""
        rows = self._rows[which] if self._rows is not None else self._read(which)
        return [self._x0[which], *(rows[:, a:b] for a, b in self._places)]

    def chunks(self, size: int = CHUNK) -> Iterator[slice]:
        """All samples, `size` at a time."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def product(self, taps: Sequence[int], rows: Rows | None = None) -> Floats:
        """X·Xᵀ of neighbouring taps side by side, (n, n) float32; that of all samples is kept for the next time.

        Args:
            taps: their numbers; 0 stands alone.
            rows: which samples, in order; None: all.
        """
        lower = np.tril(self.triangle(taps, rows))
        lower += np.tril(lower, -1).T
        return lower

    def triangle(self, taps: Sequence[int], rows: Rows | None = None) -> Floats:
        """As `product`, but only on and below the diagonal; what is above has no meaning."""
        key = tuple(taps)
        dense, threads = self.dense, self._threads
        whole = self._products.get(key)
        if whole is None and (rows is None or len(rows) == len(self)):
            whole = self._products[key] = self._gram(key, np.float32)
        if whole is not None:
            if rows is None or len(rows) == len(self):
                return whole
            n = len(rows)
            return dense.combine([whole], [1.0], np.ones(n), np.zeros(n), rows)
        assert rows is not None
        return dense.gram(self._block(key, rows), np.float32, threads)

    def parts(self, weights: Sequence[float], dtype: DType) -> tuple[list[Array], list[float]]:
        """P_p and w_p with Σ_k w_k·X_k·X_kᵀ = Σ_p w_p·P_p (T, T), computed in `dtype`, on and below the diagonal.

        Taps of one weight are one part: those that are kept, if they make up the whole, or new ones. None is kept any
        longer: beside a system of that size there had better be room.
        """
        used = {k for k, w in enumerate(weights) if w}
        kept = [taps for taps in self._products if len({weights[k] for k in taps}) == 1 and set(taps) <= used]
        if dtype is np.float32 and sorted(k for taps in kept for k in taps) == sorted(used):
            found = [self._products[taps] for taps in kept], [weights[taps[0]] for taps in kept]
            self._products = {}
            return found
        self._products = {}
        new = alike(weights)
        return [self._gram(taps, dtype) for taps in new], [weights[taps[0]] for taps in new]

    def _gram(self, taps: tuple[int, ...], dtype: DType) -> Array:
        """X·Xᵀ (T, T) of neighbouring taps, on and below the diagonal; a pair of chunks at a time where they are not
        held in memory."""
        if self._rows is not None or taps == (0,) or len(self) <= CHUNK:
            return self.dense.gram(self._block(taps, slice(0, len(self))), dtype, self._threads)
        G: Array = np.zeros((len(self), len(self)), dtype)
        for rows in self.chunks():
            X = self._block(taps, rows).astype(dtype, copy=False)
            G[rows, rows] = self.dense.gram(X, dtype, self._threads)
            for columns in itertools.islice(self.chunks(), rows.start // CHUNK):
                np.matmul(X, self._block(taps, columns).astype(dtype, copy=False).T, out=G[rows, columns])
        return G

    def products_with(self, weights: Floats, taps: Sequence[int]) -> dict[int, Array]:
        """X_kᵀ·weights (N_k, C) of some taps, float64; weights (T, C)."""
        if self._rows is not None:
            every = self.taps(slice(0, len(self)))
            return {k: np.asarray(every[k].T @ weights, np.float64) for k in taps}
        found = {k: np.zeros((self.spec.tap_widths[k], weights.shape[1])) for k in taps}
        for rows in self.chunks():
            chunk = self.taps(rows)
            for k in taps:
                found[k] += chunk[k].T @ weights[rows]
        return found

    def _block(self, taps: tuple[int, ...], which: slice | Rows) -> Floats:
        """Neighbouring taps side by side; the zeros between them add nothing to a product."""
        if taps == (0,):
            return self._x[which]
        rows = self._rows[which] if self._rows is not None else self._read(which)
        return rows[:, self._places[taps[0] - 1][0] : self._places[taps[-1] - 1][1]]

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
        last = self.spec.record.segments[-1]
        columns = slice(last.offset, last.offset + last.size)
        if self._rows is not None:
            return self._rows[:, columns][which]
        rows = np.arange(len(self))[which]
        cuts = range(0, len(rows), CHUNK)
        return np.concatenate([self._read(rows[a : a + CHUNK])[:, columns] for a in cuts] or [self._x[:0, :0]])


def alike(weights: Sequence[float]) -> list[tuple[int, ...]]:
    """Taps in runs of one weight, those of weight 0 left out; the raw input, which is kept elsewhere, by itself."""
    behind = itertools.groupby(range(1, len(weights)), key=lambda k: weights[k])
    runs_of = [(0,), *(tuple(run) for _, run in behind)]
    return [taps for taps in runs_of if weights[taps[0]]]


def subset(T: int, most: int, seed: int, pieces: int = RUNS) -> tuple[Rows, list[Rows]]:
    """At most `most` rows of T in order: runs of consecutive samples, spread evenly with a random start.

    Runs, so that samples that resemble their neighbours (consecutive spectra, overlapping windows) do so here too,
    and are left out together.

    Returns:
        The rows, and for each run its place among them.
    """
    n = min(T, most)
    blocks = runs(n, pieces)
    if n == T:
        return np.arange(T), blocks
    gaps = np.floor((np.arange(len(blocks)) + np.random.default_rng([seed, 3]).random()) * (T - n) / len(blocks))
    return np.concatenate([rows + int(gap) for rows, gap in zip(blocks, gaps, strict=True)]), blocks

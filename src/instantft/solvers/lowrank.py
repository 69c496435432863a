"""Reduced-rank ridge regression with several taps: each tap's map to the outputs gets rank R, and they make up for it.

Cutting the full-rank maps down one by one ruins them: what one tap loses, no other replaces. So they are fitted in
turn, each to what the others leave over (backfitting), and each time cut to rank R where that costs least
(reduced-rank regression): of the ridge solution W_k of tap k, with metric X_kᵀX_k + λI, the R leading eigenvectors P of

    M_k = W_kᵀ·(X_kᵀX_k + λI)·W_k = g_kᵀ·W_k                     (C, C),   g_k = X_kᵀ·(Y − Σ_{j≠k} X_j·W_j − bias)

are kept: A_k = W_k·P (N_k, R), B_k = Pᵀ (R, C). No step raises ‖Y − ΣX_k·A_k·B_k − bias‖² + λ·(Σ‖A_k·B_k‖² + bias²).

Two spaces yield the W_k: samples, where there are fewer of them than features, and features (normal equations), where
there are more. T samples, N_k features of tap k, C outputs, R rank; X_k and Y scaled and clipped as in `taps.system`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .factor import inverse_factor

__all__ = ["FeatureSpace", "Pair", "SampleSpace", "Space", "padded", "reduce_rank"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Pair = tuple[Doubles, Doubles]
"""A (N, R) and B (R, C)."""

SWEEPS = 2
"""Rounds over all taps; more bring nothing measurable (docs/decisions/0005-ridge.md)."""


class Space(Protocol):
    """Ridge regression of one tap, or of the bias, with all others held fixed."""

    def solve(self, k: int, W: Mapping[int, Doubles], bias: Doubles) -> tuple[Doubles, Doubles]:
        """W_k (N_k, C), and M_k (C, C)."""
        ...

    def metric(self, k: int, W: Doubles) -> Doubles:
        """Wᵀ·(X_kᵀX_k + λI)·W (C, C)."""
        ...

    def bias(self, W: Mapping[int, Doubles]) -> Doubles:
        """The bias (C,) that goes best with W."""
        ...


class SampleSpace:
    """The space of T samples.

    Args:
        X: (T, N_k) of each tap in use, by number; held, not copied.
        ones: (T,), the bias feature, clipped.
        Y: (T, C).
        lam: λ.
    """

    def __init__(self, X: Mapping[int, Array], ones: Doubles, Y: Doubles, lam: float) -> None:
        self._X, self._ones, self._Y, self._lam = X, ones, Y, lam
        self._V: dict[int, Doubles] = {}

    def solve(self, k: int, W: Mapping[int, Doubles], bias: Doubles) -> tuple[Doubles, Doubles]:
        """See `Space.solve`; the fits of the other taps are computed anew, which costs T·ΣN·C."""
        X = self._X[k]
        rest = self._Y - self._ones[:, None] * bias
        for j, other in W.items():
            if j != k:
                rest -= self._X[j] @ other
        V = self._factor(k)
        g = X.T @ rest
        Wk = V.T @ (V @ g) if X.shape[1] < len(X) else X.T @ (V.T @ (V @ rest))
        return np.asarray(Wk), np.asarray(g.T @ Wk)

    def metric(self, k: int, W: Doubles) -> Doubles:
        """See `Space.metric`."""
        F = self._X[k] @ W
        return np.asarray(F.T @ F + self._lam * (W.T @ W))

    def bias(self, W: Mapping[int, Doubles]) -> Doubles:
        """See `Space.bias`."""
        rest = self._Y - sum(self._X[j] @ other for j, other in W.items())
        return np.asarray((self._ones @ rest) / (self._ones @ self._ones + self._lam))

    def _factor(self, k: int) -> Doubles:
        """Of X_kᵀX_k + λI or X_kX_kᵀ + λI, whichever is smaller; made once."""
        if k not in self._V:
            X = np.asarray(self._X[k], np.float64)
            G = X.T @ X if X.shape[1] < len(X) else X @ X.T
            G[np.diag_indices_from(G)] += self._lam
            self._V[k] = inverse_factor(G)
        return self._V[k]


class FeatureSpace:
    """The space of D features and the bias: normal equations, however many samples they came from.

    Args:
        A: (D+1, D+1), ZᵀZ without λ.
        R: (D+1, C), ZᵀY.
        places: rows of each tap in use, by number; the last row is the bias.
        lam: λ.
    """

    def __init__(self, A: Doubles, R: Doubles, places: Mapping[int, slice], lam: float) -> None:
        self._A, self._R, self._places, self._lam = A, R, places, lam
        self._V: dict[int, Doubles] = {}

    def solve(self, k: int, W: Mapping[int, Doubles], bias: Doubles) -> tuple[Doubles, Doubles]:
        """See `Space.solve`."""
        at = self._places[k]
        g = self._R[at] - np.outer(self._A[at, -1], bias)
        for j, other in W.items():
            if j != k:
                g -= self._A[at, self._places[j]] @ other
        if k not in self._V:
            G = self._A[at, at].copy()
            G[np.diag_indices_from(G)] += self._lam
            self._V[k] = inverse_factor(G)
        V = self._V[k]
        Wk = V.T @ (V @ g)
        return Wk, g.T @ Wk

    def metric(self, k: int, W: Doubles) -> Doubles:
        """See `Space.metric`."""
        at = self._places[k]
        return np.asarray(W.T @ (self._A[at, at] @ W) + self._lam * (W.T @ W))

    def bias(self, W: Mapping[int, Doubles]) -> Doubles:
        """See `Space.bias`."""
        rest = self._R[-1].copy()
        for j, other in W.items():
            rest -= self._A[-1, self._places[j]] @ other
        return np.asarray(rest / (self._A[-1, -1] + self._lam))


def reduce_rank(
    space: Space, W: Mapping[int, Doubles], bias: Doubles, rank: int, sweeps: int = SWEEPS
) -> tuple[dict[int, Pair], Doubles]:
    """Maps of rank R that fit nearly as well together as the full-rank solution.

    Args:
        space: samples or features.
        W: (N_k, C) of each tap, the full-rank solution; where to start.
        bias: (C,) that goes with it.
        rank: R; taps of fewer features or outputs get fewer.
        sweeps: rounds over all taps.

    Returns:
        A_k (N_k, R) and B_k (R, C) of each tap, and the bias.
    """
    pairs: dict[int, Pair] = {}
    now: dict[int, Doubles] = {}
    for k, full in W.items():
        pairs[k] = _cut(full, space.metric(k, full), rank)
        now[k] = pairs[k][0] @ pairs[k][1]
    for _ in range(sweeps):
        for k in W:
            pairs[k] = _cut(*space.solve(k, now, bias), rank)
            now[k] = pairs[k][0] @ pairs[k][1]
        bias = space.bias(now)
    return pairs, bias


def _cut(W: Doubles, M: Doubles, rank: int) -> Pair:
    """W·P and Pᵀ for the leading eigenvectors P of M."""
    r = min(rank, *W.shape)
    _, vectors = np.linalg.eigh((M + M.T) / 2)
    P = vectors[:, ::-1][:, :r]
    return W @ P, np.ascontiguousarray(P.T)


def padded(pair: Pair, rank: int) -> Pair:
    """The same map with exactly R columns and rows, zeros where it needs fewer."""
    A, B = pair
    r = A.shape[1]
    wide, high = np.zeros((len(A), rank), A.dtype), np.zeros((rank, B.shape[1]), B.dtype)
    wide[:, :r], high[:r] = A, B
    return wide, high

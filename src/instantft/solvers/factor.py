"""Positive definite systems, and the scores that fall out of their inverse: leave-one-out and leave-block-out.

For ridge regression in the dual, G α = Y with G = K + λI (T, T), everything follows from V, the inverse of the
Cholesky factor of G (G = L·Lᵀ, V = L⁻¹, so G⁻¹ = Vᵀ·V):

    α = Vᵀ·(V·Y)                                  the solution, (T, C)
    e_i = α_i / (G⁻¹)_ii                          what is left of y_i when sample i is left out
    e_S = ((G⁻¹)_SS)⁻¹·α_S                        the same for a block S of samples

Both are exact: nothing is fitted again, yet no left-out sample has been seen (Rifkin and Lippert, 2007). They hold only
if everything that depends on the left-out samples goes through G. Centring the features would not; that is why the bias
is a feature like any other (K + 1), penalised with the rest.

In the primal, with features X (T, D), A = XᵀX + λI and r = Y − X·W, the same residuals are

    e_i = r_i / (1 − h_i),   e_S = (I − H_SS)⁻¹·r_S,   H = X·A⁻¹·Xᵀ.

T samples, D features, C outputs. float64 unless said otherwise. Only a `Dense` factorises.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.dense import Dense, DType, NumpyDense
from ..errors import UsageError

__all__ = ["NUMPY", "DType", "Factor", "blocks_of", "inverse_factor", "precision", "primal_left_out", "runs"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Rows = NDArray[np.intp]

NUMPY = NumpyDense()

FIRST_JITTER, LAST_JITTER = 1e-12, 1e-4
"""Shares of the mean diagonal that are tried where rounding has made a matrix indefinite."""

HARMLESS = 0.01
"""Share of λ by which rounding may move an eigenvalue before float64 takes over."""

STRIPS, STRIPPED = 4, 256
"""Strips in which a triangle of so many rows or more is multiplied."""

LEVERAGE_MARGIN = 1e-12
"""Least 1 − h: a sample that fixes its own prediction completely keeps a finite left-out residual."""


def inverse_factor(G: Array, dense: Dense = NUMPY, lam: float = 0.0) -> Array:
    """V = L⁻¹, where L is lower triangular and L·Lᵀ = G + λI (n, n); the lower triangle of G is read; of G's type.

    Where rounding has made that indefinite, the smallest of a few multiples of the identity that mends it is added.

    Args:
        dense: who factorises.

    Raises:
        UsageError: G holds NaN or Inf, or is far from positive definite.
    """
    mean = float(np.trace(G)) / max(len(G), 1) + lam
    if not np.isfinite(mean):
        raise UsageError("a system must hold finite values only, not NaN or Inf")
    jitter = 0.0
    while True:
        work = np.array(G, order="C")
        work.reshape(-1)[:: len(G) + 1] += work.dtype.type(lam + jitter * mean)
        V = dense.inverse_factor(work)
        if V is not None:
            return V
        jitter = FIRST_JITTER if jitter == 0 else 10 * jitter
        if jitter > LAST_JITTER:
            raise UsageError("a system must be positive definite: use a larger lambda")


def precision(error: float, lam: float) -> DType:
    """float32 where rounding of this relative size moves no eigenvalue of the system by much beside λ, else float64."""
    return np.float32 if error * float(np.finfo(np.float32).eps) <= HARMLESS * lam else np.float64


def blocks_of(groups: Array) -> list[Rows]:
    """The rows of each group, from a label a row (T,), in the order in which the labels first appear."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    cuts = np.flatnonzero(np.diff(inverse[order])) + 1
    parts = np.split(order, cuts) if len(order) else []
    return [parts[i] for i in np.argsort(first)]


def runs(n: int, count: int) -> list[Rows]:
    """At most `count` blocks of consecutive rows, equally long within one, that together are 0 … n−1."""
    cuts = np.arange(min(count, n) + 1) * n // max(min(count, n), 1)
    return [np.arange(a, b) for a, b in itertools.pairwise(cuts.tolist())]


class Factor:
    """The factorised system of a ridge regression in the dual.

    Args:
        K: (T, T) symmetric, of which the lower triangle is read; its type is that of all results.
        dense: who factorises.
        lam: λ.

    Raises:
        UsageError: see `inverse_factor`.
    """

    def __init__(self, K: Array, dense: Dense = NUMPY, lam: float = 0.0) -> None:
        self.V = inverse_factor(K, dense, lam)
        self._dense = dense

    def solve(self, Y: Array) -> Array:
        """α = G⁻¹·Y, (T, C)."""
        V = self.V
        beta, alpha = np.empty_like(Y), np.empty_like(Y)
        cuts = [len(V) * i // STRIPS for i in range(STRIPS + 1)] if len(V) >= STRIPPED else [0, len(V)]
        for a, b in itertools.pairwise(cuts):  # above V's diagonal is nothing
            beta[a:b] = V[a:b, :b] @ Y[:b]
        for a, b in itertools.pairwise(cuts):
            alpha[a:b] = V[a:, a:b].T @ beta[a:]
        return alpha

    def left_out(self, alpha: Array, blocks: Sequence[Rows] | None = None) -> Array:
        """Residuals (T, C) of every sample, left out alone or with its block.

        Args:
            alpha: as `solve` gives it.
            blocks: disjoint rows that together are all of them, as `blocks_of` gives them; None: every row by itself.
        """
        if blocks is None:
            diagonal = np.einsum("ij,ij->j", self.V, self.V)
            return np.asarray(alpha / diagonal[:, None])
        e = np.empty_like(alpha)
        starts = _starts(blocks)
        if starts is None:
            for rows in blocks:
                columns = self.V[int(rows.min()) :, rows]  # above a column's diagonal is nothing
                e[rows] = np.linalg.solve(columns.T @ columns, alpha[rows])
            return e
        sizes = np.diff(starts)
        ends = np.cumsum(sizes * sizes)
        parts = self._dense.inverse_blocks(self.V, starts)
        if (sizes == sizes[0]).all():
            M = parts.reshape(-1, sizes[0], sizes[0])
            return np.asarray(np.linalg.solve(M, alpha.reshape(len(M), sizes[0], -1)).reshape(alpha.shape))
        for m in np.unique(sizes).tolist():  # blocks of one size together
            which = np.flatnonzero(sizes == m)
            rows = starts[which][:, None] + np.arange(m)
            M = parts[(ends[which] - m * m)[:, None] + np.arange(m * m)].reshape(-1, m, m)
            e[rows] = np.linalg.solve(M, alpha[rows])
        return e


def _starts(blocks: Sequence[Rows]) -> NDArray[np.int64] | None:
    """Where each block starts, and the end, if they are runs of consecutive rows that follow each other; else None."""
    starts = np.cumsum([0, *map(len, blocks)])
    return starts if np.array_equal(np.concatenate([*blocks, []]), np.arange(starts[-1])) else None


def primal_left_out(X: Array, residuals: Array, V: Array, blocks: Sequence[Rows] | None = None) -> Array:
    """As `Factor.left_out`, for some rows of a primal fit; a block must be wholly inside them.

    Args:
        X: (n, D) features.
        residuals: (n, C), Y − X·W.
        V: (D, D), the inverse of the Cholesky factor of XᵀX + λI over all samples.
        blocks: rows of X; None: every row by itself.
    """
    Z = X @ V.T  # H = Z·Zᵀ
    if blocks is None:
        left = 1 - np.einsum("ij,ij->i", Z, Z)
        return np.asarray(residuals / np.maximum(left, LEVERAGE_MARGIN)[:, None])
    e = np.empty_like(residuals)
    for rows in blocks:
        M = np.eye(len(rows), dtype=Z.dtype) - Z[rows] @ Z[rows].T
        e[rows] = np.linalg.solve(M + LEVERAGE_MARGIN * np.eye(len(rows), dtype=Z.dtype), residuals[rows])
    return e

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

T samples, D features, C outputs. float64 unless said otherwise. Only `cholesky` touches LAPACK.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["Factor", "blocks_of", "cholesky", "inverse_lower", "primal_left_out", "solve_lower"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Rows = NDArray[np.intp]

LEAF = 32
"""Triangles up to this size are inverted by LAPACK, all at once; larger ones by halves."""

FIRST_JITTER, LAST_JITTER = 1e-12, 1e-4
"""Shares of the mean diagonal that are tried where rounding has made a matrix indefinite."""

LEVERAGE_MARGIN = 1e-10
"""Least 1 − h: a sample that fixes its own prediction completely keeps a finite left-out residual."""


def cholesky(G: Array) -> Array:
    """The lower triangular L with L·Lᵀ = G (n, n), of G's type.

    Where rounding has made G indefinite, the smallest of a few multiples of the identity that mends it is added.

    Raises:
        UsageError: G holds NaN or Inf, or is far from positive definite.
    """
    mean = float(np.trace(G)) / max(len(G), 1)
    if not np.isfinite(mean):
        raise UsageError("a system must hold finite values only, not NaN or Inf")
    jitter = 0.0
    while True:
        try:
            L = np.linalg.cholesky(G if jitter == 0 else G + (jitter * mean) * np.eye(len(G), dtype=G.dtype))
            if np.isfinite(L).all():
                return np.asarray(L)
        except np.linalg.LinAlgError:
            pass
        jitter = FIRST_JITTER if jitter == 0 else 10 * jitter
        if jitter > LAST_JITTER:
            raise UsageError("a system must be positive definite: use a larger lambda")


def inverse_lower(L: Array) -> Array:
    """The inverse of a lower triangular matrix (n, n), by halves: matrix products, where NumPy would call for SciPy.

    [A 0]⁻¹   [   A⁻¹       0 ]
    [B D]   = [−D⁻¹·B·A⁻¹  D⁻¹]
    """
    n = len(L)
    whole = n // LEAF * LEAF
    V = np.zeros_like(L)
    if whole:
        k = whole // LEAF
        on = np.arange(k)
        leaves = np.tril(np.linalg.inv(L[:whole, :whole].reshape(k, LEAF, k, LEAF)[on, :, on]))
        V[:whole, :whole].reshape(k, LEAF, k, LEAF)[on, :, on] = leaves
    if whole < n:
        V[whole:, whole:] = np.tril(np.linalg.inv(L[whole:, whole:]))

    def fill(first: int, last: int) -> None:
        """Rows and columns first … last−1, counted in leaves."""
        if last - first < 2:
            return
        middle = (first + last) // 2
        fill(first, middle)
        fill(middle, last)
        a, b, c = first * LEAF, middle * LEAF, min(last * LEAF, n)
        V[b:c, a:b] = -(V[b:c, b:c] @ (L[b:c, a:b] @ V[a:b, a:b]))

    fill(0, -(-n // LEAF))
    return V


def solve_lower(L: Array, B: Array, *, transposed: bool = False) -> Array:
    """X with L·X = B, or Lᵀ·X = B, for lower triangular L (n, n) and B (n, m), by substitution of leaves."""
    X = np.array(B, dtype=np.result_type(L, B))
    n = len(L)
    starts = range(0, n, LEAF)
    for a in reversed(starts) if transposed else starts:
        b = min(a + LEAF, n)
        leaf = L[a:b, a:b]
        X[a:b] = np.linalg.solve(leaf.T if transposed else leaf, X[a:b])
        if transposed:
            X[:a] -= L[a:b, :a].T @ X[a:b]
        else:
            X[b:] -= L[b:, a:b] @ X[a:b]
    return X


def blocks_of(groups: Array) -> list[Rows]:
    """The rows of each group, from a label a row (T,), in the order in which the labels first appear."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    cuts = np.flatnonzero(np.diff(inverse[order])) + 1
    parts = np.split(order, cuts) if len(order) else []
    return [parts[i] for i in np.argsort(first)]


class Factor:
    """The factorised system of a ridge regression in the dual.

    Args:
        G: (T, T) symmetric, K + λI; its type is that of all results.

    Raises:
        UsageError: see `cholesky`.
    """

    def __init__(self, G: Array) -> None:
        self.L = cholesky(G)
        self.V = inverse_lower(self.L)

    def solve(self, Y: Array) -> Array:
        """α = G⁻¹·Y, (T, C)."""
        return np.asarray(self.V.T @ (self.V @ Y))

    def left_out(self, alpha: Array, blocks: Iterable[Rows] | None = None) -> Array:
        """Residuals (T, C) of every sample, left out alone or with its block.

        Args:
            alpha: as `solve` gives it.
            blocks: disjoint rows that together are all of them, as `blocks_of` gives them; None: every row by itself.
        """
        if blocks is None:
            diagonal = np.einsum("ij,ij->j", self.V, self.V)
            return np.asarray(alpha / diagonal[:, None])
        blocks = list(blocks)
        e = np.empty_like(alpha)
        if len({len(rows) for rows in blocks}) == 1:
            every = np.array(blocks)  # (blocks, size): all of them at once
            columns = self.V[:, every].transpose(1, 0, 2)
            e[every] = np.linalg.solve(columns.transpose(0, 2, 1) @ columns, alpha[every])
            return e
        for rows in blocks:
            columns = self.V[:, rows]
            e[rows] = np.linalg.solve(columns.T @ columns, alpha[rows])
        return e


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

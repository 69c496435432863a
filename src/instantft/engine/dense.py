"""The dense algebra of the closed form: products of rows, the inverse of a Cholesky factor, blocks of an inverse.

The solvers plan, a `Dense` computes: `NumpyDense` here with NumPy's products and LAPACK, for the reference engine and
as the oracle; `engine.native` with the core. Of symmetric matrices only the lower triangle is read and written; what is
above the diagonal of one that is returned has no meaning.

n rows, K values in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["DType", "Dense", "NumpyDense"]

Array = NDArray[Any]
DType = type[np.float32] | type[np.float64]

LEAF = 32
"""Systems up to this size go to LAPACK."""


class Dense(Protocol):
    """What the closed form asks of an engine; everything float32 or float64."""

    def gram(self, X: Array, dtype: DType, threads: int = 1) -> Array:
        """G = X·Xᵀ (n, n), computed in `dtype`, lower triangle; X (n, K) float32, its rows may lie apart."""
        ...

    def inverse_factor(self, G: Array) -> Array | None:
        """V = L⁻¹ (n, n), L lower triangular, L·Lᵀ = G; None where G is not positive definite or not finite.

        G (n, n), C-contiguous, is used up.
        """
        ...

    def inverse_blocks(self, V: Array, starts: NDArray[np.int64]) -> Array:
        """Blocks of G⁻¹ = VᵀV on its diagonal, one after the other, each by rows.

        Args:
            V: (n, n), as `inverse_factor` gives it.
            starts: (B+1,), block b is that of rows starts[b] … starts[b+1]−1.
        """
        ...

    def combine(
        self, parts: Sequence[Array], weights: Sequence[float], d: Array, c: Array, rows: Array | None = None
    ) -> Array:
        """G_ij = d_i·d_j·Σ_p w_p·P_p[r_i, r_j] + c_i·c_j (n, n), lower triangle, of the parts' type.

        Args:
            parts: at least one P_p (m, m), C-contiguous, all of one type.
            weights: w_p of each.
            d, c: (n,).
            rows: r (n,), rows and columns of the parts; None: all, and n = m.
        """
        ...


class NumpyDense:
    """`Dense` in NumPy."""

    def gram(self, X: Array, dtype: DType, threads: int = 1) -> Array:
        """See `Dense.gram`."""
        X = X.astype(dtype, copy=False)
        return np.asarray(X @ X.T)

    def inverse_factor(self, G: Array) -> Array | None:
        """See `Dense.inverse_factor`; by halves, so that nearly all of it is matrix products.

        NumPy's own Cholesky is slower, and it has no inverse of a triangle.

        [A ·]   A = L₁·L₁ᵀ,  L₂₁ = B·L₁⁻ᵀ,  D − L₂₁·L₂₁ᵀ = L₂·L₂ᵀ        [    L₁⁻¹          0  ]
        [B D]                                                        V = [−L₂⁻¹·L₂₁·L₁⁻¹  L₂⁻¹]
        """
        V = np.zeros_like(G)
        try:
            with np.errstate(all="ignore"):
                _by_halves(G, V, 0, len(G))
        except np.linalg.LinAlgError:
            return None
        return V if np.isfinite(V).all() and (np.diagonal(V) > 0).all() else None

    def inverse_blocks(self, V: Array, starts: NDArray[np.int64]) -> Array:
        """See `Dense.inverse_blocks`; above a column's diagonal there is nothing."""
        pairs = zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        blocks = [(V[a:, a:b].T @ V[a:, a:b]).ravel() for a, b in pairs]
        return np.concatenate(blocks) if blocks else np.empty(0, V.dtype)

    def combine(
        self, parts: Sequence[Array], weights: Sequence[float], d: Array, c: Array, rows: Array | None = None
    ) -> Array:
        """See `Dense.combine`."""
        dtype = parts[0].dtype
        d, c = d.astype(dtype), c.astype(dtype)
        G: Array = np.zeros((len(d), len(d)), dtype)
        for w, part in zip(weights, parts, strict=True):
            G += dtype.type(w) * (part if rows is None else part[np.ix_(rows, rows)])
        G *= d[:, None] * d
        G += c[:, None] * c
        return G


def _by_halves(G: Array, V: Array, a: int, b: int) -> None:
    """Rows and columns a … b−1 of V; those of G are used up."""
    if b - a <= LEAF:
        V[a:b, a:b] = np.tril(np.linalg.inv(np.linalg.cholesky(G[a:b, a:b])))
        return
    m = (a + b) // 2
    _by_halves(G, V, a, m)
    upper = V[a:m, a:m]
    L21 = G[m:b, a:m] @ upper.T
    G[m:b, m:b] -= L21 @ L21.T
    _by_halves(G, V, m, b)
    np.matmul(V[m:b, m:b], L21 @ upper, out=V[m:b, a:m])
    V[m:b, a:m] *= -1

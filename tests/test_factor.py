"""The factorisation and its left-out scores, against NumPy's inverse and against fitting again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.errors import UsageError
from instantft.solvers.factor import Factor, blocks_of, inverse_factor, primal_left_out, runs

EXACT = 1e-9
"""Relative; systems here have a condition number below 1e5, float64 has 16 digits."""


def positive(n: int, seed: int = 0, floor: float = 0.1) -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(n, n + 3))
    return X @ X.T / n + floor * np.eye(n)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = EXACT) -> None:
    assert np.abs(a - b).max() <= tolerance * max(1.0, float(np.abs(b).max()))


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65, 100, 257])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_factor(n: int, dtype: type) -> None:
    G: np.ndarray = positive(n).astype(dtype)
    V = inverse_factor(G)
    assert V.dtype == dtype
    assert np.array_equal(V, np.tril(V))
    close(V @ G @ V.T, np.eye(n), EXACT if dtype is np.float64 else 1e-4)


def test_the_argument_is_not_changed() -> None:
    G = positive(70)
    before = G.copy()
    inverse_factor(G)
    assert np.array_equal(G, before)


def test_semidefinite_is_mended() -> None:
    x = np.ones((50, 1))
    V = inverse_factor(x @ x.T)
    assert np.isfinite(V).all()


@pytest.mark.parametrize("G", [np.full((3, 3), np.nan), np.diag([1.0, np.inf])])
def test_not_finite(G: np.ndarray) -> None:
    with pytest.raises(UsageError, match="finite values only, not NaN or Inf"):
        inverse_factor(G)


def test_indefinite() -> None:
    with pytest.raises(UsageError, match="positive definite"):
        inverse_factor(np.diag([1.0, -1.0]))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 24),
    d=st.integers(1, 30),
    lam=st.sampled_from([1e-3, 0.1, 10.0]),
    seed=st.integers(0, 1000),
    groups=st.integers(0, 5),
)
def test_left_out_is_fitting_again_without_them(n: int, d: int, lam: float, seed: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    X, Y = np.c_[rng.normal(size=(n, d)), np.ones(n)], rng.normal(size=(n, 3))
    X[rng.integers(n)] = X[0]  # a duplicate
    blocks = blocks_of(rng.integers(0, groups, n)) if groups else [np.array([i]) for i in range(n)]
    expected = np.empty_like(Y)
    for rows in blocks:
        kept = np.setdiff1d(np.arange(n), rows)
        W = np.linalg.solve(X[kept].T @ X[kept] + lam * np.eye(d + 1), X[kept].T @ Y[kept])
        expected[rows] = Y[rows] - X[rows] @ W
    factor = Factor(X @ X.T + lam * np.eye(n))
    alpha = factor.solve(Y)
    close(factor.left_out(alpha, blocks if groups else None), expected, 1e-7)
    V = inverse_factor(X.T @ X + lam * np.eye(d + 1))
    residuals = Y - X @ (V.T @ (V @ (X.T @ Y)))
    close(primal_left_out(X, residuals, V, blocks if groups else None), expected, 1e-6)


def test_centring_the_features_would_leak() -> None:
    """Why the bias is a feature: with centred features left-out errors go to zero as λ does, whatever the targets."""
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(40, 200)), np.eye(4)[rng.integers(0, 4, 40)]
    lam = 1e-6
    centred = X - X.mean(axis=0)
    leaking = Factor(centred @ centred.T + lam * np.eye(40))
    honest = Factor(X @ X.T + 1 + lam * np.eye(40))
    assert np.abs(leaking.left_out(leaking.solve(Y - Y.mean(axis=0)))).mean() < 1e-3
    assert np.abs(honest.left_out(honest.solve(Y))).mean() > 0.1


def test_blocks_of() -> None:
    blocks = blocks_of(np.array(["b", "a", "b", "c", "a"]))
    assert [rows.tolist() for rows in blocks] == [[0, 2], [1, 4], [3]]
    assert blocks_of(np.array([], int)) == []


def test_blocks_of_one_size_and_of_several_agree() -> None:
    G, Y = positive(24), np.random.default_rng(1).normal(size=(24, 2))
    factor = Factor(G)
    alpha = factor.solve(Y)
    even = [np.arange(i, i + 4) for i in range(0, 24, 4)]
    uneven = [*even[:-1], np.arange(20, 22), np.arange(22, 24)]
    close(factor.left_out(alpha, even)[:20], factor.left_out(alpha, uneven)[:20])


@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 1000])
def test_runs(n: int) -> None:
    blocks = runs(n, 32)
    assert len(blocks) == min(n, 32)
    assert np.concatenate(blocks).tolist() == list(range(n))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1

"""The dense algebra of the closed form: NumPy's and the core's on every instruction set, against plain NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instantft.engine import Engine, get_engine
from instantft.engine.dense import Dense, DType
from instantft.engine.native import NativeDense, NativeEngine

from .conftest import ISAS

ROUNDING = 32.0
"""Units of rounding of the type, for systems whose condition number is below 100; seen: 8."""

SIZES = [1, 2, 3, 23, 24, 25, 32, 33, 48, 49, 64, 65, 97, 100, 131, 200, 257]
"""Around leaves (32) and panels (3 to 48 columns, by instruction set), and such that blocks are cut unevenly."""

TYPES: list[DType] = [np.float32, np.float64]


@pytest.fixture
def dense(engine: Engine) -> Dense:
    return engine.dense


def close(a: np.ndarray, b: np.ndarray, dtype: DType, scale: float | None = None) -> None:
    largest = float(np.abs(b).max(initial=0)) if scale is None else scale
    assert a.dtype == dtype
    assert np.abs(a - b).max(initial=0) <= ROUNDING * float(np.finfo(dtype).eps) * largest


def rows(n: int, K: int, seed: int = 0) -> np.ndarray:
    """(n, K) float32 whose rows lie apart and off any boundary, as taps of a record do."""
    return np.random.default_rng(seed).normal(size=(n, K + 5)).astype(np.float32)[:, 2 : K + 2]


def positive(n: int, seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).normal(size=(n, n + 3))
    return X @ X.T / n + 0.1 * np.eye(n)


def lower(n: int, of: np.ndarray) -> np.ndarray:
    """With what is above the diagonal spoilt: it must not be looked at."""
    spoilt = of.copy()
    spoilt[np.triu_indices(n, 1)] = np.nan
    return spoilt


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("K", [0, 1, 7, 96, 256, 257, 1024, 1025, 1400])
@pytest.mark.parametrize("n", [0, 1, 5, 24, 50])
def test_gram(dense: Dense, n: int, K: int, dtype: DType) -> None:
    X = rows(n, K)
    G = dense.gram(X, dtype)
    assert G.shape == (n, n)
    close(np.tril(G), np.tril(X.astype(np.float64) @ X.T.astype(np.float64)), dtype, max(K, 1))


@pytest.mark.parametrize("n", SIZES)
def test_gram_of_many_rows(dense: Dense, n: int) -> None:
    X = rows(n, 300, n)
    close(np.tril(dense.gram(X, np.float32)), np.tril(X.astype(np.float64) @ X.T.astype(np.float64)), np.float32)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [40, 131, 300])
def test_threads_change_no_bit(dense: Dense, n: int, dtype: DType) -> None:
    X = rows(n, 700)
    expected = dense.gram(X, dtype)
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(dense.gram(X, dtype, threads), expected)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", SIZES)
def test_inverse_factor(dense: Dense, n: int, dtype: DType) -> None:
    G = positive(n).astype(dtype)
    V = dense.inverse_factor(lower(n, G) if isinstance(dense, NativeDense) else G.copy())
    assert V is not None
    assert np.array_equal(V, np.tril(V))
    close(V, np.linalg.inv(np.linalg.cholesky(G.astype(np.float64))), dtype, 10.0)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 70, 150])
def test_not_positive_definite(dense: Dense, n: int, dtype: DType) -> None:
    """A pivot that is zero, negative, NaN or infinite, wherever it is: no factor, and never NaN in one."""
    good = positive(n).astype(dtype)
    for at in {0, n // 2, n - 1}:
        for bad in (-1.0, 0.0, np.nan, np.inf):
            G = good.copy()
            G[at, at] = bad
            assert dense.inverse_factor(G) is None
        if at:
            for bad in (np.nan, np.inf, 1e6):
                G = good.copy()
                G[at, 0] = G[0, at] = bad
                assert dense.inverse_factor(G) is None
    assert dense.inverse_factor(np.zeros((n, n), dtype)) is None
    assert dense.inverse_factor(np.ones((n, n), dtype)) is None or n == 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("starts", [[0], [0, 1], [0, 16, 32, 48], [0, 3, 40, 41, 97], [5, 9, 90]])
def test_inverse_blocks(dense: Dense, starts: list[int], dtype: DType) -> None:
    n = max(starts[-1], 1)
    G = positive(n).astype(dtype)
    V = dense.inverse_factor(G.copy())
    assert V is not None
    expected = np.linalg.inv(G.astype(np.float64))
    got, at = dense.inverse_blocks(V, np.array(starts)), 0
    for a, b in itertools.pairwise(starts):
        block = got[at : at + (b - a) ** 2].reshape(b - a, b - a)
        close(block, expected[a:b, a:b], dtype, 100.0)
        at += (b - a) ** 2
    assert at == len(got)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("n", [1, 2, 25, 97])
def test_combine(dense: Dense, n: int, some: bool, dtype: DType) -> None:
    rng = np.random.default_rng(n)
    parts = [positive(n, seed).astype(dtype) for seed in range(3)]
    which = np.sort(rng.permutation(n)[: (n + 1) // 2]) if some else np.arange(n)
    d, c = rng.uniform(0.5, 2, (2, len(which)))
    weights = (1.0, 0.3, 0.09)
    exact = sum(w * part.astype(np.float64)[np.ix_(which, which)] for w, part in zip(weights, parts, strict=True))
    given = [lower(n, part) for part in parts]
    got = dense.combine(given, weights, d, c, which if some else None)
    close(np.tril(got), np.tril(d[:, None] * d * exact + c[:, None] * c), dtype)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 120), K=st.integers(1, 600), lam=st.sampled_from([0.1, 1.0, 10.0]), seed=st.integers(0, 999))
def test_solves_a_regression(dense: Dense, n: int, K: int, lam: float, seed: int) -> None:
    """α = VᵀV·Y solves (X·Xᵀ + λI)·α = Y, with duplicates among the rows and a column that is always zero."""
    X = rows(n, K, seed) / np.float32(np.sqrt(K))
    X[seed % n], X[:, seed % K] = X[0], 0
    G = dense.gram(X, np.float64)
    G[np.diag_indices(n)] += lam
    V = dense.inverse_factor(G)
    assert V is not None
    Y = np.random.default_rng(seed).normal(size=(n, 2))
    exact = X.astype(np.float64)
    residual = exact @ (exact.T @ (V.T @ (V @ Y))) + lam * (V.T @ (V @ Y)) - Y
    assert np.abs(residual).max() <= 1e-10 / min(lam, 1)  # condition number below 1e4


@pytest.mark.skipif(ISAS == ["not built"], reason="the native core was not built")
def test_the_core_refuses_what_does_not_fit() -> None:
    core = NativeEngine()._core
    from instantft._core import DENSE_BYTES
    from instantft.engine.native import _scratch

    x, g, ws = np.zeros((4, 3), np.float32), np.zeros((4, 4), np.float32), _scratch()
    assert ws.nbytes == DENSE_BYTES
    core.gram(x, 0, 4, False, g, ws)
    for bad in (
        (x, 0, 5, False, g, ws),
        (x, -1, 4, False, g, ws),
        (x, 0, 4, False, g[:3, :3].copy(), ws),
        (x, 0, 4, False, g, ws[: DENSE_BYTES - 1]),
        (np.zeros((3, 4), np.float32).T, 0, 4, False, g, ws),
    ):
        with pytest.raises(ValueError, match=r"rows must|square matrix|workspace|side by side"):
            core.gram(*bad)
    with pytest.raises(TypeError):  # never a silent copy of what is written to
        core.gram(x, 0, 4, False, g.astype(np.float64), ws)
    v = np.eye(4, dtype=np.float32)
    for starts in ([0, 5], [-1, 2], [2, 1]):
        with pytest.raises(ValueError, match="blocks must"):
            core.inverse_blocks(v, np.array(starts), np.zeros(64, np.float32), ws)
    with pytest.raises(ValueError, match="more room"):
        core.inverse_blocks(v, np.array([0, 4]), np.zeros(15, np.float32), ws)
    one, two, all_rows = np.ones(1, np.float32), np.ones(2, np.float32), np.empty(0, np.int64)
    h = np.zeros((2, 2), np.float32)
    core.combine([v], one, np.array([0, 3]), two, two, h)
    for wrong in (
        ([v], one, np.array([0, 4]), two, two, h),
        ([v], one, np.array([-1, 0]), two, two, h),
        ([v], one, np.array([0]), two, two, h),
        ([v], one, all_rows, two, two, h),
        ([v], two, np.array([0, 3]), two, two, h),
        ([v, h], two, np.array([0, 3]), two, two, h),
        ([v], one, np.array([0, 3]), one, two, h),
    ):
        with pytest.raises(ValueError, match=r"rows must|sizes must|one size"):
            core.combine(*wrong)


def test_engines_agree() -> None:
    """Each engine's own order of sums, to a few units of rounding."""
    reference, other = get_engine("reference").dense, get_engine().dense
    X = rows(150, 500)
    close(np.tril(other.gram(X, np.float32)), np.tril(reference.gram(X, np.float32)), np.float32)

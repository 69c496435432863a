"""Reduced rank: the loss never rises, both spaces agree, one tap is solved to the optimum, and taps help each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from instantft.solvers.lowrank import FeatureSpace, SampleSpace, padded, reduce_rank

LAM = 0.3


def problem(T: int, widths: tuple[int, ...], C: int = 5, seed: int = 0) -> tuple[dict, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    X = {2 * i: rng.normal(size=(T, n)) for i, n in enumerate(widths)}
    return X, rng.uniform(0.2, 1, T), rng.normal(size=(T, C))


def full_rank(X: dict, ones: np.ndarray, Y: np.ndarray) -> tuple[dict, np.ndarray]:
    Z = np.concatenate([*X.values(), ones[:, None]], axis=1)
    W = np.linalg.solve(Z.T @ Z + LAM * np.eye(Z.shape[1]), Z.T @ Y)
    cuts = np.cumsum([0, *(x.shape[1] for x in X.values())])
    return {k: W[a:b] for k, a, b in zip(X, cuts, cuts[1:], strict=False)}, W[-1]


def loss(X: dict, ones: np.ndarray, Y: np.ndarray, pairs: dict, bias: np.ndarray) -> float:
    W = {k: A @ B for k, (A, B) in pairs.items()}
    e = Y - ones[:, None] * bias - sum(X[k] @ W[k] for k in X)
    return float((e**2).sum() + LAM * (sum((w**2).sum() for w in W.values()) + (bias**2).sum()))


def features(X: dict, ones: np.ndarray, Y: np.ndarray) -> FeatureSpace:
    Z = np.concatenate([*X.values(), ones[:, None]], axis=1)
    cuts = np.cumsum([0, *(x.shape[1] for x in X.values())]).tolist()
    places = {k: slice(a, b) for k, a, b in zip(X, cuts, cuts[1:], strict=False)}
    return FeatureSpace(Z.T @ Z, Z.T @ Y, places, LAM)


@pytest.mark.parametrize("T", [15, 80])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_sweeps_lower_the_loss_and_both_spaces_agree(T: int, rank: int) -> None:
    X, ones, Y = problem(T, (30, 3, 12))
    W, bias = full_rank(X, ones, Y)
    spaces = SampleSpace(X, ones, Y, LAM), features(X, ones, Y)
    losses = []
    for sweeps in range(5):
        (pairs, b), (other, c) = (reduce_rank(space, W, bias, rank, sweeps) for space in spaces)
        losses.append(loss(X, ones, Y, pairs, b))
        assert loss(X, ones, Y, other, c) == pytest.approx(losses[-1], rel=1e-6)
        for k, (A, B) in pairs.items():
            assert A.shape == (X[k].shape[1], min(rank, X[k].shape[1], 5))
            assert np.allclose(A @ B, other[k][0] @ other[k][1], atol=1e-6)
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(losses))
    assert losses[-1] >= loss(X, ones, Y, {k: (w, np.eye(5)) for k, w in W.items()}, bias) - 1e-9


def test_one_tap_is_reduced_rank_regression() -> None:
    """With one tap and no bias the ridge solution, cut in its own metric, is the optimum: no other beats it."""
    X, _, Y = problem(40, (8,))
    ones = np.zeros(40)
    W, bias = full_rank(X, ones, Y)
    pairs, b = reduce_rank(SampleSpace(X, ones, Y, LAM), W, bias, 2)
    best = loss(X, ones, Y, pairs, b)
    rng = np.random.default_rng(0)
    for _ in range(200):
        P = np.linalg.qr(rng.normal(size=(5, 2)))[0]
        A = np.linalg.solve(X[0].T @ X[0] + LAM * np.eye(8), X[0].T @ Y @ P)
        assert best <= loss(X, ones, Y, {0: (A, P.T)}, b) + 1e-9


def test_taps_make_up_for_each_other() -> None:
    """Two copies of a tap at rank 1 each can together do what one does at rank 2; cutting them alone would not."""
    X, ones, Y = problem(60, (10,), C=2)
    X[2] = X[0]
    W, bias = full_rank(X, ones, Y)
    space = SampleSpace(X, ones, Y, LAM)
    cut = loss(X, ones, Y, *reduce_rank(space, W, bias, 1, 0))
    swept = loss(X, ones, Y, *reduce_rank(space, W, bias, 1, 20))
    alone = {0: X[0]}
    one_of_rank_two = loss(
        alone, ones, Y, *reduce_rank(SampleSpace(alone, ones, Y, LAM), *full_rank(alone, ones, Y), 2)
    )
    assert swept < 0.95 * cut
    assert swept < 1.05 * one_of_rank_two


def test_padded() -> None:
    A, B = padded((np.ones((4, 2)), np.ones((2, 3))), 5)
    assert A.shape == (4, 5)
    assert B.shape == (5, 3)
    assert np.array_equal(A @ B, np.full((4, 3), 2.0))

"""The search for λ and the choice of taps, on made data where the right answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from instantft.solvers import taps
from instantft.solvers.records import RUNS, subset
from instantft.tasks import Targets

RNG = np.random.default_rng(0)


def made(n: int, noise: tuple[float, ...], C: int = 3, seed: int = 0) -> taps.Sample:
    """A tap for each number in `noise`: class centres in 20 dimensions, and that much noise on them."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, C, n)
    parts = [rng.normal(size=(C, 20))[y] + sd * rng.normal(size=(n, 20)) for sd in noise]
    parts = [x / np.linalg.norm(x, axis=1).mean() for x in parts]
    blocks = np.array_split(np.arange(n), 32)
    return taps.Sample([x @ x.T for x in parts], Targets("classification", y, C), blocks)


@pytest.mark.parametrize("noise", [0.3, 3.0, 30.0])
def test_lambda_is_the_minimum_of_the_left_out_error(noise: float) -> None:
    s = made(60, (noise,))
    made_system = taps.system(s.grams, (1.0,))
    lam, _ = taps.best_lambda(made_system, s.goal.Y)

    def error(value: float) -> float:
        return float((taps.left_out(made_system, s.goal.Y, value) ** 2).mean())

    best = min(map(error, 10 ** np.arange(-4, 2.01, 0.1)))
    assert taps.LOWEST <= lam <= taps.HIGHEST
    assert error(lam) <= 1.01 * best


@pytest.mark.parametrize("start", [1e-4, 0.1, 100.0])
def test_lambda_stays_inside_its_bounds(start: float) -> None:
    pure_noise = made(40, (1e6,))
    lam, error = taps.best_lambda(taps.system(pure_noise.grams, (1.0,)), pure_noise.goal.Y, start)
    assert taps.LOWEST <= lam <= taps.HIGHEST * 1.01
    assert np.isfinite(error)


def test_one_sample() -> None:
    one = taps.System(np.ones((1, 1)), np.ones(1), 1.0, np.inf)
    assert taps.best_lambda(one, np.ones((1, 2))) == (taps.START, 2.0)


def test_the_mean_norm_is_one() -> None:
    s = made(30, (1.0, 5.0))
    found = taps.system(s.grams, (1.0, 0.3))
    assert np.sqrt(np.diagonal(found.K) - 1).mean() == pytest.approx(1)
    assert (found.c == 1).all()
    nothing = taps.system([np.zeros((4, 4))], (1.0,))
    assert nothing.scale == 1
    assert (nothing.K == 1).all()


def test_a_giant_record_is_clipped() -> None:
    """It must neither set the scale nor decide λ; and clipping is weighted least squares, to the digit."""
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(40, 6)), np.eye(2)[rng.integers(0, 2, 40)]
    X[5] *= 1e6
    found = taps.system([X @ X.T], (1.0,))
    norms = np.linalg.norm(X, axis=1)
    assert found.limit == pytest.approx(taps.CLIP * np.median(norms))
    assert found.c[5] == pytest.approx(found.limit / norms[5])
    assert (np.delete(found.c, 5) == 1).all()
    assert found.scale == pytest.approx(1 / np.minimum(norms, found.limit).mean())
    Z = found.c[:, None] * np.c_[found.scale * X, np.ones(40)]
    kept = np.arange(40) != 8
    targets = found.c[:, None] * Y
    W = np.linalg.solve(Z[kept].T @ Z[kept] + 0.1 * np.eye(7), Z[kept].T @ targets[kept])
    assert taps.left_out(found, Y, 0.1)[8] == pytest.approx(targets[8] - Z[8] @ W, rel=1e-6)


def test_deep_taps_that_are_noise_are_left_aside() -> None:
    chosen = taps.choose(made(256, (0.5, 20.0, 20.0)))
    assert chosen.weights == taps.ladder_weights(3, *taps.LADDER[-1])


def test_deep_taps_that_know_more_are_kept() -> None:
    chosen = taps.choose(made(256, (20.0, 20.0, 2.0)))
    assert chosen.weights == (1.0, 1.0, 1.0)


def test_many_samples_decide_what_few_leave_open() -> None:
    few, many = made(64, (5.0, 5.0, 5.0)), made(512, (20.0, 20.0, 2.0))
    asked = []

    def more() -> taps.Sample:
        asked.append(True)
        return many

    assert taps.choose(few, more).weights == (1.0, 1.0, 1.0)
    assert asked == [True]


def test_many_samples_are_not_asked_for_where_few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "LADDER", (taps.LADDER[0], taps.LADDER[-1]))

    def more() -> taps.Sample:
        raise AssertionError("not needed")

    assert taps.choose(made(256, (20.0, 20.0, 1.0)), more).weights == (1.0, 1.0, 1.0)


def test_weights_of_the_ladder() -> None:
    assert taps.ladder_weights(4, 0.3, 0.5) == (1.0, 0.3, 0.15, 0.15)
    assert taps.ladder_weights(1, 0.3, 0.5) == (1.0,)
    assert taps.choose(made(40, (1.0,))).weights == (1.0,)


def test_samples_of_a_block_count_as_one() -> None:
    """A difference that is the same for all samples of a block is no surer for there being many of them."""
    each = RNG.normal(size=32) + 0.3
    alone = taps.excess(each, [np.array([i]) for i in range(32)])
    blocks = [np.arange(8 * i, 8 * i + 8) for i in range(32)]
    assert taps.excess(np.repeat(each, 8), blocks) == pytest.approx(alone)


@pytest.mark.parametrize("T", [1, 5, 31, 32, 33, 100, 256, 257, 300, 1000, 1024, 5000])
@pytest.mark.parametrize("seed", [0, 1])
def test_subset(T: int, seed: int) -> None:
    rows, blocks = subset(T, 256, seed)
    assert len(rows) == min(T, 256)
    assert len(set(rows.tolist())) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < T
    assert (np.diff(rows) > 0).all()
    assert len(blocks) == min(len(rows), RUNS)
    assert np.concatenate(blocks).tolist() == list(range(len(rows)))
    for block in blocks:
        assert (np.diff(rows[block]) == 1).all(), "a block is a run of consecutive samples"
    again, _ = subset(T, 256, seed)
    assert np.array_equal(rows, again)

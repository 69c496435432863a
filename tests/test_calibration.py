"""The temperature against a search, its cap, and the calibration error on cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.errors import UsageError
from instantft.solvers.calibration import (
    LOWEST,
    expected_calibration_error,
    fit_mixture,
    fit_temperature,
    log_loss,
    softmax,
)


def drawn(T: int, beta: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels drawn with the probabilities softmax(beta·scores)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(T, 5)) * 0.3
    p = softmax(beta * z)
    return z, (p.cumsum(axis=1) < rng.random((T, 1))).sum(axis=1)


@pytest.mark.parametrize("beta", [1.0, 8.0, 20.0])
def test_finds_the_temperature_labels_were_drawn_with(beta: float) -> None:
    z, y = drawn(20_000, beta)
    found = float(fit_temperature(z, y))
    assert found == pytest.approx(beta, rel=0.05)
    assert expected_calibration_error(softmax(found * z), y) < 0.015


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), T=st.integers(2, 40), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_is_the_minimum(seed: int, T: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    z, y = rng.normal(size=(T, 3)) * scale, rng.integers(0, 3, T)
    found = float(fit_temperature(z, y))
    share = 1 / (T + 1)

    def loss(beta: float) -> float:
        smooth = (1 - share) * log_loss(beta * z, y)
        return float((smooth + share * np.mean([log_loss(beta * z, np.full(T, c)) for c in range(3)], axis=0)).mean())

    at_bound = found * float((z - z.mean(axis=1, keepdims=True)).std()) < 2e-3  # worse than chance: as flat as it gets
    for other in (*([] if at_bound else [0.5 * found, 0.97 * found]), 1.03 * found, 2 * found):
        assert loss(found) <= loss(other) + 1e-9


def test_capped_where_everything_is_right() -> None:
    z = np.eye(3)[np.arange(30) % 3]
    found = float(fit_temperature(z, np.arange(30) % 3))
    confidence = float(softmax(found * z).max(axis=1).mean())
    assert confidence == pytest.approx(1 - (2 / 3) / 31, abs=1e-6)  # the share that is spread over the other classes


def test_worse_than_chance_keeps_the_order() -> None:
    z, y = drawn(500, 10.0)
    assert 0 < float(fit_temperature(-z, y)) < 0.1


@pytest.mark.parametrize("T", [1, 5])
def test_scores_that_say_nothing(T: int) -> None:
    assert float(fit_temperature(np.full((T, 4), 0.25), np.zeros(T, int))) == 1.0


def test_bad_scores() -> None:
    with pytest.raises(UsageError, match="finite, not NaN or Inf"):
        fit_temperature(np.array([[0.0, np.nan]]), np.array([0]))
    with pytest.raises(UsageError, match="of one length, at least 1"):
        fit_temperature(np.zeros((2, 2)), np.array([0]))
    with pytest.raises(UsageError, match="of one length, at least 1"):
        fit_temperature(np.zeros((0, 2)), np.array([], int))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), T=st.integers(2, 60), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_mixture_is_the_minimum(seed: int, T: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, T)
    z, c = (rng.normal(size=(T, 3)) + strength * np.eye(3)[y] for strength in rng.uniform(0, 2, 2))
    c *= scale
    beta, gain = (float(v) for v in fit_mixture(z, c, y))
    share = 1 / (T + 1)

    def loss(b: float, g: float) -> float:
        logits = b * z + g * c
        uniform = np.mean([log_loss(logits, np.full(T, k)) for k in range(3)], axis=0)
        return float(((1 - share) * log_loss(logits, y) + share * uniform).mean())

    found = loss(beta, gain)
    assert found <= loss(float(fit_temperature(z, y)), 0) + 1e-6
    least = LOWEST / float(np.sqrt(np.mean((z - z.mean(axis=1, keepdims=True)) ** 2)))
    for b in (max(0.8 * beta, least), beta, 1.2 * beta):
        for g in (0.8 * gain, gain, 1.2 * gain, gain + 0.1 / scale):
            assert found <= loss(b, g) + 1e-4


def test_mixture_with_a_useless_network() -> None:
    z, y = drawn(500, 10.0)
    beta, gain = fit_mixture(z, np.zeros_like(z), y)
    assert float(beta) == pytest.approx(float(fit_temperature(z, y)), rel=1e-3)
    assert gain == 0
    _, gain = fit_mixture(z, -np.eye(5)[y], y)
    assert gain == 0
    with pytest.raises(UsageError, match=r"logits must be finite, \[500, 5\], not \[2, 5\]"):
        fit_mixture(z, z[:2], y)


@pytest.mark.parametrize("noise", [0.0, 3e-8])
def test_scores_that_say_nothing_stay_as_they_are(noise: float) -> None:
    """What is left of nothing is rounding, which no temperature may blow up."""
    z = np.random.default_rng(0).normal(size=(7, 3)) * noise
    y = np.arange(7) % 3
    assert float(fit_temperature(z, y)) == 1
    beta, gain = fit_mixture(z, np.eye(3)[y], y)
    assert float(beta) == 1
    assert gain > 1


def test_calibration_error_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    # bin of 0.9: half right, |0.5 − 0.9|; bin of 0.6: right, |1 − 0.6|; bin of 0.5: wrong, |0 − 0.5|
    assert expected_calibration_error(p, np.array([0, 1, 0, 1])) == pytest.approx((2 * 0.4 + 0.4 + 0.5) / 4)
    assert expected_calibration_error(np.eye(2), np.array([0, 1])) == 0
    with pytest.raises(UsageError, match="needs samples and bins"):
        expected_calibration_error(np.zeros((0, 2)), np.array([], int))


def test_log_loss_does_not_overflow() -> None:
    logits = np.array([[1e4, 0.0], [0.0, -1e4]])
    assert log_loss(logits, np.array([1, 0])).tolist() == [1e4, 0.0]
    assert math.isfinite(float(softmax(logits).sum()))

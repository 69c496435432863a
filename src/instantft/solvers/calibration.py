"""From scores to probabilities: one temperature, fitted on scores of left-out samples, and how well it fits.

Ridge regression of one-hot targets orders the classes well, but its scores, which lie mostly between 0 and 1, are no
logits. One factor β makes them so: p = softmax(β·z). It multiplies all scores, so no decision changes, and it is
folded into the adapter, so that there is one way to predict.

T samples, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

__all__ = ["Temperature", "expected_calibration_error", "fit_mixture", "fit_temperature", "log_loss", "softmax"]

Array = NDArray[Any]
Labels = NDArray[np.integer[Any]]

LOWEST, HIGHEST = 1e-3, 1e3
"""Bounds of β; scores are of order 1."""

NOTHING = 1e-6
"""Spread of scores that are all alike but for rounding in float32."""

STEPS = 50
TOLERANCE = 1e-6
"""Newton's iterations stop when the relative step is below this, or the relative gain of the loss."""

NEAR = 1e-3
"""… or when a whole step of Newton's was below this: its error is about the square."""


class Temperature(float):
    """The factor β by which scores are multiplied to become logits (one over what is usually called temperature)."""


def softmax(logits: Array) -> Array:
    """(T, C) by row."""
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


def log_loss(logits: Array, y: Labels) -> Array:
    """(T,): −log of the probability that softmax gives to each sample's own class."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y])


def fit_temperature(scores: Array, y: Labels) -> Temperature:
    """β by maximum likelihood on the scores of left-out samples, with a cap that follows from their number.

    T samples cannot show an error rate below about 1/T: where all of them are right, the likelihood alone would make β
    infinite. So a share 1/(T+1) of every target is spread over all classes. The loss stays convex in β and its
    minimum finite.

        f(β) = Σ_i log Σ_c exp(β·z_ic) − β·Σ_c t_ic·z_ic

    Args:
        scores: (T, C), of samples that the scores' model has not seen.
        y: (T,) labels.

    Returns:
        β; 1 where the scores say nothing (all alike).

    Raises:
        UsageError: a score is not finite, or the shapes do not go together.
    """
    z = np.asarray(scores, np.float64)
    if z.ndim != 2 or len(z) != len(y) or not len(z):
        raise UsageError(f"scores and labels must be of one length, at least 1, not {list(z.shape)} and {len(y)}")
    if not np.isfinite(z).all():
        raise UsageError("scores must be finite, not NaN or Inf")
    T = len(z)
    z = np.ascontiguousarray(z.T)  # (C, T), so that sums over classes run along samples
    z -= z.mean(axis=0)
    spread = float(np.sqrt(np.mean(z * z)))
    if spread < NOTHING:
        return Temperature(1.0)
    share = 1.0 / (T + 1)
    z /= spread
    z -= z.max(axis=0)
    wanted = (1 - share) * float(z[y, np.arange(T)].mean()) + share * float(z.mean())
    # exp of float32 is many times faster, and rounding moves β by a millionth
    z = z.astype(np.float32)
    squares, even = z * z, np.full(T, 1 / T)
    low, high, beta = LOWEST, HIGHEST, 1.0
    for _ in range(STEPS):
        p = np.exp(np.float32(beta) * z)
        each = even / p.sum(axis=0)
        mean = (p * z).sum(axis=0)
        slope = float(mean @ each) - wanted
        curvature = float(((p * squares).sum(axis=0) - mean * mean * each * T) @ each)
        if slope > 0:
            high = beta
        else:
            low = beta
        step = beta - slope / curvature if curvature > 0 else -1.0
        # Newton where it stays between what is known to be too low and too high, else the geometric middle.
        inside = low < step < high
        new = step if inside else float(np.sqrt(low * high))
        change, beta = abs(new - beta) / beta, new
        if change <= (NEAR if inside else TOLERANCE):
            break
    return Temperature(beta / spread)


def fit_mixture(scores: Array, frozen: Array, y: Labels, start: float | None = None) -> tuple[Temperature, float]:
    """β and gain of the logits β·z + gain·c, by maximum likelihood as in `fit_temperature`; neither is negative.

    Where the drift is mild, what the frozen network says is still worth something, and where samples are few it is
    worth more than what they teach. The loss is convex in both; Newton's steps are cut in half until they descend.

    Args:
        scores: z (T, C), of samples that the scores' model has not seen.
        frozen: c (T, C), the frozen network's logits of the same samples.
        y: (T,) labels.
        start: β without the frozen network, where that is known.

    Raises:
        UsageError: see `fit_temperature`.
    """
    beta = fit_temperature(scores, y) if start is None else start
    c = np.asarray(frozen, np.float64)
    if c.shape != np.shape(scores) or not np.isfinite(c).all():
        raise UsageError(f"the frozen network's logits must be finite, {list(np.shape(scores))}, not {list(c.shape)}")
    T = len(c)
    parts = np.ascontiguousarray(np.stack([np.asarray(scores, np.float64).T, c.T]))  # (2, C, T), as above
    parts -= parts.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.mean(parts * parts, axis=(1, 2)))
    if spread[0] < NOTHING:
        parts[0], spread[0] = 0, 1
    spread = np.maximum(spread, 1e-12)
    parts /= spread[:, None, None]  # so that both numbers are of order 1
    wanted = (1 - 1 / (T + 1)) * parts[:, y, np.arange(T)].mean(axis=1)  # the uniform share adds nothing

    def loss(theta: NDArray[np.float64]) -> tuple[float, Array, Array]:
        """The loss, and what its derivatives need: probabilities times their sum, and that sum."""
        p = theta[0] * parts[0] + theta[1] * parts[1]
        top = p.max(axis=0)
        p -= top
        np.exp(p, out=p)
        total = p.sum(axis=0)
        return float((np.log(total) + top).mean() - theta @ wanted), p, total

    theta = np.array([float(beta) * spread[0], 0.0])
    now, p, total = loss(theta)
    for _ in range(STEPS):
        weighted = parts * (p / total)
        means = weighted.sum(axis=1)
        slope = means.mean(axis=1) - wanted
        H = np.einsum("act,bct->ab", weighted, parts) / T - means @ means.T / T
        moving = (theta > 0) | (slope < 0)
        step = np.zeros(2)
        step[moving] = np.linalg.solve((H + 1e-9 * np.eye(2))[np.ix_(moving, moving)], slope[moving])
        share, best = 1.0, now
        while share > 1e-4:
            new = np.maximum(theta - share * step, 0)
            best, *state = loss(new)
            if best <= now:
                break
            share /= 2
        if not best < now - TOLERANCE * abs(now):
            break
        theta, now, (p, total) = new, best, state
    return Temperature(max(theta[0], LOWEST) / spread[0]), float(theta[1] / spread[1])


def expected_calibration_error(probabilities: Array, y: Labels, bins: int = 15) -> float:
    """How far confidence is from accuracy: Σ_b n_b/T · |accuracy_b − confidence_b| over bins of equal width.

    Args:
        probabilities: (T, C), rows that sum to 1.
        y: (T,) labels.
        bins: of the largest probability, from 0 to 1.

    Returns:
        0 (calibrated) to 1.

    Raises:
        UsageError: there are no samples or no bins.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or len(p) != len(y) or not len(p) or bins < 1:
        raise UsageError(f"calibration needs samples and bins, not shapes {list(p.shape)}, {len(y)} and {bins} bins")
    confidence = p.max(axis=1)
    right = (p.argmax(axis=1) == y).astype(np.float64)
    place = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    return float(np.abs(np.bincount(place, right - confidence, bins)).sum() / len(p))

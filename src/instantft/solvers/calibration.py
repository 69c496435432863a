"""From scores to outputs: what is fitted on scores of left-out samples, how well it fits, and what outputs mean.

Ridge regression of one-hot targets orders the classes well, but its scores, which lie mostly between 0 and 1, are no
logits. One factor β makes them so: p = softmax(β·z). It multiplies all scores, so no decision changes, and it is
folded into the adapter, so that there is one way to predict. The scores of a label get a factor and a threshold of
their own, p = σ(β_c·z_c + b_c), which does decide (Platt, 1999). Those of a regression are numbers of mean 0 and
deviation 1, which only have to be stretched and moved.

T samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..tasks import Targets, Task

__all__ = [
    "Calibration",
    "Temperature",
    "best_losses",
    "calibrate",
    "calibrate_with",
    "expected_calibration_error",
    "fit_blend",
    "fit_mixture",
    "fit_platt",
    "fit_temperature",
    "log_loss",
    "losses",
    "probabilities",
    "softmax",
]

Array = NDArray[Any]
Doubles = NDArray[np.float64]
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


def probabilities(task: Task, logits: Array) -> Array:
    """(T, C) of classes, or of each label.

    Raises:
        UsageError: numbers have none.
    """
    if task == "regression":
        raise UsageError("probabilities must be of classes or labels, not of regression: use predict")
    return softmax(logits) if task == "classification" else np.asarray(0.5 + 0.5 * np.tanh(0.5 * logits))


def losses(outputs: Array, goal: Targets) -> Array:
    """(T,): the loss of each sample, without its weight: log loss of its class, mean log loss of its labels, or mean
    squared error in units of the targets' variance.

    Args:
        outputs: (T, C) logits, or predicted numbers.
    """
    if goal.task == "classification":
        return log_loss(outputs, goal.y)
    if goal.task == "multi-label":
        return np.asarray((np.logaddexp(0, outputs) - goal.y * outputs).mean(axis=1))
    return 1 - goal.merits(outputs)


@dataclass(frozen=True)
class Calibration:
    """outputs = scale·z + shift + gain·c, of scores z and what the frozen network says, c.

    Attributes:
        scale, shift: (C,), or (1,) where all outputs share them.
        gain: of the frozen network.
    """

    scale: Doubles
    shift: Doubles
    gain: float = 0.0

    def __call__(self, scores: Array, frozen: Array | None = None) -> Array:
        """(T, C)."""
        z = self.scale * scores + self.shift
        return z if frozen is None or self.gain == 0 else z + self.gain * frozen


def calibrate(scores: Array, goal: Targets) -> Calibration:
    """The best without the frozen network."""
    if goal.task == "classification":
        beta = fit_temperature(scores, goal.y, goal.weights, goal.smoothing)
        return Calibration(np.array([float(beta)]), np.zeros(1))
    if goal.task == "multi-label":
        return fit_platt(scores, goal)
    return Calibration(goal.spread, goal.centre)


def calibrate_with(scores: Array, frozen: Array, goal: Targets, alone: Calibration) -> Calibration:
    """The best with the frozen network; `alone`: without it."""
    if goal.task == "classification":
        beta, gain = fit_mixture(scores, frozen, goal.y, float(alone.scale[0]), goal.weights, goal.smoothing)
        return Calibration(np.array([float(beta)]), alone.shift, gain)
    if goal.task == "multi-label":
        return fit_platt(scores, goal, frozen)
    return fit_blend(scores, frozen, goal)


def best_losses(scores: Array, goal: Targets) -> Array:
    """(T,): losses of left-out samples at the best calibration, each times its weight."""
    each = losses(calibrate(scores, goal)(scores), goal)
    return each if goal.weights is None else each * goal.weights


def fit_temperature(scores: Array, y: Labels, weights: Array | None = None, smoothing: float = 0.0) -> Temperature:
    """β by maximum likelihood on the scores of left-out samples, with a cap that follows from their number.

    T samples cannot show an error rate below about 1/T: where all of them are right, the likelihood alone would make β
    infinite. So a share 1/(T+1) of every target is spread over all classes. The loss stays convex in β and its
    minimum finite.

        f(β) = Σ_i log Σ_c exp(β·z_ic) − β·Σ_c t_ic·z_ic

    Args:
        scores: (T, C), of samples that the scores' model has not seen.
        y: (T,) labels.
        weights: (T,) how much each counts; None: all alike.
        smoothing: share of every target that is spread over all classes beside that.

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
    share = 1 - (1 - smoothing) * (1 - 1.0 / (T + 1))
    even = np.full(T, 1 / T) if weights is None else weights / weights.sum()
    z /= spread
    z -= z.max(axis=0)
    wanted = (1 - share) * float(z[y, np.arange(T)] @ even) + share * float(z.mean(axis=0) @ even)
    # exp of float32 is many times faster, and rounding moves β by a millionth
    z = z.astype(np.float32)
    squares = z * z
    low, high, beta = LOWEST, HIGHEST, 1.0
    for _ in range(STEPS):
        p = np.exp(np.float32(beta) * z)
        total = p.sum(axis=0)
        each = even / total
        mean = (p * z).sum(axis=0)
        slope = float(mean @ each) - wanted
        curvature = float(((p * squares).sum(axis=0) - mean * mean / total) @ each)
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


def fit_mixture(
    scores: Array,
    frozen: Array,
    y: Labels,
    start: float | None = None,
    weights: Array | None = None,
    smoothing: float = 0.0,
) -> tuple[Temperature, float]:
    """β and gain of the logits β·z + gain·c, by maximum likelihood as in `fit_temperature`; neither is negative.

    Where the drift is mild, what the frozen network says is still worth something, and where samples are few it is
    worth more than what they teach. The loss is convex in both; Newton's steps are cut in half until they descend.

    Args:
        scores: z (T, C), of samples that the scores' model has not seen.
        frozen: c (T, C), the frozen network's logits of the same samples.
        y: (T,) labels.
        start: β without the frozen network, where that is known.
        weights, smoothing: as in `fit_temperature`.

    Raises:
        UsageError: see `fit_temperature`.
    """
    beta = fit_temperature(scores, y, weights, smoothing) if start is None else start
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
    even = np.full(T, 1 / T) if weights is None else weights / weights.sum()
    wanted = (1 - smoothing) * (1 - 1 / (T + 1)) * (parts[:, y, np.arange(T)] @ even)  # the uniform share adds nothing

    def loss(theta: NDArray[np.float64]) -> tuple[float, Array, Array]:
        """The loss, and what its derivatives need: probabilities times their sum, and that sum."""
        p = theta[0] * parts[0] + theta[1] * parts[1]
        top = p.max(axis=0)
        p -= top
        np.exp(p, out=p)
        total = p.sum(axis=0)
        return float((np.log(total) + top) @ even - theta @ wanted), p, total

    theta = np.array([float(beta) * spread[0], 0.0])
    now, p, total = loss(theta)
    for _ in range(STEPS):
        weighted = parts * (p / total)
        means = weighted.sum(axis=1)
        slope = means @ even - wanted
        H = np.einsum("act,bct->ab", weighted * even, parts) - (means * even) @ means.T
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


def fit_platt(scores: Array, goal: Targets, frozen: Array | None = None) -> Calibration:
    """Factor and threshold of every label, and one gain on the frozen network for all, by maximum likelihood.

    Targets are drawn in from 0 and 1 as Platt (1999) does, so that nothing becomes infinite where all are right. Newton
    label by label; the gain, of which there is one, takes turns with them. The loss is convex in all of it.

    Args:
        scores: (T, C), of samples that the scores' model has not seen.
        goal: their labels.
        frozen: (T, C) the frozen network's logits; None: gain 0.

    Raises:
        UsageError: a score is not finite.
    """
    z, c = np.asarray(scores, np.float64), None if frozen is None else np.asarray(frozen, np.float64)
    if not (np.isfinite(z).all() and (c is None or np.isfinite(c).all())):
        raise UsageError("scores must be finite, not NaN or Inf")
    share = goal.share[:, None]
    positive = (share * (goal.y > 0.5)).sum(axis=0) * len(z)
    high, low = (positive + 1) / (positive + 2), 1 / (len(z) - positive + 2)
    t = np.where(goal.y > 0.5, high, low)
    t = (1 - goal.smoothing) * t + goal.smoothing / 2
    mean = (share * z).sum(axis=0)
    spread = np.sqrt((share * (z - mean) ** 2).sum(axis=0))
    moving = spread > NOTHING
    spread = np.where(moving, spread, 1.0)
    u = (z - mean) / spread * moving
    rate = (share * t).sum(axis=0)
    theta = np.stack([moving.astype(np.float64), np.log(rate / (1 - rate))])  # factor and shift, (2, C)
    gain = 0.0

    def outputs() -> Doubles:
        return np.asarray(theta[0] * u + theta[1] + (0 if c is None else gain * c))

    def loss(f: Array) -> Array:
        return np.asarray((share * (np.logaddexp(0, f) - t * f)).sum(axis=0))

    f = outputs()
    now = loss(f)
    for _ in range(STEPS):
        before = now.sum()
        p = probabilities("multi-label", f)
        r, w = share * (p - t), share * np.maximum(p * (1 - p), 1e-12)
        g = np.stack([(r * u).sum(axis=0), r.sum(axis=0)])
        a, b, d = (w * u * u).sum(axis=0) + 1e-12, (w * u).sum(axis=0), w.sum(axis=0)
        step = np.stack([d * g[0] - b * g[1], a * g[1] - b * g[0]]) / (a * d - b * b + 1e-15)
        size = np.ones(goal.C)
        kept = theta
        for _ in range(30):
            theta = kept - size * step
            theta[0] = np.maximum(theta[0], 0)  # scores that say the opposite say nothing
            f = outputs()
            worse = loss(f) > now + 1e-15
            if not worse.any():
                break
            size = np.where(worse, size / 2, size)
        else:
            theta, f = kept, f * 0 + kept[0] * u + kept[1] + (0 if c is None else gain * c)
        now = loss(f)
        if c is not None:
            p = probabilities("multi-label", f)
            slope = float((share * (p - t) * c).sum())
            curvature = float((share * p * (1 - p) * c * c).sum())
            old = gain
            gain = max(0.0, gain - slope / curvature) if curvature > 1e-12 else 0.0
            while loss(outputs()).sum() > now.sum() and abs(gain - old) > TOLERANCE * max(old, 1e-3):
                gain = (gain + old) / 2
            if loss(outputs()).sum() > now.sum():
                gain = old
            f = outputs()
            now = loss(f)
        if before - now.sum() <= TOLERANCE * before:
            break
    scale = np.where(moving, theta[0] / spread, 0.0)
    return Calibration(scale, theta[1] - scale * mean, gain)


def fit_blend(scores: Array, frozen: Array, goal: Targets) -> Calibration:
    """Regression: β and gain by weighted least squares of what left-out samples should have been, neither negative, and
    the shift of each output that goes with them."""
    share, s = goal.share[:, None], goal.spread
    parts = np.stack([np.asarray(scores, np.float64), frozen / s, (goal.y - goal.centre) / s])
    means = (share * parts).sum(axis=1)
    z, c, y = parts - means[:, None]
    A = np.array([[(share * p * q).sum() for q in (z, c)] for p in (z, c)])
    b = np.array([(share * p * y).sum() for p in (z, c)])
    floor = 1e-12 * np.trace(A) + 1e-300
    both = np.linalg.solve(A + floor * np.eye(2), b)
    if both.min() < 0:  # the best on the border: one of the two alone
        alone = [max(0.0, b[k] / (A[k, k] + floor)) for k in (0, 1)]
        worth = [alone[k] * b[k] for k in (0, 1)]
        both = np.array([alone[0], 0.0] if worth[0] >= worth[1] else [0.0, alone[1]])
    beta, gain = (float(v) for v in both)
    return Calibration(beta * s, goal.centre + s * (means[2] - beta * means[0] - gain * means[1]), gain)


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

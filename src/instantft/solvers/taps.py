"""Which taps, how much of each, and how much shrinkage: decided on a few hundred samples by exact leave-one-out.

The Gram matrix of a weighted set of taps is a weighted sum of theirs, K = Σ_k w_k·K_k, so once the K_k are there a
candidate costs one small factorisation and no feature is touched again.

n samples of the subset, L taps, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .calibration import fit_temperature, log_loss
from .factor import Factor, Rows

__all__ = ["LADDER", "Choice", "best_lambda", "choose", "common_scale", "ladder_weights", "system", "with_weights"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]

LADDER = ((1.0, 1.0), (0.3, 1.0), (0.03, 1.0), (0.03, 0.0))
"""Weights to choose from, as (δ, ρ) of `ladder_weights`: from all taps alike to the raw input and a trace of x^1.

The deeper a tap, the more it was made for the data before the drift. docs/decisions/ridge.md has the measurements."""

MARGIN = 1.0
"""Standard errors by which a rung may be worse than the best."""

START = 0.1
STEP = 0.5
"""Where the search for λ starts, and its step in powers of ten."""

LOWEST, HIGHEST = 1e-4, 1e2
"""Bounds of λ. Records have norm 1, so that below the first nothing is shrunk and above the second nothing is left."""


@dataclass(frozen=True)
class Choice:
    """λ, and the weight w_k of each tap (0: not used)."""

    lam: float
    weights: tuple[float, ...]


def common_scale(squared_norms: Array) -> float:
    """s, which makes the mean norm of the records 1; 1 where all of them are zero.

    Args:
        squared_norms: (n,), the diagonal of K.
    """
    mean = float(np.sqrt(np.maximum(squared_norms, 0)).mean())
    return 1.0 / mean if mean > 0 else 1.0


def system(grams: Sequence[Doubles], weights: Sequence[float]) -> Doubles:
    """s²·Σ w_k·K_k + 1, the Gram matrix of scaled features with the bias feature, (n, n)."""
    K = np.zeros_like(grams[0])
    for w, part in zip(weights, grams, strict=True):
        if w:
            K += w * part
    s = common_scale(np.diagonal(K))
    K *= s * s
    K += 1.0
    return K


def left_out(K: Doubles, Y: Doubles, lam: float, blocks: Sequence[Rows] | None = None) -> Doubles:
    """Residuals (n, C) of samples left out, alone or in blocks, at λ."""
    factor = Factor(K + lam * np.eye(len(K)))
    return np.asarray(factor.left_out(factor.solve(Y), blocks))


def best_lambda(K: Doubles, Y: Doubles, start: float = START) -> tuple[float, float]:
    """λ of the smallest leave-one-out squared error, and that error (mean over samples, sum over outputs).

    Downhill in steps of √10 from `start`, then the lowest point of the parabola through the last three.
    """
    if len(K) < 2:
        return start, float((Y * Y).sum() / max(len(K), 1))
    seen: dict[int, float] = {}

    def error(i: int) -> float:
        if i not in seen:
            e = left_out(K, Y, start * 10.0 ** (STEP * i))
            seen[i] = float((e * e).sum() / len(e))
        return seen[i]

    inside = range(int(np.ceil(np.log10(LOWEST / start) / STEP)), int(np.log10(HIGHEST / start) / STEP) + 1)
    i = 0
    while True:
        neighbours = [j for j in (i - 1, i + 1) if j in inside]
        best = min(neighbours, key=error)
        if error(best) >= error(i):
            break
        i = best
    shift = 0.0
    if i - 1 in inside and i + 1 in inside:
        a, b, c = error(i - 1), error(i), error(i + 1)
        if a - 2 * b + c > 0:
            shift = 0.5 * (a - c) / (a - 2 * b + c)
    return start * 10.0 ** (STEP * (i + shift)), error(i)


def with_weights(grams: Sequence[Doubles], Y: Doubles, weights: Sequence[float]) -> Choice:
    """λ for weights that are given."""
    lam, _ = best_lambda(system(grams, weights), Y)
    return Choice(lam, tuple(float(w) for w in weights))


def choose(grams: Sequence[Doubles], Y: Doubles, blocks: Sequence[Rows], margin: float = MARGIN) -> Choice:
    """λ and weights: down the `LADDER` from equal weights, as long as a step costs no more than chance would.

    Every rung gets its own λ by leave-one-out. Rungs are compared by the log loss of left-out blocks, each at its own
    temperature: squared error would prefer whatever interpolates neighbours best, and accuracy is too coarse for a few
    hundred samples. A rung is as good as the best one if it is worse by at most `margin` standard errors of the mean
    difference over the blocks; of those, the one that leans least on the deep taps wins.

    Args:
        grams: L matrices (n, n), the Gram matrix of each tap.
        Y: (n, C) one-hot targets.
        blocks: rows that are left out together.
        margin: standard errors.
    """
    y = Y.argmax(axis=1)
    best: Doubles | None = None
    chosen = Choice(START, (1.0,) * len(grams))
    for delta, rho in LADDER:
        if rho == 0 and len(grams) < 3:
            continue
        weights = ladder_weights(len(grams), delta, rho)
        K = system(grams, weights)
        lam, _ = best_lambda(K, Y, chosen.lam)
        scores = Y - left_out(K, Y, lam, blocks)
        loss = log_loss(float(fit_temperature(scores, y)) * scores, y)
        if best is not None and not _as_good(loss, best, blocks, margin):
            break
        chosen = Choice(lam, weights)
        if best is None or loss.mean() < best.mean():
            best = loss
    return chosen


def ladder_weights(L: int, delta: float, rho: float) -> tuple[float, ...]:
    """1 for the raw input, δ for the first tap behind it, δ·ρ for the others."""
    return tuple(1.0 if k == 0 else delta if k == 1 else delta * rho for k in range(L))


def _as_good(loss: Doubles, best: Doubles, blocks: Sequence[Rows], margin: float) -> bool:
    """Whether the mean loss is above the best one by at most `margin` standard errors, samples of a block as one."""
    difference = loss - best
    sums = np.array([difference[rows].sum() for rows in blocks])
    B = len(sums)
    if B < 2:
        return float(difference.mean()) <= 0
    sizes = np.array([len(rows) for rows in blocks])
    mean = float(difference.mean())
    spread = sums - mean * sizes
    error = float(np.sqrt(B / (B - 1) * (spread * spread).sum())) / len(loss)
    return mean <= margin * error

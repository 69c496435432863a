"""Which taps, how much of each, and how much shrinkage: decided on a few hundred samples by exact leave-one-out.

The Gram matrix of a weighted set of taps is a weighted sum of theirs, K = Σ_k w_k·K_k, so once the K_k are there a
candidate costs one small factorisation and no feature is touched again.

n samples of the subset, L taps, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.dense import Dense
from ..tasks import Targets
from .calibration import best_losses
from .factor import NUMPY, Factor, Rows, precision

__all__ = [
    "LADDER",
    "Choice",
    "Sample",
    "System",
    "best_lambda",
    "block_loss",
    "choose",
    "diagonal",
    "excess",
    "ladder_weights",
    "left_out",
    "loss_of",
    "shrinkage",
    "system",
    "unweighted",
    "with_weights",
]

Array = NDArray[Any]
Doubles = NDArray[np.float64]

LADDER = ((1.0, 1.0), (0.3, 0.3), (0.03, 0.0))
"""Weights to choose from, as (δ, ρ) of `ladder_weights`: from all taps alike to the raw input and a trace of x^1.

The deeper a tap, the more it was made for the data before the drift. Measured: docs/decisions/0005-ridge.md."""

MARGIN, ENOUGH = 2.0, 256
"""Standard errors by which a rung may be worse than the best, given that many samples; with fewer, which tell little
about any rung, proportionally less."""

SURE = 4.0
"""Standard errors above which a rung is given up after a first look at few samples."""

START = 0.1
STEP = 0.5
"""Where the search for λ starts, and its step in powers of ten."""

HOPELESS = 8.0
"""Standard errors above which a rung is given up without a λ of its own."""

LOWEST, HIGHEST = 1e-4, 1e2
"""Bounds of λ. Records have norm 1, so that below the first nothing is shrunk and above the second nothing is left."""


SMALL = 128
"""Systems up to this size gain nothing by float32."""

CLIP = 3.0
"""Norm, in medians, from which a record counts for less."""


@dataclass(frozen=True)
class Choice:
    """What is solved.

    Attributes:
        lam: λ.
        weights: w_k of each tap; 0: not used.
        scale: s, which makes the mean norm of a record 1.
        limit: norm, before s, from which a record is shrunk to it, with its target; infinite: never.
    """

    lam: float
    weights: tuple[float, ...]
    scale: float = 1.0
    limit: float = np.inf


@dataclass(frozen=True)
class System:
    """Records as their Gram matrix, scaled, clipped and weighted: Z·Zᵀ of Z = diag(c)·[s·x | 1], targets diag(c)·Y.

    Attributes:
        K: (n, n), on and below the diagonal, of the type of what it was made from.
        c: (n,), the root of the sample's weight, less for records beyond the limit.
        scale, limit: as in `Choice`.
        dense: who factorises.
        roots: (n,), √weight; None: all 1.
    """

    K: Array
    c: Doubles
    scale: float
    limit: float
    dense: Dense = NUMPY
    roots: Doubles | None = None

    def scores(self, Y: Doubles, residuals: Array) -> Doubles:
        """(n, C) what is said of records that were left out, clipped but not weighted, from their residuals."""
        return unweighted(self.c[:, None] * Y - residuals, self.roots)


def shrinkage(norms: Array, limit: float) -> Doubles:
    """c (n,): what records of these norms are multiplied by so that none is beyond the limit."""
    return np.asarray(np.minimum(1.0, limit / np.maximum(norms, 1e-300)), np.float64)


def unweighted(values: Array, roots: Doubles | None) -> Doubles:
    """(n, C) values of rows that were multiplied by the roots of their weights, without these."""
    return np.asarray(values if roots is None else values / roots[:, None])


def system(
    grams: Sequence[Array], weights: Sequence[float], dense: Dense = NUMPY, roots: Doubles | None = None
) -> System:
    """The system of a weighted set of taps, K = Σ w_k·K_k before scaling.

    A heavy-tailed sensor yields now and then a record that outweighs all others together. Beyond CLIP medians a
    record and its target are shrunk alike, which is weighted least squares: still exact, and what is fitted is still
    linear in the record. Weights of samples are the same thing, asked for.

    Args:
        roots: (n,), √weight of each sample; None: all 1.
    """
    used = [(w, part) for w, part in zip(weights, grams, strict=True) if w]
    parts, some = [part for _, part in used], [w for w, _ in used]
    norms = np.sqrt(np.maximum(diagonal(parts, some), 0).astype(np.float64))
    median = float(np.median(norms))
    limit = CLIP * median if median > 0 else np.inf
    c = shrinkage(norms, limit)
    mean = float((c * norms).mean())
    scale = 1.0 / mean if mean > 0 else 1.0
    if roots is not None:
        c = c * roots
    return System(dense.combine(parts, some, scale * c, c), c, scale, limit, dense, roots)


def diagonal(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    """That of Σ w_p·P_p, (n,) in the parts' type."""
    each = [part.dtype.type(w) * np.diagonal(part) for w, part in zip(weights, parts, strict=True)]
    return np.asarray(np.sum(each, axis=0))


def solved(system: System, Y: Doubles, lam: float) -> tuple[Factor, Array]:
    """The factor and α at λ."""
    dtype = precision(len(Y), lam) if len(Y) > SMALL else np.float64
    factor = Factor(system.K.astype(dtype, copy=False), system.dense, lam)
    return factor, factor.solve((system.c[:, None] * Y).astype(dtype))


def left_out(system: System, Y: Doubles, lam: float, blocks: Sequence[Rows] | None = None) -> Doubles:
    """Residuals (n, C) of samples left out, alone or in blocks, at λ; those of a clipped record are clipped with it."""
    factor, alpha = solved(system, Y, lam)
    return np.asarray(factor.left_out(alpha, blocks), np.float64)


def best_lambda(system: System, Y: Doubles, start: float = START, first: float | None = None) -> tuple[float, float]:
    """λ of the smallest leave-one-out squared error, and that error (`squared`).

    Downhill in steps of √10 from `start`, then the lowest point of the parabola through the last three.

    Args:
        first: the error at `start`, where that is known.
    """
    if len(Y) < 2:
        return start, float((Y * Y).sum() / max(len(Y), 1))
    seen: dict[int, float] = {} if first is None else {0: first}

    def error(i: int) -> float:
        if i not in seen:
            seen[i] = squared(left_out(system, Y, start * 10.0 ** (STEP * i)))
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


@dataclass(frozen=True)
class Sample:
    """What a choice is made on.

    Attributes:
        grams: L matrices (n, n), the Gram matrix of each tap, on and below the diagonal.
        goal: what they are to teach.
        blocks: rows that are left out together.
        dense: who factorises.
    """

    grams: Sequence[Array]
    goal: Targets
    blocks: Sequence[Rows]
    dense: Dense = NUMPY

    def system(self, weights: Sequence[float]) -> System:
        """Of its taps, weighted."""
        return system(self.grams, weights, self.dense, self.goal.roots)


def with_weights(sample: Sample, weights: Sequence[float]) -> Choice:
    """λ for weights that are given."""
    made = sample.system(weights)
    lam, _ = best_lambda(made, sample.goal.Y)
    return Choice(lam, tuple(float(w) for w in weights), made.scale, made.limit)


def choose(few: Sample, many: Callable[[], Sample] | None = None) -> Choice:
    """λ and weights: of the `LADDER`, the last rung that is no worse than the best by more than chance.

    Every rung gets its own λ by leave-one-out. Rungs are compared by the loss of left-out blocks, each at its own
    calibration: of classes log loss, because squared error would prefer whatever interpolates neighbours best, and
    accuracy is too coarse for a few hundred samples. A rung counts as no worse if the mean loss is above the smallest
    by at most MARGIN standard errors of the difference, where samples of a block count as one.

    Args:
        few: on which every rung is tried.
        many: more samples, to decide between the rungs that `few` leaves open; None: there are no more.
    """
    rungs = [ladder_weights(len(few.grams), *rung) for rung in LADDER]
    systems: dict[tuple[float, ...], System] = {}
    tried: dict[tuple[float, ...], tuple[float, Doubles]] = {}
    lam = START
    for weights in dict.fromkeys(rungs):
        made, first = few.system(weights), None
        if tried and many is not None:
            factor, alpha = solved(made, few.goal.Y, lam)
            first = squared(factor.left_out(alpha))
            blocked = factor.left_out(alpha, few.blocks)
            least = min((loss for _, loss in tried.values()), key=lambda loss: float(loss.mean()))
            if excess(loss_of(blocked, made, few.goal) - least, few.blocks) > HOPELESS:
                continue
        lam, _ = best_lambda(made, few.goal.Y, lam, first)
        systems[weights], tried[weights] = made, (lam, block_loss(few, made, lam))
    if many is not None:
        tried = {w: tried[w] for w in _no_worse({w: loss for w, (_, loss) in tried.items()}, few.blocks, SURE)}
        if len(tried) > 1:
            few = many()
            systems = {w: few.system(w) for w in tried}
            tried = {w: (lam, block_loss(few, systems[w], lam)) for w, (lam, _) in tried.items()}
    margin = MARGIN * min(1.0, len(few.goal) / ENOUGH)
    last = _no_worse({w: loss for w, (_, loss) in tried.items()}, few.blocks, margin)[-1]
    return Choice(tried[last][0], last, systems[last].scale, systems[last].limit)


def block_loss(sample: Sample, made: System, lam: float) -> Doubles:
    """(n,): weighted loss of every sample, left out with its block, at the best calibration."""
    return loss_of(left_out(made, sample.goal.Y, lam, sample.blocks), made, sample.goal)


def loss_of(residuals: Array, made: System, goal: Targets) -> Doubles:
    """(n,): weighted loss of left-out samples, from their residuals, at the best calibration (`best_losses`)."""
    return np.asarray(best_losses(made.scores(goal.Y, residuals), goal))


def squared(residuals: Array) -> float:
    """Squared error, mean over samples, sum over outputs."""
    return float(np.einsum("ij,ij->", residuals, residuals) / len(residuals))


def ladder_weights(L: int, delta: float, rho: float) -> tuple[float, ...]:
    """1 for the raw input, δ for the first tap behind it, δ·ρ for the others."""
    return tuple(1.0 if k == 0 else delta if k == 1 else delta * rho for k in range(L))


def _no_worse(
    losses: dict[tuple[float, ...], Doubles], blocks: Sequence[Rows], margin: float
) -> list[tuple[float, ...]]:
    """Those whose mean loss is above the smallest by at most `margin` standard errors, in their order."""
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    return [w for w, loss in losses.items() if loss is best or excess(loss - best, blocks) <= margin]


def excess(difference: Doubles, blocks: Sequence[Rows]) -> float:
    """Mean of the differences (n,) in standard errors, the samples of a block as one."""
    mean, B = float(difference.mean()), len(blocks)
    if B < 2:
        return float("inf") if mean > 0 else 0.0
    starts = np.cumsum([0, *map(len, blocks[:-1])])
    spread = np.add.reduceat(difference[np.concatenate(blocks)] - mean, starts)
    error = float(np.sqrt(B / (B - 1) * (spread * spread).sum())) / len(difference)
    return mean / error if error > 0 else (float("inf") if mean > 0 else 0.0)

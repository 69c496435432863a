"""The gate: is the new model better than the old one, as far as these samples can tell?

Both models are judged on the same samples, which neither may have learnt from: the old one because it is older, the
new one by its left-out scores. Each sample has a merit m_i for either (`tasks.Targets.merits`): of classes 1 where the
model is right, else 0; of labels the share that is right; of numbers 1 − (y − f)²/variance, whose mean is R². With a
weight where samples have one, d_i = w_i·(new − old), of classes mostly 0, at times +1 or −1. Then

    gain       mean of d
    error      √(B/(B−1) · Σ_b (Σ_{i∈b} d_i − n_b·gain)²) / n         samples of a block count as one
    accepted   gain ≥ SURE · wider(blocks) · error

A gain of a few samples out of few is not enough, nor a small gain among many changed minds. Two made-up samples, one
for either side (Agresti and Min, 2005), keep the error from vanishing where all d are alike: with none lost, about five
must be won, whatever their number. They are worth as much as a sample can be: ±max w, of numbers ±max |d|.

Few blocks do not tell how much blocks differ. Below ENOUGH of them errors count for more, as in Student's t; from one
block nothing follows.

n samples, B blocks, the two made-up samples among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..tasks import Targets
from .factor import Rows, runs

__all__ = ["Decision", "compare", "gate"]

Array = NDArray[Any]

RUNS = 32
"""Blocks of consecutive samples where none are given."""

SURE = 1.7
"""Standard errors by which the new model must be better; docs/decisions/0005-ridge.md."""

INTERVAL = 1.96
"""Standard errors to either side of the gain: 95 %."""


ENOUGH = 30
"""Blocks from which on the normal distribution will do."""


def wider(blocks: int) -> float:
    """How much wider than the normal distribution's a 95 % interval by so many blocks is: Student's t, one degree of
    freedom less than blocks, by its expansion in 1/ν (Fisher and Cornish, 1960), which is 24 % short at ν = 1."""
    if blocks >= ENOUGH or blocks < 2:
        return 1.0 if blocks >= ENOUGH else math.inf
    z2, v = INTERVAL**2, float(blocks - 1)
    terms = (z2 + 1) / 4, (5 * z2**2 + 16 * z2 + 3) / 96, (3 * z2**3 + 19 * z2**2 + 17 * z2 - 15) / 384
    return 1 + sum(term / v**i for i, term in enumerate(terms, 1))


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes:
        accepted: whether the new model should replace the old one.
        before, after: estimated accuracies, 0 to 1, or what else the task is judged by (`tasks.METRICS`).
        interval: 95 % confidence interval of after − before.
        n: samples that were looked at.
    """

    accepted: bool
    before: float
    after: float
    interval: tuple[float, float]
    n: int

    @property
    def gain(self) -> float:
        """after − before."""
        return self.after - self.before


def gate(before: Array, after: Array, blocks: Sequence[Rows] | None = None, most: float = 1.0) -> Decision:
    """Decide between the old and the new model.

    Args:
        before: (n,) merits of the old model; of classes bool, which samples it gets right.
        after: (n,) merits of the new model on the same samples when they are left out.
        blocks: rows that were left out together and may resemble each other, which together are all of them; None:
            RUNS runs of consecutive samples, which is right for a stream and does no harm to shuffled samples.
        most: how far apart the two may be on one sample.

    Raises:
        UsageError: the two are not of one length, or there is nothing to judge by.
    """
    old, new = np.asarray(before, np.float64), np.asarray(after, np.float64)
    n = len(old)
    if old.ndim != 1 or old.shape != new.shape or n == 0:
        raise UsageError(f"the gate needs two rows of one length, at least 1, not {list(old.shape)}, {list(new.shape)}")
    parts = runs(n, RUNS) if blocks is None else blocks
    if sum(len(rows) for rows in parts) != n:
        raise UsageError(f"the blocks of the gate must hold all {n} samples, not {sum(len(rows) for rows in parts)}")
    d = new - old
    sums = np.array([*(d[rows].sum() for rows in parts), most, -most])
    sizes = np.array([*(len(rows) for rows in parts), 1.0, 1.0])
    gain = float(sums.sum() / sizes.sum())
    B = len(sums)
    error = math.sqrt(B / (B - 1) * float(((sums - gain * sizes) ** 2).sum())) / float(sizes.sum())
    error *= wider(len(parts))
    interval = max(gain - INTERVAL * error, -most), min(gain + INTERVAL * error, most)
    return Decision(gain >= SURE * error and most > 0, float(old.mean()), float(new.mean()), interval, n)


def compare(goal: Targets, before: Array, after: Array, blocks: Sequence[Rows] | None = None) -> Decision:
    """`gate` of two models' outputs (n, C), by the merits and weights of the task.

    Args:
        goal: what the n samples are to teach.
    """
    weights = np.ones(len(goal)) if goal.weights is None else goal.weights / goal.weights.mean()
    old, new = weights * goal.merits(before), weights * goal.merits(after)
    most = float(np.abs(new - old).max() if goal.task == "regression" else weights.max())
    return gate(old, new, blocks, most)

"""What is to be learnt: the tasks, and the targets of a set of samples.

    task             y                          Y, what ridge regression aims at      logits become, and are judged by
    classification   (T,) classes 0 … C-1       one-hot                               softmax; accuracy
    regression       (T, C) numbers             (y − centre)/spread of each output    themselves; R²
    multi-label      (T, C) zeros and ones      y itself                              sigmoid of each; labels right

A sample's weight says how many samples it counts for: in what is fitted, in what is chosen by, and to the gate. Class
weights are sample weights by another name. Weights are scaled to a mean of 1, so that λ means what it does without.

T samples, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, UsageError

__all__ = [
    "METRICS",
    "TASKS",
    "Targets",
    "Task",
    "as_targets",
    "check_task",
    "class_weights",
    "loss_and_gradient",
    "targets",
]

Array = NDArray[Any]
Doubles = NDArray[np.float64]

Task = Literal["classification", "regression", "multi-label"]
TASKS: tuple[Task, ...] = ("classification", "regression", "multi-label")

METRICS: dict[Task, str] = {"classification": "accuracy", "regression": "r2", "multi-label": "label_accuracy"}
"""What `Targets.merits` is the mean of."""

MOST_SMOOTHING = 0.5
"""Label smoothing above which the true class would no longer surely be the likeliest of two."""

LEAST_WEIGHT = 1e-6
"""Smallest weight, in means: below it a sample counts for nothing, but roundings of it would."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What a set of samples is to teach. Made by `targets`.

    Attributes:
        task: which of `TASKS`.
        y: (T,) int32 classes, or (T, C) float32.
        C: number of outputs.
        weights: (T,) float64, of mean 1 over the set it was made for; None: all alike.
        smoothing: ε; a share of ε of each target is spread evenly over the classes, or over yes and no.
        centre, spread: (C,) weighted mean and standard deviation of y in regression; else 0 and 1.
        unit: what weights were divided by.
        by_class: (C,) class weights, which `weights` hold; None: there are none.
    """

    task: Task
    y: Array
    C: int
    weights: Doubles | None = None
    smoothing: float = 0.0
    centre: Doubles = field(default_factory=lambda: np.zeros(1))
    spread: Doubles = field(default_factory=lambda: np.ones(1))
    unit: float = 1.0
    by_class: Doubles | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def config(self) -> dict[str, Any]:
        """What an adapter should know of them; nothing of plain classes."""
        known = {"label_smoothing": self.smoothing} if self.smoothing else {}
        if self.by_class is not None:
            known["class_weights"] = self.by_class.tolist()
        return {**({"task": self.task} if self.task != "classification" else {}), **known}

    def hits(self, logits: Array) -> int:
        """How many samples are told rightly: their class, or all of their labels; 0 of numbers."""
        if self.task == "regression":
            return 0
        right = self.right(logits)
        return int((right if right.ndim == 1 else right.all(axis=1)).sum())

    def at(self, rows: Array | slice) -> Targets:
        """Those of some samples, with weights, centre and spread as they are."""
        return replace(self, y=self.y[rows], weights=None if self.weights is None else self.weights[rows])

    def more(self, y: Array, sample_weight: Array | None) -> Targets:
        """Those of further samples, in the same terms: the same centre, spread, class weights and unit of weights."""
        weights = _weights(y, sample_weight, self.by_class)
        if weights is None and self.weights is not None:
            weights = np.ones(len(y))
        return replace(self, y=y, weights=None if weights is None else _counting(weights / self.unit))

    def widened(self, C: int) -> Targets:
        """The same with more classes, whose samples count 1."""
        more = None if self.by_class is None else np.pad(self.by_class, (0, C - self.C), constant_values=1.0)
        return replace(self, C=C, by_class=more)

    @property
    def plain(self) -> bool:
        """Whether they are classes that count alike, without smoothing: what the fast loss of the engines is for."""
        return self.task == "classification" and self.weights is None and self.smoothing == 0

    @property
    def share(self) -> Doubles:
        """(T,) the weights scaled to a sum of 1."""
        if self.weights is None:
            return np.full(len(self), 1 / max(len(self), 1))
        return np.asarray(self.weights / self.weights.sum())

    @property
    def roots(self) -> Doubles | None:
        """(T,) what rows of a least-squares problem are multiplied by: √weight; None: all alike."""
        return None if self.weights is None else np.sqrt(self.weights)

    @cached_property
    def Y(self) -> Doubles:
        """(T, C) what ridge regression aims at. Smoothing would only shift and shrink scores, which calibration undoes,
        so it is left to that."""
        if self.task == "classification":
            return np.eye(self.C)[self.y]
        return np.asarray((self.y - self.centre) / self.spread, np.float64)

    @cached_property
    def soft(self) -> NDArray[np.float32]:
        """(T, C) what the losses of SGD aim at: probabilities, smoothed; in regression as `Y`."""
        Y, e = self.Y, self.smoothing
        if self.task == "regression":
            return Y.astype(np.float32)
        return ((1 - e) * Y + e / (self.C if self.task == "classification" else 2)).astype(np.float32)

    def right(self, logits: Array) -> Array:
        """(T,) or (T, C) bool: which classes, or which labels, these logits tell rightly.

        Raises:
            UsageError: numbers are not right or wrong.
        """
        if self.task == "classification":
            return np.asarray(logits.argmax(axis=1) == self.y)
        if self.task == "multi-label":
            return np.asarray((logits > 0) == (self.y > 0.5))
        raise UsageError("what is right or wrong must be classes or labels, not numbers")

    def merits(self, outputs: Array) -> Doubles:
        """(T,) how well each sample is told: 1 at best. Its weighted mean is what the task is judged by (`METRICS`)."""
        if self.task == "regression":
            error = (self.y - np.asarray(outputs, np.float64)) / self.spread
            return np.asarray(1 - (error * error).mean(axis=1))
        right = self.right(outputs).astype(np.float64)
        return right if self.task == "classification" else np.asarray(right.mean(axis=1))

    def score(self, outputs: Array) -> float:
        """The weighted mean of `merits`; in regression R² where the targets are all those it was made for."""
        return float(np.average(self.merits(outputs), weights=self.weights))


def check_task(task: object) -> Task:
    """See that there is such a task.

    Raises:
        UsageError: there is none.
    """
    if task not in TASKS:
        raise UsageError(f"task must be one of {', '.join(TASKS)}, not {task!r:.60}")
    return task


def loss_and_gradient(goal: Targets, z: Array) -> tuple[Doubles, Array]:
    """The losses (T,) of logits z (T, C), each times its weight, and their gradient (T, C), by the soft targets t:

        classification   w·(log Σ exp z − Σ t·z)                   w·(softmax(z) − t)
        multi-label      w·Σ (log(1 + exp z) − t·z) / C            w·(σ(z) − t) / C
        regression       w·Σ (z − t)² / C                          w·2·(z − t) / C

    In the type of z; the losses are summed in float64.
    """
    t = goal.soft.astype(z.dtype)
    w = np.ones(len(goal)) if goal.weights is None else goal.weights
    C = z.dtype.type(goal.C)
    if goal.task == "classification":
        shifted = z - z.max(axis=1, keepdims=True)
        p = np.exp(shifted)
        total = p.sum(axis=1, keepdims=True)
        told = np.multiply(t, shifted, where=t > 0, out=np.zeros_like(shifted))  # where t is 0, −Inf is nothing
        loss = np.log(total[:, 0], dtype=np.float64) - told.sum(axis=1, dtype=np.float64)
        g = p / total - t
    elif goal.task == "multi-label":
        e = np.exp(-np.abs(z))
        loss = (np.log1p(e) + np.maximum(z, 0) - t * z).mean(axis=1, dtype=np.float64)
        g = (np.where(z < 0, e, 1) / (1 + e) - t) / C
    else:
        d = z - t
        loss = (d * d).mean(axis=1, dtype=np.float64)
        g = 2 * d / C
    return loss * w, np.asarray(g * w[:, None].astype(z.dtype))


def as_targets(y: Array | Targets, C: int) -> Targets:
    """Targets as they are; of plain labels (T,) those of C classes."""
    return y if isinstance(y, Targets) else Targets("classification", y, C)


def targets(
    y: Array,
    C: int,
    task: Task = "classification",
    *,
    sample_weight: Array | None = None,
    class_weight: object = None,
    smoothing: float = 0.0,
) -> Targets:
    """The targets of a set of samples.

    Args:
        y: as in `Targets`, checked by `data.as_labels`.
        C: number of outputs.
        task: one of `TASKS`.
        sample_weight: (T,) numbers above 0; None: all alike.
        class_weight: as `class_weights` takes it; of classification only.
        smoothing: ε, 0 to `MOST_SMOOTHING`; not of regression.

    Raises:
        UsageError: an argument is out of range, or of no use to the task.
        DataError: the weights cannot be used.
    """
    check_task(task)
    if isinstance(smoothing, bool) or not isinstance(smoothing, (int, float)) or not 0 <= smoothing <= MOST_SMOOTHING:
        raise UsageError(f"label_smoothing must be 0 to {MOST_SMOOTHING}, not {smoothing!r:.60}")
    if task == "regression" and smoothing:
        raise UsageError(f"label_smoothing must go with classes or labels, not with regression: leave {smoothing} out")
    if task != "classification" and class_weight is not None:
        raise UsageError(f"class_weight must go with classification, not with {task}: use sample_weight")
    by_class = None if class_weight is None else class_weights(class_weight, y, C)
    weights, unit = _weights(y, sample_weight, by_class), 1.0
    if weights is not None:
        unit = float(weights.mean())
        weights = _counting(weights / unit)
    made = Targets(task, y, C, weights, float(smoothing), unit=unit, by_class=by_class)
    if task != "regression":
        return made
    values = np.asarray(y, np.float64)
    centre = made.share @ values
    spread = np.sqrt(made.share @ (values - centre) ** 2)
    return replace(made, centre=centre, spread=np.where(spread > 0, spread, 1.0))


def class_weights(wanted: object, y: Array, C: int) -> Doubles:
    """(C,) how much a sample of each class counts.

    Args:
        wanted: "balanced": T/(C'·n_c), with C' classes that occur and n_c samples of each; or C numbers above 0; or a
            dictionary of them by class, 1 for those it lacks.
        y: (T,) classes.

    Raises:
        UsageError: they are none of these.
    """
    rule = f"class_weight must be 'balanced' or {C} numbers above 0, one a class"
    if isinstance(wanted, str):
        if wanted != "balanced":
            raise UsageError(f"{rule}, not {wanted!r:.60}")
        counts = np.bincount(y, minlength=C)
        return np.asarray(len(y) / np.maximum(counts, 1) / max(int((counts > 0).sum()), 1))
    if isinstance(wanted, dict):
        try:
            known = {int(c): v for c, v in wanted.items()}
        except (TypeError, ValueError):
            raise UsageError(f"{rule}, not {wanted!r:.60}") from None
        if not set(known) <= set(range(C)):
            raise UsageError(f"{rule}, 0 to {C - 1}, not {sorted(known)!r:.60}")
        wanted = [known.get(c, 1.0) for c in range(C)]
    try:
        values = np.asarray(wanted, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{rule}, not {wanted!r:.60}") from None
    if values.shape != (C,) or not np.isfinite(values).all() or values.min() <= 0:
        raise UsageError(f"{rule}, not {wanted!r:.60}")
    return values


def _weights(y: Array, sample_weight: Array | None, by_class: Doubles | None) -> Doubles | None:
    """(T,) both kinds together; None: neither."""
    weights = None if sample_weight is None else _positive(sample_weight, len(y))
    if by_class is None:
        return weights
    return by_class[y] if weights is None else weights * by_class[y]


def _counting(weights: Doubles) -> Doubles:
    """Weights of which none is nothing."""
    if weights.min() < LEAST_WEIGHT:
        raise DataError(
            f"sample weights must be at least {LEAST_WEIGHT:g} times their mean, but sample {weights.argmin()} has "
            f"{weights.min():g} times: leave out samples that are not to count"
        )
    return weights


def _positive(weights: Array, T: int) -> Doubles:
    values = np.asarray(weights)
    if values.dtype.kind not in "iuf" or values.shape != (T,):
        raise DataError(f"sample weights must be ({T},) numbers, one a sample, not {values.dtype} {list(values.shape)}")
    values = values.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise DataError(
            f"sample weights must be finite and above 0, but that of sample {bad[0]} is {values[bad[0]]:g}: leave out "
            "samples that are not to count"
        )
    return values

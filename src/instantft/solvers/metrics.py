"""How well outputs tell what they should: the figures that `evaluate` reports, by task."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..tasks import Targets
from .calibration import expected_calibration_error, losses, softmax

__all__ = ["measured"]

Array = NDArray[Any]


def measured(goal: Targets, outputs: Array) -> dict[str, Any]:
    """Figures of plain Python numbers, ready for JSON.

    Args:
        goal: T targets, all of one weight.
        outputs: (T, C) logits, or predicted numbers.

    Returns:
        classification: accuracy, balanced_accuracy (mean over the classes that occur), macro_f1 (mean over those that
        occur or are predicted), loss, calibration_error, per_class, confusion_matrix (rows are true classes).
        regression: r2, rmse, mae (means over outputs), loss, per_output. r2 is null where targets are all alike.
        multi-label: label_accuracy, exact_match, macro_f1, balanced_accuracy (means over labels), loss, per_label.
    """
    z = np.asarray(outputs, np.float64)
    made = {"classification": _of_classes, "regression": _of_numbers, "multi-label": _of_labels}[goal.task](goal, z)
    return {**made, "loss": float(losses(z, goal).mean()), "n": len(goal)}


def _of_classes(goal: Targets, z: Array) -> dict[str, Any]:
    y, C = goal.y, goal.C
    confusion = np.zeros((C, C), np.int64)
    np.add.at(confusion, (y, z.argmax(axis=1)), 1)
    counts, said, right = confusion.sum(axis=1), confusion.sum(axis=0), confusion.diagonal()
    seen = counts > 0
    return {
        "accuracy": float(right.sum() / len(y)),
        "balanced_accuracy": float((right[seen] / counts[seen]).mean()),
        "macro_f1": float(_f1(right, counts, said)[counts + said > 0].mean()),
        "calibration_error": expected_calibration_error(softmax(z), y),
        "per_class": [
            {"class": c, "n": int(counts[c]), "accuracy": float(right[c] / counts[c]) if counts[c] else None}
            for c in range(C)
        ],
        "confusion_matrix": confusion.tolist(),
    }


def _of_numbers(goal: Targets, f: Array) -> dict[str, Any]:
    y = np.asarray(goal.y, np.float64)
    error, spread = f - y, y.var(axis=0)
    squares = (error * error).mean(axis=0)
    each = [float(1 - s / v) if v > 0 else None for s, v in zip(squares, spread, strict=True)]
    known = [r for r in each if r is not None]
    rmse, mae = np.sqrt(squares), np.abs(error).mean(axis=0)
    return {
        "r2": float(np.mean(known)) if known else None,
        "rmse": float(rmse.mean()),
        "mae": float(mae.mean()),
        "per_output": [
            {"output": c, "r2": each[c], "rmse": float(rmse[c]), "mae": float(mae[c])} for c in range(len(each))
        ],
    }


def _of_labels(goal: Targets, z: Array) -> dict[str, Any]:
    y, said = goal.y > 0.5, z > 0
    T, both = len(y), (y & said).sum(axis=0)
    yes, claimed = y.sum(axis=0), said.sum(axis=0)
    right = (y == said).mean(axis=0)
    f1 = _f1(both, yes, claimed)
    no = T - yes
    hits, rejections = both / np.maximum(yes, 1), (no - (claimed - both)) / np.maximum(no, 1)
    balanced = np.where(yes == 0, rejections, np.where(no == 0, hits, (hits + rejections) / 2))
    return {
        "label_accuracy": float(right.mean()),
        "exact_match": float((y == said).all(axis=1).mean()),
        "macro_f1": float(f1.mean()),
        "balanced_accuracy": float(balanced.mean()),
        "per_label": [
            {
                "label": c,
                "n": int(yes[c]),
                "accuracy": float(right[c]),
                "balanced_accuracy": float(balanced[c]),
                "f1": float(f1[c]),
            }
            for c in range(len(right))
        ],
    }


def _f1(both: Array, true: Array, said: Array) -> Array:
    """2·both/(true + said) of each class or label; 1 where there was nothing to say and nothing was said."""
    return np.where(true + said > 0, 2 * both / np.maximum(true + said, 1), 1.0)

"""Targets, weights and what tasks are judged by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.errors import DataError, UsageError
from instantft.tasks import METRICS, TASKS, Targets, as_targets, check_task, class_weights, loss_and_gradient, targets

Y = np.array([0, 0, 0, 1, 2, 2], np.int32)


def test_balanced_classes_count_alike() -> None:
    goal = targets(Y, 4, class_weight="balanced")  # class 3 does not occur
    assert goal.weights is not None
    by_class = [goal.weights[c == Y].sum() for c in range(3)]
    assert by_class == pytest.approx([2.0, 2.0, 2.0])
    assert targets(Y, 4, class_weight={1: 3}).by_class == pytest.approx([1, 3, 1, 1])


def test_weights_multiply_and_have_mean_one() -> None:
    goal = targets(Y, 3, sample_weight=np.array([1, 2, 1, 2, 1, 1]), class_weight=[1, 2, 3])
    raw = np.array([1, 2, 1, 4, 3, 3])
    assert goal.weights == pytest.approx(raw / raw.mean())
    assert goal.unit == pytest.approx(raw.mean())
    assert goal.roots == pytest.approx(np.sqrt(raw / raw.mean()))
    more = goal.more(np.array([2, 0], np.int32), np.array([5.0, 1.0]))
    assert more.weights == pytest.approx(np.array([15.0, 1.0]) / raw.mean())
    assert not goal.plain
    assert as_targets(Y, 3).plain
    assert as_targets(goal, 3) is goal


def test_more_samples_without_weights_count_one() -> None:
    goal = targets(Y, 3, sample_weight=np.full(6, 2.0))
    assert goal.more(Y[:2], None).weights == pytest.approx([0.5, 0.5])


def test_regression_is_standardised_by_weight() -> None:
    y = np.array([[1.0, 5.0], [3.0, 5.0], [9.0, 5.0]], np.float32)
    goal = targets(y, 2, "regression", sample_weight=np.array([1.0, 1.0, 2.0]))
    twice = targets(y[[0, 1, 2, 2]], 2, "regression")
    assert goal.centre == pytest.approx(twice.centre)
    assert goal.spread == pytest.approx(twice.spread)
    assert goal.spread[1] == 1  # an output that does not vary
    assert pytest.approx((y - twice.centre) / twice.spread) == goal.Y
    assert goal.score(y) == 1
    assert goal.at(np.array([0, 1])).centre is goal.centre


def test_r2_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=(50, 2)).astype(np.float32) * [1, 40]
    f = y + rng.normal(size=y.shape) * [0.5, 3]
    expected = 1 - ((y - f) ** 2).sum(axis=0) / ((y - y.mean(axis=0)) ** 2).sum(axis=0)
    assert targets(y.astype(np.float32), 2, "regression").score(f) == pytest.approx(expected.mean(), rel=1e-5)


def test_smoothing_spreads_a_share() -> None:
    soft = targets(Y, 3, smoothing=0.3).soft
    assert soft.sum(axis=1) == pytest.approx(np.ones(6))
    assert soft[0] == pytest.approx([0.8, 0.1, 0.1])
    labels = targets(np.array([[0.0, 1.0]], np.float32), 2, "multi-label", smoothing=0.2)
    assert labels.soft[0] == pytest.approx([0.1, 0.9])


def test_merits() -> None:
    logits = np.array([[1.0, 0], [0, 1]])
    assert targets(np.array([0, 0], np.int32), 2).merits(logits).tolist() == [1, 0]
    labels = targets(np.array([[1.0, 0], [1, 1]], np.float32), 2, "multi-label")
    assert labels.merits(logits).tolist() == [1, 0.5]
    weighted = targets(np.array([0, 0], np.int32), 2, sample_weight=np.array([3.0, 1.0]))
    assert weighted.score(logits) == 0.75
    with pytest.raises(UsageError, match="classes or labels, not numbers"):
        targets(np.ones((2, 1), np.float32), 1, "regression").right(logits)
    assert set(METRICS) == set(TASKS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"task": "ranking"}, "task must be one of classification, regression, multi-label, not 'ranking'"),
        ({"smoothing": 0.6}, "label_smoothing must be 0 to 0.5, not 0.6"),
        ({"smoothing": "much"}, "label_smoothing must be 0 to 0.5, not 'much'"),
        ({"smoothing": float("nan")}, "label_smoothing must be 0 to 0.5, not nan"),
        ({"smoothing": 0.1, "task": "regression"}, "label_smoothing must go with classes or labels"),
        (
            {"class_weight": "balanced", "task": "multi-label"},
            "class_weight must go with classification, not with multi",
        ),
        ({"class_weight": "even"}, "class_weight must be 'balanced' or 3 numbers above 0, one a class, not 'even'"),
        ({"class_weight": [1, 2]}, "one a class, not \\[1, 2\\]"),
        ({"class_weight": [1, 2, 0]}, "one a class, not \\[1, 2, 0\\]"),
        ({"class_weight": [1, 2, "x"]}, "one a class, not \\[1, 2, 'x'\\]"),
        ({"class_weight": {7: 2}}, "0 to 2, not \\[7\\]"),
        ({"class_weight": {"a": 2}}, "one a class, not {'a': 2}"),
        ({"class_weight": {1: -2}}, "one a class"),
        ({"class_weight": 3}, "one a class, not 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        targets(Y, 3, **arguments)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (np.ones(5), r"sample weights must be \(6,\) numbers, one a sample, not float64 \[5\]"),
        (np.array(["a"] * 6), r"sample weights must be \(6,\) numbers"),
        (np.array([1, 1, 0, 1, 1, 1]), "finite and above 0, but that of sample 2 is 0: leave out"),
        (np.array([1, 1, np.inf, 1, 1, 1]), "finite and above 0, but that of sample 2 is inf"),
        (np.array([1, 1, 1, 1e-9, 1, 1]), "at least 1e-06 times their mean, but sample 3"),
    ],
)
def test_bad_weights(weights: np.ndarray, words: str) -> None:
    with pytest.raises(DataError, match=words):
        targets(Y, 3, sample_weight=weights)


def test_class_weights_of_no_class() -> None:
    assert class_weights("balanced", np.array([1, 1], np.int32), 2)[1] == 1
    assert check_task("regression") == "regression"
    assert isinstance(targets(Y, 3), Targets)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_differences(task: Any, weighted: bool) -> None:
    """In float64, where differences of 1e-6 leave about 1e-9; smoothed targets are float32 and sum to 1 ± 1e-7."""
    rng = np.random.default_rng(0)
    y = {
        "classification": rng.integers(0, 4, 7).astype(np.int32),
        "regression": rng.normal(size=(7, 4)).astype(np.float32),
        "multi-label": rng.integers(0, 2, (7, 4)).astype(np.float32),
    }[task]
    weights = rng.uniform(0.5, 2, 7) if weighted else None
    goal = targets(y, 4, task, sample_weight=weights, smoothing=0.0 if task == "regression" else 0.2)
    z = 3 * rng.normal(size=(7, 4))
    losses, g = loss_and_gradient(goal, z)
    h = 1e-6
    for c in range(4):
        up, down = (loss_and_gradient(goal, z + s * h * np.eye(4)[c])[0] for s in (1, -1))
        assert g[:, c] == pytest.approx((up - down) / (2 * h), abs=1e-6)
    assert losses.min() > 0


def test_losses_of_large_logits_are_finite() -> None:
    z = np.array([[1e4, -1e4]], np.float32)
    for task, y in (("classification", [1]), ("multi-label", [[0, 1]])):
        goal = targets(np.array(y, np.int32 if task == "classification" else np.float32), 2, task)  # type: ignore[arg-type]
        loss, g = loss_and_gradient(goal, z)
        assert loss[0] == pytest.approx(2e4 if task == "classification" else 1e4)
        assert np.isfinite(g).all()

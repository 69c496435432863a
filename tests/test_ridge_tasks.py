"""The closed form of numbers, labels and weighted samples: against the equations, and against fitting again."""

from __future__ import annotations

import numpy as np
import pytest

from instantft.backbones.builtin import Network, embeddings
from instantft.engine import Engine, get_engine
from instantft.solvers import closed, ridge, taps
from instantft.solvers.records import Records
from instantft.solvers.ridge import fit_ridge
from instantft.spec import dnn
from instantft.tasks import Targets, Task, targets

from . import samples
from .test_ridge import SAME, close, features, predicted


def made(T: int, task: Task, weighted: bool, C: int = 3, seed: int = 0) -> tuple[np.ndarray, Targets]:
    """Samples (T, 10) whose first values tell most of their targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, 10)).astype(np.float32)
    z = x[:, :C] + 0.5 * rng.normal(size=(T, C))
    y = {
        "classification": z.argmax(axis=1).astype(np.int32),
        "regression": (z * [1, 10, 100][:C] + [0, 5, -300][:C]).astype(np.float32),
        "multi-label": (z > 0.3).astype(np.float32),
    }[task]
    return x, targets(y, C, task, sample_weight=rng.uniform(0.1, 3, T) if weighted else None)


TASKS = [("classification", True), ("regression", False), ("regression", True), ("multi-label", True)]


@pytest.mark.parametrize("T", [12, 90])  # dual, primal
@pytest.mark.parametrize(("task", "weighted"), TASKS)
def test_left_out_scores_are_those_of_fitting_again(
    T: int, task: Task, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closed, "CHUNK", 20)
    engine, base = get_engine("reference"), samples.base(dnn(10, 3, 8))
    x, goal = made(T, task, weighted)
    x[3] *= 50  # is clipped
    result = fit_ridge(engine, base, x, goal)
    assert result.space == ("dual" if T <= 26 else "primal")
    Z = features(engine, base, x, result)
    norms = np.linalg.norm(Z[:, :-1], axis=1)
    c = np.minimum(1, taps.CLIP * np.median(norms[: ridge.FEW]) / norms)[:, None]
    assert (c < 1).sum() == 1
    w = np.ones((T, 1)) if goal.weights is None else goal.weights[:, None]
    Z, Y = c * Z, c * goal.Y
    frozen = engine.forward(base.spec, base.tensors, x)

    def left_out(rows: np.ndarray) -> np.ndarray:
        kept = np.setdiff1d(np.arange(T), rows)
        A = Z[kept].T @ (w[kept] * Z[kept]) + result.lam * np.eye(Z.shape[1])
        W = np.linalg.solve(A, Z[kept].T @ (w[kept] * Y[kept]))
        return result.calibration(Z[rows] @ W, frozen[rows])

    alone = np.concatenate([left_out(result.rows[[i]]) for i in range(T)])
    close(result.loo_scores, alone, SAME)
    blocked = np.concatenate([left_out(result.rows[block]) for block in result.blocks])
    close(result.block_scores, blocked, SAME)
    assert result.loo_score == pytest.approx(goal.at(result.rows).score(alone), rel=1e-4)


@pytest.mark.parametrize(("task", "weighted"), TASKS)
@pytest.mark.parametrize("rank", [None, 2])
def test_adapter_is_what_the_equations_say(engine: Engine, task: Task, weighted: bool, rank: int | None) -> None:
    base = samples.base(dnn(10, 3, 8))
    x, goal = made(40, task, weighted)
    result = fit_ridge(engine, base, x, goal, rank=rank)
    new, _ = made(20, task, False, seed=1)
    frozen = engine.forward(base.spec, base.tensors, new)
    told = predicted(engine, base, result, new)
    assert result.adapter.config.get("task", "classification") == task
    if rank is None:
        Z, w = features(engine, base, x, result), np.ones(40) if goal.weights is None else goal.weights
        c = np.minimum(1, result.choice.limit * result.choice.scale / np.linalg.norm(Z[:, :-1], axis=1))
        A = (Z.T * (c * c * w)) @ Z + result.lam * np.eye(Z.shape[1])
        W = np.linalg.solve(A, (Z.T * (c * c * w)) @ goal.Y)
        close(told, result.calibration(features(engine, base, new, result) @ W, frozen), SAME)
    else:
        full = predicted(engine, base, fit_ridge(engine, base, x, goal), new)
        error = np.abs(told - full).mean(axis=0) / np.abs(full - full.mean(axis=0)).mean(axis=0)
        assert (error < 1).all()  # of rank 2 in place of 3
        assert (error > 0).any()


def test_a_weight_of_two_is_a_sample_twice() -> None:
    """In the system that is solved; scale and limit, which are the records' affair, are kept as they are."""
    engine, base = get_engine("reference"), samples.base(dnn(10, 3, 8))
    x, goal = made(30, "regression", False)
    twice = np.arange(10)
    weights = np.ones(30)
    weights[twice] = 2
    one = targets(goal.y, 3, "regression", sample_weight=weights)
    two = targets(np.concatenate([goal.y, goal.y[twice]]), 3, "regression")
    records = Records(engine, base, x, np.arange(30), None)
    doubled = Records(engine, base, np.concatenate([x, x[twice]]), np.arange(40), None)
    choice = taps.Choice(0.3, (1.0, 0.3, 0.09))
    a = closed.dual(records, one.Y, choice, closed.judged(30, None, 30, 0), roots=np.sqrt(weights))
    b = closed.dual(doubled, two.Y, choice, closed.judged(40, None, 40, 0))
    assert pytest.approx(two.Y[:30]) == one.Y
    for k, (A, _) in a.pairs.items():
        close(A, b.pairs[k][0], SAME)
    close(a.bias, b.bias, SAME)


@pytest.mark.parametrize("T", [40, 300])  # dual, primal
def test_units_of_numbers_do_not_matter(T: int) -> None:
    engine, base = get_engine(), embeddings(100, 1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, 100)).astype(np.float32)
    y = (x[:, :1] + 0.1 * rng.normal(size=(T, 1))).astype(np.float32)
    small = fit_ridge(engine, base, x, targets(y, 1, "regression"))
    large = fit_ridge(engine, base, x, targets((1000 * y + 5000).astype(np.float32), 1, "regression"))
    assert small.space == ("dual" if T <= 100 else "primal")
    assert large.lam == pytest.approx(small.lam, rel=1e-3)
    close((predicted(engine, base, large, x) - 5000) / 1000, predicted(engine, base, small, x), 1e-3)  # 5000 in float32
    assert large.loo_score == pytest.approx(small.loo_score, abs=1e-3)


def test_what_the_frozen_network_says_of_numbers_is_used_where_it_helps() -> None:
    """A regression network that is right but for noise in its answer."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 50)).astype(np.float32)
    true = rng.normal(size=(50, 1)).astype(np.float32)
    y = 3 * x @ true + 7
    net = embeddings(50, 1)
    knows = Network(net.spec, {"layers.0.weight": 3 * true, "layers.0.bias": np.array([4.0], np.float32)})
    with_it = fit_ridge(get_engine(), knows, x, targets(y, 1, "regression"))
    without = fit_ridge(get_engine(), net, x, targets(y, 1, "regression"))
    assert without.gain == 0
    assert with_it.gain > 0.9
    new = rng.normal(size=(200, 50)).astype(np.float32)
    error = [
        np.abs(predicted(get_engine(), b, r, new) - (3 * new @ true + 7)).mean()
        for b, r in ((knows, with_it), (net, without))
    ]
    assert error[0] < 0.1 * error[1]


def test_rare_classes_are_told_where_they_count() -> None:
    rng = np.random.default_rng(1)
    y = (rng.random(600) < 0.06).astype(np.int32)
    x = (rng.normal(size=(600, 6)) + y[:, None]).astype(np.float32)
    base = embeddings(6, 2)

    def recall(goal: Targets) -> float:
        said = predicted(get_engine(), base, fit_ridge(get_engine(), base, x, goal), x).argmax(axis=1)
        return float((said[y == 1] == 1).mean())

    assert recall(targets(y, 2, class_weight="balanced")) > recall(targets(y, 2)) + 0.3


def test_smoothing_changes_how_sure_the_classes_are_and_no_class() -> None:
    engine, base = get_engine(), samples.base()
    x, y = samples.blobs(90)
    plain, smooth = (fit_ridge(engine, base, x, targets(y, 3, smoothing=e)) for e in (0.0, 0.2))
    assert float(smooth.temperature) < float(plain.temperature)
    a, b = (predicted(engine, base, r, x) for r in (plain, smooth))
    assert (a.argmax(axis=1) == b.argmax(axis=1)).all()


def test_thresholds_of_rare_labels() -> None:
    """Each label has a factor and a threshold of its own, so that probabilities are calibrated."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(800, 8)).astype(np.float32)
    y = (x[:, :3] + 0.7 * rng.normal(size=(800, 3)) > [-1.0, 0.5, 1.5]).astype(np.float32)
    result = fit_ridge(get_engine(), embeddings(8, 3), x, targets(y, 3, "multi-label"))
    p = 1 / (1 + np.exp(-result.block_scores))
    assert p.mean(axis=0) == pytest.approx(y[result.rows].mean(axis=0), abs=0.02)
    assert len(set(result.calibration.scale.tolist())) == 3
    assert result.calibration_error is None


def test_lift_of_numbers() -> None:
    """|x| is nothing a linear map can tell, and a lift can."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 4)).astype(np.float32)
    y = np.stack([np.linalg.norm(x, axis=1), x[:, 0]], axis=1).astype(np.float32)
    base = embeddings(4, 2)
    linear, lifted = (fit_ridge(get_engine(), base, x, targets(y, 2, "regression"), lift=k) for k in (None, "nystrom"))
    assert lifted.lift == "nystrom"
    assert lifted.block_score > linear.block_score + 0.3

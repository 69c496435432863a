"""A held-out block is kept away from training, in long runs or whole groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.cache.store import memory_store
from instantft.engine import Engine, forward
from instantft.methods import METHODS
from instantft.solvers import sgd
from instantft.solvers.holdout import PIECES, SHARE, STAIRS, best_epochs, hold_out, split

from . import samples

BASE = samples.base()
X, Y = samples.blobs(90)
SETTINGS: dict[str, Any] = {"rank": 2, "batch_size": 10, "lr": 0.1, "momentum": 0.0}


@pytest.mark.parametrize("T", [1, 2, 4, 5, 30, 200, 1024, 5000])
def test_runs_are_few_and_long(T: int) -> None:
    (judge,) = split(T, None, 0)
    assert len(judge.rows) == max(1, T // SHARE)
    assert (np.diff(judge.rows) > 1).sum() < PIECES
    np.testing.assert_array_equal(np.concatenate(judge.blocks), np.arange(len(judge.rows)))


@pytest.mark.parametrize("count", [2, 3, 5, 13])
def test_every_group_is_held_out_once(count: int) -> None:
    groups = np.arange(90) % count
    lots = split(90, groups, 0)
    assert len(lots) == min(count, SHARE)
    np.testing.assert_array_equal(np.sort(np.concatenate([lot.rows for lot in lots])), np.arange(90))
    for lot in lots:
        rest = np.setdiff1d(np.arange(90), lot.rows)
        assert not set(groups[rest]) & set(groups[lot.rows])
        assert [len(set(groups[lot.rows[block]])) for block in lot.blocks] == [1] * len(lot.blocks)


def test_logits_of_groups_are_in_the_order_of_their_rows(engine: Engine) -> None:
    """Each row's logits come from the training that has not seen its group."""
    groups = np.arange(len(X)) % 3
    judge, logits = hold_out(
        engine, BASE, METHODS["skip2-lora"], X, Y,
        groups=groups, store=None, numbers=np.arange(len(X)), seed=0, threads=1, epochs=3, **SETTINGS,
    )  # fmt: skip
    assert sorted(judge.rows.tolist()) == list(range(len(X)))
    for group in range(3):
        rest = np.flatnonzero(groups != group)
        fitted = sgd.fit(engine, BASE, "skip2-lora", X[rest], Y[rest], epochs=3, seed=0, numbers=rest, **SETTINGS)
        mine = groups[judge.rows] == group
        want = forward(engine, BASE.spec, {**BASE.tensors, **fitted.adapter.tensors}, X[judge.rows[mine]])
        np.testing.assert_allclose(logits[mine], want, rtol=1e-4, atol=1e-5)


def test_what_is_held_out_is_not_learnt_from(engine: Engine) -> None:
    """The logits are those of a training without those samples, whatever their labels."""
    (judge,) = split(len(X), None, 3)
    train = np.setdiff1d(np.arange(len(X)), judge.rows)
    without = sgd.fit(engine, BASE, "skip2-lora", X[train], Y[train], epochs=4, seed=3, **SETTINGS)
    want = forward(engine, BASE.spec, {**BASE.tensors, **without.adapter.tensors}, X[judge.rows])
    for y in (Y, np.where(np.isin(np.arange(len(Y)), judge.rows), 0, Y).astype(np.int32)):
        store = memory_store("fp32", BASE.spec.record, len(X))
        found, logits = hold_out(
            engine, BASE, METHODS["skip2-lora"], X, y,
            groups=None, store=store, numbers=np.arange(len(X)), seed=3, threads=1, epochs=4, **SETTINGS,
        )  # fmt: skip
        np.testing.assert_array_equal(found.rows, judge.rows)
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5)  # the fused update sums in another order


def test_one_sample_leaves_nothing_to_train_on(engine: Engine) -> None:
    _, logits = hold_out(
        engine, BASE, METHODS["ft-all"], X[:1], Y[:1],
        groups=None, store=None, numbers=np.arange(1), seed=0, threads=1, epochs=4, **SETTINGS,
    )  # fmt: skip
    np.testing.assert_array_equal(logits, forward(engine, BASE.spec, BASE.tensors, X[:1]))


def test_epochs_follow_the_held_out_loss(engine: Engine) -> None:
    """Clean classes are worth many epochs; labels that mean nothing are worth few."""
    noise = np.random.default_rng(0).integers(0, 3, len(Y)).astype(np.int32)
    found = [
        best_epochs(
            engine, BASE, METHODS["skip2-lora"], X, y,
            groups=None, store=None, numbers=np.arange(len(X)), seed=0, threads=1, **{**SETTINGS, "lr": 0.05},
        )
        for y in (Y, noise)
    ]  # fmt: skip
    assert found[0] >= STAIRS[4]
    assert found[1] < found[0]

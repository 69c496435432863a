"""Closed-form fine-tuning on the real data, where it is there: the accuracy it is meant to reach."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.accuracy import TASKS, accuracy, drifted, network, pretraining
from benchmarks.common import data_file
from instantft.cache.store import memory_store
from instantft.engine import get_engine
from instantft.solvers import sgd
from instantft.solvers.ridge import fit_ridge

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "pretrain", "epochs", "least"),
    [("damage1", 0, 100, 99.0), ("damage2", 0, 100, 92.5), ("fashion", 6000, 3, 80.5), ("mnist", 6000, 3, 94.5)],
)
def test_accuracy(name: str, pretrain: int, epochs: int, least: float) -> None:
    """Mean of three seeds; base networks of the images are trained less than in the benchmarks, to save time."""
    task = TASKS[name]
    if not data_file(task.file).is_file():
        pytest.skip(f"{data_file(task.file)} is not here")
    engine = get_engine()
    x, y = pretraining(task)
    found = []
    for seed in range(3):
        n = pretrain or len(x)
        base, _ = sgd.pretrain(
            engine, network(task), x[:n], y[:n], epochs=epochs, batch_size=20, lr=task.pretrain_lr, seed=seed
        )
        tune, (tx, ty) = drifted(task, seed)
        store = memory_store("fp32", base.spec.record, len(tune[0]))
        result = fit_ridge(engine, base, *tune, store=store)
        logits = engine.forward(base.spec, {**base.tensors, **result.adapter.tensors}, tx[:3000])
        found.append(accuracy(logits, ty[:3000]) or 0.0)
        assert result.decide().accepted
    assert np.mean(found) >= least

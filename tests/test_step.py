"""The default step: its eigenvalue against NumPy's, and that SGD with it does not diverge where a larger one does."""

from __future__ import annotations

import numpy as np
import pytest

from instantft.engine import get_engine
from instantft.errors import DivergedError, UsageError
from instantft.methods import METHODS
from instantft.solvers import sgd
from instantft.solvers.records import Records
from instantft.solvers.step import LARGEST, SHARE, default_lr, default_momentum, features, largest_eigenvalue
from tests import samples


@pytest.mark.parametrize("shape", [(1, 1), (5, 30), (200, 12)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_largest_eigenvalue(shape: tuple[int, int], shift: float) -> None:
    H = np.random.default_rng(0).normal(size=shape) + shift
    exact = float(np.linalg.eigvalsh(H.T @ H / len(H))[-1])
    assert largest_eigenvalue(H) == pytest.approx(exact, rel=0.02)


def test_nothing_to_step_on() -> None:
    assert largest_eigenvalue(np.zeros((4, 3))) == 0
    base = samples.base()
    x = np.zeros((5, 6), np.float32)
    zero = base.tensors["layers.0.bias"] * 0
    dead = type(base)(base.spec, {**base.tensors, "layers.0.bias": zero, "layers.1.bias": zero}, base.mean, base.std)
    records = Records(get_engine("reference"), dead, x, np.arange(5), None)
    assert default_lr(records, METHODS["skip2-lora"]) <= LARGEST


@pytest.mark.parametrize("method", ["skip2-lora", "lora-last", "ft-last"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_sgd_learns_with_it_whatever_the_scale(method: str, scale: float) -> None:
    engine = get_engine()
    base = samples.base()
    x, y = samples.blobs(200)
    x = x * np.float32(scale)
    records = Records(engine, base, x, np.arange(200), None)
    for momentum in (0.0, 0.8, 0.95):
        lr = default_lr(records, METHODS[method], rank=2, momentum=momentum)
        assert 0 < lr <= LARGEST
        fitted = sgd.fit(engine, base, method, x, y, rank=2, epochs=20, lr=lr, momentum=momentum)
        assert np.isfinite(fitted.stats.loss).all()
        assert fitted.stats.loss[-1] < fitted.stats.loss[0]


def test_where_thirty_times_more_diverges() -> None:
    """Labels at random, so that no step can end in a corner where the gradient vanishes."""
    engine = get_engine()
    base = samples.base()
    x, y = samples.blobs(200)
    y = np.random.default_rng(0).permutation(y)
    lr = default_lr(Records(engine, base, x, np.arange(200), None), METHODS["skip2-lora"])
    safe = sgd.fit(engine, base, "skip2-lora", x, y, epochs=50, lr=lr).stats.loss
    assert safe[-1] <= safe[0]
    with pytest.raises(DivergedError):
        sgd.fit(engine, base, "skip2-lora", x, y, epochs=50, lr=30 * lr)


def test_momentum_and_batch() -> None:
    x, _ = samples.blobs(100)
    x *= np.float32(5)  # so that no step is LARGEST
    records = Records(get_engine("reference"), samples.base(), x, np.arange(100), None)
    m, last = METHODS["skip2-lora"], METHODS["lora-last"]
    assert default_lr(records, last, momentum=0.9) == pytest.approx(0.1 * default_lr(records, last))
    assert default_lr(records, m, momentum=0.9) == pytest.approx(0.3 * default_lr(records, m))
    assert default_lr(records, m, momentum=0.5) == default_lr(records, m)
    assert [default_momentum(METHODS[n]) for n in ("skip-lora", "skip2-lora", "lora-last", "ft-last")] == [
        0.8,
        0.8,
        0,
        0,
    ]
    assert default_lr(records, m, batch_size=1) < default_lr(records, m, batch_size=20)
    assert default_lr(records, m, batch_size=500) == default_lr(records, m, batch_size=100)


def test_a_lucky_draw_of_the_only_adapter_buys_no_larger_step() -> None:
    x, _ = samples.blobs(100)
    records = Records(get_engine("reference"), samples.base(), x * np.float32(5), np.arange(100), None)
    m, rank = METHODS["lora-last"], 2
    taps = records.taps(slice(0, 100))[-1]
    H = taps * (rank / taps.shape[1]) ** 0.5  # the features' second moment on average over draws
    M = 0.95 * largest_eigenvalue(H) + float((H**2).sum(axis=1).max()) / 20
    drawn = [largest_eigenvalue(features(records, m, rank, seed)) for seed in range(30)]
    assert min(drawn) < 0.3 * largest_eigenvalue(H)
    # √(2/AVERAGE) is one standard deviation; 3 of them for 30 draws
    assert max(default_lr(records, m, rank=rank, seed=seed) for seed in range(30)) < SHARE["bilinear"] / M / (1 - 3 / 8)


def test_features() -> None:
    x, _ = samples.blobs(30)
    base = samples.base()
    records = Records(get_engine("reference"), base, x, np.arange(30), None)
    assert features(records, METHODS["skip2-lora"], 4, 0).shape == (30, 12)
    assert features(records, METHODS["lora-last"], 3, 0).shape == (30, 3)
    last = features(records, METHODS["ft-last"], 4, 0)
    assert np.array_equal(last[:, :-1], records.taps(slice(0, 30))[-1])
    assert (last[:, -1] == 1).all()
    with pytest.raises(UsageError, match="needs a method that leaves it valid, not ft-all"):
        features(records, METHODS["ft-all"], 4, 0)

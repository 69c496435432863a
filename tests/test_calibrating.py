"""The fit of rates, and a calibration that is as short as can be."""

from __future__ import annotations

import numpy as np
import pytest

from instantft import calibrating
from instantft.calibrating import Case, _nonnegative, calibrate
from instantft.engine import Engine
from instantft.methods import method
from instantft.spec import dnn, lenet5

from . import samples


def test_rates_are_found_again() -> None:
    """Of exact times, whatever the units; a kind that costs nothing gets no rate below zero."""
    rng = np.random.default_rng(0)
    A = rng.random((40, 6)) * [1, 1e6, 1e-6, 1e3, 1, 1]
    x = np.array([2.0, 3e-6, 5e6, 0.0, 1.0, 0.5])
    np.testing.assert_allclose(_nonnegative(A, A @ x), x, rtol=1e-3, atol=1e-6)
    b = A @ x - 5.0 * A[:, 4]  # would be best explained by a rate of −4
    found = _nonnegative(A, b)
    assert found[4] == 0
    assert (found >= 0).all()


def test_a_kind_that_never_comes() -> None:
    assert _nonnegative(np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([3.0, 6.0])) == pytest.approx([3.0, 0.0])


def test_a_short_calibration(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "DENSE", (dnn(16, 3, 8),))
    monkeypatch.setattr(calibrating, "CONV", (lenet5((1, 16, 16), 3),))
    told: list[float] = []
    found = calibrate(engine, told.append, rounds=1)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    assert all(rate >= 0 for rate in found.rates.values())
    assert found.machine["engine"] == engine.name
    case = Case(samples.base(), method("skip2-lora"), "nf4", *samples.blobs(40), epochs=2)
    predicted = [found.seconds(work) for work in case.work()]
    assert all(seconds is not None and 0 < seconds < 1 for seconds in predicted)
    filled, trained = case.seconds(engine)
    assert filled > 0
    assert trained > 0

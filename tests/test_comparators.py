"""OS-ELM is exact, and both comparators learn."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import comparators
from benchmarks.closed_form import right
from benchmarks.comparators import (
    ElmSetting,
    OsElm,
    SpsaSetting,
    choose_elm,
    choose_spsa,
    input_weights,
    records,
    report,
    run_elm,
    run_spsa,
)
from instantft.engine import get_engine
from instantft.solvers import sgd
from tests import samples

EXACT = 1e-6
"""Of the largest weight: what goes into the hidden units is float32, which rounds otherwise in other chunks."""


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
@pytest.mark.parametrize("chunk", [1, 7])
def test_any_chunks_give_the_ridge_of_all_samples(chunk: int, activation: str) -> None:
    x, y = samples.blobs(200)
    elm = OsElm(*input_weights(x, 30, "random", activation, 0), activation, 0.1, 3)
    elm.start(x[:20], y[:20])
    for start in range(20, 200, chunk):
        elm.update(x[start : start + chunk], y[start : start + chunk])
    H = elm.hidden(x)
    W = np.linalg.solve(H.T @ H + 0.1 * np.eye(30), H.T @ np.eye(3)[y])
    assert np.abs(elm.W - W).max() <= EXACT * np.abs(W).max()


@pytest.mark.parametrize("kind", ["random", "autoencoder"])
def test_units_are_driven_alike(kind: str) -> None:
    x, _ = samples.blobs(200)
    A, b = input_weights(x, 30, kind, "sigmoid", 0)
    z = x @ A + b
    np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-3)
    assert np.abs(z.mean(axis=0)).max() <= 1 + 1e-5


@pytest.mark.parametrize("start", ["new", "old"])
@pytest.mark.parametrize("weights", ["random", "autoencoder"])
def test_os_elm_learns(weights: str, start: str) -> None:
    tune, old, (x, y) = samples.blobs(120), samples.blobs(60, 1), samples.blobs(90, 2)
    elm, seconds = run_elm(ElmSetting(40, weights, "sigmoid", start, 0.1), tune, old, 3, 0)
    assert right(elm.scores(x).astype(np.float32), y) > 0.9
    assert seconds >= 0


def test_os_elm_is_chosen_by_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old samples with wrong labels must not be chosen."""
    monkeypatch.setattr(comparators, "HIDDEN", (8, 32))
    x, y = samples.blobs(60, 1)
    assert choose_elm(samples.blobs(120), (x, (y + 1) % 3), 3, 0).start == "new"


@pytest.mark.parametrize("what", ["last", "skip"])
def test_spsa_learns(what: str) -> None:
    """A trained network whose classes change places."""
    engine, (x, y) = get_engine(), samples.blobs(120)
    net, _ = sgd.pretrain(engine, samples.SPEC, x, (y + 1) % 3, epochs=20)
    setting = SpsaSetting(what, 0.03)
    theta = run_spsa(setting, net, *records(engine, net, x), y, 0, steps=1000)
    before, after = (engine.forward(net.spec, {**net.tensors, **moved}, x) for moved in ({}, theta))
    assert right(after, y) > 0.9 > right(before, y)
    again = run_spsa(setting, net, *records(engine, net, x), y, 0, steps=1000)
    assert all(np.array_equal(again[name], value) for name, value in theta.items())


def test_spsa_takes_a_rate_that_does_not_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparators, "SPSA_RATES", (0.03, 1e30))
    monkeypatch.setattr(comparators, "SPSA_STEPS", 200)
    assert choose_spsa(get_engine(), samples.base(), samples.blobs(120), 0).lr == 0.03


def test_report() -> None:
    one = dict.fromkeys(comparators.COLUMNS, 0.5) | {f"{c} seconds": 0.1 for c in comparators.COLUMNS}
    one |= {"os-elm setting": "256 random", "spsa setting": "skip 0.01"}  # type: ignore[dict-item]
    text = report({"har": {"0": {"0": one}}}, [0])
    assert "| har | 50.0 ± 0.0 |" in text
    assert "| har | 100 | 100 | 100 | 100 | 256 random | skip 0.01 |" in text

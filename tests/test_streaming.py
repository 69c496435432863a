"""Streams of thousands of updates against fitting again from scratch: dual and primal, forgetting and bounded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.engine import get_engine
from instantft.errors import DataError, UsageError
from instantft.solvers.records import Records
from instantft.solvers.ridge import fit_ridge
from instantft.solvers.streaming import ROOM, TOLERANCE, StreamingRidge
from instantft.solvers.taps import Choice
from instantft.spec import NetSpec, dnn
from tests import samples

SPEC = dnn(10, 3, 8)
"""D = 26."""

CHOICE = Choice(0.05, (1.0, 0.5, 0.25), 0.2, 12.0)


def stream(T: int, seed: int = 0, spec: NetSpec = SPEC) -> tuple[list[np.ndarray], np.ndarray]:
    """Taps of T samples, a few of them giants or duplicates, and labels."""
    rng = np.random.default_rng(seed)
    taps = [np.maximum(rng.normal(size=(T, n)), 0).astype(np.float32) for n in spec.tap_widths]
    for giant in rng.integers(0, T, T // 50):
        for tap in taps:
            tap[giant] *= 30
    for tap in taps:
        tap[T // 2] = tap[0]
    return taps, rng.integers(0, 3, T).astype(np.int32)


def part(taps: list[np.ndarray], which: slice) -> list[np.ndarray]:
    return [tap[which] for tap in taps]


def again(taps: list[np.ndarray], y: np.ndarray, lam: float, forgetting: float = 1.0, C: int = 3) -> np.ndarray:
    """W (D+1, C) of the weighted least squares in streaming.py's header, by normal equations in float64."""
    parts = [np.sqrt(w) * CHOICE.scale * tap.astype(np.float64) for w, tap in zip(CHOICE.weights, taps, strict=True)]
    Z = np.concatenate([*parts, np.ones((len(y), 1))], axis=1)
    c = np.minimum(1, CHOICE.limit * CHOICE.scale / np.linalg.norm(Z[:, :-1], axis=1))[:, None]
    weights = forgetting ** np.arange(len(y) - 1, -1, -1)[:, None]
    Z, Y = c * Z, c * np.eye(C)[y]
    return np.linalg.solve(Z.T @ (weights * Z) + lam * np.eye(Z.shape[1]), Z.T @ (weights * Y))


def same(a: np.ndarray, b: np.ndarray) -> None:
    assert np.abs(a - b).max() <= TOLERANCE * np.abs(b).max()


@pytest.mark.parametrize("forgetting", [1.0, 0.999, 0.9])
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_thousands_of_updates(forgetting: float, batch: int) -> None:
    T = 3000
    taps, y = stream(T)
    s = StreamingRidge(SPEC, CHOICE, forgetting=forgetting)
    for start in range(0, T, batch):
        s.update(part(taps, slice(start, start + batch)), y[start : start + batch])
        if start in (0, 3 * batch) or start + batch >= T:
            stop = min(start + batch, T)
            same(s.W, again(part(taps, slice(0, stop)), y[:stop], s.lam, forgetting))
            assert CHOICE.lam / 2 <= s.lam <= CHOICE.lam * 1.5
    assert s.seen == T
    if forgetting == 1:
        assert s.lam == CHOICE.lam
        assert s.retained == 0


@pytest.mark.parametrize("support", [1, 20, 100])
@pytest.mark.parametrize("batch", [1, 13, 1000])
def test_bounded_support_is_fitting_again_on_what_is_kept(support: int, batch: int) -> None:
    taps, y = stream(2000)
    s = StreamingRidge(SPEC, CHOICE, support=support)
    for start in range(0, 2000, batch):
        s.update(part(taps, slice(start, start + batch)), y[start : start + batch])
        stop = min(start + batch, 2000)
        assert min(support, stop) <= s.retained <= max(ROOM * support, support + 1)
        if start % 5 == 0:
            kept = slice(stop - s.retained, stop)
            same(s.W, again(part(taps, kept), y[kept], s.lam))


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 60), max_size=8),
    seed=st.integers(0, 99),
    forgetting=st.sampled_from([1.0, 0.97]),
    support=st.sampled_from([None, 500]),
)
def test_any_way_of_cutting_gives_the_same(cuts: list[int], seed: int, forgetting: float, support: int | None) -> None:
    taps, y = stream(60, seed)
    edges = sorted({0, 60, *cuts})
    s = StreamingRidge(SPEC, CHOICE, forgetting=forgetting, support=support)
    for a, b in itertools.pairwise(edges):
        s.update(part(taps, slice(a, b)), y[a:b])
    same(s.W, again(taps, y, s.lam, forgetting))


def test_left_out_scores() -> None:
    taps, y = stream(20)
    s = StreamingRidge(SPEC, CHOICE, forgetting=0.98)
    for i in range(20):
        s.update(part(taps, slice(i, i + 1)), y[i : i + 1])
    scores, labels = s.left_out()
    assert np.array_equal(labels, y)
    Z = np.concatenate([np.sqrt(w) * CHOICE.scale * tap for w, tap in zip(CHOICE.weights, taps, strict=True)], axis=1)
    c = np.minimum(1, CHOICE.limit * CHOICE.scale / np.linalg.norm(Z, axis=1))[:, None]
    Z = c * np.c_[Z, np.ones(20)]
    weights = 0.98 ** np.arange(19, -1, -1)[:, None]
    for i in range(20):
        k = np.arange(20) != i
        W = np.linalg.solve(
            Z[k].T @ (weights[k] * Z[k]) + s.lam * np.eye(27), Z[k].T @ (weights[k] * (c[k] * np.eye(3)[y[k]]))
        )
        assert scores[i] == pytest.approx(Z[i] @ W, abs=1e-4)
    assert float(s.temperature() or 0) > 0


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
@pytest.mark.parametrize("before", [10, 200])  # dual, primal
def test_a_class_more(before: int, forgetting: float) -> None:
    taps, y = stream(before + 50)
    y[before:] = np.where(np.arange(50) % 2, 3, y[before:])
    s = StreamingRidge(SPEC, CHOICE, forgetting=forgetting)
    s.update(part(taps, slice(0, before)), y[:before])
    assert s.add_class() == 4
    assert (s.W[:, 3] == 0).all()
    s.update(part(taps, slice(before, None)), y[before:])
    same(s.W, again(taps, y, s.lam, forgetting, C=4))
    pairs, bias = s.pairs()
    assert bias.shape == (4,)
    assert pairs[0][1].shape == (4, 4)


def test_a_stream_is_a_fit() -> None:
    """Sample by sample from the engine's records, the stream ends where `fit_ridge` does."""
    engine, base = get_engine(), samples.base()
    x, y = samples.blobs(100)
    result = fit_ridge(engine, base, x, y)
    records = Records(engine, base, x, np.arange(100), None)
    s = StreamingRidge(base.spec, result.choice)
    for i in range(100):
        s.update(records.taps(slice(i, i + 1)), y[i : i + 1])
    pairs, bias = s.pairs()
    beta = float(result.temperature)
    same(beta * bias, result.adapter.tensors["output.bias"])
    for k, (A, B) in pairs.items():
        found = result.adapter.tensors[f"lora.{k}-3.A"] @ result.adapter.tensors[f"lora.{k}-3.B"]
        assert np.abs(beta * A @ B - found).max() <= 10 * TOLERANCE * np.abs(found).max()


def test_taps_of_weight_zero_are_not_needed() -> None:
    taps, y = stream(40)
    s = StreamingRidge(SPEC, Choice(0.1, (1.0, 0.0, 0.0)))
    s.update([taps[0], taps[1][:0], taps[2][:0]], y)
    assert set(s.pairs()[0]) == {0}


def test_nothing_changes_where_a_batch_is_refused() -> None:
    taps, y = stream(30)
    s = StreamingRidge(SPEC, CHOICE)
    s.update(taps, y)
    W = s.W.copy()
    wrong = [tap.copy() for tap in taps]
    wrong[1][3, 2] = np.nan
    with pytest.raises(DataError, match="records must be finite"):
        s.update(wrong, y)
    with pytest.raises(DataError, match="labels must be one a sample, 0 to 2"):
        s.update(taps, y + 1)
    with pytest.raises(DataError, match="labels must be one a sample"):
        s.update(taps, y[:-1])
    with pytest.raises(DataError, match=r"taps must be \(b, N\) with N of \[10, 8, 8\]"):
        s.update([taps[1], taps[1], taps[2]], y)
    with pytest.raises(DataError, match="must hold the same samples"):
        s.update([taps[0], taps[1][:5], taps[2]], y)
    s.update(part(taps, slice(0, 0)), y[:0])
    assert np.array_equal(s.W, W)
    assert s.seen == 30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"forgetting": 0.0}, "forgetting must be above 0 and at most 1, not 0.0"),
        ({"forgetting": 1.5}, "forgetting must be above 0 and at most 1"),
        ({"support": 0}, "support must be at least 1 sample, not 0"),
        ({"support": True}, "support must be at least 1 sample"),
        ({"choice": Choice(0.0, (1.0, 1.0, 1.0))}, "lambda must be above 0 and finite, not 0.0"),
    ],
)
def test_wrong_use(arguments: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        StreamingRidge(SPEC, **{"choice": CHOICE, **arguments})


def test_hard_data_stays_finite() -> None:
    T = 200
    zeros = [np.zeros((T, n), np.float32) for n in SPEC.tap_widths]
    same_again = [np.ones((T, n), np.float32) for n in SPEC.tap_widths]
    for taps in (zeros, same_again):
        for support in (None, 50):
            s = StreamingRidge(SPEC, Choice(1e-3, (1.0, 1.0, 1.0)), support=support)
            for i in range(T):
                s.update(part(taps, slice(i, i + 1)), np.array([i % 3]))
            assert np.isfinite(s.W).all()

"""A stream ends where a fit on all its samples does, whatever its batches."""

from __future__ import annotations

import numpy as np
import pytest

from instantft.cache.store import memory_store
from instantft.engine import Engine, forward
from instantft.errors import DataError
from instantft.solvers.ridge import fit_ridge
from instantft.solvers.stream import Stream
from instantft.solvers.streaming import TOLERANCE
from instantft.tasks import targets

from . import samples

BASE = samples.base()
X, Y = samples.blobs(96)
NUMBERS = np.arange(96)


def stream(engine: Engine, **more: object) -> Stream:
    settings = {"seed": 0, "threads": 1, "forgetting": 1.0, "support": None, **more}
    return Stream(engine, BASE, lambda y, w: targets(y, BASE.spec.C, sample_weight=w), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", ["fp32", "nf4"])
def test_a_choice_at_the_end_makes_it_a_fit(engine: Engine, codec: str) -> None:
    """12 samples, then 12, 24 and 48 more: every choice falls on the last sample of a batch."""
    store = memory_store(codec, BASE.spec.record, 96)
    s = stream(engine, support=96)
    for a, b in ((0, 12), (12, 24), (24, 48), (48, 96)):
        adapter = s.learn(X[a:b], Y[a:b], NUMBERS[a:b], store)
    fitted = fit_ridge(engine, BASE, X, Y, store=memory_store(codec, BASE.spec.record, 96))
    assert s.result is not None
    assert s.result.choice == fitted.choice
    want = forward(engine, BASE.spec, {**BASE.tensors, **fitted.adapter.tensors}, X)
    got = forward(engine, BASE.spec, {**BASE.tensors, **adapter.tensors}, X)
    np.testing.assert_allclose(got, want, atol=TOLERANCE * float(np.abs(want).max()))


def test_one_by_one_is_in_batches(engine: Engine) -> None:
    """Between two choices only the samples count, not how they came."""
    ends = []
    for size in (1, 5, 30):
        s = stream(engine, support=96)
        s.learn(X[:40], Y[:40], NUMBERS[:40], None)
        for a in range(40, 70, size):
            adapter = s.learn(X[a : a + size], Y[a : a + size], NUMBERS[a : a + size], None)
        ends.append(np.concatenate([t.ravel() for t in adapter.tensors.values()]))
    for other in ends[1:]:
        np.testing.assert_allclose(other, ends[0], atol=TOLERANCE * float(np.abs(ends[0]).max()))


def test_known_numbers_are_left_out(engine: Engine) -> None:
    s = stream(engine)
    first = s.learn(X[:10], Y[:10], NUMBERS[:10], None)
    again = s.learn(X[:10], Y[:10], NUMBERS[:10], None)
    for name, value in first.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], value)
    kept = s.samples()
    assert kept is not None
    assert len(kept[1]) == 10


def test_samples_are_let_go_once_there_are_more_than_features(engine: Engine) -> None:
    D = sum(BASE.spec.tap_widths)
    s = stream(engine)
    for a in range(0, 96, 8):
        s.learn(X[a : a + 8], Y[a : a + 8], NUMBERS[a : a + 8], None)
        assert (s.samples() is None) == (a + 8 > D)


def test_support_bounds_what_is_kept(engine: Engine) -> None:
    s = stream(engine, support=10)
    for a in range(0, 96, 3):
        s.learn(X[a : a + 3], Y[a : a + 3], NUMBERS[a : a + 3], None)
    kept = s.samples()
    assert kept is not None
    np.testing.assert_array_equal(kept[2], NUMBERS[-10:])


def test_bad_samples_change_nothing() -> None:
    from instantft.engine import get_engine

    s = stream(get_engine("reference"))
    s.learn(X[:20], Y[:20], NUMBERS[:20], None)
    before = s.adapter()
    with pytest.raises(DataError, match="finite"):
        s.learn(np.full((30, 6), 3e38, np.float32), Y[:30], NUMBERS[20:50], None)
    after = s.adapter()
    for name, value in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[name], value)
    s.learn(X[20:50], Y[20:50], NUMBERS[20:50], None)

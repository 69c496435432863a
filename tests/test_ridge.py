"""Closed-form fine-tuning: against NumPy on the engine's records, against fitting again, and on data that is hard."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, get_engine
from instantft.errors import DataError, UsageError
from instantft.solvers import closed, ridge, taps
from instantft.solvers.calibration import softmax
from instantft.solvers.records import Records
from instantft.solvers.ridge import METHOD, RidgeResult, fit_ridge
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5
from tests import samples
from tests.nets import NETS, samples_for, tensors_for

SAME = 1e-4
"""Relative to the largest logit: float32 adapters and forward passes against float64."""


def network(spec: NetSpec) -> Network:
    return Network(spec, tensors_for(spec))


def predicted(engine: Engine, base: Network, result: RidgeResult, x: np.ndarray) -> np.ndarray:
    return engine.forward(base.spec, {**base.tensors, **result.adapter.tensors}, x)


def features(engine: Engine, base: Network, x: np.ndarray, result: RidgeResult) -> np.ndarray:
    """Z of ridge.py's header, (T, D+1) float64, without its zero columns' help."""
    rows = engine.records(base.spec, base.tensors, x)
    parts = [x, *(rows[:, s.offset : s.offset + s.size] for s in base.spec.record.segments[:-1])]
    parts = [
        np.sqrt(w) * result.choice.scale * p.astype(np.float64) for w, p in zip(result.weights, parts, strict=True)
    ]
    return np.concatenate([*parts, np.ones((len(x), 1))], axis=1)


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> None:
    assert np.abs(a - b).max() <= tolerance * max(float(np.abs(b).max()), 1e-6)


def test_threads_change_no_bit(engine: Engine) -> None:
    """BLAS apart, which is the reference's affair, whoever does the sums."""
    base = network(NETS["lenet5"])
    x, y = samples_for(base.spec, 150)
    one, three = (fit_ridge(engine, base, x, y, threads=threads).adapter.tensors for threads in (1, 3))
    for name, value in one.items():
        np.testing.assert_array_equal(three[name], value, err_msg=name)


def test_engines_agree(engine: Engine) -> None:
    """λ, weights and logits are those of the reference; rounding moves λ, and that moves logits more than SAME."""
    base, reference = network(NETS["lenet5"]), get_engine("reference")
    x, y = samples_for(base.spec, 150)
    mine, theirs = fit_ridge(engine, base, x, y), fit_ridge(reference, base, x, y)
    assert mine.weights == theirs.weights
    assert mine.lam == pytest.approx(theirs.lam, rel=1e-3)
    close(predicted(reference, base, mine, x), predicted(reference, base, theirs, x), 10 * SAME)


@pytest.mark.parametrize("net", ["dnn", "odd"])
@pytest.mark.parametrize("chosen", ["auto", "all", (0,), (0, 2)])
def test_adapter_is_what_the_equations_say(engine: Engine, net: str, chosen: str | tuple[int, ...]) -> None:
    base = network(NETS[net])
    T, C = 40, base.spec.C
    x, y = samples_for(base.spec, T)
    result = fit_ridge(engine, base, x, y, taps=chosen)  # type: ignore[arg-type]
    Z, Y = features(engine, base, x, result), np.eye(C)[y]
    W = np.linalg.solve(Z.T @ Z + result.lam * np.eye(Z.shape[1]), Z.T @ Y)
    new, _ = samples_for(base.spec, 20, seed=1)
    expected = float(result.temperature) * features(engine, base, new, result) @ W
    expected += result.gain * engine.forward(base.spec, base.tensors, new)
    close(predicted(engine, base, result, new), expected, SAME)
    assert result.adapter.tensors["output.gain"] == np.float32(result.gain)
    assert result.taps == tuple(k for k, w in enumerate(result.weights) if w)


@pytest.mark.parametrize("T", [12, 90])  # dual, primal
@pytest.mark.parametrize("grouped", [False, True])
def test_left_out_scores_are_those_of_fitting_again(T: int, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "CHUNK", 20)  # so that some groups are longer
    engine = get_engine("reference")
    base = samples.base(dnn(10, 3, 8))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(T, 10)).astype(np.float32), rng.integers(0, 3, T).astype(np.int32)
    x[3] *= 50  # is clipped
    groups = rng.choice(5, T, p=[0.4, 0.3, 0.2, 0.05, 0.05]) if grouped else None
    result = fit_ridge(engine, base, x, y, groups=groups)
    assert result.space == ("dual" if T <= 26 else "primal")
    Z = features(engine, base, x, result)
    norms = np.linalg.norm(Z[:, :-1], axis=1)
    limit = taps.CLIP * np.median(norms[: ridge.FEW])
    c = np.minimum(1, limit / norms)[:, None]
    assert (c < 1).sum() == 1
    Z, Y = c * Z, c * np.eye(3)[y]
    frozen = engine.forward(base.spec, base.tensors, x)

    def left_out(rows: np.ndarray) -> np.ndarray:
        kept = np.setdiff1d(np.arange(T), rows)
        W = np.linalg.solve(Z[kept].T @ Z[kept] + result.lam * np.eye(Z.shape[1]), Z[kept].T @ Y[kept])
        return float(result.temperature) * Z[rows] @ W + result.gain * frozen[rows]

    assert sorted(result.rows.tolist()) == list(range(T))
    alone = np.concatenate([left_out(result.rows[[i]]) for i in range(T)])
    close(result.loo_scores, alone, SAME)
    blocked = np.empty((T, 3))
    for block in result.blocks:
        blocked[block] = left_out(result.rows[block])
        if groups is not None:
            assert sorted(result.rows[block]) == np.flatnonzero(groups == groups[result.rows[block[0]]]).tolist()
    close(result.block_scores, blocked, SAME)
    assert result.loo_score == pytest.approx((alone.argmax(axis=1) == result.labels).mean())
    assert result.block_score == pytest.approx((blocked.argmax(axis=1) == result.labels).mean())
    assert np.array_equal(result.labels, y[result.rows])


def test_blocks_are_runs_of_consecutive_samples() -> None:
    x, y = samples.blobs(300)
    result = fit_ridge(get_engine("reference"), samples.base(), x, y)
    assert len(result.blocks) == 32
    for n in (1, 20, 31, 32, 500, 512, 513, 1024, 9000):
        lengths = [len(block) for block in closed.judged(n, None, n, 0).blocks]
        assert sum(lengths) == n
        assert max(lengths) <= closed.LONGEST
        assert len(lengths) >= min(n, 32)
    for block in result.blocks:
        assert (np.diff(result.rows[block]) == 1).all()


def test_decide() -> None:
    engine = get_engine()
    base = samples.base()
    x, y = samples.blobs(200)
    result = fit_ridge(engine, base, x, y)
    frozen = engine.forward(base.spec, base.tensors, x)
    close(result.frozen_scores, frozen[result.rows], SAME)
    decision = result.decide()
    assert decision.accepted
    assert decision.before == pytest.approx((frozen.argmax(axis=1) == y).mean())
    assert decision.after == result.block_score
    assert not result.decide(result.block_scores).accepted
    with pytest.raises(UsageError, match=r"must be \[200, 3\], not \[2, 3\]"):
        result.decide(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [None, 1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_dual_and_primal_agree(dtype: type, rank: int | None, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = get_engine("reference")
    base = network(NETS["dnn"])
    monkeypatch.setattr(closed, "precision", lambda error, lam: dtype)
    monkeypatch.setattr("instantft.solvers.records.CHUNK", 17)
    x, y = samples_for(base.spec, 60)
    x[3] *= 20
    records = Records(engine, base, x, np.arange(60), None)
    choice = taps.Choice(0.05, (1.0, 0.3, 0.1), 0.05, 60.0)
    judge = closed.judged(60, np.arange(60) % 7 if grouped else None, 60, 0)
    a = closed.dual(records, np.eye(3)[y], choice, judge, rank)
    b = closed.primal(records, np.eye(3)[y], choice, judge, rank)
    tolerance = 1e-5 if dtype is np.float64 else 1e-3
    close(a.bias, b.bias, tolerance)
    close(a.alone, b.alone, tolerance)
    close(a.blocked, b.blocked, tolerance)
    for k, (A, B) in a.pairs.items():
        close(A @ B, b.pairs[k][0] @ b.pairs[k][1], tolerance)


def test_separable_samples_are_learnt() -> None:
    engine = get_engine()
    base = samples.base()
    x, y = samples.blobs(200)
    new, labels = samples.blobs(200, seed=1)
    result = fit_ridge(engine, base, x, y)
    assert (predicted(engine, base, result, new).argmax(axis=1) == labels).mean() > 0.95
    assert result.loo_score > 0.95
    assert (result.calibration_error or 0) < 0.1
    p = softmax(predicted(engine, base, result, new))
    assert np.abs(p.max(axis=1).mean() - (p.argmax(axis=1) == labels).mean()) < 0.05


@pytest.mark.parametrize("codec", ["fp32", "relu4", "nf4"])
def test_the_store_is_filled_and_used(engine: Engine, codec: str) -> None:
    base = network(NETS["lenet5"])
    x, y = samples_for(base.spec, 30)
    store = memory_store(codec, base.spec.record, 30)
    first = fit_ridge(engine, base, x, y, store=store)
    assert store.held(np.arange(30)).all()
    assert store.misses == 30
    decoded = Records(engine, base, x, np.arange(30), store).taps(slice(0, 30))
    assert np.array_equal(decoded[1], store.read(np.arange(30))[:, :1176])
    again = fit_ridge(engine, base, x, y, store=store)
    assert store.misses == 30
    for name, value in first.adapter.tensors.items():
        assert np.array_equal(value, again.adapter.tensors[name])
    if codec == "fp32":
        without = fit_ridge(engine, base, x, y)
        for name, value in first.adapter.tensors.items():
            assert np.array_equal(value, without.adapter.tensors[name])


def test_a_small_store_changes_nothing() -> None:
    engine = get_engine("reference")
    base = samples.base()
    x, y = samples.blobs(20)
    store = memory_store("fp32", base.spec.record, 7)
    engine.fill(base.spec, base.tensors, x, np.arange(20), store)
    result = fit_ridge(engine, base, x, y, store=store)
    without = fit_ridge(engine, base, x, y)
    for name, value in without.adapter.tensors.items():
        assert np.array_equal(value, result.adapter.tensors[name])


def test_same_seed_same_adapter(engine: Engine) -> None:
    base = samples.base()
    x, y = samples.blobs(300)
    a, b = (fit_ridge(engine, base, x, y, seed=3).adapter.tensors for _ in range(2))
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_saves_and_loads(tmp_path: Path) -> None:
    base = samples.base()
    result = fit_ridge(get_engine(), base, *samples.blobs(30))
    result.adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", base)
    assert loaded.method == METHOD
    assert loaded.rank == base.spec.C
    for name, value in result.adapter.tensors.items():
        assert np.array_equal(value, loaded.tensors[name])
    assert loaded.config["lambda"] == result.lam


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_rank(engine: Engine, rank: int) -> None:
    base = network(NETS["odd"])
    x, y = samples_for(base.spec, 60)
    result = fit_ridge(engine, base, x, y, rank=rank)
    full = fit_ridge(engine, base, x, y)
    assert result.adapter.rank == rank
    assert result.adapter.tensors["lora.0-5.A"].shape == (base.spec.tap_widths[0], rank)
    frozen = engine.forward(base.spec, base.tensors, x)
    logits, wanted = ((predicted(engine, base, r, x) - r.gain * frozen) / float(r.temperature) for r in (result, full))
    if rank >= base.spec.C:
        close(logits, wanted, SAME)
    else:
        assert np.linalg.matrix_rank(result.adapter.tensors["lora.0-5.B"]) == rank
        assert result.loo_scores.shape == full.loo_scores.shape


def test_a_frozen_network_that_is_right_is_kept() -> None:
    """Few samples in many dimensions, and a base that knows: the mixture must not fall below either by much."""
    engine = get_engine("reference")
    spec = NetSpec((30,), (LayerSpec("fc", 3),))
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(30, 3)).astype(np.float32)
    base = Network(spec, {"layers.0.weight": truth, "layers.0.bias": np.zeros(3, np.float32)})

    def drawn(T: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.normal(size=(T, 30)).astype(np.float32)
        return x, (x @ truth).argmax(axis=1).astype(np.int32)

    x, y = drawn(40)
    new, labels = drawn(1000)
    result = fit_ridge(engine, base, x, y)
    assert result.gain > 0
    assert (predicted(engine, base, result, new).argmax(axis=1) == labels).mean() > 0.95
    misled = Network(spec, {**base.tensors, "layers.0.weight": truth[:, [1, 2, 0]]})
    x, y = drawn(500)
    result = fit_ridge(engine, misled, x, y)
    assert result.gain == 0
    assert (predicted(engine, misled, result, new).argmax(axis=1) == labels).mean() > 0.85


# -- data made to break it -------------------------------------------------------------------------------------------


def _one_sample() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(3)
    return x[:1], y[:1]


def _duplicates() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(6)
    return np.repeat(x, 20, axis=0), np.repeat(y, 20)


def _contradictions() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(6)
    return np.repeat(x, 20, axis=0), np.tile(y, 20)


def _one_per_class() -> tuple[np.ndarray, np.ndarray]:
    return samples.blobs(3)


def _one_class() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(30)
    return x, np.full_like(y, 2)


def _missing_class() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(60)
    return x[y != 1], y[y != 1]


def _constant() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(30)
    return np.full_like(x, 3.0), y


def _zeros() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(30)
    return np.zeros_like(x), y


def _huge() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(30)
    return x * np.float32(1e15), y


def _tiny() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(30)
    return x * np.float32(1e-15), y


def _one_giant() -> tuple[np.ndarray, np.ndarray]:
    x, y = samples.blobs(60)
    x[7] *= np.float32(1e6)
    return x, y


HARD = (
    _one_sample, _duplicates, _contradictions, _one_per_class, _one_class, _missing_class, _constant, _zeros, _huge,
    _tiny, _one_giant,
)  # fmt: skip


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("space", ["dual", "primal"])
@pytest.mark.parametrize("rank", [None, 2])
def test_hard_data_gives_a_finite_adapter(hard, space: str, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    engine = get_engine("reference")
    base = samples.base()
    x, y = hard()
    if space == "primal":
        monkeypatch.setattr(closed, "dual", closed.primal)
    result = fit_ridge(engine, base, x, y, rank=rank)
    assert all(np.isfinite(t).all() for t in result.adapter.tensors.values())
    assert np.isfinite(result.loo_scores).all()
    assert np.isfinite(result.block_scores).all()
    assert isinstance(result.decide().accepted, bool)
    assert 0 < float(result.temperature) < np.inf
    assert np.isfinite(predicted(engine, base, result, x)).all()


def test_a_giant_record_does_not_spoil_the_others() -> None:
    engine = get_engine("reference")
    base = samples.base()
    x, y = _one_giant()
    right = predicted(engine, base, fit_ridge(engine, base, x, y), x).argmax(axis=1) == y
    assert right.mean() > 0.9


def test_missing_classes_are_not_predicted() -> None:
    engine = get_engine("reference")
    base = samples.base()
    x, y = _missing_class()
    result = fit_ridge(engine, base, x, y)
    right = predicted(engine, base, result, x).argmax(axis=1)
    assert (right == y).mean() > 0.95
    assert not (right == 1).any()


def test_one_class_is_always_predicted() -> None:
    engine = get_engine("reference")
    base = samples.base()
    x, y = _one_class()
    assert (predicted(engine, base, fit_ridge(engine, base, x, y), x).argmax(axis=1) == 2).all()


def test_many_samples_in_bounded_memory() -> None:
    """The primal must not hold all records: 10⁵ of them would take 83 MB, with float64 copies three times as much."""
    engine = get_engine()
    base = network(dnn(256, 3))
    rng = np.random.default_rng(0)
    T = 100_000
    y = rng.integers(0, 3, T).astype(np.int32)
    x = rng.standard_normal((T, 256), np.float32)
    x[np.arange(T), y] += 3
    tracemalloc.start()
    result = fit_ridge(engine, base, x, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.space == "primal"
    assert peak < 40e6
    assert result.loo_score > 0.9
    assert len(result.rows) == closed.SCORED
    assert (predicted(engine, base, result, x[:1000]).argmax(axis=1) == y[:1000]).mean() > 0.9


# -- wrong use -------------------------------------------------------------------------------------------------------


def test_wrong_use() -> None:
    engine = get_engine("reference")
    base = samples.base()
    x, y = samples.blobs(10)
    for chosen, words in (
        ("best", "taps must be 'auto', 'all' or numbers of taps, not 'best'"),
        ((), "taps must be some of 0 to 2, not"),
        ((3,), "taps must be some of 0 to 2, not"),
    ):
        with pytest.raises(UsageError, match=words):
            fit_ridge(engine, base, x, y, taps=chosen)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"groups must be one label a sample, \(10,\), not \[3\]"):
        fit_ridge(engine, base, x, y, groups=np.zeros(3))
    with pytest.raises(DataError, match="groups must be two or more, one of which can be left out, not all 7"):
        fit_ridge(engine, base, x, y, groups=np.full(10, 7))
    with pytest.raises(DataError, match="labels must be 0 to 2, not 0 to 3"):
        fit_ridge(engine, base, x, np.arange(10, dtype=np.int32) % 4)
    with pytest.raises(DataError, match="of one length, at least 1"):
        fit_ridge(engine, base, x[:0], y[:0])
    with pytest.raises(UsageError, match="seed must be an integer"):
        fit_ridge(engine, base, x, y, seed=-1)
    with pytest.raises(DataError, match="records must be finite and small enough to be squared"):
        fit_ridge(engine, base, x * np.float32(1e25), y)


def test_too_large_a_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "MAX_SYSTEM", 9)
    with pytest.raises(UsageError, match="at most 9 samples or features, not 20 samples of 16 features"):
        fit_ridge(get_engine("reference"), samples.base(), *samples.blobs(20))


def test_lenet(engine: Engine) -> None:
    base = network(lenet5((1, 28, 28)))
    x, y = samples_for(base.spec, 50)
    result = fit_ridge(engine, base, x, y)
    assert result.space == "dual"
    Z = features(engine, base, x, result)
    alpha = np.linalg.solve(Z @ Z.T + result.lam * np.eye(50), np.eye(10)[y])
    new, _ = samples_for(base.spec, 20, seed=1)
    expected = float(result.temperature) * features(engine, base, new, result) @ (Z.T @ alpha)
    expected += result.gain * engine.forward(base.spec, base.tensors, new)
    close(predicted(engine, base, result, new), expected, SAME)

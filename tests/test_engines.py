"""Every engine against the reference: logits, records, caches, and several steps of every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.cache.codecs import CODECS, codec
from instantft.cache.store import Store, memory_store
from instantft.engine import Engine, EpochStats, Trainer
from instantft.engine.reference import ReferenceEngine
from instantft.errors import UsageError
from instantft.methods import SGD_METHODS
from instantft.spec import LayerSpec, NetSpec

from .nets import METHOD_NAMES, NETS, generator, samples_for, tensors_for

FORWARD = 1e-5
"""Of the largest value. Five layers of float32 sums of up to 10^3 products, in another order: 2e-6 a layer."""

STEPS = 5e-5
"""Of the largest change of a tensor. Gradients agree to 2e-6 to 2e-5 (test_gradients), and at a learning rate that does
not blow differences up, errors of six to fourteen steps add up to a few times that."""

STEPS_ON_BATCH_STATISTICS = 4e-3
"""The same where batch norm uses batch statistics. Of two or three samples a channel's deviation may be as small as
0.01 (√1e-5 at the least), and dividing by it makes rounding a hundred times larger in such a step: on the worst of
these cases the reference itself is 1.4e-3 away from the same training in float64. Single steps are held to
test_gradients."""

REFERENCE = ReferenceEngine()
CACHED = [name for name, m in SGD_METHODS.items() if m.cacheable]


def assert_near(got: np.ndarray, expected: np.ndarray, tolerance: float, what: str = "") -> None:
    assert got.shape == expected.shape, what
    assert got.dtype == np.float32, what
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max(), what


def orders(E: int, T: int) -> np.ndarray:
    rng = generator("order", E, T)
    return np.stack([rng.permutation(T) for _ in range(E)]).astype(np.int32)


def train(
    engine: Engine,
    spec: NetSpec,
    method: str,
    *,
    rank: int = 4,
    T: int = 13,
    B: int = 3,
    E: int = 2,
    store: Store | None = None,
    fill: bool = False,
    momentum: float = 0.0,
    lr: float = 0.02,
    schedule: tuple[float, ...] = (),
    first: int = 0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], EpochStats]:
    """Tensors before, tensors after, and statistics of a small training."""
    m = SGD_METHODS[method]
    tensors = tensors_for(spec, m, rank)
    x, y = samples_for(spec, T)
    numbers = np.arange(first, first + T, dtype=np.int64)
    if store is not None and fill:
        engine.fill(spec, tensors, x, numbers, store)
    trainer = engine.trainer(
        spec, tensors, m, rank, x, y, numbers=numbers, store=store, batch_size=B, lr=lr, momentum=momentum
    )
    if not schedule:
        stats = trainer.epochs(orders(E, T))
        return tensors, trainer.tensors(), stats
    order = orders(len(schedule), T)
    parts = [trainer.epochs(order[e : e + 1], rate) for e, rate in enumerate(schedule)]
    stats = EpochStats(np.concatenate([p.loss for p in parts]), np.concatenate([p.correct for p in parts]))
    return tensors, trainer.tensors(), stats


def assert_same_training(got: tuple, expected: tuple) -> None:
    before, after, stats = expected
    assert set(got[1]) == set(after)
    batch_statistics = any(".bn.running_" in name for name in after)
    tolerance = STEPS_ON_BATCH_STATISTICS if batch_statistics else STEPS
    for name, value in after.items():
        change = np.abs(value - before[name]).max()
        beta = name.replace("bias", "bn.bias")
        if batch_statistics and name != beta and beta in after:
            # batch norm takes a bias before it out again: its gradient is zero but for rounding
            change = np.abs(after[beta] - before[beta]).max()
        rounding = 2.0**-21 * np.abs(value).max()  # a tensor is rounded once a step
        assert np.abs(got[1][name] - value).max() <= tolerance * change + rounding, name
    np.testing.assert_allclose(got[2].loss, stats.loss, rtol=1e-5)
    np.testing.assert_array_equal(got[2].correct, stats.correct)
    assert got[2].diverged_at == stats.diverged_at


@pytest.mark.parametrize("method", [None, "lora-all", "skip-lora"])
@pytest.mark.parametrize("net", NETS)
def test_forward(engine: Engine, net: str, method: str | None) -> None:
    spec = NETS[net]
    tensors = tensors_for(spec, SGD_METHODS[method] if method else None, 5)
    for T in (1, 3, 20, 37):
        x, _ = samples_for(spec, T)
        assert_near(engine.forward(spec, tensors, x), REFERENCE.forward(spec, tensors, x), FORWARD)


@pytest.mark.parametrize("method", [None, "lora-last", "skip-lora"])
def test_forward_honours_gain_and_bias(engine: Engine, method: str | None) -> None:
    spec = NETS["dnn"]
    tensors = tensors_for(spec, SGD_METHODS[method] if method else None)
    x, _ = samples_for(spec, 5)
    plain = engine.forward(spec, tensors, x)
    bias = np.linspace(-1, 1, spec.C, dtype=np.float32)
    tensors |= {"output.gain": np.array([0], np.float32), "output.bias": bias}
    only_adapters = engine.forward(spec, tensors, x)
    frozen = engine.forward(spec, {k: v for k, v in tensors.items() if k.startswith("layers.")}, x)
    assert_near(only_adapters, plain - frozen + bias, FORWARD)


@pytest.mark.parametrize("net", NETS)
def test_records(engine: Engine, net: str) -> None:
    spec = NETS[net]
    # Adapters and gain must not show in the frozen network's records.
    tensors = tensors_for(spec, SGD_METHODS["lora-all"])
    tensors["output.gain"] = np.array([0.5], np.float32)
    x, _ = samples_for(spec, 23)
    got = engine.records(spec, tensors, x)
    expected = REFERENCE.records(spec, tensors, x)
    assert_near(got, expected, FORWARD)
    network = {name: value for name, value in tensors.items() if name.startswith("layers.")}
    np.testing.assert_array_equal(got, engine.records(spec, network, x))
    gaps = np.ones(spec.record.width, bool)
    for s in spec.record.segments:
        gaps[s.offset : s.offset + s.size] = False
        if s.nonnegative:
            assert (got[:, s.offset : s.offset + s.size] >= 0).all()
    assert not got[:, gaps].any()


@pytest.mark.parametrize("net", NETS)
def test_record_holds_the_logits(engine: Engine, net: str) -> None:
    spec = NETS[net]
    tensors = tensors_for(spec)
    x, _ = samples_for(spec, 9)
    c = spec.record.segments[-1]
    record = engine.records(spec, tensors, x)
    assert_near(record[:, c.offset : c.offset + c.size], engine.forward(spec, tensors, x), FORWARD)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("net", NETS)
def test_fill_writes_what_the_codec_gives(engine: Engine, net: str, name: str) -> None:
    """The engine's own encoder gives byte for byte what the codec's NumPy gives for the engine's own records."""
    spec, T = NETS[net], 23
    tensors = tensors_for(spec)
    x, _ = samples_for(spec, T)
    store = memory_store(name, spec.record, T)
    engine.fill(spec, tensors, x, np.arange(T), store)
    assert store.held(np.arange(T)).all()
    c = codec(name)
    expected = c.encode(engine.records(spec, tensors, x), spec.record)
    used = c.nbytes(spec.record)
    np.testing.assert_array_equal(store.data[:, :used], expected[:, :used])


def test_fill_is_bounded(engine: Engine) -> None:
    """Only samples that the store would keep are computed, and none twice."""
    spec, T, capacity = NETS["dnn"], 20, 8
    tensors = tensors_for(spec)
    x, _ = samples_for(spec, T)
    store = memory_store("fp32", spec.record, capacity)
    engine.fill(spec, tensors, x, np.arange(T), store)
    np.testing.assert_array_equal(np.flatnonzero(store.held(np.arange(T))), np.arange(12, 20))
    assert (store.hits, store.misses) == (-capacity, capacity)
    assert_near(store.read(np.arange(12, 20)), REFERENCE.records(spec, tensors, x[12:]), FORWARD)
    engine.fill(spec, tensors, x, np.arange(T), store)
    assert store.misses == capacity


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("net", NETS)
def test_training(engine: Engine, net: str, method: str) -> None:
    """Several steps without a cache; 13 samples in batches of 3."""
    spec = NETS[net]
    assert_same_training(train(engine, spec, method), train(REFERENCE, spec, method))


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("B", [1, 3, 20])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_batches_and_ranks(engine: Engine, method: str, B: int, rank: int) -> None:
    """Batches of one, batches that do not divide T, batches larger than T."""
    for T in (7, 23):
        kwargs: dict[str, Any] = {"rank": rank, "B": B, "T": T, "E": 1, "lr": 0.005}
        got = train(engine, NETS["odd"], method, **kwargs)
        assert_same_training(got, train(REFERENCE, NETS["odd"], method, **kwargs))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_momentum(engine: Engine, method: str) -> None:
    kwargs: dict[str, Any] = {"momentum": 0.9, "lr": 0.005}
    got = train(engine, NETS["dnn"], method, **kwargs)
    assert_same_training(got, train(REFERENCE, NETS["dnn"], method, **kwargs))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_learning_rate_by_epoch(engine: Engine, method: str, momentum: float) -> None:
    """A schedule: one call an epoch, and a velocity that does not remember the learning rate."""
    kwargs: dict[str, Any] = {"momentum": momentum, "schedule": (0.005, 0.002, 0.001)}
    got = train(engine, NETS["dnn"], method, **kwargs)
    assert_same_training(got, train(REFERENCE, NETS["dnn"], method, **kwargs))
    constant = train(engine, NETS["dnn"], method, momentum=momentum, E=3, lr=0.005)
    assert any((got[1][name] != value).any() for name, value in constant[1].items())
    without = train(engine, NETS["dnn"], method, lr=0.005)
    assert any((got[1][name] != without[1][name]).any() for name in got[1])


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("capacity", [13, 5, 1])
@pytest.mark.parametrize("method", CACHED)
@pytest.mark.parametrize("net", NETS)
def test_cached_training_is_uncached_training(engine: Engine, net: str, method: str, capacity: int, fill: bool) -> None:
    """A cache in float32 changes no bit, however small it is and whether or not it was filled before."""
    spec = NETS[net]
    store = memory_store("fp32", spec.record, capacity)
    got = train(engine, spec, method, store=store, fill=fill, first=100)
    for name, value in train(engine, spec, method)[1].items():
        np.testing.assert_array_equal(got[1][name], value, err_msg=name)
    assert_same_training(got, train(REFERENCE, spec, method))
    assert store.hits + store.misses == 2 * 13, "every access is a hit or a miss"
    if fill or capacity == 13:
        computed = capacity + 2 * (13 - capacity)
        assert (store.hits, store.misses) == (26 - computed, computed)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("method", CACHED)
def test_quantised_training(engine: Engine, method: str, name: str) -> None:
    """Training sees what the codec gives from the first epoch on, so it does not depend on capacity or filling."""
    spec = NETS["odd"]
    stores = [memory_store(name, spec.record, capacity) for capacity in (13, 13, 4)]
    full, lazy, small = (train(engine, spec, method, store=store, fill=store is stores[0], rank=5) for store in stores)
    for name_, value in full[1].items():
        np.testing.assert_array_equal(lazy[1][name_], value, err_msg=name_)
        np.testing.assert_array_equal(small[1][name_], value, err_msg=name_)
    if name == "nf4":
        exact = train(engine, spec, method, rank=5)
        assert any((exact[1][n] != full[1][n]).any() for n in exact[1]), "the codec must show"
    # against the reference on the same bytes, since a code may flip where two engines' records round differently
    mine, theirs = memory_store(name, spec.record, 13), memory_store(name, spec.record, 13)
    mine.data[:], mine.owner[:] = stores[0].data, stores[0].owner
    theirs.data[:], theirs.owner[:] = stores[0].data, stores[0].owner
    assert_same_training(
        train(engine, spec, method, store=mine, rank=5), train(REFERENCE, spec, method, store=theirs, rank=5)
    )
    assert (mine.hits, mine.misses) == (theirs.hits, theirs.misses) == (26, 0)


def test_two_calls_are_one_training(engine: Engine) -> None:
    """`epochs` moves the state on, momentum included."""
    spec, m, T = NETS["dnn"], SGD_METHODS["ft-all"], 11
    tensors = tensors_for(spec, m)
    x, y = samples_for(spec, T)
    order = orders(4, T)

    def make() -> Trainer:
        return engine.trainer(
            spec, tensors, m, 4, x, y, numbers=np.arange(T), store=None, batch_size=4, lr=0.05, momentum=0.5
        )

    once, twice = make(), make()
    whole = once.epochs(order)
    parts = [twice.epochs(order[:1]), twice.epochs(order[1:])]
    np.testing.assert_array_equal(whole.loss, np.concatenate([p.loss for p in parts]))
    for name, value in once.tensors().items():
        np.testing.assert_array_equal(twice.tensors()[name], value, err_msg=name)


def test_start_tensors_stay(engine: Engine) -> None:
    """A trainer works on copies, and hands out copies."""
    spec, m = NETS["dnn"], SGD_METHODS["ft-all"]
    tensors = tensors_for(spec, m)
    kept = {name: value.copy() for name, value in tensors.items()}
    x, y = samples_for(spec, 6)
    trainer = engine.trainer(spec, tensors, m, 4, x, y, numbers=np.arange(6), store=None, batch_size=3, lr=0.1)
    first = trainer.tensors()
    trainer.epochs(orders(1, 6))
    for name, value in kept.items():
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)
        if name in first:
            np.testing.assert_array_equal(first[name], value, err_msg=name)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_divergence_is_reported_and_not_applied(engine: Engine, method: str) -> None:
    # no ReLU, so that NaN reaches the logits whatever a ReLU makes of it
    spec = NetSpec((9,), (LayerSpec("fc", 8, batch_norm=True), LayerSpec("fc", 3)))
    m, T = SGD_METHODS[method], 10
    tensors = tensors_for(spec, m)
    x, y = samples_for(spec, T)
    x[4] = np.float32(np.inf)
    trainer = engine.trainer(spec, tensors, m, 4, x, y, numbers=np.arange(T), store=None, batch_size=2, lr=1e-3)
    order = np.arange(T, dtype=np.int32)[None]
    assert trainer.epochs(order).diverged_at == 3
    after = trainer.tensors()
    assert all(np.isfinite(value).all() for value in after.values())
    healthy = engine.trainer(spec, tensors, m, 4, x[:4], y[:4], numbers=np.arange(4), store=None, batch_size=2, lr=1e-3)
    assert healthy.epochs(order[:, :4]).diverged_at is None
    for name, value in healthy.tensors().items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_learning_lowers_the_loss(engine: Engine) -> None:
    for method in METHOD_NAMES:
        stats = train(engine, NETS["dnn"], method, E=30, B=5, lr=0.05)[2]
        assert stats.loss[-1] < stats.loss[0], method


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name not in CACHED])
def test_no_cache_for_methods_that_obsolete_it(engine: Engine, method: str) -> None:
    spec = NETS["dnn"]
    with pytest.raises(UsageError, match=f"not {method}"):
        train(engine, spec, method, store=memory_store("fp32", spec.record, 13))

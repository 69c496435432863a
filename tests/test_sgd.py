"""Algorithm 1: orders, calls, times, and what it refuses. The arithmetic is tested with the engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, EpochStats, forward
from instantft.engine.reference import ReferenceEngine
from instantft.errors import DivergedError, UsageError
from instantft.methods import SGD_METHODS, method
from instantft.solvers import sgd

from . import samples
from .nets import NETS, samples_for, tensors_for

BASE = samples.base()
X, Y = samples.blobs(45)
REFERENCE: Engine = ReferenceEngine()


def same(a: Any, b: Any) -> bool:
    return set(a) == set(b) and all((a[k] == b[k]).all() for k in a)


@pytest.mark.parametrize("T", [1, 2, 7, 470, 5000])
def test_orders_are_permutations_however_they_are_drawn(T: int) -> None:
    together = sgd._orders(np.random.default_rng([3, 1]), 6, T)
    rng = np.random.default_rng([3, 1])
    apart = np.concatenate([sgd._orders(rng, n, T) for n in (1, 2, 3)])
    np.testing.assert_array_equal(together, apart)
    assert together.dtype == np.int32
    assert together.flags.c_contiguous
    np.testing.assert_array_equal(np.sort(together, axis=1), np.tile(np.arange(T), (6, 1)))
    assert T < 7 or len(np.unique(together, axis=0)) == 6


def test_orders_are_uniform() -> None:
    orders = sgd._orders(np.random.default_rng(0), 24_000, 4)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 23 degrees of freedom: p < 0.001


@pytest.mark.parametrize("name", SGD_METHODS)
def test_every_method_learns(engine: Engine, name: str) -> None:
    result = sgd.fit(engine, BASE, name, X, Y, epochs=30, batch_size=8, lr=0.1)
    assert result.steps == 30 * 6
    assert result.stats.loss.shape == (30,)
    assert result.stats.loss[-1] < result.stats.loss[0]
    assert result.adapter.method == name
    assert result.adapter.base_hash == BASE.hash
    assert result.seconds.total == result.seconds.fill + result.seconds.train
    changed = [k for k, v in result.adapter.tensors.items() if k in BASE.tensors and (v != BASE.tensors[k]).any()]
    assert bool(changed) == (SGD_METHODS[name].adapters in ("none",) or SGD_METHODS[name].weights == "all")


def test_cached_and_uncached_give_the_same(engine: Engine) -> None:
    store = memory_store("fp32", BASE.spec.record, len(X))
    cached = sgd.fit(engine, BASE, "skip2-lora", X, Y, store=store, seed=4)
    plain = sgd.fit(engine, BASE, "skip-lora", X, Y, seed=4)
    assert same(cached.adapter.tensors, plain.adapter.tensors)
    assert store.misses == len(X)
    assert store.hits == 9 * len(X)
    assert cached.seconds.fill > 0


def test_a_small_store_is_filled_on_the_way() -> None:
    store = memory_store("fp32", BASE.spec.record, 10)
    cached = sgd.fit(REFERENCE, BASE, "skip2-lora", X, Y, store=store)
    plain = sgd.fit(REFERENCE, BASE, "skip-lora", X, Y)
    assert same(cached.adapter.tensors, plain.adapter.tensors)
    assert store.hits + store.misses == 10 * len(X)
    assert store.misses > len(X)


def test_seed_decides_the_result() -> None:
    a, b, c = (sgd.fit(REFERENCE, BASE, "skip-lora", X, Y, seed=s, epochs=2).adapter.tensors for s in (1, 1, 2))
    assert same(a, b)
    assert not same(a, c)


@pytest.mark.parametrize(
    ("name", "settings", "momentum"),
    [
        ("skip2-lora", {}, 0.8),
        ("skip-lora", {}, 0.8),
        ("skip2-lora", {"lr": 0.1}, 0),  # the papers' SGD
        ("skip2-lora", {"momentum": 0.0}, 0),
        ("skip2-lora", {"lr": 0.1, "momentum": 0.3}, 0.3),
        ("lora-last", {}, 0),
        ("ft-last", {}, 0),
        ("ft-all", {}, 0),
    ],
)
def test_momentum_goes_with_the_step_that_nobody_chose(name: str, settings: dict[str, float], momentum: float) -> None:
    fitted = sgd.fit(REFERENCE, BASE, name, X, Y, epochs=2, **settings)  # type: ignore[arg-type]
    assert fitted.adapter.config["momentum"] == momentum
    again = sgd.fit(REFERENCE, BASE, name, X, Y, epochs=2, lr=fitted.adapter.config["lr"], momentum=momentum)
    assert same(fitted.adapter.tensors, again.adapter.tensors)


def test_how_epochs_are_cut_into_calls_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sgd.fit(REFERENCE, BASE, "lora-all", X, Y, epochs=7)
    told: list[float] = []
    monkeypatch.setattr(sgd, "FIRST_CALL_SAMPLES", 1)
    monkeypatch.setattr(sgd, "CALL_SECONDS", 0.0)
    cut = sgd.fit(REFERENCE, BASE, "lora-all", X, Y, epochs=7, progress=told.append)
    assert told == [1, 2, 3, 4, 5, 6, 7]
    assert same(whole.adapter.tensors, cut.adapter.tensors)
    np.testing.assert_array_equal(whole.stats.loss, cut.stats.loss)


@pytest.mark.parametrize(("name", "codec"), [("ft-all", None), ("lora-all", None), ("skip2-lora", "fp32")])
def test_long_epochs_are_cut_between_batches(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str, codec: str | None
) -> None:
    def fit(progress: Any = None) -> sgd.FitResult:
        store = memory_store(codec, BASE.spec.record, 45) if codec else None
        return sgd.fit(
            engine, BASE, name, X, Y, epochs=2, batch_size=4, momentum=0.5, store=store, progress=progress
        )  # fmt: skip

    told: list[float] = []
    whole = fit()
    monkeypatch.setattr(sgd, "LONG_EPOCH", 21)
    cut = fit(told.append)
    assert told == [20 / 45, 40 / 45, 1, 1 + 20 / 45, 1 + 40 / 45, 2]
    assert same(whole.adapter.tensors, cut.adapter.tensors)
    np.testing.assert_array_equal(whole.stats.correct, cut.stats.correct)
    np.testing.assert_allclose(whole.stats.loss, cut.stats.loss, rtol=1e-12)


def test_the_cache_is_filled_in_parts(engine: Engine) -> None:
    x, y = samples.blobs(3000)
    told: list[float] = []
    store = memory_store("nf4", BASE.spec.record, 3000)
    sgd.fit(engine, BASE, "skip2-lora", x, y, epochs=1, store=store, filling=told.append)
    whole = memory_store("nf4", BASE.spec.record, 3000)
    engine.fill(BASE.spec, BASE.tensors, x, np.arange(3000), whole)
    assert told[0] == 1024
    assert told[-1] == 3000
    assert (store.hits, store.misses) == (0, 3000)
    np.testing.assert_array_equal(store.data, whole.data)


def test_forward_in_parts_is_forward(engine: Engine) -> None:
    x, _ = samples.blobs(2500)
    told: list[float] = []
    logits = forward(engine, BASE.spec, BASE.tensors, x, 2, told.append)
    assert told[0] == 1024
    assert told[-1] == 2500
    np.testing.assert_array_equal(logits, engine.forward(BASE.spec, BASE.tensors, x))


@pytest.mark.parametrize("codec", ["fp32", "nf4"])
def test_threads_change_nothing(engine: Engine, codec: str) -> None:
    x, y = samples_for(NETS["odd"], 230)
    base = Network(NETS["odd"], tensors_for(NETS["odd"]))
    results = []
    for threads in (1, 3):
        store = memory_store(codec, base.spec.record, len(x))
        fitted = sgd.fit(engine, base, "skip2-lora", x, y, epochs=3, lr=0.01, threads=threads, store=store)
        results.append((fitted.adapter.tensors, store.data.copy()))
    assert same(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


def test_going_on_draws_new_orders() -> None:
    first = sgd.fit(REFERENCE, BASE, "skip-lora", X, Y, epochs=1)
    more = [
        sgd.fit(REFERENCE, BASE, "skip-lora", X, Y, epochs=1, start=first.adapter, epochs_before=n).adapter.tensors
        for n in (0, 1, 1)
    ]
    assert not same(more[0], more[1])
    assert same(more[1], more[2])


def test_divergence_names_the_step_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Trainer:
        calls = 0

        def epochs(self, order: Any) -> EpochStats:
            Trainer.calls += 1
            at = 4 if Trainer.calls == 3 else None
            return EpochStats(np.zeros(len(order)), np.zeros(len(order), np.int64), at)

    monkeypatch.setattr(sgd, "FIRST_CALL_SAMPLES", 1)
    monkeypatch.setattr(sgd, "CALL_SECONDS", 0.0)
    with pytest.raises(DivergedError) as e:
        sgd._epochs(Trainer(), 45, 7, 10, 0.5, np.random.default_rng(0), None)  # type: ignore[arg-type]
    assert e.value.step == 2 * 5 + 4
    assert "step 14" in str(e.value)
    Trainer.calls = 0
    monkeypatch.setattr(sgd, "LONG_EPOCH", 20)  # two steps a call, three calls an epoch: the third is at step 5
    with pytest.raises(DivergedError) as e:
        sgd._epochs(Trainer(), 45, 7, 10, 0.5, np.random.default_rng(0), None)  # type: ignore[arg-type]
    assert e.value.step == 4 + 4


@pytest.mark.parametrize("name", [m for m in SGD_METHODS if m != "ft-bias"])  # whose loss stays finite, if barely
def test_too_large_steps_are_stopped(engine: Engine, name: str) -> None:
    with pytest.raises(DivergedError, match=r"step \d+ made it NaN or Inf at lr 3e\+38"):
        sgd.fit(engine, BASE, name, X * 100, Y, lr=3e38)


def test_a_last_update_that_overflows_is_noticed() -> None:
    with pytest.raises(DivergedError, match="step 1 "):
        sgd.fit(REFERENCE, BASE, "ft-last", X * 1e10, Y, epochs=1, batch_size=45, lr=1e38)


@pytest.mark.parametrize("name", [m for m in SGD_METHODS if not method(m).cacheable])
def test_a_cache_needs_a_cacheable_method(name: str) -> None:
    with pytest.raises(UsageError, match=f"frozen activations as they are, not {name}"):
        sgd.fit(REFERENCE, BASE, name, X, Y, store=memory_store("fp32", BASE.spec.record, 45))


def test_pretraining_yields_a_usable_network(engine: Engine) -> None:
    network, stats = sgd.pretrain(engine, BASE.spec, X, Y, epochs=20, lr=0.1, momentum=0.5, mean=(0.0,), std=(1.0,))
    start = Network.init(BASE.spec, 0)
    assert network.mean == (0.0,)
    assert stats.correct[-1] > 40
    assert (network.tensors["layers.0.bn.running_mean"] != start.tensors["layers.0.bn.running_mean"]).any()
    logits = engine.forward(network.spec, network.tensors, X)
    assert (logits.argmax(axis=1) == Y).mean() > 0.9


BAD = [
    ("rank", 0),
    ("rank", -1),
    ("rank", 1 << 40),
    ("rank", 2.0),
    ("rank", True),
    ("epochs", 0),
    ("epochs", 10**30),
    ("batch_size", 0),
    ("batch_size", -5),
    ("batch_size", 1 << 40),
    ("threads", 0),
    ("seed", -1),
    ("seed", 1 << 64),
    ("lr", 0.0),
    ("lr", -0.1),
    ("lr", float("nan")),
    ("lr", float("inf")),
    ("lr", 1e300),
    ("lr", "0.1"),
    ("momentum", 1.0),
    ("momentum", -0.1),
    ("momentum", float("nan")),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_arguments_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{name} must be .*, not ") as e:
        sgd.check_arguments(**{name: value})
    assert repr(value)[:20] in str(e.value)
    with pytest.raises(UsageError, match=f"^{name} must be"):
        sgd.fit(REFERENCE, BASE, "skip-lora", X, Y, **{name: value})

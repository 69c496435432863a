"""SGD in the space of samples: equal to the primal, and chosen where it pays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instantft import cost
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, Tensors
from instantft.errors import DivergedError, UsageError
from instantft.methods import SGD_METHODS, method
from instantft.solvers import dual, sgd
from instantft.solvers.records import Records
from instantft.spec import LayerSpec, NetSpec

from .nets import NETS, samples_for, tensors_for

ROUNDING = 128
"""Most float32 roundings, in units of 2^-24 of a tensor's largest value, by which dual and primal may differ after the
runs here. Each forward pass sums about N products, in another order, and every step carries on what the last has left.
Seen: at most 32, and as many between the primal steps of the two engines; the rest is for other machines."""

EPS = 2.0**-24
LR = 0.03

WIDE = NetSpec((700,), (LayerSpec("fc", 400, relu=True), LayerSpec("fc", 9, relu=True), LayerSpec("fc", 4)))
"""Two wide taps, and one that is narrower than any batch."""

SHAPES = [
    # network, method, T, batch, rank, momentum
    ("wide", "skip2-lora", 40, 20, 4, 0.0),
    ("wide", "skip2-lora", 47, 20, 4, 0.0),  # the last batch of an epoch has 7
    ("wide", "skip2-lora", 7, 20, 4, 0.0),  # fewer samples than a batch
    ("wide", "skip2-lora", 33, 8, 1, 0.0),
    ("wide", "skip2-lora", 33, 8, 6, 0.9),
    ("wide", "lora-last", 33, 8, 3, 0.5),
    ("lenet5", "skip2-lora", 50, 20, 4, 0.0),
    ("odd", "skip-lora", 45, 16, 5, 0.9),
    ("odd", "lora-last", 31, 10, 2, 0.0),
    ("dnn", "skip2-lora", 1, 1, 4, 0.0),
]


def network(name: str) -> Network:
    spec = WIDE if name == "wide" else NETS[name]
    return Network(spec, tensors_for(spec))


def fit(engine: Engine, base: Network, name: str, T: int, **settings: Any) -> sgd.FitResult:
    x, y = samples_for(base.spec, T)
    store = memory_store(settings.pop("codec", "fp32"), base.spec.record, T)
    given = {"epochs": 15, "lr": LR * (1 - settings.get("momentum", 0)), "seed": 3, "store": store, **settings}
    return sgd.fit(engine, base, name, x, y, **given)


def units(a: Tensors, b: Tensors) -> float:
    """The largest difference of a tensor, in roundings of its largest value."""
    assert set(a) == set(b)
    worst = [np.abs(a[k] - b[k]).max() / np.abs(b[k]).max() / EPS for k in a]
    return float(max(worst))


@pytest.mark.parametrize(("net", "name", "T", "batch", "rank", "momentum"), SHAPES)
def test_dual_is_primal(engine: Engine, net: str, name: str, T: int, batch: int, rank: int, momentum: float) -> None:
    base = network(net)
    settings = {"batch_size": batch, "rank": rank, "momentum": momentum}
    primal = fit(engine, base, name, T, space="primal", **settings)
    other = fit(engine, base, name, T, space="dual", **settings)
    assert other.steps == primal.steps
    assert units(other.adapter.tensors, primal.adapter.tensors) <= ROUNDING
    np.testing.assert_allclose(other.stats.loss, primal.stats.loss, rtol=ROUNDING * EPS)
    np.testing.assert_array_equal(other.stats.correct, primal.stats.correct)
    start = initial(method(name), base.spec, rank, 3)
    moved = {k: v for k, v in start.items() if k.endswith(".A")}
    assert all(np.abs(v - other.adapter.tensors[k]).max() > 0.01 * np.abs(v).max() for k, v in moved.items())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_taps_may_train_in_different_spaces(engine: Engine, monkeypatch: pytest.MonkeyPatch, momentum: float) -> None:
    base = network("wide")
    primal = fit(engine, base, "skip2-lora", 47, space="primal", momentum=momentum)
    seen = []
    for chosen in ((True, False, False), (False, True, False), (True, True, False), (False, False, True)):
        monkeypatch.setattr(cost, "spaces", lambda *_, chosen=chosen, **__: chosen)
        seen.append(fit(engine, base, "skip2-lora", 47, space="auto", momentum=momentum).adapter.tensors)
        assert units(seen[-1], primal.adapter.tensors) <= ROUNDING
    assert any((seen[0][k] != seen[1][k]).any() for k in seen[0])  # else the choice was not heeded


@pytest.mark.parametrize("codec", ["nf4", "int8"])
def test_records_are_used_as_the_codec_gives_them(engine: Engine, codec: str) -> None:
    base = network("wide")
    primal, other = (fit(engine, base, "skip2-lora", 40, space=s, codec=codec) for s in ("primal", "dual"))
    exact = fit(engine, base, "skip2-lora", 40, space="dual")
    assert units(other.adapter.tensors, primal.adapter.tensors) <= ROUNDING
    assert units(exact.adapter.tensors, primal.adapter.tensors) > ROUNDING


def test_without_a_cache_and_from_where_an_adapter_stands(engine: Engine) -> None:
    base = network("wide")
    x, y = samples_for(base.spec, 40)
    first = sgd.fit(engine, base, "skip-lora", x, y, epochs=3, lr=LR)
    runs = [
        sgd.fit(engine, base, "skip-lora", x, y, epochs=3, lr=LR, start=first.adapter, epochs_before=3, space=s)
        for s in ("primal", "dual")
    ]
    assert units(runs[1].adapter.tensors, runs[0].adapter.tensors) <= ROUNDING


def test_the_same_every_time_and_each_record_is_read_once(engine: Engine) -> None:
    base = network("wide")
    x, y = samples_for(base.spec, 40)
    results = []
    for cut in (1, 10_240):
        store = memory_store("fp32", base.spec.record, 40)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sgd, "FIRST_CALL_SAMPLES", cut)
            patch.setattr(sgd, "CALL_SECONDS", 0.0)
            results.append(sgd.fit(engine, base, "skip2-lora", x, y, lr=LR, store=store, space="dual"))
        assert (store.hits, store.misses) == (0, 40)
    a, b = (r.adapter.tensors for r in results)
    assert all((a[k] == b[k]).all() for k in a)


def test_gain_and_bias_of_the_output_count(engine: Engine) -> None:
    base = network("wide")
    x, y = samples_for(base.spec, 30)
    numbers, m = np.arange(30), method("skip-lora")
    gain, bias = np.array([0.5], np.float32), np.array([1, -1, 0, 2], np.float32)
    added = {**initial(m, base.spec, 4, 0), "output.gain": gain, "output.bias": bias}
    order = sgd._orders(np.random.default_rng(0), 4, 30)
    settings: Any = {"batch_size": 8, "lr": LR}
    primal = engine.trainer(base.spec, {**base.tensors, **added}, m, 4, x, y, numbers=numbers, store=None, **settings)
    records = Records(engine, base, x, numbers, None)
    other = dual.DualTrainer(records, y, added, m, (True, True, True), **settings)
    np.testing.assert_allclose(other.epochs(order).loss, primal.epochs(order).loss, rtol=ROUNDING * EPS)
    assert units(other.tensors(), primal.tensors()) <= ROUNDING


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_learning_rate_by_epoch(engine: Engine, momentum: float) -> None:
    """A velocity does not remember the learning rate, here as there."""
    base = network("wide")
    x, y = samples_for(base.spec, 30)
    numbers, m = np.arange(30), method("skip-lora")
    added = initial(m, base.spec, 4, 0)
    order = sgd._orders(np.random.default_rng(0), 3, 30)
    settings: Any = {"batch_size": 8, "lr": LR, "momentum": momentum}
    primal = engine.trainer(base.spec, {**base.tensors, **added}, m, 4, x, y, numbers=numbers, store=None, **settings)
    other = dual.DualTrainer(Records(engine, base, x, numbers, None), y, added, m, (True, True, False), **settings)
    for e, lr in enumerate((LR, LR / 3, LR / 10)):
        for trainer in (primal, other):
            trainer.epochs(order[e : e + 1], lr)
    assert units(other.tensors(), primal.tensors()) <= ROUNDING


def test_features_without_information(engine: Engine) -> None:
    base = network("wide")
    _, y = samples_for(base.spec, 30)
    for x in (np.zeros((30, 700), np.float32), np.ones((30, 700), np.float32)):
        primal, other = (sgd.fit(engine, base, "skip-lora", x, y, lr=LR, space=s) for s in ("primal", "dual"))
        assert all(np.isfinite(t).all() for t in other.adapter.tensors.values())
        np.testing.assert_allclose(other.stats.loss, primal.stats.loss, rtol=ROUNDING * EPS)


@pytest.mark.parametrize("lr", [1e4, 3e38])
def test_divergence_is_seen_at_the_same_step(engine: Engine, lr: float) -> None:
    steps = []
    for space in ("primal", "dual"):
        with pytest.raises(DivergedError) as caught:
            fit(engine, network("wide"), "skip2-lora", 40, space=space, lr=lr)
        steps.append(caught.value.step)
    assert abs(steps[0] - steps[1]) <= 1  # rounding decides which step first leaves float32


def test_space_is_checked(engine: Engine) -> None:
    base = network("wide")
    with pytest.raises(UsageError, match=r"^space must be one of auto, primal, dual, not 'both'$"):
        fit(engine, base, "skip2-lora", 10, space="both")
    with pytest.raises(UsageError, match=r"^space 'dual' must go with .* only adapters to the output, not lora-all$"):
        fit(engine, base, "lora-all", 10, space="dual", store=None)
    with pytest.raises(
        UsageError, match=r"^space 'dual' must keep its Gram matrices within \d+ bytes, not 4800000000 "
    ):
        dual.taps_in_dual("dual", method("skip2-lora"), (9, 9, 9), 20_000, 4, 10, 20)
    for name in SGD_METHODS:
        assert fit(engine, base, name, 10, store=None, epochs=1, lr=1e-3).steps == 1


WIDTHS = (100_352, 96, 96)


def test_auto_goes_where_it_is_cheaper() -> None:
    skip = method("skip2-lora")
    assert dual.taps_in_dual("auto", skip, WIDTHS, 256, 4, 100, 20) == (True, False, False)
    assert dual.taps_in_dual("auto", method("lora-last"), (9, 100_352), 256, 4, 100, 20) == (True,)
    assert not any(dual.taps_in_dual("auto", skip, WIDTHS, 256, 4, 1, 20))  # the Gram matrix costs more than an epoch
    assert not any(dual.taps_in_dual("auto", skip, (96, 96, 96), 256, 4, 100, 20))
    assert not any(dual.taps_in_dual("auto", skip, NETS["lenet5"].tap_widths, 1024, 4, 10, 20))
    assert dual.taps_in_dual("auto", method("lora-all"), WIDTHS, 256, 4, 100, 20) == ()
    assert dual.taps_in_dual("primal", skip, WIDTHS, 256, 4, 100, 20) == (False, False, False)


def test_auto_leaves_a_run_without_a_whole_cache_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    base = network("wide")
    monkeypatch.setattr(cost, "spaces", lambda widths, *_, **__: (True,) * len(widths))
    primal = fit(engine, base, "skip2-lora", 40, space="primal").adapter.tensors
    small = memory_store("fp32", base.spec.record, 10)
    for store in (None, small):
        tensors = fit(engine, base, "skip-lora", 40, store=store).adapter.tensors
        assert all((tensors[k] == primal[k]).all() for k in primal)
    assert any((fit(engine, base, "skip2-lora", 40).adapter.tensors[k] != primal[k]).any() for k in primal)

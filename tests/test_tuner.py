"""FineTuner has scikit-learn's habits, and remembers its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.engine import Engine
from instantft.errors import DataError, DivergedError, MismatchError, UsageError
from instantft.methods import METHODS, method
from instantft.solvers.calibration import softmax
from instantft.solvers.holdout import STAIRS
from instantft.tuner import FineTuner, load

from . import samples

BASE = samples.base()
X, Y = samples.blobs()


def tuner(**settings: Any) -> FineTuner:
    steps = {} if settings.get("method") == "skip-ridge" or settings.get("solver") == "ridge" else {"epochs": 5}
    return FineTuner(BASE, **{"engine": "reference", **steps, **settings})


def test_fit_predict_score(engine: Engine) -> None:
    t = tuner(engine=engine, epochs=40)
    assert t.fit(X, Y) is t
    assert t.score(X, Y) > 0.9
    logits = t.decision_function(X)
    assert logits.shape == (60, 3)
    np.testing.assert_array_equal(t.predict(X), logits.argmax(axis=1))
    np.testing.assert_allclose(t.predict_proba(X).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(t.classes_, [0, 1, 2])
    assert t.n_features_in_ == 6
    assert len(t.history_["loss"]) == len(t.history_["accuracy"]) == 40
    assert t.history_["accuracy"][-1] > 0.9


@pytest.mark.parametrize("name", METHODS)
def test_saved_adapters_predict_the_same(tmp_path: Path, name: str) -> None:
    t = tuner(method=name).fit(X, Y)
    t.adapter.save(tmp_path / "a")
    BASE.save(tmp_path / "b.safetensors")
    again = tuner(method=name)
    again.base = load(tmp_path / "b.safetensors")
    again.adapter_ = Adapter.load(tmp_path / "a", again.base)
    np.testing.assert_array_equal(again.decision_function(X), t.decision_function(X))


def test_inputs_of_every_kind() -> None:
    base = samples.base(samples.IMAGES)
    x = np.random.default_rng(0).integers(0, 256, (12, 2, 6, 5)).astype(np.uint8)
    y = np.arange(12) % 4
    t = FineTuner(base, engine="reference", batch_size=4, epochs=1).fit(x, y)
    want = t.decision_function(x)
    scaled = (x * np.float32(1 / 255)).astype(np.float32)
    for other in (scaled, scaled.reshape(12, 60), scaled.astype(np.float64)):
        np.testing.assert_allclose(t.decision_function(other), want, rtol=1e-5, atol=1e-6)


def test_preprocessing_of_the_base_is_applied() -> None:
    base = Network(BASE.spec, BASE.tensors, (1.0,), (2.0,))
    shifted = FineTuner(base, "skip2-lora", engine="reference").fit(2 * X + 1, Y)
    np.testing.assert_allclose(
        shifted.decision_function(2 * X + 1), tuner(epochs=10).fit(X, Y).decision_function(X), rtol=1e-4, atol=1e-5
    )


def test_clone_and_parameters() -> None:
    sklearn_base = pytest.importorskip("sklearn.base")
    t = tuner(rank=3, cache="nf4").fit(X, Y)
    copy = sklearn_base.clone(t)
    assert copy.get_params() == t.get_params()
    assert copy.base is t.base
    assert not hasattr(copy, "adapter_")
    assert "rank=3" in repr(copy)
    with pytest.raises(UsageError, match="rank must be"):
        copy.set_params(rank=0, lr=0.5)
    assert copy.get_params() == t.get_params()
    assert copy.set_params(lr=0.5).lr == 0.5
    with pytest.raises(UsageError, match=r"parameter must be one of .*, not 'depth'"):
        copy.set_params(depth=3)


def test_scikit_learn_can_search_over_it() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    scores = selection.cross_val_score(tuner(epochs=30), X, Y, cv=3)
    assert scores.mean() > 0.8


def test_cache_settings() -> None:
    assert tuner().fit(X, Y).store_ is not None
    assert tuner(cache="none").fit(X, Y).store_ is None
    assert tuner(method="skip-lora").fit(X, Y).store_ is None
    t = tuner(method="ft-last", cache="nf4", cache_capacity=7).fit(X, Y)
    assert t.store_ is not None
    assert (t.store_.codec.name, t.store_.capacity) == ("nf4", 7)


def test_partial_fit_goes_on_and_numbers_on() -> None:
    t = tuner()
    for n in range(1, 4):
        t.partial_fit(X[:20], Y[:20])
        assert t.next_number_ == 20 * n
        assert len(t.history_["loss"]) == n
    assert t.store_ is not None
    assert t.store_.misses == 60
    assert t.history_["loss"][2] < t.history_["loss"][0]


def test_partial_fit_after_fit_starts_from_its_adapter() -> None:
    t = tuner().fit(X, Y)
    before = t.adapter
    t.partial_fit(X[:10] * 1.1, Y[:10])
    assert t.adapter is not before
    assert t.next_number_ == 70
    assert t.score(X, Y) > 0.5


def test_revisited_samples_are_not_computed_again() -> None:
    t = tuner()
    t.partial_fit(X, Y)
    assert t.store_ is not None
    t.partial_fit(X[:10], Y[:10], numbers=np.arange(10))
    assert (t.store_.hits, t.store_.misses) == (10, 60)
    assert t.next_number_ == 60
    t.forget([3])
    t.partial_fit(X[:10], Y[:10], numbers=np.arange(10))
    assert t.store_.misses == 61


def test_revisiting_equals_running_again() -> None:
    cached, fresh = tuner(), tuner(cache="none")
    for t in (cached, fresh):
        t.partial_fit(X, Y)
        t.partial_fit(X[5:25], Y[5:25], numbers=np.arange(5, 25))
    np.testing.assert_array_equal(cached.decision_function(X), fresh.decision_function(X))


@pytest.mark.parametrize("codec", ["fp32", "nf4"])
def test_a_growing_cache_keeps_its_records(codec: str) -> None:
    t = tuner(cache=codec)
    for start in range(0, 60, 5):
        t.partial_fit(X[start : start + 5], Y[start : start + 5])
    assert t.store_ is not None
    assert t.store_.held(np.arange(60)).all()
    t.partial_fit(X, Y, numbers=np.arange(60))
    assert (t.store_.hits, t.store_.misses) == (60, 60)


def test_a_bounded_stream_keeps_the_newest() -> None:
    t = tuner(cache_capacity=10)
    for start in range(0, 60, 5):
        t.partial_fit(X[start : start + 5], Y[start : start + 5])
    assert t.store_ is not None
    assert t.store_.capacity == 10
    assert t.store_.held(np.arange(50, 60)).all()


def test_cache_file_serves_the_next_run(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    first = tuner(cache_file=file).fit(X, Y)
    second = tuner(cache_file=file).fit(X, Y)
    assert first.store_ is not None
    assert second.store_ is not None
    assert (first.store_.misses, second.store_.misses) == (60, 0)
    np.testing.assert_array_equal(first.decision_function(X), second.decision_function(X))
    with pytest.raises(MismatchError, match="data set"):
        tuner(cache_file=file).fit(X + 1, Y)
    with pytest.raises(UsageError, match="cache_file"):
        tuner(cache_file=file).partial_fit(X, Y)


def test_failure_keeps_the_old_adapter() -> None:
    t = tuner().fit(X, Y)
    old, history = t.adapter, t.history_
    t.set_params(lr=1e30)
    with pytest.raises(DivergedError):
        t.fit(X, Y)
    with pytest.raises(DivergedError):
        t.partial_fit(X, Y)
    assert t.adapter is old
    assert t.history_ is history


def test_another_base_starts_anew() -> None:
    t = tuner().fit(X, Y)
    t.set_params(base=samples.base(seed=1))
    with pytest.raises(MismatchError, match=BASE.hash):
        t.partial_fit(X, Y)
    t.set_params(rank=2)  # an adapter of another rank cannot be gone on with anyway, and old records do not serve
    t.partial_fit(X, Y, numbers=np.arange(60))
    assert t.store_ is not None
    assert (t.store_.hits, t.store_.misses) == (0, 60)


def test_nothing_fitted_yet() -> None:
    with pytest.raises(UsageError, match="fit must come before"):
        tuner().predict(X)
    tuner().forget([1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank must be an integer from 1 to 4096, not 0"),
        ({"batch_size": -1}, "batch_size must be .*, not -1"),
        ({"epochs": 0}, "epochs must be .*, not 0"),
        ({"lr": float("nan")}, "lr must be .*, not nan"),
        ({"threads": 0}, "threads must be"),
        ({"method": "magic"}, "method must be one of .*, not 'magic'"),
        ({"cache": "gzip"}, "codec must be one of .*, not 'gzip'"),
        ({"cache": 4}, "cache must be the name of a codec, not 4"),
        ({"cache": "fp32", "method": "ft-all"}, "a cache must go with a method .* not ft-all"),
        ({"cache_capacity": 0}, "cache_capacity must be at least 1 sample, not 0"),
        ({"cache_capacity": 5, "method": "skip-lora"}, "must go with a cache"),
        ({"base": "file"}, "base must be a Network, .* not str"),
        ({"engine": 5}, "engine must be the name of an engine or an engine, not 5"),
        ({"cache_capacity": np.int64(0)}, "cache_capacity must be at least 1 sample"),
        ({"cache_capacity": True}, "cache_capacity must be at least 1 sample"),
        ({"space": "both"}, "space must be one of auto, primal, dual, not 'both'"),
        ({"space": "dual", "method": "ft-last"}, "space 'dual' must go with .* not ft-last"),
        ({"space": "dual", "method": "skip-ridge"}, "space 'dual' must go with .* not skip-ridge"),
        ({"space": "primal", "method": "skip-ridge"}, "space must be left out for skip-ridge, .* it is primal"),
        ({"epochs": 5, "method": "skip-ridge"}, "epochs must be left out for skip-ridge, which makes no steps, .* 5"),
        ({"epochs": 5, "solver": "ridge"}, "epochs must be left out for skip-ridge"),
        ({"lr": 0.1, "method": "skip-ridge"}, "lr must be left out"),
        ({"momentum": 0.0, "method": "skip-ridge"}, "momentum must be left out"),
        ({"batch_size": 10, "method": "skip-ridge"}, "batch_size must be left out"),
        ({"forgetting": 0.9, "method": "skip2-lora"}, "forgetting must be left out for skip2-lora, which is not in cl"),
        ({"support": 9, "solver": "sgd"}, "support must be left out for skip2-lora"),
        ({"rank": 4, "method": "ft-all"}, "rank must be left out for ft-all, which has no adapters, but it is 4"),
    ],
)
def test_arguments_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        FineTuner(**{"base": BASE, **settings})


@pytest.mark.parametrize(
    "numbers", [[0, 1], [0.5] * 60, [-1] * 60, [0] * 60, [[0], [1, 2]], [*range(59), 2**63 - 1], [*range(59), 2**70]]
)
def test_bad_numbers(numbers: list[Any]) -> None:
    with pytest.raises(DataError, match="numbers must"):
        tuner().partial_fit(X, Y, numbers=numbers)


def test_small_data_warn_only_in_fit() -> None:
    with pytest.warns(UserWarning, match="fewer samples"):
        tuner().fit(X[:5], Y[:5])


def test_every_cacheable_method_takes_a_cache() -> None:
    for name in METHODS:
        if method(name).cacheable:
            assert tuner(method=name, cache="fp16").fit(X, Y).store_ is not None


def test_probabilities_survive_large_logits() -> None:
    p = softmax(np.array([[1e30, -1e30], [0, 0]], np.float32))
    np.testing.assert_array_equal(p, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize("dtype", [np.uint64, np.int64, np.uint8])
def test_numbers_of_every_integer_type(dtype: Any) -> None:
    start = np.iinfo(dtype).max - np.asarray(60, dtype)
    numbers = start + np.arange(60, dtype=dtype)
    t = tuner(cache_capacity=60)
    if dtype is np.uint64:
        with pytest.raises(DataError, match=r"numbers must be 0 to 2\^63-2, not \d+") as e:
            t.partial_fit(X, Y, numbers=numbers)
        assert "\n" not in str(e.value)
        numbers = (numbers - 2**63).astype(dtype)
    t.partial_fit(X, Y, numbers=numbers)
    assert t.next_number_ == int(numbers.max()) + 1
    assert t.store_ is not None
    assert t.store_.held(numbers).all()


def test_after_the_largest_number_there_is_no_other() -> None:
    t = tuner(cache_capacity=60)
    t.partial_fit(X, Y, numbers=np.arange(60) + (2**63 - 1 - 60))
    with pytest.raises(DataError, match="numbers must be at most"):
        t.partial_fit(X, Y)
    t.partial_fit(X, Y, numbers=np.arange(60))


def test_numpy_integers_are_integers(tmp_path: Path) -> None:
    t = tuner(cache_capacity=np.int64(5)).fit(X, Y)
    assert t.store_ is not None
    assert t.store_.capacity == 5
    assert tuner(cache_capacity=np.uint16(5), cache_file=tmp_path / "c").fit(X, Y).score(X, Y) > 0
    assert tuner(cache_capacity=np.int64(5)).partial_fit(X, Y).score(X, Y) > 0


def test_ragged_lists_are_no_arrays() -> None:
    ragged: list[Any] = [[1.0, 2.0], [3.0]]
    mixed: list[Any] = [0, [1]]
    t = tuner().fit(X, Y)
    for call in (lambda: t.fit(ragged, [0, 1]), lambda: t.fit(X, mixed), lambda: t.forget(ragged)):
        with pytest.raises(DataError, match="must be an array") as e:
            call()
        assert "\n" not in str(e.value)


def test_records_survive_a_training_that_diverged(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    with pytest.raises(DivergedError):
        tuner(cache_file=file, lr=1e30).fit(X, Y)
    t = tuner(cache_file=file).fit(X, Y)
    assert t.store_ is not None
    assert (t.store_.damaged, t.store_.misses) == (0, 0)


def test_damaged_records_are_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "cache"
    tuner(cache_file=file).fit(X, Y)
    raw = bytearray(file.read_bytes())
    raw[-65] ^= 1  # behind it there are 64 bytes of slack
    file.write_bytes(raw)
    with pytest.warns(UserWarning, match="1 of 60 records in .*cache were damaged"):
        t = tuner(cache_file=file).fit(X, Y)
    assert t.store_ is not None
    assert t.store_.misses == 1


def test_an_adapter_from_a_file_can_be_used(tmp_path: Path) -> None:
    fitted = tuner().fit(X, Y)
    fitted.adapter.save(tmp_path / "adapter")
    loaded = tuner().use(Adapter.load(tmp_path / "adapter", BASE))
    np.testing.assert_array_equal(loaded.predict(X), fitted.predict(X))
    np.testing.assert_array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    other = Network.init(BASE.spec, 77)
    with pytest.raises(MismatchError, match=other.hash):
        FineTuner(other).use(loaded.adapter)


def test_one_sample_gives_no_certainty() -> None:
    single = tuner(epochs=None).fit(X[:1], Y[:1])
    assert single.predict_proba(X).max() < 0.99


def test_another_adapter_is_not_judged_by_what_was_fitted() -> None:
    fitted, other = tuner(epochs=None).fit(X, Y), tuner(epochs=None).fit(X[:3], Y[:3]).adapter
    said = fitted.judge().after
    assert fitted.use(fitted.adapter).judge().after == said
    with pytest.raises(UsageError, match=r"said must be one a sample, \(\d+,\), not \[5\]"):
        fitted.judge(said=np.zeros(5, int))
    with pytest.raises(UsageError, match="fit must come before judge"):
        fitted.use(other).judge()
    stream = tuner(epochs=None).partial_fit(X, Y).use(other)
    fresh = tuner(epochs=None).partial_fit(X[:8], Y[:8])
    np.testing.assert_array_equal(stream.partial_fit(X[:8], Y[:8]).predict(X), fresh.predict(X))


def test_another_base_is_no_place_for_the_adapter() -> None:
    stream = tuner(epochs=None).partial_fit(X, Y).set_params(base=Network.init(BASE.spec, 77))
    with pytest.raises(MismatchError, match="an adapter must be used on the network"):
        stream.predict(X)
    with pytest.raises(MismatchError, match="an adapter must be used on the network"):
        stream.partial_fit(X[:1], Y[:1])
    assert stream.fit(X, Y).score(X, Y) > 0.5


def test_auto_picks_what_the_arguments_leave_open() -> None:
    assert tuner(epochs=None).fit(X, Y).method_.name == "skip-ridge"
    assert tuner(epochs=None, rank=1).fit(X, Y).adapter.rank == 1
    for settings in (
        {"epochs": 3},
        {"epochs": None, "lr": 0.1},
        {"epochs": None, "momentum": 0.0},
        {"epochs": None, "space": "dual"},
    ):
        t = tuner(**settings).fit(X, Y)
        assert t.method_.name == "skip2-lora"
        assert t.epochs_ == (3 if settings["epochs"] else t.epochs_) > 0
    assert tuner(epochs=None, solver="sgd").fit(X, Y).method_.name == "skip2-lora"
    assert tuner(solver="ridge").fit(X, Y).method_.name == "skip-ridge"
    for wrong, words in (
        ({"solver": "newton"}, "solver must be one of auto, ridge, sgd, not 'newton'"),
        ({"solver": "ridge", "method": "ft-all"}, "solver must be sgd for ft-all, not ridge"),
    ):
        with pytest.raises(UsageError, match=words):
            tuner(**wrong)


def test_auto_makes_steps_where_the_system_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instantft.tuner.MAX_SYSTEM", 16)
    t = tuner(epochs=None)
    assert t.fit(X[:16], Y[:16]).method_.name == "skip-ridge"
    assert t.fit(X, Y).method_.name == "skip2-lora"
    assert t.epochs_ in STAIRS
    assert t.score(X, Y) > 0.9


def test_judge_compares_on_samples_left_out(engine: Engine) -> None:
    good = tuner(engine=engine, epochs=None).fit(X, Y)
    found = good.judge()
    assert found.accepted
    assert found.n == 60
    assert found.before == pytest.approx(np.mean(frozen(engine, X).argmax(axis=1) == Y))
    noise = np.random.default_rng(0).integers(0, 3, 60)
    for method_name in ("auto", "skip2-lora", "ft-all"):
        t = tuner(engine=engine, method=method_name, epochs=None).fit(X, noise)
        against_good = t.judge(good.adapter)
        assert not against_good.accepted
        assert against_good.n == (60 if method_name == "auto" else 12)
    with pytest.raises(UsageError, match="fit must come before judge"):
        tuner().judge()


def test_judging_by_records_runs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the frozen network says of the samples is in their records; of another adapter nobody knows."""
    t = tuner(epochs=None).fit(X, Y)
    wanted, other = t.judge(t.adapter), tuner(epochs=None).fit(X, Y[::-1]).adapter

    def refused(*_: object) -> None:
        raise RuntimeError("the network must not run")

    monkeypatch.setattr("instantft.tuner.forward", refused)
    assert t.judge().after == wanted.after
    with pytest.raises(RuntimeError, match="must not run"):
        t.judge(other)


def frozen(engine: Engine, x: Any) -> Any:
    return engine.forward(BASE.spec, BASE.tensors, x)


def test_groups_are_left_out_together() -> None:
    """Every sample twice: alone its twin gives it away, with the group it does not."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(40, 6)).astype(np.float32), 2, axis=0)
    y = np.repeat(rng.integers(0, 3, 40), 2)
    order = rng.permutation(80)
    plain = tuner(epochs=None).fit(x[order], y[order])
    grouped = tuner(epochs=None).fit(x[order], y[order], groups=np.repeat(np.arange(40), 2)[order])
    assert plain.judge().after > grouped.judge().after + 0.1
    for wrong in (np.zeros(79, int), np.zeros(80), np.zeros(80, int)):
        with pytest.raises(DataError, match="groups must be"):
            tuner().fit(x, y, groups=wrong)


@pytest.mark.parametrize("codec", ["fp32", "nf4"])
def test_partial_fit_in_closed_form(engine: Engine, codec: str) -> None:
    """Updates come close to what fit says of all samples, from whichever of the two the stream began with."""
    whole = tuner(engine=engine, epochs=None, cache=codec).fit(X, Y).decision_function(X)
    streamed = tuner(engine=engine, epochs=None, cache=codec, support=60)
    begun = tuner(engine=engine, epochs=None, cache=codec, support=60).fit(X[:15], Y[:15])
    for t, start in ((streamed, 0), (begun, 15)):
        for a in range(start, 60, 5):
            assert t.partial_fit(X[a : a + 5], Y[a : a + 5]) is t
        assert t.next_number_ == 60
        assert t.method_.name == "skip-ridge"
        assert t.score(X, Y) > 0.9
        assert t.judge().n == 60
        assert np.mean(t.decision_function(X).argmax(axis=1) == whole.argmax(axis=1)) > 0.9
    with pytest.raises(UsageError, match="rank must be left out"):
        tuner(epochs=None, rank=2).partial_fit(X, Y)


def test_a_fit_begins_a_new_stream() -> None:
    t = tuner(epochs=None).partial_fit(X, Y).fit(X[:20], Y[:20])
    assert t.judge().n == 20
    t.partial_fit(X[20:30], Y[20:30])
    assert t.adapter.config["samples"] == 30


@pytest.mark.parametrize("settings", [{"epochs": None}, {"method": "skip2-lora", "epochs": 10}])
def test_a_class_comes_later(engine: Engine, settings: dict[str, Any]) -> None:
    t = tuner(engine=engine, cache="nf4", **settings).partial_fit(X, Y)
    before = t.decision_function(X)
    assert t.add_class() is t
    assert t.base is not BASE
    after = t.decision_function(X)
    np.testing.assert_allclose(after[:, :3], before, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(t.classes_, [0, 1, 2, 3])
    new = np.random.default_rng(5).normal(size=(30, 6)).astype(np.float32) * 0.5
    new[:, 5] += 4
    for _ in range(1 if settings["epochs"] is None else 40):
        t.partial_fit(new, np.full(30, 3))
    assert t.score(new, np.full(30, 3)) > 0.9
    with pytest.raises(UsageError, match="not to ft-all"):
        tuner(method="ft-all").add_class()


def test_settings_of_a_stream() -> None:
    for wrong in ({"forgetting": 0.0}, {"forgetting": 1.5}, {"support": 0}):
        with pytest.raises(UsageError, match=r"(forgetting|support) must be"):
            tuner(**wrong)
    old, new = np.zeros(40, np.int64), np.ones(40, np.int64)
    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    t = tuner(epochs=None, forgetting=0.8).partial_fit(rows, old)
    assert (t.partial_fit(rows + 1e-3, new).predict(rows) == 1).all()


# -- a lift ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arccos", "nystrom"])
def test_lift(tmp_path: Path, kind: str) -> None:
    x, y = samples.shells()
    new, labels = samples.shells(300, seed=1)
    t = FineTuner(BASE, engine="reference", lift=kind).fit(x, y)
    assert t.score(new, labels) > 0.95
    assert t.judge().accepted
    t.adapter.save(tmp_path / "a")
    again = FineTuner(BASE, engine="reference").use(Adapter.load(tmp_path / "a", BASE))
    np.testing.assert_array_equal(again.decision_function(new), t.decision_function(new))
    with pytest.raises(UsageError, match=f"lift must be left out where skip-ridge goes on, not {kind}"):
        t.partial_fit(x, y)
    t.set_params(lift=None).fit(x, y)
    assert "lift.basis" not in t.adapter.tensors


def test_lift_must_fit_the_method() -> None:
    for settings, words in (
        ({"lift": "rbf"}, "lift must be one of arccos, nystrom, not 'rbf'"),
        ({"lift": "arccos", "method": "skip2-lora"}, "lift must go with skip-ridge, not skip2-lora"),
        ({"lift": "arccos", "epochs": 5}, "lift must go with skip-ridge, not skip2-lora"),
        ({"lift": "arccos", "rank": 2}, "lift must go with full rank, 3 or more, not 2"),
    ):
        with pytest.raises(UsageError, match=words):
            FineTuner(BASE, **settings)

"""The engine `fixed`: the specification's arithmetic behind the protocol of engines, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft import cli
from instantft.adapters import Adapter
from instantft.cache.store import Store, memory_store
from instantft.engine.reference import ReferenceEngine
from instantft.errors import UsageError
from instantft.hw import fixed
from instantft.hw.configs import CONFIGS, configured
from instantft.hw.engine import FixedEngine
from instantft.hw.fixed import CODEC
from instantft.hw.formats import PROFILES, Ints, nearest
from instantft.methods import SGD_METHODS
from instantft.solvers import sgd
from instantft.spec import dnn
from instantft.tasks import targets
from instantft.tuner import FineTuner

from . import samples
from .nets import NETS, samples_for, tensors_for

SKIP2 = SGD_METHODS["skip2-lora"]
T, B, E = 13, 5, 2  # the last batch is smaller


def store_for(spec: Any, codec: str = CODEC, capacity: int = T) -> Store:
    return memory_store(codec, spec.record, capacity)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("name", "rank"), [("dnn", 4), ("lenet5", 3), ("odd", 1)])
def test_a_fine_tuning_is_that_of_the_specification(config: str, name: str, rank: int) -> None:
    """From arrays to A and B with nothing of the engine, the trainer and the store in between: not a bit differs."""
    spec, formats = NETS[name], configured(config, NETS[name]).formats
    tensors, (x, y) = tensors_for(spec, SKIP2, rank), samples_for(spec, T)
    engine, store = FixedEngine(config), store_for(spec)
    trainer = engine.trainer(spec, tensors, SKIP2, rank, x, y, numbers=np.arange(T), store=store, batch_size=B, lr=0.1)
    order = np.stack([np.random.default_rng(e).permutation(T) for e in range(E)]).astype(np.int32)
    stats = trainer.epochs(order)

    x0, seen = fixed.quantise_input(x, formats), fixed.Saturations()
    values = fixed.frozen(spec, fixed.fold(spec, tensors), x0, formats, seen)
    *taps, c = (x0, *fixed.decode(spec.record, fixed.encode(spec.record, values, formats)))

    def ints(part: str) -> tuple[Ints, ...]:
        return tuple(nearest(tensors[f"lora.{k}-{spec.L}.{part}"], 12) for k in range(spec.L))

    params, correct = fixed.Parameters(ints("A"), ints("B"), 4096, np.zeros(spec.C, np.int64)), []
    for rows in [row[i : i + B] for row in order for i in range(0, T, B)]:
        eta = int(np.floor(0.1 / len(rows) * 2**24 + 0.5))
        params, trace = fixed.step(params, [t[rows] for t in taps], c[rows], y[rows], eta, formats, seen)
        correct.append((trace.y.argmax(axis=1) == y[rows]).sum())
    found = trainer.tensors()
    for k in range(spec.L):
        np.testing.assert_array_equal(found[f"lora.{k}-{spec.L}.A"] * 4096, params.A[k])
        np.testing.assert_array_equal(found[f"lora.{k}-{spec.L}.B"] * 4096, params.B[k])
        assert (params.B[k] != ints("B")[k]).any()
    assert stats.correct.sum() == sum(correct)
    assert engine.seen == seen
    assert (store.hits, store.misses) == (E * T - T, T)


def test_the_cache_holds_the_entries_of_the_core() -> None:
    spec, (x, _) = NETS["lenet5"], samples_for(NETS["lenet5"], 3)
    tensors = tensors_for(spec)
    for config in CONFIGS:
        engine, store = FixedEngine(config), store_for(spec)
        engine.fill(spec, tensors, x, np.arange(3), store)
        formats = configured(config, spec).formats
        x0 = fixed.quantise_input(x, formats)
        values = fixed.frozen(spec, fixed.fold(spec, tensors), x0, formats, fixed.Saturations())
        entries = fixed.encode(spec.record, values, formats)
        codes = slice(96, 96 + 62 * 16)
        np.testing.assert_array_equal(store.data[:3, codes], entries[:, codes])
        for words in (slice(0, 96), slice(codes.stop, None)):
            kept = store.data[:3, words].copy().view("<i4") >> (16 - formats.fraction)
            np.testing.assert_array_equal(kept, entries[:, words].copy().view("<i4"))
        assert (entries[:, codes.stop :].copy().view("<i4")[:, :10] == values[-1]).all()
        # Whoever reads it as nf4-hw sees the values that the core sees, but for the last bits of its format.
        rows = store.read(np.arange(3))
        for s, v in zip(spec.record.segments, fixed.decode(spec.record, entries), strict=True):
            seen = rows[:, s.offset : s.offset + s.size]
            assert np.abs(seen - v / 2.0**formats.fraction).max() <= 0.5 * 2.0**-formats.fraction


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("config", ["k26", "ecp5-85f"])
def test_records_are_those_of_floating_point(name: str, config: str) -> None:
    """test_fixed derives the bound layer by layer; here it is that nothing is swapped or left out."""
    spec, (x, _) = NETS[name], samples_for(NETS[name], 3)
    tensors = tensors_for(spec)
    found, wanted = FixedEngine(config).records(spec, tensors, x), ReferenceEngine().records(spec, tensors, x)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()


def general(spec: Any, rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """An adapter as a closed form finds them: small A, B of all sizes, gain and bias."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {
        "output.gain": np.array([0.37], np.float32),
        "output.bias": rng.normal(size=spec.C).astype(np.float32),
    }
    for k, n in enumerate(spec.tap_widths):
        made[f"lora.{k}-{spec.L}.A"] = rng.normal(0, 0.02 / n**0.5, (n, rank)).astype(np.float32)
        made[f"lora.{k}-{spec.L}.B"] = (rng.normal(size=(rank, spec.C)) * 10.0 ** np.arange(rank)[:, None]).astype("f4")
    return made


def test_a_general_adapter_predicts() -> None:
    """The logits of floating point from the same records in 4 bits, to 1 % of their spread: A's column has values of
    about 0.02/√N, which are 2^-12 without the balancing."""
    spec, (x, _) = dnn(61, 3, 24), samples_for(dnn(61, 3, 24), 40)
    tensors = {**tensors_for(spec), **general(spec, 3)}
    engine = FixedEngine()
    found = engine.forward(spec, tensors, x)
    store = store_for(spec, capacity=40)
    engine.fill(spec, tensors, x, np.arange(40), store)
    rows = store.read(np.arange(40))
    *taps, c = (x, *(rows[:, s.offset : s.offset + s.size] for s in spec.record.segments))
    wanted = tensors["output.gain"] * c + tensors["output.bias"]
    for k, tap in enumerate(taps):
        wanted = wanted + tap @ tensors[f"lora.{k}-3.A"] @ tensors[f"lora.{k}-3.B"]
    plain = sum(tap @ tensors[f"lora.{k}-3.A"] @ tensors[f"lora.{k}-3.B"] for k, tap in enumerate(taps))
    assert np.abs(plain).max() > 0.5
    assert np.abs(found - wanted).max() < 0.01 * wanted.std()
    assert engine.report()["saturations"] == {"activations": 0, "gradients": 0, "parameters": 0}


@given(st.integers(0, 2**32), st.integers(-12, 2), st.integers(-10, 3))
@settings(deadline=None, max_examples=50)
def test_balancing_loses_little_and_fits(seed: int, a: int, b: int) -> None:
    """A·B off by half a unit of both: |A|·2^-13 + |B|·2^-13 where e balances them, 2^-6 of the product at the worst
    of these sizes; and h is no larger than the factor that B is smaller."""
    rng, spec = np.random.default_rng(seed), dnn(9, 3, 4)
    A, B = rng.uniform(-(2.0**a), 2.0**a, (9, 2)), rng.uniform(-(2.0**b), 2.0**b, (2, 3))
    tensors = {"lora.0-3.A": A.astype(np.float32), "lora.0-3.B": B.astype(np.float32)}
    made = fixed.adapter(spec, tensors, 4, PROFILES["q24"])
    assert made.A[0].shape == (9, 4)
    assert not made.A[0][:, 2:].any()
    assert not made.A[1].any()
    found = (made.A[0] @ made.B[0]) / 2.0**24
    exact = tensors["lora.0-3.A"].astype(float) @ tensors["lora.0-3.B"].astype(float)
    size = np.sqrt((A**2).sum(axis=0) * (B**2).sum(axis=1)).sum()
    assert np.abs(found - exact).max() <= max(2.0**-6 * size, 2.0**-12)


def test_what_the_core_has_trained_is_not_balanced() -> None:
    rng, spec = np.random.default_rng(0), dnn(9, 3, 4)
    A, B = rng.integers(-40, 40, (9, 2)), rng.integers(-30000, 30000, (2, 3))
    tensors = {"lora.2-3.A": (A / 4096).astype(np.float32)[:4], "lora.2-3.B": (B / 4096).astype(np.float32)}
    made = fixed.adapter(spec, tensors, 2, PROFILES["q24"])
    np.testing.assert_array_equal(made.A[2], A[:4])
    np.testing.assert_array_equal(made.B[2], B)


def test_sgd_leaves_the_steps_to_the_core() -> None:
    """No steps in the space of samples, no momentum of its own accord."""
    base, (x, y) = samples.base(), samples.blobs(24)
    made = [
        sgd.fit(
            FixedEngine(), base, SKIP2, x, y, epochs=3, batch_size=5, lr=lr, store=store_for(base.spec, capacity=24)
        ).adapter
        for lr in (None, 0.05)
    ]
    assert [a.config["momentum"] for a in made] == [0, 0]
    for a in made:
        assert all((v * 4096 == np.rint(v * 4096)).all() for v in a.tensors.values())
    with pytest.raises(UsageError, match="space must be primal or auto for the engine fixed, not dual"):
        sgd.fit(FixedEngine(), base, SKIP2, x, y, space="dual", store=store_for(base.spec, capacity=24))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 5}, "rank must be at most 4"),
    "batch": ({"batch_size": 21}, "batch size must be at most 20"),
    "momentum": ({"momentum": 0.5}, "momentum must be 0"),
    "lr": ({"lr": 1e-9}, "learning rate over the samples of a batch must be"),
    "lr of the last batch": ({"lr": 3.0}, "not 3/3"),
    "method": ({"method": SGD_METHODS["lora-last"]}, "method must be skip2-lora"),
    "codec": ({"codec": "nf4"}, "cache must be nf4-hw, not nf4"),
    "no cache": ({"codec": None}, "must be nf4-hw, not none"),
    "room": ({"capacity": 3}, "must have room for all 13 samples, not 3"),
    "weights": ({"weight": 8.0}, "must lie within ±8"),
    "smoothing": ({"smoothing": 0.1}, "classes that count alike"),
    "regression": ({"task": "regression"}, "classes that count alike"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_core_cannot_do_is_refused(name: str) -> None:
    change, words = REFUSED[name]
    spec = dnn(6, 3, 5)
    rank = change.get("rank", 4)
    tensors = tensors_for(spec, SKIP2, rank)
    if "weight" in change:
        tensors["layers.2.weight"][0, 0] = change["weight"]
    x, y = samples_for(spec, T)
    goal = targets(
        np.ones((T, 3), np.float32) if "task" in change else y, 3, change.get("task", "classification"),
        smoothing=change.get("smoothing", 0.0),
    )  # fmt: skip
    codec = change.get("codec", CODEC)
    store = None if codec is None else store_for(spec, codec, change.get("capacity", T))
    with pytest.raises(UsageError, match=words):
        FixedEngine().trainer(
            spec, tensors, change.get("method", SKIP2), rank, x, goal, numbers=np.arange(T), store=store,
            batch_size=change.get("batch_size", B), lr=change.get("lr", 0.1), momentum=change.get("momentum", 0.0),
        )  # fmt: skip
    if store is not None and name not in ("room",):
        assert not store.held(np.arange(T)).any()  # before anything ran


def test_networks_and_adapters_that_the_core_cannot_hold_are_refused() -> None:
    x = np.zeros((1, 6), np.float32)
    spec = dnn(6, 17, 5)
    with pytest.raises(UsageError, match="up to 16 classes, not 17"):
        FixedEngine().records(spec, tensors_for(spec), x)
    with pytest.raises(UsageError, match="one of k26, k26-small, ecp5-85f, not 'k27'"):
        FixedEngine("k27").records(dnn(6, 3, 5), tensors_for(dnn(6, 3, 5)), x)
    spec = dnn(6, 3, 5)
    tensors = tensors_for(spec)
    for added, words in (
        ({"lora.0-1.A": (6, 1, 1), "lora.0-1.B": (1, 5, 1)}, "to the output only, not lora.0-1"),
        (
            {"lora.0-3.A": (6, 5, 1), "lora.0-3.B": (5, 3, 1)},
            "rank must be at most 4 for this build of the core, not 5",
        ),
        ({"lora.0-3.A": (6, 1, 1e3), "lora.0-3.B": (1, 3, 1)}, "must lie within ±8"),
        ({"output.gain": (1, 8)}, "output.gain must lie within ±8"),
        ({"output.bias": (3, -129)}, "output.bias must lie within ±128"),
    ):
        adapter = {name: np.full(shape, value, np.float32) for name, (*shape, value) in added.items()}
        with pytest.raises(UsageError, match=words):
            FixedEngine().forward(spec, {**tensors, **adapter}, x)


# -- Python and the command line --------------------------------------------------------------------------------------


def test_the_tuner_takes_the_core() -> None:
    base, (x, y) = samples.base(), samples.blobs(60)
    tuner = FineTuner(base, method="skip2-lora", cache="nf4-hw", epochs=20, lr=0.1, engine=FixedEngine())
    assert tuner.fit(x, y).score(x, y) > 0.9


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    samples.base().save("base.safetensors")
    x, y = samples.blobs(60)
    np.savez("ft.npz", x=x, y=y)
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    return cli.run([str(a) for a in arguments]), *capsys.readouterr()


FINETUNE = ("finetune", "base.safetensors", "--data", "ft.npz", "--out", "adapter", "--engine", "fixed")


def test_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*FINETUNE, "--epochs", 20, "--lr", 0.1, "--eval", "ft.npz", "--force")
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    said = json.loads(out)
    assert (said["method"], said["engine"], said["cache"]["codec"]) == ("skip2-lora", "fixed", "nf4-hw")
    assert said["hardware"] == {"config": "k26", "saturations": {"activations": 0, "gradients": 0, "parameters": 0}}
    assert said["accuracy_after"] > 0.9
    adapter = Adapter.load("adapter")
    assert all((v * 4096 == np.rint(v * 4096)).all() for v in adapter.tensors.values())

    status, out, _ = call(capsys, *arguments, "--hw-config", "ecp5-85f")
    assert status == 0
    assert "core     ecp5-85f; saturated: nothing" in out

    at = ("base.safetensors", "--adapter", "adapter", "--data", "ft.npz", "--engine", "fixed")
    status, out, err = call(capsys, "evaluate", *at, "--json")
    assert status == 0, err
    assert json.loads(out)["hardware"]["config"] == "k26"
    status, out, err = call(capsys, "predict", *at, "--out", "y.npz")
    assert status == 0, err
    assert "core     k26; saturated: nothing" in out
    logits = np.load("y.npz")["logits"]
    np.testing.assert_array_equal(logits * 65536, np.rint(logits * 65536))


def test_a_closed_form_of_limited_rank_runs_on_the_core(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = call(
        capsys, "finetune", "base.safetensors", "--data", "ft.npz", "--out", "adapter", "--method", "skip-ridge",
        "--rank", 2, "--force",
    )  # fmt: skip
    assert status == 0, err
    at = ("evaluate", "base.safetensors", "--adapter", "adapter", "--data", "ft.npz", "--json", "--engine")
    found = [json.loads(call(capsys, *at, engine)[1])["accuracy"] for engine in ("native", "fixed")]
    assert found[0] > 0.9
    assert abs(found[0] - found[1]) <= 1 / 60  # a sample


def test_saturation_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = samples.blobs(60)
    np.savez("ft.npz", x=x * 1000, y=y)
    status, out, err = call(capsys, *FINETUNE, "--epochs", 1, "--lr", 0.9, "--json")
    assert status == 0, err
    cut = json.loads(out)["hardware"]["saturations"]
    assert cut["activations"] > 0
    assert cut["parameters"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "lora-all"), "--method must be skip2-lora for the core, not 'lora-all'"),
        (("--cache", "nf4"), "--cache must be nf4-hw for the core, not 'nf4'"),
        (("--rank", 5), "rank must be at most 4 for the core's build k26, not 5"),
        (("--batch-size", 21), "batch size must be at most 20 for the core's build k26, not 21"),
        (("--momentum", 0.5), "momentum must be 0 for the core, not 0.5"),
        (("--space", "dual"), "space must be primal or auto for the engine fixed, not dual"),
        (("--lr", 1e-9), "learning rate over the samples of a batch must be"),
        (("--hw-config", "k27"), "configuration must be one of k26, k26-small, ecp5-85f, not 'k27'"),
        (("--memory-limit", "1G"), "--memory-limit must go with --engine native or reference"),
        (("--label-smoothing", 0.1), "classes that count alike"),
        (("--engine", "native", "--hw-config", "k26"), "--hw-config must go with --engine fixed or rtl-sim"),
        (("--engine", "fpga"), "engine must be one of native, reference, fixed, rtl-sim, not 'fpga'"),
    ],
)  # fmt: skip
def test_refusals(here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], words: str) -> None:
    status, out, err = call(capsys, *FINETUNE, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not Path("adapter").exists()

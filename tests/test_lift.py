"""The lift: the kernel against its definition, fits against explicit kernels and fitting again, files, hard data."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from instantft import lift
from instantft.adapters import CONFIG_FILE, TENSOR_FILE, Adapter
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, forward, get_engine
from instantft.errors import DataError, FileError, MismatchError, UsageError
from instantft.methods import METHODS, parameters
from instantft.solvers import closed, lifting
from instantft.solvers.records import Records
from instantft.solvers.ridge import METHOD, RidgeResult, fit_ridge
from instantft.solvers.taps import Choice
from instantft.spec import NetSpec, dnn, lenet5
from tests import samples
from tests.nets import NETS, samples_for, tensors_for
from tests.test_ridge import HARD

SAME = 1e-3
"""Relative to the largest logit. The curve of the kernel has an infinite second derivative where u = ±v, so float32
records and directions (1e-7) show up magnified, and the coefficients of a Nyström map are large and cancel."""

KINDS: tuple[lifting.Kind, ...] = ("arccos", "nystrom")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lift is taken, whether or not it helps."""
    monkeypatch.setattr(lifting, "_helps", lambda before, after: True)


def network(spec: NetSpec) -> Network:
    return Network(spec, tensors_for(spec))


def tensors(base: Network, result: RidgeResult) -> dict[str, np.ndarray]:
    return {**base.tensors, **result.adapter.tensors}


def predicted(engine: Engine, base: Network, result: RidgeResult, x: np.ndarray) -> np.ndarray:
    return forward(engine, base.spec, tensors(base, result), x)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = SAME) -> None:
    assert np.abs(a - b).max() <= tolerance * max(float(np.abs(b).max()), 1e-6)


def arc_cosine(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Cho and Saul (2009), equations 3 and 6, order 1, as printed."""
    a, b = np.linalg.norm(u, axis=1)[:, None], np.linalg.norm(v, axis=1)
    theta = np.arccos(np.clip(u @ v.T / (a * b), -1, 1))
    return a * b / np.pi * (np.sin(theta) + (np.pi - theta) * np.cos(theta))


def taps_of(engine: Engine, base: Network, x: np.ndarray) -> np.ndarray:
    """x^0 … x^{L-1} side by side, (T, D) float64."""
    rows = engine.records(base.spec, base.tensors, x)
    parts = [x, *(rows[:, s.offset : s.offset + s.size] for s in base.spec.record.segments[:-1])]
    return np.concatenate(parts, axis=1).astype(np.float64)


def explicit(engine: Engine, base: Network, result: RidgeResult, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    """The whole kernel (n, m) of two sets of samples, from the definition; the adapter lends directions only."""
    spec, t = base.spec, result.adapter.tensors
    widths = np.repeat(np.sqrt(result.weights), spec.tap_widths) * result.choice.scale
    X, Z = taps_of(engine, base, x), taps_of(engine, base, z)
    K = (X * widths) @ (Z * widths).T + 1
    basis, offset = t["lift.basis"].astype(np.float64), t["lift.offset"].astype(np.float64)
    u, v = X @ basis - offset, Z @ basis - offset

    def e(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return arc_cosine(a, b) - a @ b.T / 2

    if result.lift == "arccos":
        return np.asarray(K + lifting.SHARE * e(u, v))
    V = t["lift.landmarks"].astype(np.float64)
    inverse = np.linalg.inv(e(V, V) + lifting.NUGGET * np.eye(len(V)))
    return np.asarray(K + lifting.SHARE * e(u, V) @ inverse @ e(v, V).T)


# -- the kernel ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_kernel_without_its_linear_half(dtype: type) -> None:
    rng = np.random.default_rng(0)
    u: np.ndarray = rng.normal(size=(50, 7)).astype(dtype)
    v: np.ndarray = rng.normal(size=(30, 7)).astype(dtype)
    v[0], v[1] = u[0], -u[1]
    e = lift.curved(u @ v.T, np.linalg.norm(u, axis=1), np.linalg.norm(v, axis=1))
    assert e.dtype == dtype
    close(
        e + u @ v.T / 2, arc_cosine(u.astype(np.float64), v.astype(np.float64)), 1e-6 if dtype is np.float32 else 1e-12
    )
    assert e[0, 0] == pytest.approx(u[0] @ u[0] / 2, rel=1e-6)  # k(u, u) = ‖u‖²
    assert e[1, 1] == pytest.approx(u[1] @ u[1] / 2, rel=1e-6)  # even


def test_the_kernel_is_that_of_many_relus() -> None:
    """2·E[max(0, w·u)·max(0, w·v)] over Gaussian w is the arc-cosine kernel; 200,000 draws leave an error of 1 %."""
    rng = np.random.default_rng(0)
    u = rng.normal(size=(6, 5))
    hidden = np.maximum(rng.normal(size=(200_000, 5)) @ u.T, 0)
    n = np.linalg.norm(u, axis=1)
    close(2 * hidden.T @ hidden / len(hidden), lift.curved(u @ u.T, n, n) + u @ u.T / 2, 0.02)


def test_the_curved_half_is_positive_semidefinite_and_zero_at_zero() -> None:
    u = np.random.default_rng(0).normal(size=(80, 3))
    u[5] = 0
    n = np.linalg.norm(u, axis=1)
    e = lift.curved(u @ u.T, n, n)
    assert np.linalg.eigvalsh(e).min() > -1e-12 * np.trace(e)
    assert not e[5].any()
    assert not e[:, 5].any()


# -- the fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("net", ["dnn", "odd", "lenet5"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_kernel_ridge_regression(
    engine: Engine, net: str, kind: lifting.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifting, "LANDMARKS", 12)
    base = network(NETS[net])
    x, y = samples_for(base.spec, 40)
    result = fit_ridge(engine, base, x, y, lift=kind)
    alpha = np.linalg.solve(explicit(engine, base, result, x, x) + result.lam * np.eye(40), np.eye(base.spec.C)[y])
    new, _ = samples_for(base.spec, 25, seed=1)
    expected = float(result.temperature) * explicit(engine, base, result, new, x) @ alpha
    expected += result.gain * engine.forward(base.spec, base.tensors, new)
    close(predicted(engine, base, result, new), expected)
    assert len(result.adapter.tensors["lift.landmarks"]) == (40 if kind == "arccos" else 12)


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [12, 90])  # nystrom: dual, primal
@pytest.mark.parametrize("grouped", [False, True])
def test_left_out_scores_are_those_of_fitting_again(
    T: int, grouped: bool, kind: lifting.Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifting, "LANDMARKS", 10)
    engine, base = get_engine("reference"), samples.base(dnn(10, 3, 8))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(T, 10)).astype(np.float32), rng.integers(0, 3, T).astype(np.int32)
    x[3] *= 50  # is clipped
    groups = rng.choice(4, T, p=[0.4, 0.3, 0.2, 0.1]) if grouped else None
    result = fit_ridge(engine, base, x, y, groups=groups, lift=kind)
    assert result.space == ("primal" if kind == "nystrom" and T == 90 else "dual")
    X = taps_of(engine, base, x) * np.repeat(np.sqrt(result.weights), base.spec.tap_widths)
    c = np.minimum(1, result.choice.limit / np.linalg.norm(X, axis=1))[:, None]
    assert (c < 1).sum() == 1
    K, Y = explicit(engine, base, result, x, x), c * np.eye(3)[y]
    frozen = engine.forward(base.spec, base.tensors, x)

    def left_out(rows: np.ndarray) -> np.ndarray:
        kept = np.setdiff1d(np.arange(T), rows)
        G = c[kept] * K[np.ix_(kept, kept)] * c[kept].T + result.lam * np.eye(len(kept))
        scores = c[rows] * K[np.ix_(rows, kept)] @ (c[kept] * np.linalg.solve(G, Y[kept]))
        return np.asarray(float(result.temperature) * scores + result.gain * frozen[rows])

    close(result.loo_scores, np.concatenate([left_out(result.rows[[i]]) for i in range(T)]))
    blocked = np.empty((T, 3))
    for block in result.blocks:
        blocked[block] = left_out(result.rows[block])
    close(result.block_scores, blocked)


@pytest.mark.usefixtures("taken")
def test_centring_does_not_leak() -> None:
    """Left-out scores hold the centre and the directions fixed. Finding them again without the sample changes little,
    and nothing is learnt from labels that mean nothing."""
    engine, base = get_engine("reference"), samples.base(dnn(40, 2, 30))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 40)).astype(np.float32) + 3
    y = rng.permutation(np.arange(60) % 2).astype(np.int32)
    for kind in KINDS:
        result = fit_ridge(engine, base, x, y, lift=kind)
        # 60 coin tosses: two standard errors are 0.13
        assert abs(result.loo_score - 0.5) < 0.2
        assert not result.decide(np.eye(2, dtype=np.float32)[result.labels]).accepted


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dual_and_primal_agree(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, base = get_engine("reference"), network(NETS["dnn"])
    monkeypatch.setattr(closed, "precision", lambda error, lam: dtype)
    monkeypatch.setattr("instantft.solvers.records.CHUNK", 17)
    x, y = samples_for(base.spec, 60)
    x[3] *= 20
    records = Records(engine, base, x, np.arange(60), None)
    choice = Choice(0.05, (1.0, 0.3, 0.1), 0.05, 60.0)
    judge = closed.judged(60, None, 60, 0)
    found = lifting.find(records, choice, "nystrom", 0)
    a = closed.dual(records, np.eye(3)[y], choice, judge, lifting=found)
    b = closed.primal(records, np.eye(3)[y], choice, judge, lifting=found)
    tolerance = 1e-5 if dtype is np.float64 else 1e-3
    close(a.bias, b.bias, tolerance)
    close(a.alone, b.alone, tolerance)
    close(a.blocked, b.blocked, tolerance)
    assert a.lift is not None
    assert b.lift is not None
    u = found.project(records.taps(slice(0, 60)))
    k = lifting._kernel(u, a.lift.landmarks)
    close(k @ a.lift.coefficients, k @ b.lift.coefficients, tolerance)


@pytest.mark.usefixtures("taken")
def test_as_many_landmarks_as_samples_are_the_whole_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lifting.DIRECTIONS, "nystrom", lifting.DIRECTIONS["arccos"])
    engine, base = get_engine("reference"), network(NETS["dnn"])
    x, y = samples_for(base.spec, 80)
    new, _ = samples_for(base.spec, 25, seed=1)
    a, b = (fit_ridge(engine, base, x, y, lift=kind) for kind in KINDS)
    close(predicted(engine, base, a, new), predicted(engine, base, b, new), 1e-2)  # λ differs by as much as the nugget


def test_directions_are_the_leading_ones() -> None:
    rng = np.random.default_rng(0)
    A = rng.normal(size=(300, 60)) * 0.8 ** np.arange(60)
    vectors, values = lifting._leading(A @ A.T, 10, 0)
    close(vectors.T @ vectors, np.eye(10), 1e-9)
    exact = np.linalg.eigvalsh(A @ A.T)[::-1]
    assert (values > 0.95 * exact[:10]).all()  # two rounds; the tail of the spectrum is what they do not resolve
    assert values.sum() > 0.99 * exact[:10].sum()
    nothing, infinite = lifting._leading(np.zeros((5, 5)), 3, 0)
    assert not (nothing / np.sqrt(infinite)).any()
    few, _ = lifting._leading(np.outer(A[:, 0], A[:, 0]), 10, 0)
    assert few.shape[1] == 1


def test_the_basis_is_orthonormal_and_the_centre_is_at_zero() -> None:
    engine, base = get_engine("reference"), network(NETS["dnn"])
    x, _ = samples_for(base.spec, 300)
    x[3] *= 50
    records = Records(engine, base, x, np.arange(300), None)
    choice = Choice(0.1, (1.0, 0.3, 0.0), 0.1, 30.0)
    found = lifting.find(records, choice, "arccos", 0)
    widths = np.repeat(np.sqrt(choice.weights), base.spec.tap_widths) * choice.scale
    used = widths > 0
    Q = found.basis[used] / widths[used][:, None]
    close(Q.T @ Q, np.eye(Q.shape[1]), 1e-4)
    assert not found.basis[~used].any()
    X = taps_of(engine, base, x) * np.repeat(np.sqrt(choice.weights), base.spec.tap_widths)
    c = np.minimum(1, choice.limit / np.linalg.norm(X, axis=1))
    assert (c < 1).sum() == 1
    u = found.project(records.taps(slice(0, 300)))
    assert np.abs(c @ u / c.sum()).max() < 1e-6
    centred = X * choice.scale - c @ X * choice.scale / c.sum()
    close(u, centred[:, used] @ Q, 1e-4)
    kept = (c[:, None] * u).var(axis=0).sum()
    best = np.linalg.svd(c[:, None] * centred, compute_uv=False)[: Q.shape[1]]
    assert kept > 0.98 * (best**2).sum() / 300


@pytest.mark.parametrize("kind", KINDS)
def test_learns_what_no_linear_map_can(kind: lifting.Kind) -> None:
    engine, base = get_engine(), samples.base()
    x, y = samples.shells()
    new, labels = samples.shells(500, seed=1)
    result = fit_ridge(engine, base, x, y, lift=kind, taps=(0,))
    linear = fit_ridge(engine, base, x, y, taps=(0,))
    assert (predicted(engine, base, linear, new).argmax(axis=1) == labels).mean() < 0.65
    assert (predicted(engine, base, result, new).argmax(axis=1) == labels).mean() > 0.95
    assert result.loo_score > 0.95


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_adapter_with_and_without_a_store(kind: lifting.Kind) -> None:
    engine, base = get_engine(), network(NETS["dnn"])
    x, y = samples_for(base.spec, 300)
    store = memory_store("fp32", base.spec.record, 300)
    a = fit_ridge(engine, base, x, y, seed=3, lift=kind).adapter.tensors
    for b in (
        fit_ridge(engine, base, x, y, seed=3, lift=kind, threads=2).adapter.tensors,
        fit_ridge(engine, base, x, y, seed=3, lift=kind, store=store).adapter.tensors,
    ):
        assert all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lift_that_does_not_help_is_left_out(kind: lifting.Kind) -> None:
    engine, base = get_engine("reference"), samples.base(dnn(40, 3, 30))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 40)).astype(np.float32)
    y = (x @ rng.normal(size=(40, 3))).argmax(axis=1).astype(np.int32)
    result, linear = (fit_ridge(engine, base, x, y, lift=k, taps=(0,)) for k in (kind, None))
    assert result.lift is None
    assert result.adapter.config["lift"] is None
    assert result.adapter.tensors.keys() == linear.adapter.tensors.keys()
    for name, value in linear.adapter.tensors.items():
        close(result.adapter.tensors[name], value, 1e-4)  # arccos solves both in the dual


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize(("kind", "space"), [("arccos", "dual"), ("nystrom", "dual"), ("nystrom", "primal")])
def test_hard_data_gives_a_finite_adapter(
    hard: Callable[[], tuple[np.ndarray, np.ndarray]], kind: lifting.Kind, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, base = get_engine("reference"), samples.base()
    x, y = hard()
    if space == "primal":
        monkeypatch.setattr(closed, "dual", closed.primal)
    result = fit_ridge(engine, base, x, y, lift=kind)
    assert all(np.isfinite(t).all() for t in result.adapter.tensors.values())
    assert np.isfinite(result.loo_scores).all()
    assert np.isfinite(result.block_scores).all()
    assert np.isfinite(predicted(engine, base, result, x)).all()
    assert np.isfinite(predicted(engine, base, result, 1e6 * x)).all()


@pytest.mark.usefixtures("taken")
def test_many_samples_in_bounded_memory() -> None:
    """10⁵ records would take 83 MB; the kernel values of 1,024 at a time take 2."""
    engine, base = get_engine(), network(dnn(256, 3))
    rng = np.random.default_rng(0)
    T = 100_000
    y = rng.integers(0, 3, T).astype(np.int32)
    x = rng.standard_normal((T, 256), np.float32)
    x[np.arange(T), y] += 3
    tracemalloc.start()
    result = fit_ridge(engine, base, x, y, lift="nystrom")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.space == "primal"
    assert peak < 70e6
    assert result.loo_score > 0.9


# -- prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("taken")
def test_prediction_is_the_same_in_parts_and_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, base = get_engine(), network(NETS["dnn"])
    x, y = samples_for(base.spec, 400)
    result = fit_ridge(engine, base, x, y, lift="arccos")
    new, _ = samples_for(base.spec, 4000, seed=1)
    seen: list[float] = []
    whole = forward(engine, base.spec, tensors(base, result), new, 1, seen.append)
    assert seen[-1] == 4000
    monkeypatch.setattr(lift, "BLOCK", 10_000)
    tracemalloc.start()
    close(forward(engine, base.spec, tensors(base, result), new), whole, 1e-5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6  # the records of a part are 0.5 MB, all kernel values would be 6.4 MB


@pytest.mark.usefixtures("taken")
def test_engines_agree_and_refuse_to_leave_the_lift_out(engine: Engine) -> None:
    base = network(NETS["odd"])
    x, y = samples_for(base.spec, 30)
    result = fit_ridge(get_engine("reference"), base, x, y, lift="arccos")
    close(predicted(engine, base, result, x), predicted(get_engine("reference"), base, result, x))
    with pytest.raises(UsageError, match=r"with a lift must be run by instantft\.engine\.forward"):
        engine.forward(base.spec, tensors(base, result), x)


# -- files and cost --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_loads(tmp_path: Path, kind: lifting.Kind) -> None:
    base = samples.base()
    result = fit_ridge(get_engine(), base, *samples.blobs(30), lift=kind)
    result.adapter.save(tmp_path / "a")
    loaded = Adapter.load(tmp_path / "a", base)
    assert loaded.tensors.keys() == result.adapter.tensors.keys()
    for name, value in result.adapter.tensors.items():
        assert np.array_equal(value, loaded.tensors[name])
    assert loaded.config["lift"] == kind
    assert loaded.parameters == loaded.tensors["lift.coefficients"].size + parameters(METHODS[METHOD], base.spec, 3)
    with pytest.raises(MismatchError, match="must be used on the network it was made on"):
        Adapter.load(tmp_path / "a", samples.base(seed=1))


@pytest.mark.usefixtures("taken")
def test_widened_by_a_class_that_it_ignores() -> None:
    engine = get_engine("reference")
    base = samples.base()
    x, y = samples.blobs(30)
    adapter = fit_ridge(engine, base, x, y, lift="arccos").adapter
    wider = base.widened()
    logits = forward(engine, wider.spec, {**wider.tensors, **adapter.widened(wider).tensors}, x)
    close(logits[:, :3], forward(engine, base.spec, {**base.tensors, **adapter.tensors}, x), 1e-5)
    assert (logits.argmax(axis=1) < 3).all()


@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("x 30", "must give directions and landmarks of its lift"),
        ("8", "must give directions and landmarks of its lift"),
        ("8 9999999", "must give directions and landmarks of its lift"),
        ("8 0", "1 to 4096 landmarks, not 0"),
        ("8 99999", "1 to 4096 landmarks, not 99999"),
        ("1025 30", "1 to 1024 directions, not 1025"),
        ("1024 4096", "must"),
    ],
)
def test_a_file_that_lies_about_its_lift_is_refused(tmp_path: Path, size: str, words: str) -> None:
    base = samples.base()
    result = fit_ridge(get_engine(), base, *samples.blobs(30), lift="arccos")
    result.adapter.save(tmp_path / "a")
    file = tmp_path / "a" / TENSOR_FILE
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header["__metadata__"]["lift"].endswith(" 30")
    header["__metadata__"]["lift"] = size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    tracemalloc.start()
    with pytest.raises(FileError, match=words):
        Adapter.load(tmp_path / "a", base)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6
    assert (tmp_path / "a" / CONFIG_FILE).is_file()


@pytest.mark.usefixtures("taken")
def test_wrong_tensors_are_refused() -> None:
    base = samples.base()
    good = dict(fit_ridge(get_engine(), base, *samples.blobs(30), lift="arccos").adapter.tensors)
    for name, value, words in (
        ("lift.basis", None, "must hold lift.basis"),
        ("lift.landmarks", None, "must hold lift.landmarks"),
        ("lift.offset", None, "must hold lift.offset"),
        ("lift.other", good["lift.offset"], "must hold no 'lift.other'"),
        ("lift.offset", good["lift.offset"][1:], "lift.offset must be float32"),
        ("lift.coefficients", good["lift.coefficients"][1:], "lift.coefficients must be float32"),
        ("lift.landmarks", np.full_like(good["lift.landmarks"], np.nan), "lift.landmarks must hold finite values"),
    ):
        bad = {k: v for k, v in good.items() if k != name} | ({} if value is None else {name: value})
        with pytest.raises(UsageError, match=words):
            Adapter(METHOD, 3, base.spec, base.hash, bad)
    linear = dict(samples.adapter(base, "lora-last").tensors) | {k: v for k, v in good.items() if k[:5] == "lift."}
    with pytest.raises(UsageError, match="adapters that all lead to the output, not with lora-last"):
        Adapter("lora-last", 2, base.spec, base.hash, linear)


@pytest.mark.usefixtures("taken")
def test_cost() -> None:
    c = lift.cost(lenet5((1, 28, 28)), 64, 256)
    assert c.macs == 2564 * 64 + 256 * 64 + 256 * 10
    assert (c.directions, c.landmarks) == (64, 256)
    assert lifting.size("nystrom", 1024) == (64, 256)
    assert lifting.size("nystrom", 100) == (50, 100)
    assert lifting.size("arccos", 1024) == (128, 1024)
    assert lifting.size("arccos", 1) == (1, 1)
    base = samples.base()
    adapter = fit_ridge(get_engine(), base, *samples.blobs(30), lift="arccos").adapter
    assert adapter.lift_cost is not None
    assert adapter.lift_cost.bytes == sum(t.nbytes for name, t in adapter.tensors.items() if name[:5] == "lift.")
    assert samples.adapter(base).lift_cost is None


# -- wrong use -------------------------------------------------------------------------------------------------------


def test_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, base = get_engine("reference"), samples.base()
    x, y = samples.blobs(10)
    with pytest.raises(UsageError, match="a lift must be one of arccos, nystrom, not 'rbf'"):
        fit_ridge(engine, base, x, y, lift="rbf")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a lift must go with full rank, 3 or more, not 2"):
        fit_ridge(engine, base, x, y, lift="arccos", rank=2)
    with pytest.raises(DataError, match="records must be finite and small enough to be squared"):
        fit_ridge(engine, base, x * np.float32(1e25), y, lift="arccos")
    monkeypatch.setattr(lift, "MAX_LANDMARKS", 9)
    with pytest.raises(UsageError, match="lift arccos must have at most 9 samples, not 10: use nystrom"):
        fit_ridge(engine, base, x, y, lift="arccos")

"""FineTuner beyond one label: numbers, labels, weights, smoothing, embeddings; and the same on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import instantft as ift
from instantft import cli
from instantft.adapters import CONFIG_FILE, Adapter
from instantft.errors import DataError, MismatchError, UsageError
from instantft.solvers.ridge import RidgeResult
from instantft.solvers.streaming import TOLERANCE
from instantft.tuner import FineTuner, load

from . import samples

X, Y = samples.blobs(120)
BASE = samples.base()
NUMBERS = (X[:, :3] * [1, 5, 20] + [0, 3, -100]).astype(np.float32)
LABELS = (X[:, :3] > [0, 1, 2]).astype(np.int64)
TARGETS: dict[str, Any] = {"classification": Y, "regression": NUMBERS, "multi-label": LABELS}


@pytest.mark.parametrize("task", TARGETS)
def test_fit_score_predict(task: str) -> None:
    t = FineTuner(BASE, task=task)  # type: ignore[arg-type]
    t.fit(X[:90], TARGETS[task][:90])
    assert t.score(X[90:], TARGETS[task][90:]) > 0.85
    said = t.predict(X[90:])
    assert said.shape == TARGETS[task][90:].shape
    assert said.dtype == (np.float32 if task == "regression" else np.int64)
    assert t.adapter.task == task
    decision = t.judge()
    assert decision.accepted
    assert decision.after == pytest.approx(t.score(X[90:], TARGETS[task][90:]), abs=0.15)


def test_embeddings_in_two_lines() -> None:
    tuner = ift.FineTuner(ift.embeddings(6, 3)).fit(X[:90], Y[:90])
    assert tuner.score(X[90:], Y[90:]) > 0.9
    one = ift.FineTuner(ift.embeddings(6, 1), task="regression").fit(X[:90], NUMBERS[:90, 0])
    assert one.predict(X[90:]).shape == (30,)
    with pytest.raises(UsageError, match="probabilities must be of classes or labels"):
        one.predict_proba(X)


def test_probabilities_of_labels_are_each_labels_own() -> None:
    t = FineTuner(BASE, task="multi-label").fit(X, LABELS)
    p = t.predict_proba(X)
    assert p == pytest.approx(1 / (1 + np.exp(-t.decision_function(X).astype(np.float64))), abs=1e-6)
    assert ((p > 0.5) == (t.predict(X) == 1)).all()


def test_weights_of_a_class_are_weights_of_its_samples() -> None:
    by_class = FineTuner(BASE, class_weight={1: 4.0}).fit(X, Y)
    by_sample = FineTuner(BASE).fit(X, Y, np.where(Y == 1, 4.0, 1.0))
    same = FineTuner(BASE).fit(X, Y, np.full(len(Y), 7.0))
    none = FineTuner(BASE).fit(X, Y)
    assert np.array_equal(by_class.decision_function(X), by_sample.decision_function(X))
    assert same.decision_function(X) == pytest.approx(none.decision_function(X), abs=1e-3)
    assert np.abs(by_class.decision_function(X) - none.decision_function(X)).max() > 0.01


def test_noisy_samples_that_count_less() -> None:
    rng = np.random.default_rng(0)
    x, y = samples.blobs(300, seed=3)
    x += rng.normal(size=x.shape).astype(np.float32)
    noisy = rng.random(300) < 0.6
    wrong = np.where(noisy, (y + 1) % 3, y).astype(np.int32)
    new, labels = samples.blobs(300, seed=4)
    base = ift.embeddings(6, 3)
    trusting = FineTuner(base).fit(x, wrong).score(new, labels)
    assert FineTuner(base).fit(x, wrong, np.where(noisy, 0.05, 1.0)).score(new, labels) > trusting + 0.3


def test_the_gate_counts_as_samples_count() -> None:
    """The estimate is of weighted accuracy: of samples of one class alone where the others count next to nothing."""
    t = FineTuner(BASE, class_weight={0: 1.0, 1: 0.001, 2: 0.001}).fit(X, Y)
    left = t.left_out()
    first = Y[left.judge.rows] == 0
    right = left.logits[first].argmax(axis=1) == 0
    assert t.judge().after == pytest.approx(right.mean(), abs=0.01)


@pytest.mark.parametrize("task", ["regression", "multi-label"])
@pytest.mark.parametrize("weighted", [False, True])
def test_streams_end_where_a_fit_does(task: str, weighted: bool) -> None:
    """At the last choice, made for all samples, the two are the same but for rounding."""
    w = np.random.default_rng(0).uniform(0.5, 2, 96) if weighted else None
    y = TARGETS[task]
    stream = FineTuner(BASE, task=task, support=96)  # type: ignore[arg-type]
    for a, b in ((0, 12), (12, 24), (24, 48), (48, 96)):
        stream.partial_fit(X[a:b], y[a:b], None if w is None else w[a:b])
    fitted = FineTuner(BASE, task=task).fit(X[:96], y[:96], w)  # type: ignore[arg-type]
    told, wanted = stream.decision_function(X), fitted.decision_function(X)
    assert np.abs(told - wanted).max() <= 10 * TOLERANCE * np.abs(wanted).max()
    assert stream.judge().accepted


def test_between_choices_a_stream_goes_on_in_the_same_terms() -> None:
    """λ, scale, centre and spread are those of the last choice; the rest is exact."""
    w = np.random.default_rng(0).uniform(0.5, 2, 90)
    stream = FineTuner(ift.embeddings(6, 3), task="regression", support=200)
    stream.partial_fit(X[:60], NUMBERS[:60], w[:60]).partial_fit(X[60:90], NUMBERS[60:90], w[60:90])
    result = stream.result_
    assert isinstance(result, RidgeResult)
    goal, choice = result.goal, result.choice
    Z = np.concatenate([choice.scale * X[:90], np.ones((90, 1))], axis=1).astype(np.float64)
    c = np.minimum(1, choice.limit * choice.scale / np.linalg.norm(Z[:, :-1], axis=1))
    v = c * c * w / w[:60].mean()
    W = np.linalg.solve(
        (Z.T * v) @ Z + choice.lam * np.eye(7), (Z.T * v) @ ((NUMBERS[:90] - goal.centre) / goal.spread)
    )
    new = np.concatenate([choice.scale * X[90:], np.ones((30, 1))], axis=1)
    expected = result.calibration(new @ W)
    assert np.abs(stream.decision_function(X[90:]) - expected).max() <= 10 * TOLERANCE * np.abs(expected).max()


def test_a_new_head_for_other_targets(tmp_path: Path) -> None:
    net = BASE.with_outputs(2)
    assert (net.spec.C, net.spec.tap_widths) == (2, BASE.spec.tap_widths)
    assert np.array_equal(net.tensors["layers.0.weight"], BASE.tensors["layers.0.weight"])
    t = FineTuner(net, task="regression").fit(X, NUMBERS[:, :2])
    t.adapter.save(tmp_path / "adapter")
    BASE.save(tmp_path / "base.safetensors")
    adapter = Adapter.load(tmp_path / "adapter")
    again = load(tmp_path / "base.safetensors", adapter=adapter)
    assert again.hash == net.hash
    used = FineTuner(again, task="regression").use(adapter)
    assert np.array_equal(used.predict(X), t.predict(X))
    with pytest.raises(UsageError, match="its own task, regression, not for classification"):
        FineTuner(again).use(adapter)
    samples.base(seed=5).save(tmp_path / "other.safetensors")
    with pytest.raises(MismatchError):
        adapter.check_base(load(tmp_path / "other.safetensors", adapter=adapter))


def test_scikit_learn_knows_what_it_is() -> None:
    sklearn = pytest.importorskip("sklearn")
    from sklearn.base import clone, is_classifier, is_regressor
    from sklearn.model_selection import cross_val_score

    assert sklearn
    numbers = FineTuner(ift.embeddings(6, 1), task="regression")
    assert is_regressor(numbers)
    assert not is_classifier(numbers)
    assert is_classifier(FineTuner(BASE, task="multi-label"))
    assert cross_val_score(numbers, X, NUMBERS[:, 0], cv=3).min() > 0.9
    assert clone(FineTuner(BASE, class_weight="balanced")).class_weight == "balanced"


@pytest.mark.parametrize(
    ("task", "y", "words"),
    [
        ("regression", NUMBERS[:, :2], r"y must be \(120, 3\) numbers, one a sample and output, not \[120, 2\]"),
        ("regression", NUMBERS[:, 0], r"y must be \(120, 3\) numbers.*Network.with_outputs and --outputs"),
        ("regression", np.where(NUMBERS > 60, np.nan, NUMBERS), "y must be finite in float32, but sample"),
        ("regression", NUMBERS.astype(str), "y must be numbers, not <U"),
        ("regression", NUMBERS[:5], r"y must be \(120, 3\) numbers"),
        ("multi-label", LABELS + 1, "y must be zeros and ones, but the labels of sample 0 hold others"),
        ("multi-label", Y, r"y must be \(120, 3\) zeros and ones"),
        ("classification", LABELS, r"y must be \(120,\), one label a sample"),
    ],
)
def test_targets_that_cannot_be_used(task: Any, y: Any, words: str) -> None:
    if words.startswith("y must be finite"):
        y = y.copy()
        y[7, 1] = np.inf
    with pytest.raises(DataError, match=words):
        FineTuner(BASE, task=task).fit(X, y)


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="task must be one of classification"):
        FineTuner(BASE, task="ranking")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="class_weight must go with classification"):
        FineTuner(BASE, task="regression", class_weight="balanced")
    with pytest.raises(UsageError, match="a class can be added to classification, not to multi-label"):
        FineTuner(BASE, task="multi-label").add_class()
    with pytest.raises(UsageError, match="a class can be added where class_weight is balanced or none"):
        FineTuner(BASE, class_weight=[1, 2, 3]).add_class()
    with pytest.raises(DataError, match=r"sample weights must be \(120,\)"):
        FineTuner(BASE).fit(X, Y, np.ones(3))


def test_a_class_comes_to_weighted_ones() -> None:
    t = FineTuner(BASE, class_weight="balanced").partial_fit(X[:60], Y[:60])
    t.add_class().partial_fit(X[60:63], [3, 3, 3])
    assert t.predict(X).max() <= 3


def test_constant_targets_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="every sample has 4 as target 0"):
        t = FineTuner(ift.embeddings(6, 1), task="regression").fit(X, np.full(120, 4.0))
    assert t.predict(X) == pytest.approx(np.full(120, 4.0), abs=1e-3)
    assert not t.judge().accepted


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    status = cli.run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, (json.loads(out) if status == 0 and "--json" in arguments else out), err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    BASE.save("base.safetensors")
    for task, y in TARGETS.items():
        np.savez(f"{task}.npz", x=X, y=y, w=np.linspace(1, 2, len(X)))
    np.savez("one.npz", x=X, y=NUMBERS[:, 1])
    return tmp_path


@pytest.mark.parametrize("task", TARGETS)
def test_command_line(task: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", f"{task}.npz")
    status, made, _ = run(
        capsys, "finetune", "base.safetensors", *data, "--eval", f"{task}.npz", "--task", task,
        "--sample-weights", "w", "--out", "a", "--json",
    )  # fmt: skip
    assert status == 0
    assert (made["task"], made["accepted"]) == (task, True)
    assert made["metric"] == {"classification": "accuracy", "regression": "r2", "multi-label": "label_accuracy"}[task]
    assert made["score_after"] > max(0.85, made["score_before"])
    assert (made["accuracy_after"] is None) == (task != "classification")
    status, found, _ = run(capsys, "evaluate", "base.safetensors", "--adapter", "a", *data, "--json")
    assert found[made["metric"]] == pytest.approx(made["score_after"])
    assert found["task"] == task
    status, said, _ = run(capsys, "predict", "base.safetensors", "--adapter", "a", *data, "--out", "y.npz", "--json")
    assert said["keys"] == (["value"] if task == "regression" else ["logits", "probabilities", "label"])
    with np.load("y.npz") as y:
        assert y[said["keys"][-1]].shape == TARGETS[task].shape
    arguments = ("--task", task, "--out", "b", "--eval", f"{task}.npz")
    status, text, _ = run(capsys, "finetune", "base.safetensors", *data, *arguments)
    name = {"classification": "accuracy", "regression": "R²      ", "multi-label": "labels  "}[task]
    assert f"\n{name} " in text
    assert "better than the frozen network" in text
    status, text, _ = run(capsys, "evaluate", "base.safetensors", "--adapter", "a", *data)
    assert {"classification": "macro F1", "regression": "RMSE", "multi-label": "samples wholly right"}[task] in text


def test_a_new_head_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("finetune", "base.safetensors", "--data", "one.npz", "--task", "regression", "--out", "a")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert "--outputs" in err
    status, made, _ = run(capsys, *arguments, "--outputs", 1, "--json")
    assert status == 0
    assert made["accepted"]
    status, found, _ = run(capsys, "evaluate", "base.safetensors", "--adapter", "a", "--data", "one.npz", "--json")
    assert found["r2"] > 0.9
    assert found["rmse"] < 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "ranking"), "task must be one of classification, regression, multi-label, not 'ranking'"),
        (("--class-weights", "1,2"), "class_weight must be 'balanced' or 3 numbers above 0"),
        (("--class-weights", "much"), "--class-weights must be numbers with commas between them, not 'much'"),
        (("--sample-weights", "v"), "lacks v"),
        (("--sample-weights", "x"), "sample weights must be (120,) numbers"),
        (("--label-smoothing", "0.9"), "label_smoothing must be 0 to 0.5, not 0.9"),
        (("--outputs", "0"), "outputs must be 1 to"),
        (("--task", "multi-label"), "y must be (120, 3) zeros and ones"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", "classification.npz", "--out", "a")
    status, _, err = run(capsys, "finetune", "base.safetensors", *data, *arguments)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not Path("a").exists()


def test_tasks_do_not_mix(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "finetune", "base.safetensors", "--data", "regression.npz", "--task", "regression", "--out", "a")
    data = ("--data", "classification.npz")
    status, _, err = run(capsys, "evaluate", "base.safetensors", "--adapter", "a", *data, "--task", "classification")
    assert status == 2
    assert "--task must be that of the adapter, regression, not classification" in err
    status, _, err = run(capsys, "finetune", "base.safetensors", *data, "--out", "a")
    assert status == 0
    assert "is not compared with the new one, because it was made for regression" in err
    config = json.loads(Path("a", CONFIG_FILE).read_text())
    config["training"]["task"] = ["x"]
    Path("a", CONFIG_FILE).write_text(json.dumps(config))
    status, _, err = run(capsys, "evaluate", "base.safetensors", "--adapter", "a", *data)
    assert status == 2
    assert "an adapter's config must name its task" in err

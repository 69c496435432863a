"""Losses by targets and weights: every engine against the reference, steps in the dual against the primal, torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import instantft as ift
from instantft.adapters import Adapter
from instantft.engine import Engine
from instantft.engine.reference import ReferenceEngine, _forward, gradients
from instantft.errors import UsageError
from instantft.methods import METHODS, connections
from instantft.solvers import sgd
from instantft.tasks import TASKS, Targets, Task, loss_and_gradient, targets
from instantft.tuner import FineTuner

from . import samples
from .nets import NETS, samples_for, tensors_for
from .test_engines import STEPS, orders

REFERENCE = ReferenceEngine()
CASES = list(itertools.product(TASKS, (False, True)))


def goal_for(task: Task, C: int, T: int, weighted: bool) -> Targets:
    rng = np.random.default_rng(5)
    y = {
        "classification": rng.integers(0, C, T).astype(np.int32),
        "regression": (3 * rng.normal(size=(T, C)) + 1).astype(np.float32),
        "multi-label": rng.integers(0, 2, (T, C)).astype(np.float32),
    }[task]
    smoothing = 0.0 if task == "regression" else 0.1
    return targets(y, C, task, sample_weight=rng.uniform(0.2, 3, T) if weighted else None, smoothing=smoothing)


@pytest.mark.parametrize(("task", "weighted"), CASES)
@pytest.mark.parametrize(
    ("net", "method"), [("dnn", "skip-lora"), ("lenet5", "skip-lora"), ("odd", "ft-all"), ("dnn", "lora-all")]
)
def test_engines_agree(engine: Engine, net: str, method: str, task: Task, weighted: bool) -> None:
    """Fourteen samples in batches of five: a whole and an unfinished vector of each width."""
    spec, m, T = NETS[net], METHODS[method], 14
    tensors = tensors_for(spec, m, 4)
    x, _ = samples_for(spec, T)
    goal = goal_for(task, spec.C, T, weighted)
    found = []
    for who in (engine, REFERENCE):
        trainer = who.trainer(
            spec, tensors, m, 4, x, goal, numbers=np.arange(T), store=None, batch_size=5, lr=0.01, momentum=0.5
        )
        found.append((trainer.epochs(orders(2, T)), trainer.tensors()))
    (stats, got), (expected_stats, expected) = found
    for name, value in expected.items():
        if ".bn." in name or (name.endswith("bias") and m.norms == "train"):
            continue  # test_engines says why
        change = np.abs(value - tensors[name]).max()
        tolerance = STEPS if m.norms != "train" else 4e-3
        assert np.abs(got[name] - value).max() <= tolerance * change + 2.0**-21 * np.abs(value).max(), name
    np.testing.assert_allclose(stats.loss, expected_stats.loss, rtol=1e-5)
    assert stats.correct.tolist() == expected_stats.correct.tolist()
    assert stats.correct.sum() == 0 or task != "regression"


@pytest.mark.parametrize(("task", "weighted"), CASES)
@pytest.mark.parametrize("method", ["ft-all", "skip-lora"])
def test_gradients_through_the_network_are_those_of_differences(method: str, task: Task, weighted: bool) -> None:
    spec, m = NETS["dnn"], METHODS[method]
    rng = np.random.default_rng(0)
    tensors = {k: v.astype(np.float64) for k, v in tensors_for(spec, m, 4).items()}
    x = samples_for(spec, 6)[0].astype(np.float64)
    goal = goal_for(task, spec.C, 6, weighted)
    for name, g in gradients(spec, tensors, m, x, goal).items():
        if name.endswith("bias") and ".bn." not in name and m.norms == "train" and not name.startswith("layers.2"):
            continue  # zero: batch norm takes it out
        direction = rng.normal(size=g.shape)
        losses = []
        for h in (1e-5, -1e-5):
            moved = {**tensors, name: tensors[name] + h * direction}
            z = _forward(spec, moved, connections(m, spec.L), x, m.norms == "train").y
            losses.append(loss_and_gradient(goal, z)[0].mean())
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope - (g * direction).sum()) <= 1e-5 * max(abs(slope), 1e-2), name


@pytest.mark.parametrize(("task", "weighted"), CASES)
def test_the_dual_makes_the_same_steps(task: Task, weighted: bool) -> None:
    base = ift.embeddings(50, 3)
    x = np.random.default_rng(0).normal(size=(20, 50)).astype(np.float32)
    goal = goal_for(task, 3, 20, weighted)
    made = [
        sgd.fit(REFERENCE, base, "skip2-lora", x, goal, epochs=3, batch_size=6, lr=0.02, momentum=0.5, space=space)
        for space in ("primal", "dual")
    ]
    for name, value in made[0].adapter.tensors.items():
        assert made[1].adapter.tensors[name] == pytest.approx(value, abs=1e-5 * float(np.abs(value).max())), name
    assert made[0].stats.loss == pytest.approx(made[1].stats.loss, rel=1e-5)


def test_losses_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'instantft[torch]'")
    f = torch.nn.functional
    rng = np.random.default_rng(0)
    z = rng.normal(size=(9, 4))
    wide = torch.tensor(z, requires_grad=True)
    for task in TASKS:
        goal = goal_for(task, 4, 9, True)
        assert goal.weights is not None
        w = torch.tensor(goal.weights)
        if task == "classification":
            each = f.cross_entropy(wide, torch.tensor(goal.y).long(), reduction="none", label_smoothing=0.1)
        elif task == "multi-label":
            soft = torch.tensor(0.9 * goal.y + 0.05)
            each = f.binary_cross_entropy_with_logits(wide, soft, reduction="none").mean(dim=1)
        else:
            each = f.mse_loss(wide, torch.tensor(goal.Y), reduction="none").mean(dim=1)
        (expected,) = torch.autograd.grad((w * each).sum(), wide)
        losses, g = loss_and_gradient(goal, z)
        assert losses == pytest.approx((w * each).detach().numpy(), rel=1e-6)
        assert g == pytest.approx(expected.numpy(), abs=1e-6)


X, Y = samples.blobs(120)
NUMBERS = (X[:, :3] * [1, 5, 20] + [0, 3, -100]).astype(np.float32)
LABELS = (X[:, :3] > [0, 1, 2]).astype(np.int64)
BASE = samples.base()


@pytest.mark.parametrize("method", ["skip2-lora", "skip-lora", "lora-last"])
@pytest.mark.parametrize(("task", "y"), [("regression", NUMBERS), ("multi-label", LABELS)])
def test_tuner_by_steps(method: str, task: Task, y: np.ndarray) -> None:
    t = FineTuner(BASE.with_outputs(3), task=task, method=method, epochs=60).fit(X[:90], y[:90])
    if method != "lora-last":  # which sees the last layer of an untrained network only
        assert t.score(X[90:], y[90:]) > 0.85
        assert t.judge().accepted
    assert t.history_["loss"][-1] < t.history_["loss"][0]
    assert len(t.history_["accuracy"]) == (0 if task == "regression" else 60)
    assert t.adapter.task == task


def test_auto_finds_the_epochs_of_numbers() -> None:
    t = FineTuner(BASE.with_outputs(3), task="regression", solver="sgd").fit(X, NUMBERS)
    assert t.method_.name == "skip2-lora"
    assert t.epochs_ > 1
    assert t.score(X, NUMBERS) > 0.8


def test_steps_in_regression_have_no_units() -> None:
    """Up to rounding, a target in grams is one in kilograms times 1,000, and 20 degrees more are 20 more."""
    small, large = (
        FineTuner(BASE.with_outputs(3), task="regression", method="skip2-lora").fit(X, y).predict(X)
        for y in (NUMBERS, 1000 * NUMBERS + 20)
    )
    assert (large - 20) / 1000 == pytest.approx(small, abs=1e-3 * float(np.abs(small).max()))


def test_partial_fit_of_numbers_goes_on() -> None:
    t = FineTuner(BASE.with_outputs(3), task="regression", method="skip2-lora")
    scores = []
    for _ in range(12):
        scores.append(t.partial_fit(X, NUMBERS, numbers=np.arange(120)).score(X, NUMBERS))
    assert scores[-1] > max(0.7, scores[0] + 0.1)


def test_weights_of_classes_by_steps() -> None:
    rng = np.random.default_rng(1)
    y = (rng.random(600) < 0.06).astype(np.int32)
    x = np.hstack([rng.normal(size=(600, 6)) + 0.6 * y[:, None], np.ones((600, 1))]).astype(np.float32)
    base = ift.embeddings(7, 2)
    plain, balanced = (
        FineTuner(base, method="skip2-lora", class_weight=w, epochs=50).fit(x, y).predict(x) for w in (None, "balanced")
    )
    assert (balanced[y == 1] == 1).mean() > (plain[y == 1] == 1).mean() + 0.3


@pytest.mark.parametrize("method", ["ft-all", "ft-bias", "ft-last", "lora-all"])
def test_methods_that_change_the_network_learn_classes_and_labels_only(method: str) -> None:
    t = FineTuner(BASE, task="multi-label", method=method, epochs=2).fit(X, LABELS)
    assert t.history_["loss"][-1] < t.history_["loss"][0]
    with pytest.raises(UsageError, match=f"regression must go with a method that leaves the network .*, not {method}"):
        FineTuner(BASE, task="regression", method=method, epochs=2).fit(X, NUMBERS)


def test_an_adapter_for_numbers_holds_its_bias() -> None:
    t = FineTuner(BASE, task="regression", method="skip2-lora", epochs=1).fit(X, NUMBERS)
    assert isinstance(t.adapter, Adapter)
    assert t.adapter.tensors["output.bias"][2] < -50

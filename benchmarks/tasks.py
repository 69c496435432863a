"""Tasks beyond one label, on Fashion-MNIST, beside a linear probe (scikit-learn) and PyTorch on all weights.

    python -m benchmarks.tasks --json build/tasks.json
    python -m benchmarks.tasks --quick            random images: does it work?

A LeNet-5 learns the ten classes of 10,000 upright training images (4 epochs). Then 1,024 test images teach, and 3,000
others test:

angle       images turned by −60 to 60 degrees; the angle is to be told, in degrees (regression, one output, new head)
attributes  images turned by 75 degrees; shoe (classes 5, 7, 9), top (0, 2, 4, 6), long sleeves (2, 4), for the legs (1)
            (multi-label, new head)
rare        turned by 75 degrees; classes 5 to 9 come 16 times as often as 0 to 4; tested on all classes alike
noisy       turned by 75 degrees; 60 % of the samples have a label drawn at random and are known as doubtful: weight 0.1

Probe: RidgeCV (13 λ) or LogisticRegression (C = 1, 1,000 iterations) on x^4, the last tap. PyTorch: all weights, Adam
1e-3, batches of 20, 20 epochs, the same weights in the loss. Nothing was tuned for these tasks, of ours or theirs.
Ours: `FineTuner` as it is, and Skip2-LoRA of 20 epochs. Seconds are of this process, processor time, one thread.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import announce, load, machine, save_json, scaled, table
from benchmarks.common import clock as timer
from instantft.backbones.builtin import Network
from instantft.data.drift import rotate
from instantft.engine import get_engine
from instantft.solvers import sgd
from instantft.solvers.metrics import measured
from instantft.spec import lenet5
from instantft.tasks import Task, targets
from instantft.tuner import FineTuner

T, TEST, EPOCHS = 1024, 3000, 20
DOUBT = 0.1
ATTRIBUTES = ((5, 7, 9), (0, 2, 4, 6), (2, 4), (1,))

Array = NDArray[Any]


class Problem:
    """Samples of a task: x, y, weights of those to learn from, and x, y to test on."""

    def __init__(self, task: Task, outputs: int, x: Array, y: Array, tx: Array, ty: Array) -> None:
        self.task, self.outputs, self.x, self.y, self.tx, self.ty = task, outputs, x, y, tx, ty
        self.class_weight: str | None = None
        self.sample_weight: Array | None = None

    def measures(self, outputs: Array) -> dict[str, float]:
        """Of logits or numbers for tx."""
        found = measured(targets(self.ty, self.outputs, self.task), outputs)
        names = {
            "classification": ("accuracy", "balanced_accuracy", "loss"),
            "regression": ("r2", "mae"),
            "multi-label": ("label_accuracy", "macro_f1", "loss"),
        }[self.task]
        return {name: float(found[name]) for name in names}

    def weights(self) -> Array:
        made = targets(
            self.y, self.outputs, self.task, sample_weight=self.sample_weight, class_weight=self.class_weight
        ).weights
        return np.ones(len(self.x)) if made is None else made


def problems(images: Array, labels: Array, seed: int) -> dict[str, Problem]:
    """The four tasks, and the last two once more without weights."""
    rng = np.random.default_rng([seed, 7])
    order = rng.permutation(len(images))
    new, held = order[:T], order[T : T + TEST]
    angles = rng.uniform(-60, 60, len(images)).astype(np.float32)
    turned = {i: rotate(images[i : i + 1], float(angles[i]))[0] for i in (*new, *held)}
    x, tx = (scaled(np.stack([turned[i] for i in rows])).reshape(len(rows), -1) for rows in (new, held))
    made = {"angle": Problem("regression", 1, x, angles[new, None], tx, angles[held, None])}
    all_turned = scaled(rotate(images, 75.0)).reshape(len(images), -1)
    yes = np.stack([np.isin(labels, some) for some in ATTRIBUTES], axis=1).astype(np.float32)
    x, tx, y, ty = all_turned[new], all_turned[held], labels[new], labels[held]
    made["attributes"] = Problem("multi-label", len(ATTRIBUTES), x, yes[new], tx, yes[held])
    share = np.where(labels < 5, 1.0, 16.0)
    share[held] = 0
    few = rng.choice(len(images), T, replace=False, p=share / share.sum())
    for name, weight in (("rare", None), ("rare, weighted", "balanced")):
        made[name] = Problem("classification", 10, all_turned[few], labels[few], tx, ty)
        made[name].class_weight = weight
    doubtful = rng.random(T) < 0.6
    wrong = np.where(doubtful, rng.integers(0, 10, T), y).astype(np.int32)
    for name, weights in (("noisy", None), ("noisy, weighted", np.where(doubtful, DOUBT, 1.0))):
        made[name] = Problem("classification", 10, x, wrong, tx, ty)
        made[name].sample_weight = weights
    return made


def ours(base: Network, p: Problem, seed: int, **settings: Any) -> Array:
    """Outputs for the test samples."""
    net = base if p.task == "classification" else base.with_outputs(p.outputs)
    tuner = FineTuner(net, task=p.task, class_weight=p.class_weight, seed=seed, **settings)
    return tuner.fit(p.x, p.y, p.sample_weight).decision_function(p.tx)


def probe(base: Network, p: Problem) -> Array:
    """scikit-learn on the last tap."""
    from sklearn.linear_model import LogisticRegression, RidgeCV

    last = base.spec.record.segments[-2]
    a, b = (
        get_engine().records(base.spec, base.tensors, np.ascontiguousarray(x))[:, last.offset : last.offset + last.size]
        for x in (p.x, p.tx)
    )
    if p.task == "regression":
        return np.asarray(RidgeCV(np.logspace(-3, 3, 13)).fit(a, p.y, p.weights()).predict(b)).reshape(-1, p.outputs)

    def logits(y: Array) -> Array:
        return np.asarray(LogisticRegression(max_iter=1000).fit(a, y, p.weights()).decision_function(b))

    if p.task == "multi-label":
        return np.stack([logits(y) for y in p.y.T], axis=1)
    made = np.full((len(b), p.outputs), -30.0)  # what no sample is of
    made[:, np.unique(p.y)] = logits(p.y)
    return made


def everything(base: Network, p: Problem, seed: int) -> Array:
    """PyTorch, all weights."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, p.outputs),
    )  # fmt: skip
    with torch.no_grad():
        for k, layer in enumerate(m for m in net if hasattr(m, "weight")):
            if k == 4 and p.task != "classification":
                continue  # a new head
            w = torch.tensor(base.tensors[f"layers.{k}.weight"])
            layer.weight.copy_(w if w.ndim == 4 else w.T)
            layer.bias.copy_(torch.tensor(base.tensors[f"layers.{k}.bias"]))
    goal = targets(p.y, p.outputs, p.task)
    x, tx = (torch.tensor(v).reshape(-1, 1, 28, 28) for v in (p.x, p.tx))
    y, w = (
        torch.tensor(p.y if p.task == "classification" else goal.soft),
        torch.tensor(p.weights(), dtype=torch.float32),
    )
    step = torch.optim.Adam(net.parameters(), lr=1e-3)
    f = nn.functional
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(20):
            z = net(x[rows])
            if p.task == "classification":
                each = f.cross_entropy(z, y[rows].long(), reduction="none")
            elif p.task == "regression":
                each = f.mse_loss(z, y[rows], reduction="none").mean(dim=1)
            else:
                each = f.binary_cross_entropy_with_logits(z, y[rows], reduction="none").mean(dim=1)
            step.zero_grad()
            (w[rows] * each).mean().backward()
            step.step()
    with torch.no_grad():
        z = net(tx).numpy()
    return np.asarray(z * goal.spread + goal.centre if p.task == "regression" else z)


def main() -> None:
    """Run all, print a table a task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="random images, one seed")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    timer.count_cpu()
    data = load("fashion_mnist.npz", arguments.quick)
    if arguments.quick:
        global T, TEST, EPOCHS
        T, TEST, EPOCHS = 60, 100, 2
        arguments.seeds = 1
    n = min(10_000, len(data["train_x"]))
    x, y = scaled(data["train_x"][:n]).reshape(n, -1), data["train_y"][:n].astype(np.int32)
    images, labels = data["test_x"], data["test_y"].astype(np.int32)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in range(arguments.seeds):
        base, _ = sgd.pretrain(get_engine(), lenet5((1, 28, 28), 10), x, y, epochs=4, seed=seed)
        for name, p in problems(images, labels, seed).items():
            steps = {"method": "skip2-lora", "epochs": EPOCHS}
            ways: dict[str, Callable[[], Array]] = {
                "skip-ridge": partial(ours, base, p, seed, method="skip-ridge"),
                "skip2-lora": partial(ours, base, p, seed, **steps),
                "probe": partial(probe, base, p),
            }
            if name.startswith(("rare", "noisy")):
                ways["skip2-lora, smoothing 0.1"] = partial(ours, base, p, seed, label_smoothing=0.1, **steps)
            if not arguments.no_torch:
                ways["PyTorch, all weights"] = partial(everything, base, p, seed)
            for way, job in ways.items():
                announce(f"seed {seed}: {name}, {way}")
                began = timer.now()
                outputs = job()
                seconds = timer.now() - began
                row = {**p.measures(outputs), "seconds": seconds}
                found.setdefault(name, {}).setdefault(way, []).append(row)
            save_json(arguments.json, {"seeds": seed + 1, "found": found})
    announce("")
    print(f"{machine()}; {arguments.seeds} seeds\n")
    for name, ways_found in found.items():
        keys = list(next(iter(ways_found.values()))[0])
        rows = [
            (way, *(f"{statistics.fmean(r[k] for r in runs):.3f}" for k in keys)) for way, runs in ways_found.items()
        ]
        print(table((name, *keys), rows) + "\n")


if __name__ == "__main__":
    main()

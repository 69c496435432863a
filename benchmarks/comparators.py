"""Two ways to learn on a device without backpropagation, beside the closed form and Skip2-LoRA on the same tasks.

    python -m benchmarks.comparators --json build/comparators.json      goes on where it stopped
    python -m benchmarks.comparators --tasks fashion-75 --seeds 2

OS-ELM (Skip2-LoRA's references [7], [12]): one hidden layer whose input weights stay as they are, output weights by
recursive least squares. After an initial batch, for every chunk of samples with hidden values H and targets Y:

    P ← P − P·Hᵀ·(I + H·P·Hᵀ)⁻¹·H·P,   W ← W + P·Hᵀ·(Y − H·W)          P = (ΣHᵀH + λI)⁻¹

Input weights are random, or those of an autoencoder that was fitted to pre-training samples in the same way. It sees
samples alone, no network of ours. SPSA, the zeroth-order step of InstantFT's reference [7], needs forward passes only,
and here they start from the cached records:

    g = (loss(θ + ε·z) − loss(θ − ε·z)) / 2ε,   θ ← θ − η·g·z           z Gaussian

θ is the last layer, or the skip adapters of rank 4. Either way, what there is to choose (`elm_settings`,
`spsa_settings`) is chosen on the held-out fifth of `benchmarks.drifts`, task by task and seed by seed, and then all
samples are used. Times are of the chosen setting alone, arrays in memory to result in memory, one thread; those of the
two comparators do not count their search, that of the closed form does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import BATCH, RANK, TASKS, Samples, base, pretraining
from benchmarks.closed_form import NAMES, adapted, fitted, right, samples, task
from benchmarks.common import clock, machine, save_json, spread, table
from benchmarks.drifts import held_out
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, Floats, get_engine
from instantft.methods import METHODS
from instantft.solvers import sgd
from instantft.solvers.calibration import log_loss

HIDDEN = (64, 256, 1024)
RIDGES = (0.01, 0.1, 1.0, 10.0)
OLD = 1024
"""Pre-training samples: the initial batch where it is old, and what the autoencoder is fitted to."""
CHUNK = BATCH
"""Samples a sequential update."""

SPSA_RATES = (1e-3, 3e-3, 1e-2)
SPSA_STEPS = 5000
SPSA_BATCH = 64
EPSILON = 1e-3

CHOSEN = ("fashion-75", "fashion-15", "mnist-90", "damage1", "damage2", "har")

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class ElmSetting:
    """One hidden layer of OS-ELM.

    Attributes:
        hidden: its size.
        weights: "random", or "autoencoder".
        activation: "sigmoid" or "relu".
        start: the initial batch: a quarter of the "new" samples, or OLD "old" ones.
        ridge: λ.
    """

    hidden: int
    weights: str
    activation: str
    start: str
    ridge: float

    @property
    def name(self) -> str:
        return f"{self.hidden} {self.weights} {self.activation} {self.start} {self.ridge:g}"


class OsElm:
    """Online sequential extreme learning machine.

    Args:
        A: (N, H) input weights.
        b: (H,) their bias.
        activation: "sigmoid" or "relu".
        ridge: λ.
        C: number of classes.
    """

    def __init__(self, A: Array, b: Array, activation: str, ridge: float, C: int) -> None:
        self.A, self.b, self.activation = A, b, activation
        self.P: Doubles = np.eye(A.shape[1]) / ridge
        self.W: Doubles = np.zeros((A.shape[1], C))

    def hidden(self, x: Array) -> Doubles:
        """(T, H)."""
        z = (x @ self.A + self.b).astype(np.float64)
        return np.maximum(z, 0) if self.activation == "relu" else 1 / (1 + np.exp(-z))

    def start(self, x: Array, y: Labels) -> None:
        """The initial batch, at once."""
        H = self.hidden(x)
        self.P = np.linalg.inv(np.linalg.inv(self.P) + H.T @ H)
        self.W = self.P @ (H.T @ np.eye(self.W.shape[1])[y])

    def update(self, x: Array, y: Labels) -> None:
        """Samples that came later, one or a chunk."""
        H = self.hidden(x)
        PH = self.P @ H.T
        gain = np.linalg.solve(np.eye(len(H)) + H @ PH, PH.T).T
        self.P -= gain @ PH.T
        self.W += gain @ (np.eye(self.W.shape[1])[y] - H @ self.W)

    def scores(self, x: Array) -> Doubles:
        """(T, C)."""
        return self.hidden(x) @ self.W


def input_weights(x: Array, hidden: int, kind: str, activation: str, seed: int) -> tuple[Floats, Floats]:
    """A (N, H) and b (H,), scaled so that a unit's input has deviation 1 over the samples x.

    "random": uniform in ±1. "autoencoder": the transposed output weights of such a network of the same size, fitted to
    reproduce x.
    """
    rng = np.random.default_rng([seed, 5])
    A = rng.uniform(-1, 1, (x.shape[1], hidden)).astype(np.float32)
    A /= (x @ A).std(axis=0) + np.float32(1e-6)
    b = (rng.uniform(-1, 1, hidden) - (x @ A).mean(axis=0)).astype(np.float32)
    if kind == "autoencoder":
        H = OsElm(A, b, activation, 1.0, 1).hidden(x)
        V = np.linalg.solve(H.T @ H + np.eye(hidden), H.T @ x)
        A = np.ascontiguousarray(V.T, np.float32)
        A /= (x @ A).std(axis=0) + np.float32(1e-6)
        b = (rng.uniform(-1, 1, hidden) - (x @ A).mean(axis=0)).astype(np.float32)
    return A, b


@lru_cache(maxsize=1)
def old_samples(key: str, seed: int) -> Samples:
    """OLD of the samples that the base network was trained on."""
    x, y = pretraining(TASKS[key])
    rows = np.random.default_rng([seed, 6]).permutation(len(x))[:OLD]
    return np.ascontiguousarray(x[rows]), y[rows]


def elm_settings() -> Iterator[ElmSetting]:
    for hidden in HIDDEN:
        for weights in ("random", "autoencoder"):
            for activation in ("sigmoid", "relu"):
                for start in ("new", "old"):
                    for ridge in RIDGES:
                        yield ElmSetting(hidden, weights, activation, start, ridge)


def choose_elm(tune: Samples, old: Samples, C: int, seed: int) -> ElmSetting:
    """By held-out samples; all at once, which is what the sequence of updates amounts to."""
    x, y = tune
    out = held_out(len(x))
    scored: dict[ElmSetting, tuple[int, float]] = {}
    layers: dict[tuple[int, str, str], tuple[OsElm, Doubles, Doubles]] = {}
    for s in elm_settings():
        key = s.hidden, s.weights, s.activation
        if key not in layers:
            layers.clear()
            elm = OsElm(*input_weights(old[0], *key, seed), s.activation, 1.0, C)
            layers[key] = elm, elm.hidden(x), elm.hidden(old[0])
        _, H, H_old = layers[key]
        seen, labels = H[~out], y[~out]
        if s.start == "old":
            seen, labels = np.concatenate([H_old, seen]), np.concatenate([old[1], labels])
        W = np.linalg.solve(seen.T @ seen + s.ridge * np.eye(s.hidden), seen.T @ np.eye(C)[labels])
        error = H[out] @ W - np.eye(C)[y[out]]
        hits = int(((H[out] @ W).argmax(axis=1) == y[out]).sum())
        scored[s] = hits, -float((error * error).mean())
    return max(scored, key=lambda s: scored[s])


def run_elm(setting: ElmSetting, tune: Samples, old: Samples, C: int, seed: int) -> tuple[OsElm, float]:
    """Initial batch, then chunk by chunk; and seconds. Input weights and what is old were there before."""
    x, y = tune
    weights = input_weights(old[0], setting.hidden, setting.weights, setting.activation, seed)
    elm = OsElm(*weights, setting.activation, setting.ridge, C)
    # in random order, so that the initial batch of a recording holds all classes
    order = np.random.default_rng([seed, 7]).permutation(len(x))
    first = max(1, len(x) // 4)
    if setting.start == "old":
        elm.start(*old)
        first = 0
    began = clock.now()
    if first:
        elm.start(x[order[:first]], y[order[:first]])
    for start in range(first, len(x), CHUNK):
        rows = order[start : start + CHUNK]
        elm.update(x[rows], y[rows])
    return elm, clock.now() - began


@dataclass(frozen=True)
class SpsaSetting:
    """What SPSA moves ("last": W and b of the last layer; "skip": adapters of rank 4 from every tap), and how far."""

    what: str
    lr: float

    @property
    def name(self) -> str:
        return f"{self.what} {self.lr:g}"


def spsa_settings() -> Iterator[SpsaSetting]:
    for what in ("last", "skip"):
        for lr in SPSA_RATES:
            yield SpsaSetting(what, lr)


def records(engine: Engine, net: Network, x: Floats) -> tuple[list[Floats], Floats]:
    """x^0 … x^{L-1} and c of every sample, by one pass through the frozen network."""
    rows = engine.records(net.spec, net.tensors, x)
    *taps, c = (rows[:, s.offset : s.offset + s.size] for s in net.spec.record.segments)
    return [x, *taps], c


def run_spsa(
    setting: SpsaSetting, net: Network, taps: Sequence[Floats], c: Floats, y: Labels, seed: int, steps: int = SPSA_STEPS
) -> dict[str, Floats]:
    """The tensors that have moved. The rate falls to 0 along a cosine; a run that diverges ends where it does."""
    L = net.spec.L
    if setting.what == "last":
        names = [f"layers.{L - 1}.weight", f"layers.{L - 1}.bias"]
        theta = {name: net.tensors[name].copy() for name in names}
    else:
        theta = initial(METHODS["skip-lora"], net.spec, RANK, seed)
    rng = np.random.default_rng([seed, 8])
    batch = min(SPSA_BATCH, len(y))

    def loss(at: dict[str, Floats]) -> float:
        if setting.what == "last":
            logits = seen[0] @ at[names[0]] + at[names[1]]
        else:
            logits = c[rows]
            for k, x in enumerate(seen):
                logits = logits + x @ at[f"lora.{k}-{L}.A"] @ at[f"lora.{k}-{L}.B"]
        return float(log_loss(logits.astype(np.float64), y[rows]).mean())

    used = taps[L - 1 :] if setting.what == "last" else taps

    epsilon = np.float32(EPSILON)
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(steps):
            rows = rng.integers(0, len(y), batch)
            seen = [tap[rows] for tap in used]
            z = {name: rng.standard_normal(value.shape, np.float32) for name, value in theta.items()}
            up = loss({name: value + epsilon * z[name] for name, value in theta.items()})
            down = loss({name: value - epsilon * z[name] for name, value in theta.items()})
            rate = setting.lr / 2 * (1 + np.cos(np.pi * step / steps))
            move = np.float32(rate * (up - down) / (2 * EPSILON))
            if not np.isfinite(move):
                break
            for name in theta:
                theta[name] -= move * z[name]
    return theta


def choose_spsa(engine: Engine, net: Network, tune: Samples, seed: int) -> SpsaSetting:
    """By held-out samples."""
    x, y = tune
    out = held_out(len(x))
    taps, c = records(engine, net, np.ascontiguousarray(x[~out]))

    def score(setting: SpsaSetting) -> tuple[float, float]:
        theta = run_spsa(setting, net, taps, c, y[~out], seed)
        logits = engine.forward(net.spec, {**net.tensors, **theta}, np.ascontiguousarray(x[out]))
        if not np.isfinite(logits).all():
            return 0.0, -np.inf
        return right(logits, y[out]), -float(log_loss(logits.astype(np.float64), y[out]).mean())

    return max(spsa_settings(), key=score)


Result = dict[str, Any]
COLUMNS = ("before", "auto", "skip2-lora", "os-elm", "spsa")


def measure(engine: Engine, name: str, seed: int, size: int) -> Result:
    """Accuracy (fraction) and seconds of every column; what was chosen."""
    key, t = task(name)
    net = base(engine, key, TASKS[key], seed)
    tune, (x, y) = samples(name, seed, size)
    found: Result = {"before": right(engine.forward(net.spec, net.tensors, x), y)}

    began = clock.now()
    result = fitted(engine, net, tune, seed=seed)
    found["auto seconds"] = clock.now() - began
    found["auto"] = right(adapted(engine, net, result, x), y)

    began = clock.now()
    store = memory_store("fp32", net.spec.record, len(tune[0]))
    skip2 = sgd.fit(
        engine, net, "skip2-lora", *tune,
        rank=RANK, epochs=t.epochs, batch_size=BATCH, lr=t.lr, seed=seed, store=store,
    )  # fmt: skip
    found["skip2-lora seconds"] = clock.now() - began
    found["skip2-lora"] = right(engine.forward(net.spec, {**net.tensors, **skip2.adapter.tensors}, x), y)

    old = old_samples(key, seed)
    setting = choose_elm(tune, old, net.spec.C, seed)
    elm, seconds = run_elm(setting, tune, old, net.spec.C, seed)
    scores = np.concatenate([elm.scores(part) for part in np.array_split(x, max(1, len(x) // 1000))])
    found |= {"os-elm": right(scores.astype(np.float32), y), "os-elm seconds": seconds, "os-elm setting": setting.name}

    chosen = choose_spsa(engine, net, tune, seed)
    began = clock.now()
    theta = run_spsa(chosen, net, *records(engine, net, tune[0]), tune[1], seed)
    found |= {"spsa seconds": clock.now() - began, "spsa setting": chosen.name}
    found["spsa"] = right(engine.forward(net.spec, {**net.tensors, **theta}, x), y)
    return found


Results = dict[str, dict[str, dict[str, Result]]]


def report(results: Results, sizes: Iterable[int]) -> str:
    parts = []
    for size in sizes:
        accuracies: list[list[object]] = []
        times: list[list[object]] = []
        for name in NAMES:
            seeds = list(results.get(name, {}).get(str(size), {}).values())
            if seeds:
                accuracies.append([name, *(spread([100 * r[c] for r in seeds]) for c in COLUMNS), len(seeds)])
                medians = [statistics.median(1000 * r[f"{c} seconds"] for r in seeds) for c in COLUMNS[1:]]
                settings = [statistics.mode(r[f"{c} setting"] for r in seeds) for c in ("os-elm", "spsa")]
                times.append([name, *(f"{ms:.0f}" for ms in medians), *settings])
        if accuracies:
            title = f"{size} samples" if size else "all samples"
            parts.append(table([f"{title}, accuracy, %", *COLUMNS, "seeds"], accuracies))
            parts.append(table([f"{title}, ms", *COLUMNS[1:], "OS-ELM, most chosen", "SPSA, most chosen"], times))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=CHOSEN)
    parser.add_argument("--sizes", nargs="+", type=int, default=(0, 100), help="0: all samples")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="written after every run; results that are there are kept")
    args = parser.parse_args()
    clock.count_cpu()
    engine = get_engine()
    results: Results = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text())["results"]
    for seed in range(args.seeds):
        for size in args.sizes:
            for name in args.tasks:
                have = results.setdefault(name, {}).setdefault(str(size), {})
                if str(seed) not in have:
                    have[str(seed)] = measure(engine, name, seed, size)
                    save_json(args.json, {"machine": machine(), "results": results})
                    print(f"{name}, size {size}, seed {seed}", file=sys.stderr, flush=True)
    print(report(results, args.sizes))


if __name__ == "__main__":
    main()

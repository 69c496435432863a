"""The multinomial loss on the cached taps: does L-BFGS on it beat ridge regression, and does momentum help SGD?

    OMP_NUM_THREADS=1 python -m benchmarks.second_order --json build/second_order.json      goes on where it stopped
    OMP_NUM_THREADS=1 python -m benchmarks.second_order --momentum --json build/momentum.json

Tasks, base networks and samples are those of `benchmarks.closed_form`; accuracy on unseen test data, in percent.

Multinomial: scores f = K·α on the same kernel as ridge's, K = Σ w_k·X_k·X_kᵀ·s² + 1, with the weights and the scale
that `fit_ridge` has chosen, so that only the loss differs:

    min over α   Σ_i cross-entropy(f_i + g·c_i, y_i) + λ/2·tr(αᵀKα)

over W = Lᵀα, K = L·Lᵀ, by SciPy's L-BFGS from 0. λ comes from a grid by the log loss of left-out quarters of at most
256 samples, runs of consecutive ones. *best λ* is that of the grid which is best on the test data, which nobody knows:
a bound. g = 0, or 1 (*on c*): what is added to the frozen output. *ridge, best λ* is the same bound for ridge. *lower
loss*: of the first three, the one whose left-out log loss is least.

Momentum: Skip2-LoRA, rank 4, batches of 20, 10 epochs, heavy ball with momentum μ and lr = f·lr₀, where lr₀ is the
step of `solvers.step` without momentum. *nesterov* is the same with Nesterov's gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import TASKS, base
from benchmarks.closed_form import NAMES, adapted, right, samples, task
from benchmarks.common import announce, clock, machine, orders, save_json, table
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, Tensors, get_engine
from instantft.errors import DivergedError
from instantft.methods import METHODS, Method, connections
from instantft.solvers import sgd
from instantft.solvers.records import Records, subset
from instantft.solvers.ridge import fit_ridge
from instantft.solvers.step import default_lr

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Numbers = dict[str, float]

SOME = ("fashion-75", "fashion-15", "mnist-90", "mnist-15", "damage1", "damage2", "har")
SIZES = (0, 300, 100, 50)
TEST = 3000
"""Test samples that are looked at."""
GRID = tuple(float(10.0**e) for e in np.arange(-3.0, 1.01, 0.5))
FOLDS, FEW = 4, 256
ITERATIONS = 200
EPOCHS, BATCH, RANK = 10, 20, 4
SHARES = (1, 2, 3, 4)
NESTEROV = 0.9
"""Least μ that Nesterov's gradient is tried with."""
STEPS = tuple((mu, round(s * (1 - mu), 3)) for mu in (0.0, 0.5, 0.8, 0.9) for s in SHARES)

FEWER = ((0.0, 1.0), (0.5, 1.0), (0.8, 0.6), (0.8, 0.8), (0.8, 1.6), (0.9, 0.3), (0.9, 0.4), (0.9, 0.8))
"""What other methods and numbers of epochs are tried with."""


# L-BFGS


def multinomial(
    K: Doubles, y: NDArray[np.int32], C: int, lam: float, offset: Doubles, start: Doubles | None = None
) -> tuple[Doubles, int]:
    """α (T, C) of the problem above, and how many iterations it took."""
    from scipy.optimize import minimize

    T = len(K)
    values, vectors = np.linalg.eigh(K)
    keep = values > 1e-10 * values[-1]
    root = np.sqrt(values[keep])
    L = vectors[:, keep] * root
    onehot = np.eye(C)[y]

    def loss(w: Doubles) -> tuple[float, Doubles]:
        W = w.reshape(-1, C)
        f = L @ W + offset
        f -= f.max(axis=1, keepdims=True)
        p = np.exp(f)
        total = p.sum(axis=1, keepdims=True)
        value = float((np.log(total[:, 0]) - f[np.arange(T), y]).sum() + 0.5 * lam * (W * W).sum())
        return value, np.asarray(L.T @ (p / total - onehot) + lam * W).ravel()

    x0 = np.zeros((len(root), C)) if start is None else L.T @ start
    done = minimize(
        loss, x0.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS, "ftol": 1e-7, "gtol": 1e-4}
    )
    return (vectors[:, keep] / root) @ done.x.reshape(-1, C), int(done.nit)


def ridge(K: Doubles, y: NDArray[np.int32], C: int, lam: float) -> Doubles:
    return np.asarray(np.linalg.solve(K + lam * np.eye(len(K)), np.eye(C)[y]))


def log_loss(f: Doubles, y: NDArray[np.int32]) -> float:
    f = f - f.max(axis=1, keepdims=True)
    return float((np.log(np.exp(f).sum(axis=1)) - f[np.arange(len(y)), y]).sum())


def chosen(K: Doubles, y: NDArray[np.int32], C: int, offset: Doubles, seed: int) -> tuple[float, float]:
    """λ by the log loss of left-out quarters, and that loss a sample."""
    rows, _ = subset(len(K), FEW, seed)
    K, y, offset = K[np.ix_(rows, rows)], y[rows], offset[rows]
    losses = dict.fromkeys(GRID, 0.0)
    for fold in np.array_split(np.arange(len(rows)), min(FOLDS, len(rows))):
        rest = np.setdiff1d(np.arange(len(rows)), fold)
        alpha = None
        for lam in GRID[::-1]:
            alpha, _ = multinomial(K[np.ix_(rest, rest)], y[rest], C, lam, offset[rest], alpha)
            losses[lam] += log_loss(K[np.ix_(fold, rest)] @ alpha + offset[fold], y[fold])
    lam = min(losses, key=losses.__getitem__)
    return lam, losses[lam] / len(rows)


def accuracy(f: Array, y: NDArray[np.int32]) -> float:
    return float((f.argmax(axis=1) == y).mean())


def kernel(a: list[Array], b: list[Array], weights: Sequence[float], scale: float) -> Doubles:
    """Σ w_k·A_k·B_kᵀ·s² + 1 in float64."""
    K = np.ones((len(a[0]), len(b[0])))
    for x, z, w in zip(a, b, weights, strict=True):
        if w:
            K += scale * scale * w * (x @ z.T)
    return K


def second_order(engine: Engine, name: str, seed: int, size: int) -> Numbers:
    key, _ = task(name)
    net = base(engine, key, TASKS[key], seed)
    tune, (tx, ty) = samples(name, seed, size)
    tx, ty = np.ascontiguousarray(tx[:TEST]), ty[:TEST]
    (x, y), C = tune, net.spec.C
    began = clock.now()
    fitted = fit_ridge(engine, net, x, y, store=memory_store("fp32", net.spec.record, len(x)), seed=seed)
    found = {"ridge s": clock.now() - began, "ridge": right(adapted(engine, net, fitted, tx), ty)}
    found["before"] = right(engine.forward(net.spec, net.tensors, tx), ty)
    records = Records(engine, net, x, np.arange(len(x)), None)
    unseen = Records(engine, net, tx, np.arange(len(tx)), None)
    records.keep()
    unseen.keep()
    taps, test = records.taps(slice(0, len(x))), unseen.taps(slice(0, len(tx)))
    c = np.asarray(records.frozen(slice(0, len(x))), np.float64)
    c_test = np.asarray(unseen.frozen(slice(0, len(tx))), np.float64)
    found["ridge left out"] = log_loss(np.asarray(fitted.block_scores, np.float64), fitted.labels) / len(fitted.labels)
    choice = fitted.choice
    K, K_test = (kernel(z, taps, choice.weights, choice.scale) for z in (taps, test))
    for g in (0.0, 1.0):
        label = "lbfgs on c" if g else "lbfgs"
        began = clock.now()
        lam, found[f"{label} left out"] = chosen(K, y, C, g * c, seed)
        found[f"{label} choose s"] = clock.now() - began
        began = clock.now()
        alpha, found[f"{label} iterations"] = multinomial(K, y, C, lam, g * c)
        found[f"{label} s"] = clock.now() - began
        found[label], found[f"{label} λ"] = accuracy(K_test @ alpha + g * c_test, ty), lam
        if not g:
            best, start = 0.0, None
            for lam in GRID[::-1]:
                start, _ = multinomial(K, y, C, lam, g * c, start)
                best = max(best, accuracy(K_test @ start, ty))
            found["lbfgs, best λ"] = best
            found["ridge, best λ"] = max(accuracy(K_test @ ridge(K, y, C, lam), ty) for lam in GRID)
    lower = min(("ridge", "lbfgs", "lbfgs on c"), key=lambda name: found[f"{name} left out"])
    found["lower loss"] = found[lower]
    return found


# Momentum


def nesterov(
    net: Network, records: Records, y: NDArray[np.int32], E: int, lr: float, mu: float, seed: int
) -> dict[str, NDArray[np.float32]]:
    """Skip-LoRA by v ← μv + g, p ← p − lr·(g + μv), else as `sgd.fit`."""
    m, spec, T = METHODS["skip2-lora"], net.spec, len(records)
    p = initial(m, spec, RANK, seed)
    v = {k: np.zeros_like(a) for k, a in p.items()}
    names = [f"lora.{i}-{j}" for i, j in connections(m, spec.L)]
    X, c = records.taps(slice(0, T)), records.frozen(slice(0, T))
    for order in orders(T, E, seed):
        for b in range(0, T, BATCH):
            rows = order[b : b + BATCH]
            x = [tap[rows] for tap in X]
            h = [z @ p[f"{n}.A"] for z, n in zip(x, names, strict=True)]
            f = c[rows] + sum(u @ p[f"{n}.B"] for u, n in zip(h, names, strict=True))
            g = np.exp(f - f.max(axis=1, keepdims=True))
            g /= g.sum(axis=1, keepdims=True)
            g[np.arange(len(rows)), y[rows]] -= 1
            g /= np.float32(len(rows))
            for z, u, n in zip(x, h, names, strict=True):
                grads = {f"{n}.A": z.T @ (g @ p[f"{n}.B"].T), f"{n}.B": u.T @ g}
                for k, d in grads.items():
                    v[k] = np.float32(mu) * v[k] + d
                    p[k] = p[k] - np.float32(lr) * (d + np.float32(mu) * v[k])
    return p


def momentum(
    engine: Engine, name: str, seed: int, size: int, m: Method, E: int, steps: Sequence[tuple[float, float]]
) -> Numbers:
    key, _ = task(name)
    net = base(engine, key, TASKS[key], seed)
    (x, y), (tx, ty) = samples(name, seed, size)
    tx, ty = np.ascontiguousarray(tx[:TEST]), ty[:TEST]
    numbers = np.arange(len(x), dtype=np.int64)
    store = memory_store("fp32", net.spec.record, len(x))
    engine.fill(net.spec, net.tensors, x, numbers, store)
    records = Records(engine, net, x, numbers, store)
    records.keep()
    lr0 = default_lr(records, m, rank=RANK, batch_size=BATCH, seed=seed)
    found: Numbers = {"lr0": lr0}

    def tested(tensors: Tensors) -> float:
        logits = engine.forward(net.spec, {**net.tensors, **tensors}, tx)
        return right(logits, ty) if np.isfinite(logits).all() else float("nan")

    for mu, f in steps:
        try:
            fitted = sgd.fit(
                engine, net, m, x, y, rank=RANK, epochs=E, batch_size=BATCH, lr=f * lr0, momentum=mu, seed=seed,
                store=store,
            )  # fmt: skip
            found[label(mu, f)] = tested(fitted.adapter.tensors)
        except DivergedError:
            found[label(mu, f)] = float("nan")
        if mu >= NESTEROV and steps is STEPS:
            with np.errstate(all="ignore"):
                found["nesterov " + label(mu, f)] = tested(nesterov(net, records, y, E, f * lr0, mu, seed))
    return found


def label(mu: float, f: float) -> str:
    return f"μ {mu:g} lr {f:g}"


# Tables

Results = dict[str, dict[str, dict[str, Numbers]]]

SECOND = ("before", "ridge", "lbfgs", "lbfgs on c", "lower loss", "ridge, best λ", "lbfgs, best λ")
SECONDS = ("ridge s", "lbfgs choose s", "lbfgs s")


def report(
    results: Results, names: Sequence[str], sizes: Sequence[int], columns: Sequence[str], times: Sequence[str]
) -> str:
    rows: list[list[object]] = []
    everything: list[list[float]] = []
    for size in sizes:
        for name in names:
            seeds = list(results.get(name, {}).get(str(size), {}).values())
            if not seeds:
                continue
            cells = [statistics.fmean(100 * n[c] for n in seeds) for c in columns]
            everything.append(cells)
            milliseconds = [f"{1000 * statistics.median(n[t] for n in seeds):.0f}" for t in times]
            rows.append([name, size or "all", *(f"{c:.1f}" for c in cells), *milliseconds])
    means = [f"{statistics.fmean(c):.2f}" for c in zip(*everything, strict=True)]
    rows.append(["mean", "", *means, *[""] * len(times)])
    return table(["task", "samples", *columns, *(t.replace(" s", ", ms") for t in times)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=SOME)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="0: all samples")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--momentum", action="store_true")
    parser.add_argument("--method", choices=("skip2-lora", "lora-last"), default="skip2-lora")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the momentum's runs")
    parser.add_argument("--json", type=Path, help="written after every seed; results that are there are kept")
    args = parser.parse_args()
    clock.count_cpu()
    engine = get_engine()
    steps = STEPS if (args.epochs, args.method) == (EPOCHS, "skip2-lora") else FEWER
    measure: Callable[[Engine, str, int, int], Numbers] = (
        partial(momentum, m=METHODS[args.method], E=args.epochs, steps=steps) if args.momentum else second_order
    )
    results: Results = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text())["results"]
    for seed in range(args.seeds):
        for size in args.sizes:
            for name in args.tasks:
                have = results.setdefault(name, {}).setdefault(str(size), {})
                if str(seed) not in have:
                    announce(f"{name} size {size} seed {seed}")
                    have[str(seed)] = measure(engine, name, seed, size)
                    save_json(args.json, {"machine": machine(), "results": results})
    announce("")
    if args.momentum:
        columns = [label(*s) for s in steps]
        if steps is STEPS:
            columns += ["nesterov " + label(*s) for s in steps if s[0] >= NESTEROV]
        print(report(results, args.tasks, args.sizes, columns, ()))
    else:
        print(report(results, args.tasks, args.sizes, SECOND, SECONDS))


if __name__ == "__main__":
    main()

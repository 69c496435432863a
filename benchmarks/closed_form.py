"""Ridge regression on the cached records: accuracy, calibration and honesty of its estimates, on unseen test data.

    python -m benchmarks.closed_form --json build/closed_form.json     all tasks and sizes; goes on where it stopped
    python -m benchmarks.closed_form --tasks fashion-75 har --sizes 0 --seeds 3
    python -m benchmarks.closed_form --gate --json build/gate.json     the gate, over sizes and label noise
    python -m benchmarks.closed_form --blocks                          left-out blocks against the truth

Base networks, fine-tuning samples and test samples are those of `benchmarks.accuracy`, seed by seed. Columns: before
fine-tuning; the raw input alone; all taps alike; taps as `taps.choose` weights them, at full rank, at rank 4, and from
a 4-bit cache; estimates of the chosen one by leave-one-out and by left-out blocks; expected calibration error in
percent; seconds. Means over the seeds, in percent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import TASKS, Samples, Task, base, drifted
from benchmarks.common import announce, load, machine, save_json, table
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, Floats, get_engine
from instantft.solvers.calibration import expected_calibration_error, softmax
from instantft.solvers.ridge import RidgeResult, fit_ridge

ANGLES = (15, 30, 45, 60, 75, 90)
NAMES = [*(f"{k}-{a}" for k in ("fashion", "mnist") for a in ANGLES), "damage1", "damage2", "har"]
SIZES = (0, 300, 100, 50)
"""Fine-tuning samples; 0: all there are."""

GATE_SIZES = (0, 300, 100, 50, 30)
GATE_NOISE = (0.0, 0.1, 0.2, 0.35, 0.5)
HARM = 0.01
"""A gate that lets accuracy fall by more than this has done harm."""

CODEC = "relu4"

Numbers = dict[str, float]
Labels = NDArray[np.int32]


def task(name: str) -> tuple[str, Task]:
    """The key in `TASKS`, and the task at the angle asked for."""
    key, _, degrees = name.partition("-")
    return key, replace(TASKS[key], degrees=float(degrees)) if degrees else TASKS[key]


def samples(name: str, seed: int, size: int) -> tuple[Samples, Samples]:
    """Fine-tuning samples, `size` of them in their order, and test samples."""
    _, t = task(name)
    (x, y), test = drifted(t, seed)
    if 0 < size < len(x):
        # Images are in random order already; spectra and windows are drawn, and stay in order of time.
        images = t.degrees is not None
        rows = np.arange(size) if images else np.sort(np.random.default_rng(seed).permutation(len(x))[:size])
        x, y = np.ascontiguousarray(x[rows]), y[rows]
    return (x, y), test


def fitted(
    engine: Engine,
    net: Network,
    tune: Samples,
    *,
    codec: str = "fp32",
    rank: int | None = None,
    taps: str | Sequence[int] = "auto",
    seed: int = 0,
) -> RidgeResult:
    store = memory_store(codec, net.spec.record, len(tune[0]))
    return fit_ridge(engine, net, *tune, store=store, rank=rank, taps=taps, seed=seed)  # type: ignore[arg-type]


def adapted(engine: Engine, net: Network, result: RidgeResult, x: Floats) -> Floats:
    return engine.forward(net.spec, {**net.tensors, **result.adapter.tensors}, x)


def right(logits: Floats, y: Labels) -> float:
    return float((logits.argmax(axis=1) == y).mean())


def measure(engine: Engine, name: str, seed: int, size: int) -> Numbers:
    """All columns of one task, seed and size."""
    key, _ = task(name)
    net = base(engine, key, TASKS[key], seed)
    tune, (x, y) = samples(name, seed, size)
    found: Numbers = {"before": right(engine.forward(net.spec, net.tensors, x), y)}
    found["raw"] = right(adapted(engine, net, fitted(engine, net, tune, taps=(0,), seed=seed), x), y)
    found["all"] = right(adapted(engine, net, fitted(engine, net, tune, taps="all", seed=seed), x), y)
    found["rank 4"] = right(adapted(engine, net, fitted(engine, net, tune, rank=4, seed=seed), x), y)
    found["4 bit"] = right(adapted(engine, net, fitted(engine, net, tune, codec=CODEC, seed=seed), x), y)
    result = fitted(engine, net, tune, seed=seed)
    logits = adapted(engine, net, result, x)
    found |= {
        "auto": right(logits, y),
        "loo": result.loo_score,
        "block": result.block_score,
        "ece": expected_calibration_error(softmax(logits), y),
        "accepted": float(result.decide().accepted),
        "lam": result.lam,
        "first": result.weights[min(1, len(result.weights) - 1)],
        "seconds": result.seconds.total,
    }
    return found


COLUMNS = ("before", "raw", "all", "auto", "rank 4", "4 bit", "loo", "block", "ece")


def report(results: dict[str, dict[str, dict[str, Numbers]]], sizes: Sequence[int]) -> str:
    """One table a size; rows are tasks."""
    parts = []
    for size in sizes:
        rows: list[list[object]] = []
        for name in NAMES:
            seeds = results.get(name, {}).get(str(size), {})
            if seeds:
                cells = [[n[c] for n in seeds.values()] for c in COLUMNS]
                spread = statistics.stdev(cells[3]) * 100 if len(seeds) > 1 else 0.0
                shown = [f"{100 * statistics.fmean(c):.1f}" for c in cells]
                shown[3] += f" ± {spread:.1f}"
                milliseconds = 1000 * statistics.median(n["seconds"] for n in seeds.values())
                rows.append([name, *shown, f"{milliseconds:.0f}", len(seeds)])
        title = f"{size} samples" if size else "all samples"
        parts.append(table([title, *COLUMNS, "ms", "seeds"], rows))
    return "\n\n".join(parts)


GATE_TASKS = (
    "fashion-75",
    "fashion-45",
    "fashion-15",
    "mnist-90",
    "mnist-45",
    "mnist-15",
    "damage1",
    "damage2",
    "har",
)
GATE_GROUPS = {"images": ("fashion", "mnist"), "fan": ("damage",), "HAR": ("har",), "all": ("",)}
"""Beginnings of the names of the tasks."""

GATE_TEST = 3000
"""Test samples that the gate is judged by, at most."""


def gate_runs(engine: Engine, name: str, seed: int, size: int) -> list[Numbers]:
    """One run for every share of labels that are replaced at random."""
    key, _ = task(name)
    net = base(engine, key, TASKS[key], seed)
    (x, y), (tx, ty) = samples(name, seed, size)
    tx, ty = tx[:GATE_TEST], ty[:GATE_TEST]
    frozen = right(engine.forward(net.spec, net.tensors, tx), ty)
    runs: list[Numbers] = []
    for noise in GATE_NOISE:
        rng = np.random.default_rng([seed, int(100 * noise)])
        at_random = rng.integers(0, net.spec.C, len(y))
        noisy = np.where(rng.random(len(y)) < noise, at_random, y).astype(np.int32)
        result = fitted(engine, net, (x, noisy), seed=seed)
        after = right(adapted(engine, net, result, tx), ty)
        accepted = float(result.decide().accepted)
        runs.append({"noise": noise, "before": frozen, "after": after, "accepted": accepted})
    return runs


def gate_report(runs: dict[str, list[Numbers]]) -> str:
    """What the gate does, against knowing the test data; keys of `runs` begin with the name of a task."""
    rows: list[list[object]] = []
    for group, beginnings in GATE_GROUPS.items():
        chosen = [run for key, some in runs.items() if key.startswith(beginnings) for run in some]
        if not chosen:
            continue
        old, new, taken = (np.array([run[c] for run in chosen]) for c in ("before", "after", "accepted"))
        kept = np.where(taken > 0, new, old)
        for name, values in (("frozen", old), ("adapted", new), ("gate", kept), ("oracle", np.maximum(old, new))):
            harmed = 100 * (values < old - HARM).mean()
            cells = [f"{100 * values.mean():.2f}", f"{harmed:.2f}", f"{100 * (old - values).max():.1f}"]
            rows.append([f"{group}, {len(chosen)} runs: {name}", *cells])
    return table(["", "mean accuracy", "harmed by > 1 point, % of runs", "worst, points"], rows)


RUN_LENGTHS = (1, 8, 16, 32, 64)
"""Of consecutive samples that are left out together."""


def groups_of(name: str, T: int, length: int | None) -> NDArray[np.intp]:
    """(T,): runs of a length; None: what belongs together in the data: a person (HAR), a speed of a fan (a quarter of
    a recording)."""
    if length is not None:
        return np.arange(T) // length
    if name == "har":
        data = load(TASKS["har"].file)
        return np.asarray(data["subject"][data["finetune_idx"]], np.intp)
    return np.arange(T) * 8 // T


def estimates(engine: Engine, name: str, seed: int) -> dict[str, tuple[float, float]]:
    """Accuracy that left-out runs of each length promise, and the true one: groups also decide which taps count."""
    key, _ = task(name)
    net = base(engine, key, TASKS[key], seed)
    (x, y), (tx, ty) = samples(name, seed, 0)
    found = {}
    for length in (*RUN_LENGTHS, None):
        result = fit_ridge(engine, net, x, y, seed=seed, groups=groups_of(name, len(x), length))
        found[str(length)] = result.block_score, right(adapted(engine, net, result, tx), ty)
    return found


def blocks_report(engine: Engine, seeds: int) -> str:
    """Promised and true accuracy by what is left out together, means over the seeds."""
    rows: list[list[object]] = []
    for name in ("har", "damage1", "damage2", "fashion-75"):
        found = [estimates(engine, name, seed) for seed in range(seeds)]
        lengths = [length for length in found[0] if length != "None" or not name.startswith("fashion")]
        for i, what in enumerate(("promised", "true")):
            means = [f"{100 * statistics.fmean(f[length][i] for f in found):.1f}" for length in lengths]
            rows.append([f"{name}, {what}", *means, *[""] * (len(RUN_LENGTHS) + 1 - len(means))])
    return table(["left out together", *(str(n) for n in RUN_LENGTHS), "person, speed"], rows)


def kept(path: Path | None) -> dict[str, Any]:
    """The results of an earlier run, which are not measured again."""
    found: dict[str, Any] = json.loads(path.read_text())["results"] if path and path.is_file() else {}
    return found


def over_seeds(
    engine: Engine, args: argparse.Namespace, measure: Callable[[Engine, str, int, int], Numbers]
) -> dict[str, Any]:
    """What `measure` says of every task, size and seed that was asked for, by these; saved after each."""
    results = kept(args.json)
    for name, size, seed in itertools.product(args.tasks, args.sizes, range(args.seeds)):
        have = results.setdefault(name, {}).setdefault(str(size), {})
        if str(seed) not in have:
            announce(f"{name} size {size} seed {seed}")
            have[str(seed)] = measure(engine, name, seed, size)
            save_json(args.json, {"machine": machine(), "results": results})
    announce("")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="written after every seed; results that are there are kept")
    parser.add_argument("--gate", action="store_true", help="the gate instead")
    parser.add_argument("--blocks", action="store_true", help="how honest left-out blocks are instead")
    args = parser.parse_args()
    engine = get_engine()
    if args.blocks:
        print(blocks_report(engine, args.seeds))
        return
    if args.gate:
        results = kept(args.json)
        for seed, name, size in itertools.product(range(args.seeds), GATE_TASKS, GATE_SIZES):
            key = f"{name} {size} {seed}"
            if key not in results:
                announce(key)
                results[key] = gate_runs(engine, name, seed, size)
                save_json(args.json, {"machine": machine(), "results": results})
        announce("")
        print(gate_report(results))
        return
    print(report(over_seeds(engine, args, measure), args.sizes))


if __name__ == "__main__":
    main()

"""What a lift brings and what it costs: accuracy on unseen test data, and prediction beside that of the frozen network.

    python -m benchmarks.lift --json build/lift.json          all tasks; goes on where it stopped
    python -m benchmarks.lift --tasks fashion-75 --sizes 0 300 --seeds 3
    python -m benchmarks.lift --time                          processor time of prediction, interleaved, one thread

Base networks, fine-tuning samples and test samples are those of `benchmarks.accuracy`, seed by seed. Accuracies are
means over the seeds, in percent; "taken" says in how many fits the lift was, which is left out where it does not help;
"loo" and "block" are the fit's own estimates with the arccos lift. Costs are those of the lift where it was taken:
multiply-adds of one prediction in units of the frozen network's, and kilobytes of tensors.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.accuracy import TASKS, base
from benchmarks.closed_form import NAMES, over_seeds, right, samples, task
from benchmarks.common import clock, interleaved, table, timed
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.cost import linear_macs
from instantft.engine import Engine, forward, get_engine
from instantft.solvers.calibration import expected_calibration_error, softmax
from instantft.solvers.lifting import LIFTS
from instantft.solvers.ridge import RidgeResult, fit_ridge

Numbers = dict[str, float]

KINDS = (None, *LIFTS)


def fitted(engine: Engine, net: Network, name: str, seed: int, size: int, kind: str | None) -> RidgeResult:
    tune, _ = samples(name, seed, size)
    store = memory_store("fp32", net.spec.record, len(tune[0]))
    return fit_ridge(engine, net, *tune, store=store, seed=seed, lift=kind)  # type: ignore[arg-type]


def measure(engine: Engine, name: str, seed: int, size: int) -> Numbers:
    key, _ = task(name)
    net = base(engine, key, TASKS[key], seed)
    _, (x, y) = samples(name, seed, size)
    found: Numbers = {}
    for kind in KINDS:
        result = fitted(engine, net, name, seed, size, kind)
        logits = forward(engine, net.spec, {**net.tensors, **result.adapter.tensors}, x)
        column = kind or "linear"
        found |= {
            column: right(logits, y),
            f"{column} loo": result.loo_score,
            f"{column} block": result.block_score,
            f"{column} ece": expected_calibration_error(softmax(logits), y),
            f"{column} lam": result.lam,
            f"{column} seconds": result.seconds.total,
            f"{column} taken": float(result.lift is not None),
        }
        cost = result.adapter.lift_cost
        if cost is not None:
            found[f"{column} macs"] = cost.macs / sum(linear_macs(net.spec))
            found[f"{column} kB"] = cost.bytes / 1000
    return found


COLUMNS = ("linear", *LIFTS, "arccos taken", "nystrom taken", "arccos loo", "arccos block", "linear ece", "arccos ece")


def report(results: dict[str, dict[str, dict[str, Numbers]]], sizes: Sequence[int]) -> str:
    parts = []
    for size in sizes:
        rows: list[list[object]] = []
        for name in NAMES:
            seeds = list(results.get(name, {}).get(str(size), {}).values())
            if seeds:
                shown = [f"{100 * statistics.fmean(n[c] for n in seeds):.1f}" for c in COLUMNS]
                for cost in (f"{kind} {c}" for kind in LIFTS for c in ("macs", "kB")):
                    known = [n[cost] for n in seeds if cost in n]
                    shown.append(f"{statistics.fmean(known):.2f}" if known else "–")
                ms = [f"{1000 * statistics.median(n[f'{c} seconds'] for n in seeds):.0f}" for c in ("linear", *LIFTS)]
                rows.append([name, *shown, " / ".join(ms), len(seeds)])
        costs = [f"{kind} {c}" for kind in LIFTS for c in ("MACs ×", "kB")]
        title = f"{size} samples" if size else "all samples"
        parts.append(table([title, *COLUMNS, *costs, "fit, ms", "seeds"], rows))
    return "\n\n".join(parts)


def times(engine: Engine, tasks: Sequence[str], repeats: int) -> str:
    """Prediction of the test samples: frozen network, linear adapter, lifts; medians of interleaved rounds."""
    rows: list[list[object]] = []
    for name in tasks:
        key, _ = task(name)
        net = base(engine, key, TASKS[key], 0)
        x = samples(name, 0, 0)[1][0]
        x = np.ascontiguousarray(np.tile(x, (-(-2048 // len(x)), 1))[:2048])
        jobs = {"frozen": dict(net.tensors)}
        for kind in KINDS:
            jobs[kind or "linear"] = {**net.tensors, **fitted(engine, net, name, 0, 0, kind).adapter.tensors}

        def job(tensors: dict[str, np.ndarray], net: Network = net, x: np.ndarray = x) -> float:
            return timed(lambda: forward(engine, net.spec, tensors, x))

        seen = interleaved({column: (lambda t=t: job(t)) for column, t in jobs.items()}, repeats)  # type: ignore[misc]
        frozen = statistics.median(seen["frozen"])
        ratios = ([b / a for a, b in zip(seen["frozen"], seen[c], strict=True)] for c in ("linear", *LIFTS))
        rows.append([name, f"{1e6 * frozen / len(x):.1f}", *(f"{statistics.median(r):.1f}" for r in ratios)])
    return table(["prediction", "frozen, µs a sample", *(f"{c}, × frozen" for c in ("linear", *LIFTS))], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=(0,))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="written after every seed; results that are there are kept")
    parser.add_argument("--time", action="store_true", help="seconds of prediction instead")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    engine = get_engine()
    if args.time:
        clock.count_cpu()
        print(times(engine, args.tasks, args.repeat))
        return
    print(report(over_seeds(engine, args, measure), args.sizes))


if __name__ == "__main__":
    main()

"""Time of the closed-form adaptation against PyTorch's LoRA-All: LeNet-5, 1,024 samples, one thread.

    python -m benchmarks.ridge_speed --json build/ridge_speed.json   two minutes once the base networks are there
    python -m benchmarks.ridge_speed --quick                            does it run? (without the data folder too)

Both sides run in one process and in turn (A B A B …); the ratio is that of the medians. *Whole*: data and base network
in memory to adapter in memory, for instantft all of `fit_ridge` with the making and filling of the cache, λ, weights,
left-out scores and temperature; for PyTorch ten epochs in batches of 20, without building its modules.

Where the time goes is measured by wrapping the steps named in `STEPS` in a further run of its own; *rest* is what
none of them covers.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.accuracy import BATCH, RANK, TASKS, Samples, base, drifted
from benchmarks.closed_form import task
from benchmarks.common import clock, interleaved, machine, orders, save_json, table, timed
from benchmarks.speed import works
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, get_engine
from instantft.engine.native import NativeDense, NativeEngine
from instantft.methods import METHODS
from instantft.solvers import closed, ridge
from instantft.solvers.factor import Factor
from instantft.solvers.records import Records

EPOCHS, LR = 10, 0.1
TARGET = 20.0
"""Times faster than PyTorch's LoRA-All."""

DRIFTS = ("fashion-75", "mnist-90")

STEPS: dict[str, tuple[Any, str]] = {
    "fill": (NativeEngine, "fill"),
    "records kept": (Records, "keep"),
    "products of taps": (Records, "triangle"),
    "choice of λ and weights": (ridge, "_choose"),
    "system": (NativeDense, "combine"),
    "factor": (Factor, "__init__"),
    "solve": (Factor, "solve"),
    "left-out scores": (Factor, "left_out"),
    "all of the dual": (closed, "dual"),
    "temperature and gain": (ridge, "_calibrated"),
}
"""Name to whose function it is. A step's time is without that of steps inside it."""


@dataclass(frozen=True)
class Work:
    net: Network
    tune: Samples


def ours(engine: Engine, w: Work, codec: str = "fp32") -> float:
    x, y = w.tune
    return timed(
        lambda: ridge.fit_ridge(engine, w.net, x, y, store=memory_store(codec, w.net.spec.record, len(x)), threads=1)
    )


def lora_all(w: Work) -> float:
    from benchmarks.rivals import Rival

    x, y = w.tune
    m = METHODS["lora-all"]
    start = {**w.net.tensors, **initial(m, w.net.spec, RANK, 0)}
    rival = Rival(w.net.spec, start, m, x, y, lr=LR, batch_size=BATCH)
    order = orders(len(x), EPOCHS, 1)
    return timed(lambda: rival.epochs(order))


@contextmanager
def watched(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds of each of `STEPS`, each without what is inside it."""
    inside: list[float] = []

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(0.0)
            began = clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = clock.now() - began
                spent[name] = spent.get(name, 0.0) + seconds - inside.pop()
                if inside:
                    inside[-1] += seconds

        return call

    patches = [patch.object(owner, at, watch(name, getattr(owner, at))) for name, (owner, at) in STEPS.items()]
    for p in patches:
        p.start()
    try:
        yield
    finally:
        for p in patches:
            p.stop()


def breakdown(engine: Engine, w: Work, repeats: int) -> dict[str, float]:
    """Median seconds of every step of a whole adaptation."""
    seen: list[dict[str, float]] = []
    for _ in range(repeats):
        x, y = w.tune
        spent: dict[str, float] = {}
        with watched(spent):
            began = clock.now()
            store = memory_store("fp32", w.net.spec.record, len(x))
            ridge.fit_ridge(engine, w.net, x, y, store=store, threads=1)
            total = clock.now() - began
        spent["rest"] = total - sum(spent.values())
        seen.append({**spent, "together": total})
    names = dict.fromkeys(name for one in seen for name in one)
    return {name: statistics.median(one.get(name, 0.0) for one in seen) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--drifts", nargs="+", default=list(DRIFTS), help="as benchmarks.closed_form names its tasks")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--codec", default="fp32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny runs: does it work?")
    parser.add_argument("--engine", choices=("native", "reference"), default="native")
    parser.add_argument("--no-torch", action="store_true", help="instantft only")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a machine that is not idle")
    args = parser.parse_args()
    if args.cpu_time:
        clock.count_cpu()
    if not args.quick and "1" not in (os.environ.get("OMP_NUM_THREADS"), os.environ.get("OPENBLAS_NUM_THREADS")):
        raise SystemExit("one thread is measured: set OMP_NUM_THREADS=1, which NumPy reads when it starts")
    engine = get_engine(args.engine)
    repeats = 1 if args.quick else args.repeats
    if args.quick:
        lenet = works(engine, True)[0]
        all_works = {"quick": Work(lenet.base, (lenet.x, lenet.y))}
    else:
        all_works = {}
        for name in args.drifts:
            key, drift = task(name)
            all_works[name] = Work(base(engine, key, TASKS[key], 0), drifted(drift, 0)[0])
    jobs: dict[str, Callable[[], float]] = {}
    for name, w in all_works.items():
        jobs[f"{name}: skip-ridge"] = partial(ours, engine, w, args.codec)
        if not args.no_torch:
            jobs[f"{name}: LoRA-All"] = partial(lora_all, w)
    if not args.no_torch:
        from benchmarks.rivals import single_thread

        single_thread()
    seen = interleaved(jobs, repeats, warm=not args.quick)
    medians = {name: statistics.median(values) for name, values in seen.items()}
    rows: list[list[object]] = []
    for name in all_works:
        mine, theirs = medians[f"{name}: skip-ridge"], medians.get(f"{name}: LoRA-All", float("nan"))
        rows.append([name, f"{1e3 * theirs:.0f}", f"{1e3 * mine:.1f}", f"{theirs / mine:.1f}×", f"≥ {TARGET:.0f}×"])
    head = [f"whole, 1 thread, ms, {clock.name} time", f"PyTorch LoRA-All, E={EPOCHS}", "skip-ridge", "ratio", "target"]
    print(table(head, rows))
    parts = {name: breakdown(engine, w, repeats) for name, w in all_works.items()}
    steps = list(dict.fromkeys(step for spent in parts.values() for step in spent if step not in ("rest", "together")))
    shown = [[s, *(f"{1e3 * spent.get(s, 0.0):.1f}" for spent in parts.values())] for s in (*steps, "rest", "together")]
    print("\n" + table(["ms", *parts], shown))
    save_json(args.json, {"machine": machine(), "clock": clock.name, "all": seen, "medians": medians, "steps": parts})


if __name__ == "__main__":
    main()

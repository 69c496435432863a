"""Accuracy of every method on the papers' data, beside the papers' figures and PyTorch at the same settings.

    python -m benchmarks.accuracy --json build/accuracy.json            all of it; goes on where it stopped
    python -m benchmarks.accuracy --tasks fashion --seeds 3
    python -m benchmarks.accuracy --quick

A seed decides the base network (pre-trained once, kept in build/bases), which 1,024 test images are turned and
fine-tuned on, the adapters' start and the order of the samples. PyTorch gets the same base, start and order, so what is
left between the two is rounding. Accuracy is measured on samples that neither side has trained on: for the images all
8,976 others of the test set, turned alike. Means and standard deviations over the seeds, in percent.

Tasks and settings are those of `instantft.data.protocols`, which says where they come from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import ROOT, data_file, machine, orders, save_json, spread, table
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.codecs import CODECS
from instantft.cache.store import memory_store
from instantft.data import protocols
from instantft.data.protocols import BATCH, RANK, TASKS, Samples, Task, network, quick
from instantft.engine import Engine, Floats, get_engine
from instantft.errors import DivergedError
from instantft.methods import SGD_METHODS, Method
from instantft.solvers import sgd

FOLDER = data_file("")
__all__ = [
    "BATCH", "CODECS", "RANK", "TASKS", "Samples", "Task", "accuracy", "base", "drifted", "network", "pretraining",
]  # fmt: skip

DRAWS = 8
"""Fine-tunings a seed in the comparison of caches, each with its own images, start and order: one run's accuracy moves
by a point when only rounding changes, which is more than what is to be seen."""
BASES = ROOT / "build" / "bases"
WITHIN_TORCH = 3.0
"""Points that a method may be away from PyTorch at the same settings."""
WITHIN_FP32 = 0.4
"""Points that a 4-bit cache may be away from the fp32 cache."""


def pretraining(task: Task) -> Samples:
    """What the base network is trained on."""
    return protocols.pretraining(task, FOLDER)


def drifted(task: Task, seed: int) -> tuple[Samples, Samples]:
    """What it is fine-tuned on, and what it is tested on."""
    return protocols.drifted(task, FOLDER, seed)


def base(engine: Engine, name: str, task: Task, seed: int) -> Network:
    """The pre-trained network of a seed, from build/bases or trained now."""
    path = BASES / f"{name}-n{task.pretrain}-e{task.pretrain_epochs}-lr{task.pretrain_lr:g}-seed{seed}.safetensors"
    if path.is_file():
        return Network.load(path)
    x, y = pretraining(task)
    made, _ = sgd.pretrain(
        engine, network(task), x, y, epochs=task.pretrain_epochs, batch_size=BATCH, lr=task.pretrain_lr, seed=seed
    )
    BASES.mkdir(parents=True, exist_ok=True)
    made.save(path)
    return made


def accuracy(logits: Floats, y: NDArray[np.int32]) -> float | None:
    """Percent correct; None where the network has diverged."""
    if not np.isfinite(logits).all():
        return None
    return float((logits.argmax(axis=1) == y).mean() * 100)


def ours(
    engine: Engine, task: Task, net: Network, m: Method, tune: Samples, test: Samples, seed: int, codec: str
) -> float | None:
    """Accuracy after fine-tuning with instantft."""
    store = memory_store(codec, net.spec.record, len(tune[0])) if m.cached else None
    try:
        fitted = sgd.fit(
            engine, net, m, *tune, rank=RANK, epochs=task.epochs, batch_size=BATCH, lr=task.lr, seed=seed, store=store
        )
    except DivergedError:
        return None
    return accuracy(engine.forward(net.spec, {**net.tensors, **fitted.adapter.tensors}, test[0]), test[1])


def theirs(task: Task, net: Network, m: Method, tune: Samples, test: Samples, seed: int) -> float | None:
    """Accuracy after fine-tuning with PyTorch: the same base, the same start, the same order."""
    from benchmarks.rivals import Rival, single_thread

    single_thread()
    start = {**net.tensors, **initial(m, net.spec, RANK, seed)}
    rival = Rival(net.spec, start, m, *tune, lr=task.lr, batch_size=BATCH)
    rival.epochs(orders(len(tune[0]), task.epochs, seed))
    return accuracy(rival.forward(test[0]), test[1])


def wanted(with_torch: bool) -> list[str]:
    """Keys of the results of one seed."""
    keys = ["none", *(f"ours {m}" for m in SGD_METHODS), *(f"cache {c}" for c in CODECS)]
    return keys + ([f"torch {m}" for m in SGD_METHODS] if with_torch else [])


Results = dict[str, list[float | None]]
"""Key to accuracies: one, or one a draw."""


def run_seed(name: str, task: Task, seed: int, engine_name: str, keys: Sequence[str]) -> Results:
    """The results of one seed that `keys` asks for."""
    engine = get_engine(engine_name)
    net = base(engine, name, task, seed)
    tune, test = drifted(task, seed)
    found: Results = {}
    for key in keys:
        kind, _, what = key.partition(" ")
        if kind == "none":
            found[key] = [accuracy(engine.forward(net.spec, net.tensors, test[0]), test[1])]
        elif kind == "ours":
            found[key] = [ours(engine, task, net, SGD_METHODS[what], tune, test, seed, "fp32")]
        elif kind == "torch":
            found[key] = [theirs(task, net, SGD_METHODS[what], tune, test, seed)]
        else:
            draws = [seed + 1000 * d for d in range(DRAWS)]
            skip2 = SGD_METHODS["skip2-lora"]
            found[key] = [ours(engine, task, net, skip2, *drifted(task, d), d, what) for d in draws]
    return found


# Tables


def _cell(values: Sequence[float | None]) -> str:
    good = [v for v in values if v is not None]
    diverged = f" ({len(values) - len(good)} of {len(values)} diverged)" if len(good) < len(values) else ""
    return (spread(good) if good else "–") + diverged


def _differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float]:
    """a - b, run by run, where neither has diverged."""
    return [x - y for x, y in zip(a, b, strict=True) if x is not None and y is not None]


def _mean(differences: Sequence[float], *, error: bool = False) -> str:
    """The mean, signed, and its standard error where asked for."""
    if not differences:
        return "–"
    n = len(differences)
    tail = f" ± {statistics.stdev(differences) / n**0.5:.2f}" if error and n > 1 else ""
    return f"{statistics.fmean(differences):+.2f}{tail}"


def report_task(task: Task, by_seed: dict[str, Results]) -> str:
    """The tables of one task, and whether it keeps within the points asked for."""
    seeds = sorted(by_seed, key=int)
    paper = dict(task.paper)

    def column(key: str) -> list[float | None]:
        return [value for s in seeds for value in by_seed[s].get(key, [])]

    with_torch = any(key.startswith("torch") for s in seeds for key in by_seed[s])
    rows: list[list[object]] = [["none", paper.get("none", ""), _cell(column("none")), *["", ""] * with_torch]]
    worst = 0.0
    for m in SGD_METHODS.values():
        mine, other = column(f"ours {m.name}"), column(f"torch {m.name}")
        row: list[object] = [m.title, paper.get(m.name, ""), _cell(mine)]
        if with_torch:
            differences = _differences(mine, other)
            worst = max([worst, *([abs(statistics.fmean(differences))] if differences else [])])
            row += [_cell(other), _mean(differences)]
        rows.append(row)
    head = [task.title, "paper", "instantft", *["PyTorch", "difference"] * with_torch]
    fp32 = column("cache fp32")
    caches: list[list[object]] = []
    four_bit = 0.0
    for codec in CODECS.values():
        values = column(f"cache {codec.name}")
        differences = _differences(values, fp32)
        if codec.nonnegative is not None and codec.nonnegative.bits == 4 and differences:
            four_bit = max(four_bit, abs(statistics.fmean(differences)))
        change = "" if codec.name == "fp32" else _mean(differences, error=True)
        caches.append([codec.name, paper.get(codec.name, ""), _cell(values), change])
    training = (
        f"Pre-training E={task.pretrain_epochs}, lr {task.pretrain_lr:g}; fine-tuning E={task.epochs}, lr {task.lr:g}; "
        f"B={BATCH}, R={RANK}; {len(seeds)} seeds. Paper: {task.source}."
    )
    lines = [table(head, rows), training]
    if with_torch:
        verdict = "within" if worst <= WITHIN_TORCH else "NOT within"
        lines.append(f"Largest difference of a mean to PyTorch's: {worst:.2f} points, {verdict} {WITHIN_TORCH:g}.")
    head = [f"{task.title}: Skip2-LoRA's cache", "paper", "instantft", "to fp32 ± standard error"]
    lines.append(table(head, caches))
    verdict = "within" if four_bit <= WITHIN_FP32 else "NOT within"
    lines.append(
        f"Largest difference of a 4-bit cache to fp32, over {len(fp32)} runs: {four_bit:.2f} points, "
        f"{verdict} {WITHIN_FP32:g}."
    )
    return "\n\n".join(lines)


def read_results(path: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Results]]:
    """What an earlier run has left in the file.

    Raises:
        SystemExit: it was made with other settings.
    """
    if path is None or not path.is_file():
        return {}
    old = json.loads(path.read_text())
    for name, now in settings.items():
        if old["settings"].get(name, now) != now:
            raise SystemExit(
                f"{path} must hold results of the same settings, but those of {name} differ: name a new file"
            )
    results: dict[str, dict[str, Results]] = old["results"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="written after every seed; results that are there are kept")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--quick", action="store_true", help="next to no training: does it work?")
    parser.add_argument("--engine", choices=("native", "reference"), default="native")
    args = parser.parse_args()
    tasks = {name: quick(TASKS[name]) if args.quick else TASKS[name] for name in args.tasks}
    settings = {name: json.loads(json.dumps(asdict(task))) for name, task in tasks.items()}
    results = read_results(args.json, settings)
    everything = {**{name: results.get(name, {}) for name in TASKS if name in results or name in tasks}}
    seeds = 1 if args.quick else args.seeds

    def save() -> None:
        kept = {
            **(json.loads(args.json.read_text())["settings"] if args.json and args.json.is_file() else {}),
            **settings,
        }
        save_json(args.json, {"machine": machine(), "settings": kept, "results": everything})

    with ProcessPoolExecutor(args.jobs) as pool:
        began = time.monotonic()
        futures: dict[Future[Results], tuple[str, str]] = {}
        for name, task in tasks.items():
            for seed in range(seeds):
                have = everything[name].setdefault(str(seed), {})
                missing = [key for key in wanted(not args.no_torch) if key not in have]
                if missing:
                    future = pool.submit(run_seed, name, task, seed, args.engine, missing)
                    futures[future] = (name, str(seed))
        for n, future in enumerate(as_completed(futures), 1):
            name, seed_name = futures[future]
            everything[name][seed_name].update(future.result())
            save()
            elapsed = time.monotonic() - began
            print(f"{n}/{len(futures)}: {name}, seed {seed_name}, after {elapsed:.0f} s", file=sys.stderr, flush=True)
    print("\n\n".join(report_task(task, everything[name]) for name, task in tasks.items()))


if __name__ == "__main__":
    main()

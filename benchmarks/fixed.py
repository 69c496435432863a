"""Accuracy of the hardware core's arithmetic beside floating point.

    python -m benchmarks.fixed --json build/fixed.json            all of it; goes on where it stopped
    python -m benchmarks.fixed --cases fashion-75 damage2 --seeds 3

The same base, samples, start, order and cache (nf4-hw) on both sides: `float` is the native engine; `q24` and `q18` are
the engine `fixed` with the configurations k26 and ecp5-85f; `fp32` is the native engine with a cache that loses
nothing, which says what the cache costs, whoever reads it. `host` is the adapter that the core has trained, used by the
native engine, beside the one that floating point has trained; `core` is what the core itself predicts, from taps in 4
bits, beside floating point that does the same, and beside floating point with records as they are. Gaps are float less
fixed, in points, with the standard error of their mean over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.common import ROOT, data_file, machine, save_json, table
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.cache.codecs import codec
from instantft.cache.store import memory_store
from instantft.data.protocols import BATCH, RANK, TASKS, Samples, Task, drifted
from instantft.engine import Engine, Tensors, get_engine
from instantft.experiments.accuracy import accuracy, base_network, base_params
from instantft.experiments.core import Settings, Where
from instantft.experiments.images import ANGLES, coloured, sizes, turned
from instantft.hw.engine import METHOD, FixedEngine
from instantft.hw.fixed import CODEC
from instantft.solvers import sgd

CORES = {"q24": "k26", "q18": "ecp5-85f"}
"""A configuration of each profile of formats."""

ASKED = 0.3
"""Points that the mean over the seeds may be below floating point's."""

SETTINGS = Settings()
CASES: dict[str, Task] = {
    **{f"{name}-{angle}": turned(name, angle, SETTINGS) for name in ("fashion", "mnist") for angle in ANGLES},
    "colour": coloured(max(sizes(SETTINGS)), SETTINGS),
    **{name: TASKS[name] for name in ("damage1", "damage2", "har")},
    "har-fast": replace(TASKS["har"], lr=0.1, epochs=TASKS["har"].epochs // 5),
}

Row = dict[str, float]

GAPS = {"host": ("host", "float"), "core, both in 4 bits": ("core", "float in 4 bits"), "core": ("core", "float")}
"""What is compared with what."""


def train(engine: Engine, net: Network, task: Task, tune: Samples, seed: int, cache: str) -> Adapter:
    """Skip2-LoRA's adapter."""
    store = memory_store(cache, net.spec.record, len(tune[0]))
    return sgd.fit(
        engine, net, METHOD, *tune, store=store,
        rank=RANK, epochs=task.epochs, batch_size=BATCH, lr=task.lr, seed=seed,
    ).adapter  # fmt: skip


def in_4_bits(engine: Engine, net: Network, tensors: Tensors, test: Samples) -> float:
    """Accuracy in percent of an adapter in floating point on records that went through the cache."""
    spec, cache, x = net.spec, codec(CODEC), test[0]
    right = 0
    for at in range(0, len(x), 1000):
        rows = engine.records(spec, net.tensors, x[at : at + 1000])
        decoded = cache.decode(cache.encode(rows, spec.record), spec.record)
        *taps, c = (x[at : at + 1000], *(decoded[:, s.offset : s.offset + s.size] for s in spec.record.segments))
        added = (x_k @ tensors[f"lora.{k}-{spec.L}.A"] @ tensors[f"lora.{k}-{spec.L}.B"] for k, x_k in enumerate(taps))
        y = c + sum(added)
        right += int((y.argmax(axis=1) == test[1][at : at + 1000]).sum())
    return 100 * right / len(x)


def run(task: Task, seed: int, where: Where) -> Row:
    """The accuracies of one seed, in percent, and how many values were cut off."""
    native = get_engine("native")
    net = base_network(base_params(task, seed), where)
    tune, test = drifted(task, where.data, seed)
    tensors = train(native, net, task, tune, seed, CODEC).tensors
    whole = train(native, net, task, tune, seed, "fp32").tensors
    found: Row = {
        "fp32": accuracy(native, net, whole, test) or 0.0,
        "float": accuracy(native, net, tensors, test) or 0.0,
        "float in 4 bits": in_4_bits(native, net, tensors, test),
    }
    for name, config in CORES.items():
        core = FixedEngine(config)
        began = time.perf_counter()
        tensors = train(core, net, task, tune, seed, CODEC).tensors
        found[f"{name} seconds"] = time.perf_counter() - began
        found[f"{name} saturated"] = sum(asdict(core.seen).values())
        found[f"{name} core"] = accuracy(core, net, tensors, test) or 0.0
        found[f"{name} host"] = accuracy(native, net, tensors, test) or 0.0
    return found


def report(results: dict[str, dict[str, Row]]) -> str:
    """A row a case, and whether the gaps keep within the points asked for."""
    rows, worst = [], dict.fromkeys(GAPS, (0.0, ""))
    for case, by_seed in results.items():
        means = (f"{statistics.fmean(r[name] for r in by_seed.values()):.2f}" for name in ("fp32", "float"))
        row: list[object] = [case, len(by_seed), *means]
        for name in CORES:
            for title, (side, other) in GAPS.items():
                gaps = [r[other] - r[f"{name} {side}"] for r in by_seed.values()]
                error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
                row.append(f"{statistics.fmean(gaps):+.2f} ± {error:.2f}")
                worst[title] = max(worst[title], (statistics.fmean(gaps), f"{case}, {name}"))
        row.append(f"{sum(r[f'{name} saturated'] for r in by_seed.values() for name in CORES):,.0f}")
        rows.append(row)
    head = ["case", "seeds", "fp32 %", "float %", *(f"{name} {title}" for name in CORES for title in GAPS), "saturated"]
    said = "; ".join(f"{title} {gap:+.2f} ({where})" for title, (gap, where) in worst.items())
    return f"{table(head, rows)}\n\nLargest mean gaps: {said}. Asked: at most {ASKED}."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bases", type=Path, default=ROOT / "build" / "bases", help="folder of pre-trained networks")
    parser.add_argument("--json", type=Path, help="written after every run; results that are there are kept")
    args = parser.parse_args()
    results: dict[str, dict[str, Row]] = {}
    if args.json and args.json.is_file():
        results = json.loads(args.json.read_text())["results"]
    args.bases.mkdir(parents=True, exist_ok=True)
    where = Where(data_file(""), args.bases)
    for case in args.cases:
        by_seed = results.setdefault(case, {})
        for seed in range(args.seeds):
            if str(seed) not in by_seed:
                by_seed[str(seed)] = run(CASES[case], seed, where)
                save_json(args.json, {"machine": machine(), "results": results})
                print(f"{case}, seed {seed}: {by_seed[str(seed)]}", file=sys.stderr, flush=True)
    print(report({case: results[case] for case in CASES if results.get(case)}))


if __name__ == "__main__":
    main()

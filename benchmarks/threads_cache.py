"""InstantFT's Fig. 7b in small, on 1 and 2 threads, and what a cache too small for all samples costs.

    python -m benchmarks.threads_cache --json build/threads_cache.json
    python -m benchmarks.threads_cache --quick

The same ten passes over 1,024 images four ways: inference only, Skip-LoRA without a cache, with an fp32 cache, with a
4-bit one. Then Skip2-LoRA with a bounded cache that has room for a part of the samples: time, and the share of
accesses served from it. Runs take turns; medians.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import interleaved, load, machine, save_json, scaled, table, timed
from instantft.backbones.builtin import Network
from instantft.cache.store import Store, memory_store
from instantft.data.drift import rotate
from instantft.engine import Engine, get_engine
from instantft.methods import METHODS
from instantft.solvers import sgd
from instantft.spec import lenet5

BATCH = 20
LR = 0.1
CACHES = {"fp32 cache": "fp32", "4-bit cache (nf4)": "nf4", "4-bit cache (relu4)": "relu4"}
ONE_PASS, ALL_PASSES = "inference only, one pass", "inference only, a pass an epoch"
SHARES = (0, 25, 50, 75, 100)
"""Room in the bounded cache, in percent of the samples."""


class Bench:
    """One network and one set of samples, adapted in several ways."""

    def __init__(self, engine: Engine, T: int, E: int, quick: bool = False) -> None:
        data = load("mnist.npz", quick)
        rows = np.random.default_rng(0).choice(len(data["test_x"]), T, replace=False)
        turned = rotate(scaled(data["test_x"][rows]), 90)
        self.engine, self.T, self.E = engine, T, E
        self.x = np.ascontiguousarray(turned.reshape(T, -1))
        self.y: NDArray[np.int32] = data["test_y"][rows].astype(np.int32)
        few = min(6000, 6 * T)
        train = scaled(data["train_x"][:few].reshape(few, -1))
        self.base: Network = sgd.pretrain(
            engine, lenet5((1, 28, 28)), train, data["train_y"][:few].astype(np.int32), epochs=1, lr=LR
        )[0]
        self.hit_rate: dict[str, float] = {}

    def inference(self, passes: int, threads: int) -> float:
        def run() -> None:
            for _ in range(passes):
                self.engine.forward(self.base.spec, self.base.tensors, self.x, threads)

        return timed(run)

    def tune(self, codec: str | None, capacity: int, threads: int) -> float:
        store: Store | None = None

        def run() -> None:
            nonlocal store
            store = memory_store(codec, self.base.spec.record, capacity) if codec and capacity else None
            sgd.fit(
                self.engine, self.base, METHODS["skip-lora"], self.x, self.y, epochs=self.E, batch_size=BATCH, lr=LR,
                threads=threads, store=store,
            )  # fmt: skip

        seconds = timed(run)
        if store is not None:
            accesses = store.hits + store.misses
            self.hit_rate[f"{codec}, {capacity}"] = store.hits / accesses
        return seconds


def measure(bench: Bench, repeats: int, threads: tuple[int, ...]) -> dict[str, Any]:
    jobs: dict[str, Callable[[], float]] = {}
    for n in threads:
        jobs[f"{ONE_PASS}, {n}"] = partial(bench.inference, 1, n)
        jobs[f"{ALL_PASSES}, {n}"] = partial(bench.inference, bench.E, n)
        jobs[f"no cache, {n}"] = partial(bench.tune, None, 0, n)
        for name, codec in CACHES.items():
            jobs[f"{name}, {n}"] = partial(bench.tune, codec, bench.T, n)
    rooms = {share: math.ceil(bench.T * share / 100) for share in SHARES}
    for codec in ("fp32", "relu4"):
        for share, room in rooms.items():
            jobs[f"{codec}, {share} %"] = partial(bench.tune, codec, room, 1)
    seen = interleaved(jobs, repeats)
    return {
        "seconds": {name: statistics.median(values) for name, values in seen.items()},
        "all": seen,
        "hit_rate": {
            f"{codec}, {share} %": bench.hit_rate.get(f"{codec}, {room}", 0.0)
            for codec in ("fp32", "relu4")
            for share, room in rooms.items()
        },
        "bytes": {
            f"{codec}, {share} %": memory_store(codec, bench.base.spec.record, room).nbytes if room else 0
            for codec in ("fp32", "relu4")
            for share, room in rooms.items()
        },
    }


def report(result: dict[str, Any], bench: Bench, threads: tuple[int, ...]) -> str:
    seconds = result["seconds"]
    rows = []
    for name in (ONE_PASS, ALL_PASSES, "no cache", *CACHES):
        label = name if name in (ONE_PASS, ALL_PASSES) else f"Skip-LoRA, {name}"
        times = [seconds[f"{name}, {n}"] for n in threads]
        ratios = [f"{t / seconds[f'{ALL_PASSES}, {n}']:.2f}×" for t, n in zip(times, threads, strict=True)]
        rows.append([label, *(f"{t * 1e3:.1f}" for t in times), *ratios])
    head = [f"LeNet-5, {bench.T} images, {bench.E} epochs"]
    head += [f"{n} thread{'s' * (n > 1)}, ms" for n in threads] + [f"÷ passes, {n}" for n in threads]
    bounded = []
    for share in SHARES:
        row: list[object] = [f"{share} %"]
        for codec in ("fp32", "relu4"):
            key = f"{codec}, {share} %"
            row += [
                f"{seconds[key] * 1e3:.1f}",
                f"{result['hit_rate'][key] * 100:.1f} %",
                f"{result['bytes'][key] / 1000:.0f}",
            ]
        bounded.append(row)
    return "\n\n".join(
        [
            table(head, rows),
            table(
                ["room for", "fp32, ms", "hits", "kB", "relu4, ms", "hits", "kB"],
                bounded,
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny runs: does it work?")
    parser.add_argument("--engine", choices=("native", "reference"), default="native")
    args = parser.parse_args()
    threads = tuple(args.threads)
    bench = Bench(get_engine(args.engine), 100 if args.quick else 1024, 2 if args.quick else 10, args.quick)
    result = measure(bench, 1 if args.quick else args.repeats, threads)
    print(report(result, bench, threads))
    save_json(args.json, {"machine": machine(), "samples": bench.T, "epochs": bench.E, **result})


if __name__ == "__main__":
    main()

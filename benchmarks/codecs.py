"""How much each codec loses, how much room and how much time it takes, on made-up and on real activations.

    python -m benchmarks.codecs --json build/codecs.json
    python -m benchmarks.codecs --quick

Relative squared error is Σ(v − v̂)² / Σv², on ReLU(N(0, 1)) in the shape of LeNet-5's record, and on the record of
LeNet-5 pre-trained on Fashion-MNIST, run over test images turned by 75°: all of it, and tap by tap. Times are processor
time of a sample on one thread, medians of interleaved runs: running the network and writing its record; and a step of
Skip2-LoRA (rank 4, batches of 20) that reads the record.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import clock, interleaved, load, machine, orders, save_json, scaled, table, timed
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.codecs import CODECS, Codec
from instantft.cache.store import memory_store
from instantft.data.drift import rotate
from instantft.engine import Engine, Floats, get_engine
from instantft.methods import method
from instantft.solvers import sgd
from instantft.spec import RecordSpec, lenet5


def made_up(record: RecordSpec, T: int) -> Floats:
    """(T, width): ReLU(N(0, 1)) in the taps after a ReLU, N(0, 1) in the output."""
    rng = np.random.default_rng(0)
    rows = np.zeros((T, record.width), np.float32)
    for s in record.segments:
        values = rng.standard_normal((T, s.size)).astype(np.float32)
        rows[:, s.offset : s.offset + s.size] = np.maximum(values, 0) if s.nonnegative else values
    return rows


def real(engine: Engine, images: int, epochs: int, T: int, quick: bool = False) -> tuple[Network, Floats]:
    """A network trained on upright images, and T turned ones."""
    data, spec = load("fashion_mnist.npz", quick), lenet5((1, 28, 28))
    x = scaled(data["train_x"][:images].reshape(images, -1))
    base, _ = sgd.pretrain(engine, spec, x, data["train_y"][:images].astype(np.int32), epochs=epochs, lr=0.1)
    turned = rotate(scaled(data["test_x"][:T]), 75)
    return base, np.ascontiguousarray(turned.reshape(T, -1))


def errors(codec: Codec, rows: Floats, record: RecordSpec) -> dict[str, float]:
    """Relative squared error of every segment, and of the whole record."""
    back = codec.decode(codec.encode(rows, record), record)
    lost = (rows.astype(np.float64) - back) ** 2
    power = rows.astype(np.float64) ** 2
    found = {"all": float(lost.sum() / power.sum())}
    for s in record.segments:
        part = slice(s.offset, s.offset + s.size)
        found[s.name] = float(lost[:, part].sum() / power[:, part].sum())
    return found


def times(engine: Engine, base: Network, x: Floats, epochs: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a sample of filling a cache, and of a step that reads it."""
    spec, m, T = base.spec, method("skip2-lora"), len(x)
    numbers, y = np.arange(T), (np.arange(T) % spec.C).astype(np.int32)
    tensors = {**base.tensors, **initial(m, spec, 4, 0)}
    order = orders(T, epochs, 0)

    def jobs(codec: str) -> dict[str, Callable[[], float]]:
        store = memory_store(codec, spec.record, T)

        def fill() -> float:
            store.forget(numbers)
            return timed(lambda: engine.fill(spec, tensors, x, numbers, store))

        def step() -> float:
            trainer = engine.trainer(spec, tensors, m, 4, x, y, numbers=numbers, store=store, batch_size=20, lr=0.01)
            return timed(lambda: trainer.epochs(order)) / epochs

        return {f"{codec} fill": fill, f"{codec} step": step}

    seen = interleaved({name: job for codec in CODECS for name, job in jobs(codec).items()}, rounds)
    found = {name: median(seconds) / T * 1e6 for name, seconds in seen.items()}
    return {codec: {"fill": found[f"{codec} fill"], "step": found[f"{codec} step"]} for codec in CODECS}


def report(result: dict[str, Any], record: RecordSpec) -> str:
    names = [s.name for s in record.segments]
    rows = [
        [
            name,
            r["bytes"],
            f"{r['made up']['all'] * 100:.3g}",
            f"{r['real']['all'] * 100:.3g}",
            *(f"{r['real'][n] * 100:.3g}" for n in names),
            f"{r['time']['fill']:.1f}",
            f"{r['time']['step']:.2f}",
        ]
        for name, r in result.items()
    ]
    head = [
        "codec",
        "bytes a sample",
        "ReLU(N(0,1)), %",
        "real record, %",
        *(f"{n}, %" for n in names),
        "fill, µs",
        "step, µs",
    ]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a barely trained network: does it work?")
    parser.add_argument("--engine", choices=("native", "reference"), default="native")
    args = parser.parse_args()
    T = 100 if args.quick else 1024
    record = lenet5((1, 28, 28)).record
    clock.count_cpu()
    engine = get_engine(args.engine)
    base, x = real(engine, 500 if args.quick else 60_000, 1 if args.quick else 3, T, args.quick)
    taps = engine.records(base.spec, base.tensors, x)
    took = times(engine, base, x, *((1, 1) if args.quick else (10, 9)))
    normal = made_up(record, T)
    result = {
        name: {
            "bytes": codec.bytes_per_sample(record),
            "made up": errors(codec, normal, record),
            "real": errors(codec, taps, record),
            "time": took[name],
        }
        for name, codec in CODECS.items()
    }
    print(report(result, record))
    save_json(args.json, {"machine": machine(), "samples": T, "codecs": result})


if __name__ == "__main__":
    main()

"""Times predicted by the cost model beside times measured, of all methods on both networks of the papers.

    PYTHONPATH=src OPENBLAS_NUM_THREADS=1 python -m benchmarks.predicted [--quick] [--json FILE]

The machine is calibrated first, on networks of other shapes; then every method is run in interleaved rounds, on real
data, and the medians are compared. Times are those of the wall, or of the processor where those are fewer, so that what
else runs on the machine counts for less.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from instantft.backbones.builtin import Network
from instantft.calibrating import ROUNDS, Case, calibrate
from instantft.data.drift import rotate
from instantft.engine import Engine, get_engine
from instantft.methods import METHODS, method
from instantft.solvers import sgd
from instantft.spec import dnn, lenet5

from .common import announce, load, machine, save_json, scaled, table

__all__ = ["WITHIN"]

WITHIN = 0.25
"""Relative error that is asked for."""

ALSO = (
    ("ft-last", "fp32"),
    ("lora-last", "fp32"),
    ("skip2-lora", "nf4"),
    ("skip2-lora", "relu4"),
    ("skip-ridge", "relu4"),
)
"""Methods with other caches than their own."""


def _tasks(engine: Engine, quick: bool) -> dict[str, tuple[Network, np.ndarray, np.ndarray]]:
    """The fan's DNN on its 470 samples, LeNet-5 on 1,024 images turned by 75 degrees, both after pre-training."""
    fan, fashion = load("fan_damage1.npz", quick), load("fashion_mnist.npz", quick)
    T, few = (128, 300) if quick else (1024, 6000)
    x, y = fan["pretrain_x"], fan["pretrain_y"].astype(np.int32)
    small, _ = sgd.pretrain(engine, dnn(256, 3), x, y, epochs=10, lr=0.02)
    images, labels = scaled(fashion["train_x"][:few]).reshape(few, -1), fashion["train_y"][:few].astype(np.int32)
    net, _ = sgd.pretrain(engine, lenet5((1, 28, 28)), images, labels, epochs=1 if quick else 3)
    turned = np.ascontiguousarray(rotate(scaled(fashion["test_x"][:T]), 75).reshape(T, -1), np.float32)
    return {
        "DNN, fan": (small, np.ascontiguousarray(fan["finetune_x"], np.float32), fan["finetune_y"].astype(np.int32)),
        "LeNet-5, Fashion-MNIST": (net, turned, fashion["test_y"][:T].astype(np.int32)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of small runs: no numbers to believe")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    chosen = parser.parse_args(arguments)
    rounds = 1 if chosen.quick else ROUNDS + 1
    engine = get_engine()
    tasks = _tasks(engine, chosen.quick)
    announce("calibrating")
    calibration = calibrate(engine, lambda done: announce(f"calibrating: {done:.1f}"), rounds)
    cases = [
        (task, Case(base, m, codec, x, y))
        for task, (base, x, y) in tasks.items()
        for m, codec in (
            *((m, "fp32" if m.cached else None) for m in METHODS.values()),
            *((method(name), codec) for name, codec in ALSO),
        )
    ]
    times: list[list[float]] = [[] for _ in cases]
    for done in range(-1, rounds):
        for i, (task, case) in enumerate(cases):
            announce(f"round {done + 1}/{rounds}: {task}, {case.method.name}")
            seconds = sum(case.seconds(engine))
            if done >= 0:
                times[i].append(seconds)
    announce("")
    rows, found, ratios = [], [], []
    for (task, case), seen in zip(cases, times, strict=True):
        each = [calibration.seconds(work) for work in case.work()]
        assert None not in each, "the calibration has no rate for some kind of work"
        predicted, measured = sum(s for s in each if s is not None), median(seen)
        ratio = predicted / measured
        found.append(
            {
                "task": task,
                "method": case.method.name,
                "cache": case.codec,
                "predicted": predicted,
                "measured": measured,
            }
        )
        name = f"{task}: {case.method.name} {case.codec or ''}".strip()
        rows.append((name, f"{predicted * 1e3:.1f}", f"{measured * 1e3:.1f}", f"{ratio:.2f}"))
    print(table(("method", "predicted ms", "measured ms", "ratio"), rows))
    ratios = [f["predicted"] / f["measured"] for f in found]  # type: ignore[operator]
    own = [
        r for r, (_, case) in zip(ratios, cases, strict=True) if case.codec == ("fp32" if case.method.cached else None)
    ]
    for name, some in (("methods as they are", own), ("with other caches too", ratios)):
        print(
            f"\n{name}: {min(some):.2f} to {max(some):.2f}; "
            f"{sum(abs(r - 1) <= WITHIN for r in some)} of {len(some)} within {WITHIN:.0%}"
        )
    print(f"\nNine in ten of what the calibration timed are within {calibration.error:.0%} of what it says.")
    save_json(chosen.json, {"machine": machine(), "runs": found, "rates": dict(calibration.rates)})


if __name__ == "__main__":
    main()

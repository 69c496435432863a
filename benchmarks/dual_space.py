"""SGD in the space of samples against SGD in the space of features: one thread, both in turn, processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.dual_space --json build/dual_space.json
    python -m benchmarks.dual_space --quick                    does it run?

Skip-LoRA, rank 4, batches of 20, one tap of N values, random samples. Primal is this machine's best engine. An *epoch*
is timed with everything built and the cache filled. *Gram* is what the dual does first (K and X·A(0)) and last (Xᵀ·C).
A *fit* is all of `sgd.fit`, where "auto" decides from N, T and E alone. The first table has the width of the issue, the
second says from which N and E on the dual pays, and whether auto knows.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.common import clock, interleaved, machine, orders, save_json, table
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.store import memory_store
from instantft.engine import Engine, get_engine
from instantft.methods import METHODS
from instantft.solvers import sgd
from instantft.solvers.dual import DualTrainer, Space, taps_in_dual
from instantft.solvers.records import Records
from instantft.spec import LayerSpec, NetSpec

M, RANK, BATCH, CLASSES = METHODS["skip2-lora"], 4, 20, 10
LR = 1e-3
WIDTH, SAMPLES = 100_352, 256
WIDTHS = (256, 1024, 4096, 16_384)
EPOCHS = (10, 100)
TARGET = 10
"""Times as fast as the primal that an epoch at WIDTH and SAMPLES must be."""


class Work:
    """A network with one tap, and T samples of it."""

    def __init__(self, engine: Engine, N: int, T: int) -> None:
        rng = np.random.default_rng(0)
        self.engine, self.T = engine, T
        self.base = Network.init(NetSpec((N,), (LayerSpec("fc", CLASSES),)), 0)
        self.x = rng.standard_normal((T, N), np.float32)
        self.y = rng.integers(0, CLASSES, T).astype(np.int32)
        self.start = initial(M, self.base.spec, RANK, 0)
        self.numbers = np.arange(T, dtype=np.int64)
        self.store = memory_store("fp32", self.base.spec.record, T)
        engine.fill(self.base.spec, self.base.tensors, self.x, self.numbers, self.store)

    def dual(self) -> DualTrainer:
        records = Records(self.engine, self.base, self.x, self.numbers, self.store)
        return DualTrainer(records, self.y, self.start, M, (True,), batch_size=BATCH, lr=LR)

    def epoch(self, space: Space, E: int) -> float:
        """Seconds an epoch."""
        spec = self.base.spec
        trainer = self.dual() if space == "dual" else self.engine.trainer(
            spec, {**self.base.tensors, **self.start}, M, RANK, self.x, self.y,
            numbers=self.numbers, store=self.store, batch_size=BATCH, lr=LR,
        )  # fmt: skip
        order = orders(self.T, E, 1)
        began = clock.now()
        stats = trainer.epochs(order)
        seconds = clock.now() - began
        assert stats.diverged_at is None
        return seconds / E

    def gram(self) -> float:
        """Seconds before the first step and after the last."""
        began = clock.now()
        self.dual().tensors()
        return clock.now() - began

    def fit(self, space: Space, E: int) -> float:
        """Seconds of a whole fit, its cache made and filled."""
        began = clock.now()
        store = memory_store("fp32", self.base.spec.record, self.T)
        sgd.fit(
            self.engine, self.base, M, self.x, self.y,
            rank=RANK, epochs=E, batch_size=BATCH, lr=LR, store=store, space=space,
        )  # fmt: skip
        return clock.now() - began

    def auto(self, E: int) -> str:
        dual = taps_in_dual("auto", M, self.base.spec.tap_widths, self.T, RANK, E, BATCH)
        return "dual" if any(dual) else "primal"


def medians(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    return {name: statistics.median(seen) for name, seen in interleaved(jobs, repeats).items()}


def wide(engine: Engine, N: int, T: int, epochs: Sequence[int], repeats: int) -> tuple[str, dict[str, float]]:
    """The table of one width, and its figures in seconds."""
    w = Work(engine, N, T)
    jobs: dict[str, Callable[[], float]] = {
        "epoch primal": partial(w.epoch, "primal", 3),
        "epoch dual": partial(w.epoch, "dual", 30),
        "gram": w.gram,
    }
    for E in epochs:
        jobs |= {f"fit primal {E}": partial(w.fit, "primal", E), f"fit dual {E}": partial(w.fit, "dual", E)}
    seen = medians(jobs, repeats)
    rows: list[list[object]] = []
    for title, key in (("an epoch", "epoch {}"), *((f"a fit, {E} epochs", f"fit {{}} {E}") for E in epochs)):
        primal, dual = seen[key.format("primal")], seen[key.format("dual")]
        rows.append([title, f"{1e3 * primal:.2f}", f"{1e3 * dual:.2f}", f"{primal / dual:.1f} ×"])
    lines = [
        table([f"N = {N:,}, T = {T}", "primal, ms", "dual, ms", "faster"], rows),
        f"Gram matrix, X·A(0) and Xᵀ·C: {1e3 * seen['gram']:.1f} ms; it takes "
        f"{seen['gram'] / max(seen['epoch primal'] - seen['epoch dual'], 1e-9):.1f} epochs to earn them.",
    ]
    return "\n\n".join(lines), seen


def break_even(
    engine: Engine, widths: Sequence[int], samples: Sequence[int], epochs: Sequence[int], repeats: int
) -> tuple[str, dict[str, float]]:
    """Over widths, samples and epochs: how much faster a whole fit in the dual is, and what auto takes."""
    rows: list[list[object]] = []
    found: dict[str, float] = {}
    for T in samples:
        for N in widths:
            w = Work(engine, N, T)
            cells: list[object] = [T, f"{N:,}"]
            for E in epochs:
                jobs: dict[str, Callable[[], float]] = {
                    "primal": partial(w.fit, "primal", E),
                    "dual": partial(w.fit, "dual", E),
                }
                seen = medians(jobs, repeats)
                ratio = found[f"{T} {N} {E}"] = seen["primal"] / seen["dual"]
                cells.append(f"{ratio:.2f} ({w.auto(E)})")
            rows.append(cells)
    head = ["T", "N", *(f"{E} epochs (auto takes)" for E in epochs)]
    return table(head, rows), found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", default=None)
    parser.add_argument("--quick", action="store_true", help="small and once: does it run?")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clock.count_cpu()
    engine = get_engine(args.engine)
    repeats = 1 if args.quick else args.repeats
    N, T, widths, samples, epochs = (
        (2000, 40, (64, 500), (40,), (2, 4)) if args.quick else (WIDTH, SAMPLES, WIDTHS, (256, 1024), EPOCHS)
    )
    text, seen = wide(engine, N, T, epochs, repeats)
    print(text, end="\n\n")
    ratio = seen["epoch primal"] / seen["epoch dual"]
    verdict = "met" if ratio >= TARGET else "NOT met"
    if not args.quick:
        print(f"An epoch in the dual at least {TARGET} times as fast: {ratio:.1f}, {verdict}.", end="\n\n")
    even, ratios = break_even(engine, widths, samples, epochs, repeats)
    print(even)
    save_json(args.json, {"machine": machine(), "seconds": seen, "fit ratios": ratios})


if __name__ == "__main__":
    main()

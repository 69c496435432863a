"""The watcher's loop on real drift while some of the labels are wrong.

    python -m benchmarks.noisy_labels
    python -m benchmarks.noisy_labels --quick

The papers' tasks: 300 samples of the world that the network was trained in, then those it is to be fine-tuned on, each
with a label at once, which is another class with probability 0, 0.1, 0.2 or 0.3 (`PARTS`). At the end somebody asks for
an adaptation. What is asked for (docs/reliability.md): on clean labels of the new world's test set, the live adapter
is at most a point below the better of the frozen network and of the adapter fitted last, accepted or not. The fan's
test set is another recording, so a world of its own; what counts is a quarter of the one that is fine-tuned on, kept
back, and the other recording is shown beside it. Nothing is tuned on these streams: the loop has its defaults.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import TASKS, base, drifted, pretraining
from benchmarks.common import machine, save_json, table
from instantft.adapters import Adapter
from instantft.backbones.builtin import Network
from instantft.engine import forward, get_engine
from instantft.watch.journal import Journal
from instantft.watch.loop import Command, Loop, Message, Sample

PARTS = (0.0, 0.1, 0.2, 0.3)
NAMES = ("damage1", "damage2", "fashion", "mnist")
BEFORE = 300
SEEDS = 5


def wrongly(rng: np.random.Generator, y: Any, part: float, C: int) -> Any:
    """Each label is another one with this probability."""
    return np.where(rng.random(len(y)) < part, (y + rng.integers(1, C, len(y))) % C, y)


def one(name: str, part: float, seed: int) -> tuple[float, ...]:
    """Accuracy in % on clean labels: of the frozen network, the adapter fitted last, and the live one; then the same on
    the fan's other recording."""
    engine, task = get_engine(), TASKS[name]
    net: Network = base(engine, name, task, seed)
    rng = np.random.default_rng([seed, round(100 * part)])
    x0, y0 = pretraining(task)
    known = rng.choice(len(y0), BEFORE, replace=False)
    (x, y), (test_x, test_y) = drifted(task, seed)
    order = rng.permutation(len(y))
    asked = [(test_x, test_y)]
    if name.startswith("damage"):
        back, order = order[: len(y) // 4], order[len(y) // 4 :]
        asked.insert(0, (x[back], y[back]))
    said = wrongly(rng, y[order], part, net.spec.C)
    stream: list[Message] = [Sample(a, None, int(b)) for a, b in zip(x0[known], y0[known], strict=True)]
    stream += [Sample(a, None, int(b)) for a, b in zip(x[order], said, strict=True)]
    fitted: list[Adapter] = []

    def work(job: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(job())
        fitted.append(future.result().adapter)
        return future

    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), net, net.mean, net.std, keep=2000)
        loop = Loop(net, engine, journal, work, seed=seed)
        for message in [*stream, Command("adapt", {})]:
            loop.feed([message])
            loop.poll()
        live = journal.live
        journal.close()

    def right(adapter: Adapter | None, x: Any, y: Any) -> float:
        tensors = {**net.tensors, **({} if adapter is None else adapter.tensors)}
        return 100 * float((forward(engine, net.spec, tensors, x).argmax(axis=1) == y).mean())

    return tuple(right(adapter, *set_) for set_ in asked for adapter in (None, fitted[-1], live))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--tasks", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="one seed of one task")
    args = parser.parse_args()
    rows, kept = [], []
    for name in args.tasks[:1] if args.quick else args.tasks:
        for part in PARTS[-1:] if args.quick else PARTS:
            runs = np.array([one(name, part, seed) for seed in range(1 if args.quick else args.seeds)])
            gap = runs[:, :2].max(axis=1) - runs[:, 2]
            means = [f"{v:.1f}" for v in runs.mean(axis=0)]
            gaps = [f"{gap.mean():.1f}", f"{gap.max():.1f}"]
            rows.append([name, f"{part:.0%}", *means[:3], *gaps, " / ".join(means[3:]) or "–"])
            kept.append({"task": name, "wrong": part, "runs": runs.tolist()})
    print(
        table(
            ["task", "wrong labels", "frozen", "last fitted", "live", "gap, mean", "largest", "other recording"], rows
        )
    )
    save_json(args.json, {"machine": machine(), "rows": kept})


if __name__ == "__main__":
    main()

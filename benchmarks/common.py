"""What the measurements share: data, starts, operations, medians of interleaved runs, tables.

T samples, R rank, E epochs.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantft.cost import cost
from instantft.experiments.core import machine
from instantft.methods import SGD_METHODS, Method
from instantft.solvers import sgd
from instantft.spec import NetSpec

__all__ = [
    "ROOT",
    "announce",
    "clock",
    "data_file",
    "interleaved",
    "load",
    "machine",
    "made_up",
    "orders",
    "run_flops",
    "save_json",
    "scaled",
    "spread",
    "step_flops",
    "table",
    "timed",
]

ROOT = Path(__file__).resolve().parent.parent

Floats = NDArray[np.float32]


def data_file(name: str) -> Path:
    """A file of the data folder: $INSTANTFT_DATA, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("INSTANTFT_DATA") or ROOT.parent / "shared" / "data")
    return folder / name


def made_up(name: str) -> dict[str, NDArray[Any]]:
    """Random arrays of the names, types and shapes of a data file, though fewer: enough to see that things run."""
    rng = np.random.default_rng(0)
    if name == "fan_damage1.npz":
        x = {f"{part}_x": rng.random((470, 256), np.float32) for part in ("pretrain", "finetune", "test")}
        return x | {key.replace("_x", "_y"): np.arange(470) % 3 for key in x}
    sizes = {"train": 1000, "test": 300}
    x = {f"{part}_x": rng.integers(0, 256, (n, 28, 28)).astype(np.uint8) for part, n in sizes.items()}
    return x | {f"{part}_y": np.arange(n) % 10 for part, n in sizes.items()}


MADE_UP = ("fan_damage1.npz", "fashion_mnist.npz", "mnist.npz")


def load(name: str, quick: bool = False) -> dict[str, NDArray[Any]]:
    """The arrays of a data file; where it is not there and the run is `quick`, random ones, and a line that says so.

    Raises:
        SystemExit: it is not there.
    """
    path = data_file(name)
    if quick and name in MADE_UP and not path.is_file():
        print(f"Random numbers stand in for {path}, which is not there: times and accuracies mean nothing.\n")
        return made_up(name)
    if not path.is_file():
        raise SystemExit(f"this needs {path}: set INSTANTFT_DATA to the folder that holds {name}")
    with np.load(path, allow_pickle=False) as z:
        return {key: z[key] for key in z.files}


def scaled(images: NDArray[Any]) -> Floats:
    """Pixels 0 … 255 as float32 in 0 … 1, as the package scales them."""
    return np.asarray(images.astype(np.float32) / np.float32(255), np.float32)


def orders(T: int, E: int, seed: int) -> NDArray[np.int32]:
    """(E, T): the orders in which `sgd.fit` visits the samples, so that both sides make the same steps."""
    return sgd._orders(sgd._rng(seed, 0), E, T)


def step_flops(spec: NetSpec, method: Method, rank: int = 4, *, cached: bool | None = None) -> int:
    """Operations a sample of a step of training, the cache filled."""
    c = cost(spec, method, rank)
    if method.cached if cached is None else cached:
        assert c.forward_cached is not None
        return c.forward_cached + c.backward
    return c.forward + c.backward


def run_flops(spec: NetSpec, method: Method, T: int, E: int, rank: int = 4, *, cached: bool | None = None) -> int:
    """Operations of a whole fine-tuning of T samples over E epochs, filling the cache included."""
    cached = method.cached if cached is None else cached
    fill = cost(spec, SGD_METHODS["ft-last"], rank).forward if cached else 0
    return T * (fill + E * step_flops(spec, method, rank, cached=cached))


def interleaved(jobs: Mapping[str, Callable[[], float]], repeats: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Run the jobs in turn, A B C A B C …, `repeats` times after a round that is not counted.

    Each job returns its own seconds, so that it decides what is timed.
    """
    seen: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(-int(warm), repeats):
        for name, job in jobs.items():
            announce(f"round {i + 1}/{repeats}: {name}" if i >= 0 else f"warm-up: {name}")
            seconds = job()
            if i >= 0:
                seen[name].append(seconds)
    announce("")
    return seen


class Clock:
    """Seconds: of the wall, or, on a machine that others use too, of this process's own processor time.

    For work on one thread in this process the two agree where nothing else runs.
    """

    def __init__(self) -> None:
        self.name = "wall"
        self.now = time.perf_counter

    def count_cpu(self) -> None:
        """From now on count processor time."""
        self.name = "processor"
        self.now = time.process_time


clock = Clock()


def timed(job: Callable[[], Any]) -> float:
    """Seconds a call takes, by `clock`."""
    start = clock.now()
    job()
    return clock.now() - start


def announce(text: str) -> None:
    """A line of progress on a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text[:110]}", end="", file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, with one decimal."""
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {sd:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def save_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the result, all of it or nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    part.replace(path)

"""What the measurements share: data, starts, operations, medians of interleaved runs, tables.

T samples, N inputs, M outputs of a layer, R rank, E epochs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantft.methods import Method, adapter_types, connections, layer_types
from instantft.solvers import sgd
from instantft.spec import NetSpec

__all__ = [
    "ROOT",
    "adapter_flops",
    "announce",
    "data_file",
    "interleaved",
    "load",
    "machine",
    "network_flops",
    "orders",
    "run_flops",
    "save_json",
    "spread",
    "table",
    "timed",
]

ROOT = Path(__file__).resolve().parent.parent

Floats = NDArray[np.float32]


def data_file(name: str) -> Path:
    """A file of the data folder: $INSTANTFT_DATA, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("INSTANTFT_DATA") or ROOT.parent / "shared" / "data")
    return folder / name


def load(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of a data file.

    Raises:
        SystemExit: it is not there.
    """
    path = data_file(name)
    if not path.is_file():
        raise SystemExit(f"this needs {path}: set INSTANTFT_DATA to the folder that holds {name}")
    with np.load(path, allow_pickle=False) as z:
        return {key: z[key] for key in z.files}


def orders(T: int, E: int, seed: int) -> NDArray[np.int32]:
    """(E, T): the orders in which `sgd.fit` visits the samples, so that both sides make the same steps."""
    return sgd._orders(sgd._rng(seed, 0), E, T)


# Operations a sample, as InstantFT's Table 1 counts them: 2 a multiply-add, 1 a bias, 1 a ReLU, 3 a 2×2 pool; the
# gradients of what is trained and of what they pass through, and no others. Batch norm, which that table does not have:
# 2 by running statistics and 1 for its gradient, 7 and 8 by batch statistics.


def network_flops(spec: NetSpec, method: Method | None = None) -> tuple[int, int]:
    """Forward and backward operations a sample of the network alone; without a method, forward only."""
    types = layer_types(method, spec.L) if method else ["FC_y"] * spec.L
    batch_statistics = method is not None and method.norms == "train"
    forward = backward = 0
    for k, (layer, g, kind) in enumerate(zip(spec.layers, spec.geometry, types, strict=True)):
        taps_a_output = g.N if layer.kind == "fc" else g.in_shape[0] * layer.kernel[0] * layer.kernel[1]
        macs = taps_a_output * g.M
        letters = kind[4:]
        forward += 2 * macs + g.M + g.M * layer.relu
        forward += (layer.pool**2 - 1) * g.n_out if layer.pool > 1 else 0
        forward += (7 if batch_statistics else 2) * g.M * layer.batch_norm
        backward += 2 * macs * ("w" in letters) + g.M * ("b" in letters) + 2 * macs * ("x" in letters)
        passes = any("x" in t for t in types[k + 1 :])  # a gradient arrives at this layer's output
        if passes:
            backward += g.M * layer.relu + (8 if batch_statistics else 1) * g.M * layer.batch_norm
    return forward, backward


def adapter_flops(spec: NetSpec, method: Method, rank: int) -> tuple[int, int]:
    """Forward and backward operations a sample of the adapters."""
    forward = backward = 0
    for (i, j), kind in zip(connections(method, spec.L), adapter_types(method, spec.L), strict=True):
        N, M = spec.geometry[i].N, spec.geometry[j - 1].M
        forward += 2 * rank * (N + M)
        backward += 2 * rank * (2 * M + N + N * kind.endswith("x"))
    return forward, backward


def run_flops(spec: NetSpec, method: Method, T: int, E: int, rank: int = 4, *, cached: bool | None = None) -> float:
    """Operations of a whole fine-tuning of T samples over E epochs, the cache fill included."""
    cached = method.cached if cached is None else cached
    forward, backward = network_flops(spec, method)
    adapter = sum(adapter_flops(spec, method, rank))
    if not cached:
        return float(T) * E * (forward + backward + adapter)
    last = 2 * spec.geometry[-1].N * spec.C + spec.C if method.weights == "last" else 0
    return float(T) * (forward + E * (backward + adapter + last))


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


def timed(job: Callable[[], Any]) -> float:
    """Seconds a call takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


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


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cpus": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def save_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write the result, all of it or nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    part.replace(path)

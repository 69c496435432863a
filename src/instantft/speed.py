"""How long a run will take on this machine: work counted from the shape, times what a unit of each kind takes here.

    seconds = Σ_k work_k · rate_k

`fill_work` and `train_work` count, per kind, what the engines really execute: multiply-adds of padded layers, values
that pass, steps, records. `calibrating.calibrate` finds the rates by timing small made-up networks. A `Calibration` is
kept in a small JSON file in the user's cache folder and is good for the machine, version and engine that made it.

Times are those of `FitResult.seconds`: arrays in memory to an adapter in memory, one thread, the method's own step.
T samples, B batch size, E epochs, R rank, D sum of the taps' widths, C outputs.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import files
from .cost import linear_macs
from .errors import FileError
from .methods import Method, connections, layer_types, trainable
from .solvers.closed import KEPT, SCORED
from .solvers.dual import Space, taps_in_dual
from .solvers.ridge import FEW, MANY
from .solvers.step import AVERAGE, MOST
from .spec import PAD, NetSpec, pad

__all__ = ["Calibration", "calibration_file", "fill_work", "load_calibration", "save_calibration", "train_work"]

Work = Mapping[str, float]

FORMAT = 1


CHUNK = 64
"""Samples whose records are looked up together in a training (IFT_CHUNK of the core)."""


def _lanes(n: int) -> int:
    """Samples that n take as long as where samples lie side by side in registers: the last panel may be half a one."""
    return -(-n // (PAD // 2)) * (PAD // 2)


def _frozen(work: dict[str, float], spec: NetSpec, n: float, batch: int, until: int | None = None) -> None:
    """n samples through the frozen layers below `until`, `batch` at a time; convolutions run in panels of PAD."""
    if not spec.own:
        return
    panels = n * _lanes(batch) / batch
    for k, (y, g) in enumerate(zip(spec.layers[:until], spec.geometry, strict=False)):
        conv = y.kind == "conv"
        work["frozen conv" if conv else "frozen fc"] += panels * linear_macs(spec)[k] if conv else n * g.N * pad(g.M)
        work["frozen values"] += (panels if conv else n) * (g.M if conv else pad(g.M))


def fill_work(spec: NetSpec, T: int, codec: str) -> Work:
    """Work of running the frozen network once over T samples, and of writing their records."""
    work: dict[str, float] = defaultdict(float, fills=1.0)
    _frozen(work, spec, T, PAD)
    work[f"write {codec}"] += T * spec.record.width
    return work


def train_work(
    spec: NetSpec,
    m: Method,
    T: int,
    *,
    rank: int,
    epochs: int,
    batch_size: int,
    codec: str | None,
    space: Space = "auto",
    own_step: bool = True,
) -> Work:
    """Work of a training, after the cache is filled; of a foreign network, without running it.

    Args:
        spec: the network.
        m: a row of the table of methods.
        T, rank, epochs, batch_size, space: of the run, as in `solvers.sgd.fit`.
        codec: of the cache, which holds all samples; None: there is none.
        own_step: whether the learning rate is found from the records (`solvers.step`), where the method can.
    """
    if m.solver == "ridge":
        return _ridge(spec, T, codec)
    work: dict[str, float] = defaultdict(float)
    work["runs"] += 1
    R = -(-rank // 4) * 4
    B = min(batch_size, T)
    samples, steps = epochs * T, epochs * math.ceil(T / B)
    work["steps"], work["samples"] = float(steps), float(samples)
    types, L = layer_types(m, spec.L), spec.L
    general = [k for k in range(L) if set(types[k][3:]) & set("wb") or m.adapters == "layers" or m.norms != "frozen"]
    first = min(general, default=L)
    width = spec.record.width
    if m.cacheable and own_step:
        n = min(T, MOST)
        pairs = connections(m, L, spec.first_tap)
        columns = rank + AVERAGE if len(pairs) == 1 else rank
        work["products"] += n * sum(spec.geometry[i].N * columns for i, _ in pairs)
        work["eigenvalue"] += n * (len(pairs) * columns or spec.tap_widths[-1] + 1)
        work["own steps"] += 1
        looks = 2 if len(pairs) == 1 else 1
        if codec is None:
            _frozen(work, spec, looks * n, n)
        else:
            work[f"decode {codec}"] += looks * n * width
    if m.rows_only:
        used = [spec.geometry[i].N for i, _ in connections(m, L, spec.first_tap)]
        dual = taps_in_dual(space, m, spec.tap_widths, T, rank, epochs, batch_size) if codec else ()
        if any(dual):
            _dual(work, used, dual, T, rank, epochs, batch_size)
            return work
    if codec is None:
        chunk = CHUNK // B * B if B < CHUNK else B
        _frozen(work, spec, samples if spec.own else T, chunk, None if first == L or not spec.own else first)
    elif codec != "fp32":
        work[f"read {codec}"] += samples * width
    if m.adapters in ("skip", "last"):
        used = [pad(spec.geometry[i].N) for i, _ in connections(m, L, spec.first_tap)]
        work["skip"] += 2 * samples * R * sum(used)
        work["skip outputs"] += samples * R * len(used) * pad(spec.C)
        work["skip weights"] += steps * R * sum(used) * 2
        return work
    lanes = steps * _lanes(B)
    macs = linear_macs(spec)
    for k in range(first, L):
        y, g, wanted = spec.layers[k], spec.geometry[k], types[k][3:]
        conv = y.kind == "conv"
        here = lanes * macs[k] if conv else samples * g.N * pad(g.M)
        name = "conv" if conv else "fc"
        work[f"step {name}"] += here
        work[f"step {name} gradients"] += here * (("w" in wanted) + ("x" in wanted))
        values = lanes * (g.M + g.n_out) if conv else samples * pad(g.M)
        work[f"step {name} values"] += values * (2 if any("x" in t[3:] for t in types) or "w" in wanted else 1)
        if y.batch_norm:
            work["norms"] += values
    if m.adapters == "layers":
        for i, j in connections(m, L):
            work["layer adapters"] += 3 * samples * R * (pad(spec.geometry[i].N) + pad(spec.geometry[j - 1].M))
    work["updates"] += steps * sum(math.prod(s) for s in trainable(m, spec, rank).values())
    return work


def _dual(
    work: dict[str, float], widths: list[int], dual: tuple[bool, ...], T: int, R: int, epochs: int, batch_size: int
) -> None:
    """Steps in the space of samples (`solvers.dual`), in NumPy."""
    for N, sample_space in zip(widths, dual, strict=True):
        work["gram"] += T * T * N if sample_space else 0
        work["products"] += 2 * T * N * R + epochs * T * T * R if sample_space else 2 * epochs * T * N * R
    work["dual steps"] += epochs * math.ceil(T / batch_size) * (3 + len(widths))


def _ridge(spec: NetSpec, T: int, codec: str | None) -> Work:
    work: dict[str, float] = defaultdict(float)
    D, C, width = sum(spec.tap_widths), spec.C, spec.record.width
    few = min(T, FEW)
    work["ridge runs"] += 1
    work["choices"] += few**3
    if codec is None:
        _frozen(work, spec, T, PAD)
    elif codec != "fp32":
        work[f"decode {codec}"] += T * width
    work["gram"] += T * T * D if min(KEPT, D) >= T else (few * few + min(T, MANY) ** 2) * D
    work["outputs"] += T * D * C
    if T <= D:
        work["gram"] += T * T * D if T > KEPT else 0
        work["factor"] += T**3
    else:
        n = D + 1
        work["features"] += T * n
        work["system"] += (T + 2 * min(T, SCORED)) * n * n
        work["wide factor"] += n**3
    return work


@dataclass(frozen=True)
class Calibration:
    """What a unit of each kind of work takes on a machine, with one engine.

    Attributes:
        rates: seconds a unit, by kind.
        machine: what it was measured on (`this_machine`).
        error: relative error below which nine in ten of what was timed are.
    """

    rates: Work
    machine: Mapping[str, str]
    error: float

    def seconds(self, work: Work) -> float | None:
        """Seconds that this work takes; None where a kind of it was never timed."""
        if not work.keys() <= self.rates.keys():
            return None
        return sum(n * self.rates[kind] for kind, n in work.items())


def this_machine(engine: str) -> dict[str, str]:
    """What a calibration is good for: processor, engine, and the versions that decide how fast they are."""
    from . import __version__

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "node": platform.node(),
        "engine": engine,
        "isa": os.environ.get("INSTANTFT_ISA", ""),
        "instantft": __version__,
        "numpy": np.__version__,
    }


def calibration_file() -> Path:
    """Where the calibration is kept: instantft/calibration.json in the user's cache folder ($XDG_CACHE_HOME)."""
    return files.cache_folder() / "calibration.json"


def save_calibration(found: Calibration) -> Path:
    """Keep a calibration for later runs; the file is replaced whole or not at all.

    Raises:
        FileError: the user's cache folder cannot be written.
    """
    path = calibration_file()
    content = {
        "format": FORMAT,
        "machine": dict(found.machine),
        "rates": dict(found.rates),
        "error": found.error,
    }
    files.write_whole(path, json.dumps(content, indent=1).encode(), "a calibration")
    return path


def load_calibration(engine: str) -> tuple[Calibration | None, str]:
    """The calibration that was kept for this machine and an engine; or None, and why."""
    path, what = calibration_file(), "a calibration"
    if not path.exists():
        return None, f"there is no calibration in {path}"
    try:
        content = files.decode_json(files.read_small(path, what), what, path)
        rates, error = content["rates"], float(content["error"])
        if content["format"] != FORMAT or not isinstance(rates, dict) or not rates:
            raise ValueError
        rates = {str(kind): float(rate) for kind, rate in rates.items()}
        if not all(0 <= rate < math.inf for rate in (*rates.values(), error)):
            raise ValueError
        made_on = dict(content["machine"])
    except (FileError, KeyError, TypeError, ValueError, OverflowError):
        return None, f"the calibration in {path} is damaged or of another version"
    here = this_machine(engine)
    other = [key for key in here if made_on.get(key) != here[key]]
    if other:
        return None, f"the calibration in {path} is of another {' and '.join(other)}"
    return Calibration(rates, here, error), ""

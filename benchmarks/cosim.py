"""The RTL against the golden model: every y, every parameter after every step, every byte of the cache, every logit.

    python -m benchmarks.cosim --seeds 200 --json build/cosim.json      small runs, drawn by seed
    python -m benchmarks.cosim --whole 16 32 80 --net mnist    a network of the papers, 1,024 samples x 10 epochs

Small runs are of the networks, lanes, ranks and formats below, with drawn numbers of samples, epochs, batches, learning
rates and magnitudes; weights and adapters of many reach the ends of their formats, so that values are cut off in them.
Every run has its own latencies of DRAM. Whole ones are Fashion-MNIST turned by 75 degrees where the data are there,
else random pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import save_json
from instantft.data.protocols import TASKS, drifted, pretraining, set_folder
from instantft.engine import get_engine
from instantft.hw import fixed, image
from instantft.hw.fixed import Frozen, Parameters, Saturations
from instantft.hw.formats import PROFILES, Ints
from instantft.hw.image import Launch
from instantft.hw.layout import BEAT, Build
from instantft.hw.sim import Simulator
from instantft.solvers import sgd
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5

__all__ = ["BUILDS", "Case", "Compared", "compare", "drawn", "whole"]

SMALL = NetSpec(
    (1, 12, 12),
    (
        LayerSpec("conv", 6, (3, 3), (1, 1), relu=True, pool=2),
        LayerSpec("conv", 18, (3, 3), relu=True, pool=2),
        LayerSpec("fc", 24, relu=True),
        LayerSpec("fc", 10),
    ),
)
"""All that LeNet-5 has, in small: two pixels at once, two groups of channels, padding, pooling, odd sizes."""

BUILDS = (
    Build(SMALL, 16, 4, PROFILES["q24"], "u8", 8),
    Build(SMALL, 48, 2, PROFILES["q24"], "u8", 5),
    Build(SMALL, 32, 4, PROFILES["q18"], "u8", 8),
    Build(dnn(40, 3, 20), 16, 4, PROFILES["q24"], "q", 20),
    Build(dnn(20, 16, 33), 32, 1, PROFILES["q18"], "q", 7),
)
"""Of the small runs."""


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        x: (T, N); order: (E, T); labels: (T,).
    """

    build: Build
    frozen: Frozen
    parameters: Parameters
    x: NDArray[np.float32]
    order: NDArray[np.int64]
    labels: NDArray[np.int64]
    lr: float
    batch_size: int


@dataclass(frozen=True)
class Compared:
    """What a run showed.

    Attributes:
        different: values (bytes of the cache) that are not the golden model's, by kind.
        compared: how many were looked at.
        saturated: values cut off, by the core's own counters.
        cycles: by the core's counters; host: the total as the host saw it.
        seconds: that simulating took.
    """

    different: dict[str, int]
    compared: dict[str, int]
    saturated: int
    cycles: dict[str, int]
    host: int
    steps: int
    seconds: float

    @property
    def same(self) -> bool:
        return not any(self.different.values())


def drawn(build: Build, seed: int) -> Case:
    """A small run."""
    rng = np.random.default_rng([seed, 5])
    net = build.net
    wild = bool(rng.random() < 0.4)

    def ints(shape: tuple[int, ...], scale: float) -> Ints:
        return np.clip(np.rint(rng.normal(0, scale * 4096, shape)), -(1 << 15), (1 << 15) - 1).astype(np.int64)

    spread = 3.0 if wild else float(rng.uniform(0.05, 0.4))
    shapes = net.parameters
    frozen = Frozen(
        tuple(ints(shapes[f"layers.{k}.weight"], spread) for k in range(net.L)),
        tuple(ints(shapes[f"layers.{k}.bias"], spread) for k in range(net.L)),
    )
    adapters = 4.0 if wild else 0.1
    limit = 1 << (build.formats.width - 1)
    parameters = Parameters(
        tuple(ints((n, build.rank), adapters) for n in net.tap_widths),
        tuple(ints((build.rank, net.C), adapters) for _ in net.tap_widths),
        int(rng.integers(-(1 << 15), 1 << 15)) if wild else 4096,
        rng.integers(-limit, limit, net.C) if wild else np.zeros(net.C, np.int64),
    )
    T = int(rng.integers(1, 2 * build.samples + build.batch + 3))
    E = int(rng.integers(1, 4))
    if build.input == "u8":
        x = (rng.integers(0, 256, (T, build.taps[0].size)) / 255).astype(np.float32)
    else:
        x = rng.normal(0, 60 if wild else 1, (T, build.taps[0].size)).astype(np.float32)
    batch = int(rng.integers(1, build.batch + 1))
    lr = float(rng.uniform(0.005, 0.9)) * min(batch, T % batch or batch)
    order = np.stack([rng.permutation(T) for _ in range(E)])
    return Case(build, frozen, parameters, x, order, rng.integers(0, net.C, T), lr, batch)


NETS = {"mnist": lenet5((1, 28, 28)), "colour": lenet5((3, 32, 32)), "fan": dnn(256, 3)}
"""Of whole runs: the papers'."""


def whole(lanes: int, formats: str = "q24", name: str = "mnist") -> Case:
    """A network of the papers on 1,024 samples (random ones but for MNIST's shape), 10 epochs in batches of 20."""
    task, rng = replace(TASKS["fashion"], pretrain=10_000), np.random.default_rng(0)
    net, folder, native = NETS[name], set_folder(), get_engine()
    if name == "mnist" and (folder / task.file).is_file():
        base, _ = sgd.pretrain(native, net, *pretraining(task, folder), epochs=2)
        x, y = drifted(task, folder, 0)[0]
        x = (np.rint(255 * x) / 255).astype(np.float32)
    else:
        x = (rng.integers(0, 256, (1024, net.geometry[0].N)) / 255).astype(np.float32)
        y = rng.integers(0, net.C, len(x)).astype(np.int32)
        base, _ = sgd.pretrain(native, net, x, y, epochs=1)
    build = Build(net, lanes, 4, PROFILES[formats], "q" if name == "fan" else "u8", 20)

    def ints(shape: tuple[int, ...], scale: float) -> Ints:
        return np.rint(rng.normal(0, scale * 4096, shape)).astype(np.int64)

    A = tuple(ints((n, 4), 0.05) for n in net.tap_widths)
    parameters = Parameters(A, tuple(ints((4, net.C), 0) for _ in A), 4096, np.zeros(net.C, np.int64))
    order = np.stack([rng.permutation(len(x)) for _ in range(10)])
    return Case(build, fixed.fold(net, base.tensors), parameters, x, order, y.astype(np.int64), 0.1, 20)


def steps(case: Case, entries: NDArray[np.uint8], seen: Saturations) -> Iterator[tuple[Ints, Parameters]]:
    """y (b, C) and the parameters after each batch, by the golden model."""
    build, parameters = case.build, case.parameters
    x0 = fixed.quantise_input(_samples(case), build.formats)
    *taps, c = fixed.decode(build.net.record, entries)
    for row in case.order:
        for start in range(0, len(row), case.batch_size):
            at = row[start : start + case.batch_size]
            eta = fixed.step_size(case.lr, len(at))
            parameters, trace = fixed.step(
                parameters, [t[at] for t in (x0, *taps)], c[at], case.labels[at], eta, build.formats, seen
            )
            yield trace.y, parameters


def compare(case: Case, simulator: Simulator) -> Compared:
    """Run a case on both sides: train, then predict with what was trained.

    Args:
        simulator: with traces.
    """
    build, formats = case.build, case.build.formats
    job = _launch(case, case.parameters, case.order, case.lr)
    began = time.perf_counter()
    got = simulator.run(job)
    seconds, host, trace = time.perf_counter() - began, simulator.cycles, simulator.trace
    assert trace is not None
    seen = Saturations()
    x0 = fixed.quantise_input(_samples(case), formats)
    values = fixed.frozen(build.net, case.frozen, x0, formats, seen)
    entries = fixed.encode(build.net.record, values, formats)
    cache = job.buffers["cache"].reshape(len(x0), -1)
    different = {"cache": int(np.count_nonzero(cache != entries)), "y": 0, "A": 0, "B": 0}
    compared = {"cache": entries.size, "y": 0, "A": 0, "B": 0}
    at, S, C, last = 0, got.steps, build.net.C, case.parameters
    rows = len(build.taps) * build.rank
    if (S * build.chunks, S * rows) != (len(trace.a), len(trace.b)) or len(trace.y) != case.order.size:
        raise AssertionError(
            f"the core must show {S} x {build.chunks} chunks, {S} x {rows} rows and {case.order.size} logits, "
            f"not {len(trace.a)}, {len(trace.b)} and {len(trace.y)}"
        )
    for i, (y, parameters) in enumerate(steps(case, entries, seen)):
        chunk, a = (v[i * build.chunks :][: build.chunks] for v in (trace.chunk, trace.a))
        row, b = (v[i * rows :][:rows] for v in (trace.row, trace.b))
        expected = image.adapter_bytes(build, parameters.A, parameters.B).view("<i2")
        wanted_a = expected[: a.size].reshape(a.shape)
        wanted_b = expected[build.a_beats * BEAT // 2 :].reshape(b.shape)
        assert sorted(chunk) == list(range(build.chunks)), chunk
        assert sorted(row) == list(range(rows)), row
        place = trace.sample[at : at + len(y)]
        different["A"] += int(np.count_nonzero(a != wanted_a[chunk]))
        different["B"] += int(np.count_nonzero(b[:, :C] != wanted_b[row][:, :C]))
        different["y"] += int(np.count_nonzero(trace.y[at : at + len(y), :C] != y[place]))
        compared["A"] += a.size
        compared["B"] += len(b) * C
        compared["y"] += y.size
        at, last = at + len(y), parameters
    A, B = image.parameters_of(build, job.buffers["out"])
    ours, theirs = (*A, *B), (*last.A, *last.B)
    different["out"] = sum(int(np.count_nonzero(o != t)) for o, t in zip(ours, theirs, strict=True))
    compared["out"] = sum(o.size for o in ours)
    different["saturations"] = sum(abs(n - got.saturations[kind]) for kind, n in asdict(seen).items())

    told = _launch(case, last, np.arange(len(x0))[None], None, job.buffers["cache"])
    simulator.run(told)
    *taps, c = fixed.decode(build.net.record, entries)
    y = fixed.forward(last, [x0, *taps], c, formats, Saturations())[1]
    different["logits"] = int(np.count_nonzero(image.logits_of(build, told.buffers["logits"]) != y))
    compared["logits"] = y.size
    return Compared(different, compared, sum(got.saturations.values()), got.cycles, host, S, seconds)


def _samples(case: Case) -> NDArray[Any]:
    return np.rint(255 * case.x.astype(np.float64)).astype(np.uint8) if case.build.input == "u8" else case.x


def _launch(
    case: Case, parameters: Parameters, order: NDArray[np.int64], lr: float | None, cache: Any = None
) -> Launch:
    return image.launch(
        case.build, case.frozen, parameters, case.x, order, case.labels, lr=lr, batch_size=case.batch_size, cache=cache
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0, help="small runs")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    everyone = list(range(len(BUILDS)))
    parser.add_argument("--builds", type=int, nargs="+", default=everyone, choices=everyone, help="of small runs")
    parser.add_argument("--whole", type=int, nargs="*", default=[], metavar="LANES")
    parser.add_argument("--formats", default="q24", choices=sorted(PROFILES), help="of whole runs")
    parser.add_argument("--net", default="mnist", choices=sorted(NETS), help="of whole runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: list[tuple[str, Compared]] = []
    programs = {}
    for seed in range(options.first, options.first + options.seeds):
        build = BUILDS[options.builds[seed % len(options.builds)]]
        if build not in programs:
            programs[build] = Simulator(build, trace=True).program
        core = Simulator(build, program=programs[build], trace=True, seed=seed)
        found.append((f"seed {seed}, {build.lanes} lanes, {build.formats.name}", compare(drawn(build, seed), core)))
        if not found[-1][1].same:
            print(found[-1][0], found[-1][1].different, flush=True)
    for lanes in options.whole:
        case = whole(lanes, options.formats, options.net)
        found.append(
            (f"{options.net}, {lanes} lanes, {options.formats}", compare(case, Simulator(case.build, trace=True)))
        )
        r = found[-1][1]
        print(found[-1][0], r.different, r.cycles, f"host {r.host}", f"{r.seconds:.0f} s", flush=True)
    wrong = [name for name, r in found if not r.same]
    saturating = sum(r.saturated > 0 for _, r in found)
    values = sum(sum(r.compared.values()) for _, r in found)
    print(f"{len(found)} runs, {values:,} values compared, {saturating} runs saturate, {len(wrong)} runs differ")
    if options.json:
        save_json(options.json, {"runs": [{"name": name, **asdict(r)} for name, r in found]})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

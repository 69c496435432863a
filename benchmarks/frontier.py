"""Accuracy against bytes a sample: the codecs, and records of fewer numbers that were tried beside them.

    python -m benchmarks.frontier --json build/frontier.json --png build/frontier.png      goes on where it stopped
    python -m benchmarks.frontier --tasks fashion --seeds 2 --no-times

Base networks, fine-tuning and test samples are those of `benchmarks.accuracy`, seed by seed. Every way of keeping
records is judged by what the product makes of what it gives back: closed form (`solvers.ridge`) and Skip2-LoRA, tested
on samples as they are. The ways:

codec       as the product has it.
pca d       each tap in the d directions that hold most of 256 of its own records; coordinates in NF4.
pca-base d  the same from 1,024 records of the base's training samples, so that it could be shipped with the base.
random d    each tap in d random directions.
frozen-A R  x·A only, for a random A of rank R and the raw input too, as float32; only B is trained. 30 numbers at R=4.
base-A      the same with the A of a ridge fit on 1,024 of the base's training samples, rank 10.
1 bit       zero or the mean of what is positive, by channel.

Coordinates are turned by a random rotation first, so that all of them are alike and one scale a tap serves.
T samples, N_k width of tap k, d directions kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import BATCH, RANK, TASKS, Samples, base, drifted, pretraining
from benchmarks.common import announce, interleaved, machine, save_json, table
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.codecs import CODECS, Codec, codec
from instantft.cache.store import Store, memory_store
from instantft.engine import Engine, Floats, Tensors, get_engine
from instantft.methods import METHODS
from instantft.solvers import sgd
from instantft.solvers.ridge import fit_ridge
from instantft.solvers.step import largest_eigenvalue
from instantft.spec import LayerSpec, NetSpec, RecordSpec, Segment, pad

FEW, MANY = 256, 1024
"""Records that a basis is made from: the device's own, and those of the base's training samples."""

IMAGE_EPOCHS, IMAGE_LR = 30, 0.02
"""Skip2-LoRA on images: at the papers' 0.1 some draws nearly diverge, which is more than what is to be seen."""

SOLVERS = ("ridge", "skip2-lora")
SKIP2 = METHODS["skip2-lora"]


@dataclass(frozen=True)
class Way:
    """A way of keeping records.

    Attributes:
        name: in the tables.
        codec: of the product, for the record or for the coordinates.
        kind: where directions come from; "": all values are kept.
        d: directions a tap.
    """

    name: str
    codec: str
    kind: str = ""
    d: int = 0

    @property
    def whole(self) -> bool:
        """True where the raw input is kept in few directions too."""
        return self.kind in ("frozen-A", "base-A")


WAYS = (
    *(Way(name, name) for name in CODECS),
    Way("1 bit", "1 bit"),
    *(Way(f"pca {d}", "relu4", "pca", d) for d in (8, 16, 32, 64, 128, 256)),
    *(Way(f"pca-base {d}", "relu4", "pca-base", d) for d in (16, 32, 64)),
    *(Way(f"random {d}", "relu4", "random", d) for d in (16, 32, 64, 128)),
    *(Way(f"frozen-A {R}", "fp32", "frozen-A", R) for R in (4, 16)),
    Way("frozen-A 64", "relu4", "frozen-A", 64),
    Way("base-A", "fp32", "base-A", 10),
    Way("base-A, NF4", "relu4", "base-A", 10),
)


@dataclass(frozen=True)
class Given:
    """What a solver sees of T samples."""

    x: Floats
    rows: Floats
    nbytes: int
    """A sample."""
    bases: dict[int, Floats]
    """Tap to its directions (N_k, d), orthonormal."""
    coordinates: list[Floats]
    """(T, d) of every tap in `bases`, as the codec gives them back."""


def one_bit(rows: Floats, record: RecordSpec) -> Floats:
    """Taps as zero or the mean of their channel's positive values."""
    out = rows.copy()
    for s in record.segments[:-1]:
        v = rows[:, s.offset : s.offset + s.size].reshape(len(rows), s.groups, -1)
        on = v > 0
        mean = (v * on).sum(axis=2, keepdims=True) / np.maximum(on.sum(axis=2, keepdims=True), 1)
        out[:, s.offset : s.offset + s.size] = (on * mean).reshape(len(rows), -1)
    return out


def coordinates_record(widths: Sequence[int], C: int) -> RecordSpec:
    """Layout of a record that holds a vector of so many coordinates for every tap, and the output."""
    segments: list[Segment] = []
    offset = 0
    for n in (*widths, C):
        segments.append(Segment(f"h{len(segments)}", n, 1, False, offset))
        offset += pad(n)
    return RecordSpec(tuple(segments))


def top_directions(X: Floats, d: int) -> Floats:
    """(N, d): orthonormal directions that hold most of X (n, N), by the eigenvectors of X·Xᵀ."""
    values, vectors = np.linalg.eigh(np.asarray(X @ X.T, np.float64))
    keep = np.argsort(values)[::-1][: min(d, X.shape[1])]
    keep = keep[values[keep] > 1e-9 * values.max()]
    return np.linalg.qr(X.T.astype(np.float64) @ vectors[:, keep])[0].astype(np.float32)


def rotated(P: Floats, rng: np.random.Generator) -> Floats:
    """The same subspace in turned directions, all of them alike."""
    Q = np.linalg.qr(rng.standard_normal((P.shape[1], P.shape[1])))[0]
    return np.asarray(P @ Q, np.float32)


@lru_cache(maxsize=4)
def trained_on(name: str, seed: int) -> tuple[list[Floats], Samples]:
    """Taps x^0 … x^{L-1} of MANY of the base's training samples, and these."""
    engine = get_engine()
    net = base(engine, name, TASKS[name], seed)
    x, y = pretraining(TASKS[name])
    some = np.random.default_rng([seed, 7]).permutation(len(x))[:MANY]
    x, y = np.ascontiguousarray(x[some]), y[some]
    return taps(net, x, engine.records(net.spec, net.tensors, x)), (x, y)


def taps(net: Network, x: Floats, rows: Floats) -> list[Floats]:
    return [x, *(rows[:, s.offset : s.offset + s.size] for s in net.spec.record.segments[:-1])]


@lru_cache(maxsize=4)
def base_pairs(name: str, seed: int) -> Tensors:
    """Tensors of a ridge fit of the base's own task."""
    engine = get_engine()
    net = base(engine, name, TASKS[name], seed)
    return fit_ridge(engine, net, *trained_on(name, seed)[1], seed=seed, taps="all").adapter.tensors


def directions(way: Way, name: str, net: Network, seed: int, own: list[Floats]) -> dict[int, Floats]:
    """The basis of every tap that gets one."""
    found: dict[int, Floats] = {}
    L = net.spec.L
    for k in range(0 if way.whole else 1, L):
        rng = np.random.default_rng([seed, 8, k])
        N = net.spec.tap_widths[k]
        if way.kind == "pca":
            P = top_directions(own[k][:FEW], way.d)
        elif way.kind == "pca-base":
            P = top_directions(trained_on(name, seed)[0][k], way.d)
        elif way.kind == "random":
            P = np.linalg.qr(rng.standard_normal((N, min(way.d, N))))[0].astype(np.float32)
        elif way.kind == "frozen-A":
            A = initial(SKIP2, net.spec, min(way.d, N), seed)[f"lora.{k}-{L}.A"]
            P = np.linalg.qr(A)[0].astype(np.float32)
        else:
            A = base_pairs(name, seed)[f"lora.{k}-{L}.A"]
            P = np.linalg.qr(A[:, np.abs(A).sum(axis=0) > 0])[0].astype(np.float32)
        found[k] = rotated(P, rng)
    return found


def written(c: Codec, rows: Floats, record: RecordSpec) -> Floats:
    return c.decode(c.encode(rows, record), record)


def given(engine: Engine, way: Way, name: str, net: Network, seed: int, x: Floats) -> Given:
    """What `way` gives back of the records of x."""
    record = net.spec.record
    rows = engine.records(net.spec, net.tensors, x)
    if way.codec == "1 bit":
        groups = sum(s.groups for s in record.segments[:-1])
        nbytes = 2 * groups + sum(-(-s.size // 8) for s in record.segments[:-1]) + 2 * net.spec.C
        return Given(x, one_bit(rows, record), nbytes, {}, [])
    c = codec(way.codec)
    if not way.kind:
        return Given(x, written(c, rows, record), c.bytes_per_sample(record), {}, [])
    own = taps(net, x, rows)
    bases = directions(way, name, net, seed, own)
    short = coordinates_record([P.shape[1] for P in bases.values()], net.spec.C)
    held = np.zeros((len(x), short.width), np.float32)
    last = record.segments[-1]
    values = [*(own[k] @ P for k, P in bases.items()), rows[:, last.offset : last.offset + last.size]]
    for s, v in zip(short.segments, values, strict=True):
        held[:, s.offset : s.offset + s.size] = v
    held = written(c, held, short)
    coordinates = [held[:, s.offset : s.offset + s.size] for s in short.segments]
    x, rows = x.copy(), rows.copy()
    for (k, P), h in zip(bases.items(), coordinates, strict=False):
        if k:
            s = record.segments[k - 1]
            rows[:, s.offset : s.offset + s.size] = h @ P.T
        else:
            x[:] = h @ P.T
    rows[:, last.offset : last.offset + last.size] = coordinates[-1]
    return Given(x, rows, c.bytes_per_sample(short), bases, coordinates[:-1])


def filled(net: Network, rows: Floats) -> Store:
    """A store that holds these rows."""
    store = memory_store("fp32", net.spec.record, len(rows))
    store.write(np.arange(len(rows)), rows)
    return store


def only_B(g: Given, c: Floats, y: NDArray[np.int32], L: int, epochs: int, seed: int) -> dict[str, Floats]:
    """SGD on B alone, y = c + Σ h_k·B_k, at half the largest stable step (`solvers.step`)."""
    H = np.concatenate(g.coordinates, axis=1).astype(np.float64)
    M = (1 - 1 / BATCH) * largest_eigenvalue(H) + float((H * H).sum(axis=1).max()) / BATCH
    Y = np.eye(c.shape[1])[y]
    B = np.zeros((H.shape[1], c.shape[1]))
    for order in sgd._orders(sgd._rng(seed, 0), epochs, len(y)):
        for start in range(0, len(y), BATCH):
            rows = order[start : start + BATCH]
            z = c[rows] + H[rows] @ B
            p = np.exp(z - z.max(axis=1, keepdims=True))
            B -= 2 / M / len(rows) * H[rows].T @ (p / p.sum(axis=1, keepdims=True) - Y[rows])
    tensors: dict[str, Floats] = {}
    start = 0
    for k, P in g.bases.items():
        tensors[f"lora.{k}-{L}.A"] = P
        tensors[f"lora.{k}-{L}.B"] = B[start : start + P.shape[1]].astype(np.float32)
        start += P.shape[1]
    return tensors


def adapted(engine: Engine, way: Way, solver: str, name: str, net: Network, g: Given, y: Any, seed: int) -> Any:
    """Tensors of the adapter."""
    task, L = TASKS[name], net.spec.L
    if solver == "ridge":
        return fit_ridge(engine, net, g.x, y, store=filled(net, g.rows), seed=seed).adapter.tensors
    epochs, lr = (IMAGE_EPOCHS, IMAGE_LR) if task.degrees is not None else (task.epochs, task.lr)
    if way.whole:
        last = net.spec.record.segments[-1]
        return only_B(g, g.rows[:, last.offset : last.offset + last.size], y, L, epochs, seed)
    store = filled(net, g.rows)
    fitted = sgd.fit(engine, net, SKIP2, g.x, y, rank=RANK, epochs=epochs, lr=lr, seed=seed, store=store)
    tensors = dict(fitted.adapter.tensors)
    for k, P in g.bases.items():  # what A starts with outside the basis, training has never seen
        A = f"lora.{k}-{L}.A"
        tensors[A] = P @ (P.T @ tensors[A])
    return tensors


def measure(engine: Engine, way: Way, solver: str, name: str, seed: int) -> tuple[float, int]:
    """Accuracy in percent, and bytes a sample."""
    task = TASKS[name]
    net = base(engine, name, task, seed)
    (x, y), (test_x, test_y) = drifted(task, seed)
    g = given(engine, way, name, net, seed, x)
    tensors = adapted(engine, way, solver, name, net, g, y, seed)
    logits = engine.forward(net.spec, {**net.tensors, **tensors}, test_x)
    return float((logits.argmax(axis=1) == test_y).mean() * 100), g.nbytes


# Times: LeNet-5, 1,024 images, ten epochs, one thread


def stand_in(net: Network, way: Way, widths: Sequence[int]) -> NetSpec:
    """A network whose records are as wide as the coordinates, so that the core's own cached steps can be timed."""
    first = widths[0] if way.whole else net.spec.tap_widths[0]
    rest = widths[1:] if way.whole else widths
    return NetSpec((first,), (*(LayerSpec("fc", n) for n in rest), LayerSpec("fc", net.spec.C)))


def time_codec(engine: Engine, name: str, solver: str) -> float:
    """Seconds of a whole fine-tuning with a codec's cache."""
    net = base(engine, "fashion", TASKS["fashion"], 0)
    tune, _ = drifted(TASKS["fashion"], 0)
    store = memory_store(name, net.spec.record, len(tune[0]))
    start = time.process_time()
    if solver == "ridge":
        fit_ridge(engine, net, *tune, store=store)
    else:
        sgd.fit(engine, net, SKIP2, *tune, rank=RANK, epochs=10, lr=IMAGE_LR, store=store)
    return time.process_time() - start


def time_way(engine: Engine, way: Way) -> float:
    """The same in few directions: frozen network, basis where it is made of own records, projection, cached epochs."""
    net = base(engine, "fashion", TASKS["fashion"], 0)
    (x, y), _ = drifted(TASKS["fashion"], 0)
    rows = engine.records(net.spec, net.tensors, x)
    bases = directions(way, "fashion", net, 0, taps(net, x, rows))
    start = time.process_time()
    own = taps(net, x, engine.records(net.spec, net.tensors, x))
    if way.kind == "pca":
        bases = directions(way, "fashion", net, 0, own)
    h = [own[k] @ P for k, P in bases.items()]
    seconds = time.process_time() - start
    spec = stand_in(net, way, [v.shape[1] for v in h])
    rng = np.random.default_rng(0)
    tensors = {n: np.asarray(rng.standard_normal(s) / s[0], np.float32) for n, s in spec.parameters.items()}
    small = Network(spec, tensors)
    store = memory_store(way.codec, spec.record, len(x))
    held = np.zeros((len(x), spec.record.width), np.float32)
    for s, v in zip(spec.record.segments, h[1:] if way.whole else h, strict=False):
        held[:, s.offset : s.offset + s.size] = v
    start = time.process_time()
    store.write(np.arange(len(x)), held)
    sgd.fit(
        engine, small, SKIP2, h[0] if way.whole else x, y, rank=RANK, epochs=10, lr=1e-3, store=store
    )  # the step's size costs no time
    return seconds + time.process_time() - start


def times(engine: Engine, rounds: int) -> dict[str, dict[str, float]]:
    """Way to its time relative to fp32's, by solver; only what was timed."""
    jobs: dict[str, Callable[[], float]] = {}
    for w in WAYS:
        if w.kind:
            jobs[f"skip2-lora {w.name}"] = partial(time_way, engine, w)
        elif w.codec in CODECS:
            for solver in SOLVERS:
                jobs[f"{solver} {w.name}"] = partial(time_codec, engine, w.codec, solver)
    seen = interleaved(jobs, rounds)
    found: dict[str, dict[str, float]] = {}
    for key, seconds in seen.items():
        solver, _, name = key.partition(" ")
        ratios = [a / b for a, b in zip(seconds, seen[f"{solver} fp32"], strict=True)]
        found.setdefault(name, {})[solver] = statistics.median(ratios)
    return found


# Report

Results = dict[str, dict[str, list[float]]]
"""Solver, task and way (`key_of`); seed; accuracy in percent and bytes a sample."""


def key_of(solver: str, task: str, way: Way) -> str:
    return f"{solver}/{task}/{way.name}"


def accuracies(results: Results, key: str) -> list[float]:
    by_seed = results.get(key, {})
    return [by_seed[s][0] for s in sorted(by_seed, key=int)]


def report(results: Results, found: dict[str, dict[str, float]], tasks: Sequence[str]) -> str:
    """A table for each solver: fp32's accuracy, and what each way changes."""
    parts = []
    for solver in SOLVERS:
        rows: list[list[object]] = []
        for w in WAYS:
            cells: list[object] = []
            changes = []
            for t in tasks:
                mine, exact = (accuracies(results, key_of(solver, t, v)) for v in (w, WAYS[0]))
                if not mine or len(mine) != len(exact):
                    cells.append("")
                    continue
                change = [a - b for a, b in zip(mine, exact, strict=True)]
                error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else 0.0
                changes.append(statistics.fmean(change))
                cells.append(f"{statistics.fmean(mine):.1f}" if w is WAYS[0] else f"{changes[-1]:+.2f} ± {error:.2f}")
            if not changes:
                continue
            size = next(iter(results[key_of(solver, tasks[0], w)].values()))[1]
            mean = "" if w is WAYS[0] or len(changes) < len(tasks) else f"{statistics.fmean(changes):+.2f}"
            ratio = found.get(w.name, {}).get(solver)
            rows.append([w.name, int(size), *cells, mean, f"{ratio:.2f}×" if ratio else ""])
        head = [f"{solver}: change to fp32, points", f"bytes, {tasks[0]}", *tasks, "mean", "time to fp32"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def draw(results: Results, task: str, path: Path) -> None:
    """Accuracy on one task against bytes a sample, for both solvers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    marks = {"": "o", "pca": "s", "pca-base": "D", "random": "^", "frozen-A": "v", "base-A": "P"}
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=False)
    for axis, solver in zip(axes, SOLVERS, strict=True):
        for kind, mark in marks.items():
            points = []
            for w in WAYS:
                values = accuracies(results, key_of(solver, task, w))
                if w.kind == kind and values:
                    size = next(iter(results[key_of(solver, task, w)].values()))[1]
                    points.append((size, statistics.fmean(values), w))
            if not points:
                continue
            points.sort(key=lambda p: p[2].d)
            sizes, means = [p[0] for p in points], [p[1] for p in points]
            axis.plot(sizes, means, mark, ls="-" if kind else "", lw=0.8, ms=5, label=kind or "codec")
            for size, mean, w in points:
                if kind in ("", "pca", "frozen-A") and w.codec[:3] != "nf4":  # others lie on these
                    text = str(w.d) if kind else w.name
                    axis.annotate(text, (size, mean), (0, 5), textcoords="offset points", ha="center", fontsize=6.5)
        axis.set_xscale("log")
        axis.margins(x=0.08, y=0.08)
        axis.set_xlabel("bytes a sample")
        axis.set_title(solver, fontsize=10)
        axis.grid(alpha=0.3, which="both", lw=0.4)
    axes[0].set_ylabel(f"accuracy, %: {TASKS[task].title}")
    axes[0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--ways", nargs="+", choices=[w.name for w in WAYS], default=[w.name for w in WAYS])
    parser.add_argument("--rounds", type=int, default=7, help="of the times")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--json", type=Path, help="written after every result; results that are there are kept")
    parser.add_argument("--png", type=Path, help="draw the frontier of the first task")
    args = parser.parse_args()
    engine = get_engine()
    results: Results = {}
    found: dict[str, dict[str, float]] = {}
    if args.json and args.json.is_file():
        old = json.loads(args.json.read_text())
        results, found = old["results"], old["times"]

    def save() -> None:
        save_json(args.json, {"machine": machine(), "results": results, "times": found})

    for solver in args.solvers:
        for name in args.tasks:
            for seed in range(args.seeds):
                for w in (w for w in WAYS if w.name in args.ways):
                    have = results.setdefault(key_of(solver, name, w), {})
                    if str(seed) not in have:
                        announce(f"{solver} {name} {w.name} seed {seed}")
                        have[str(seed)] = list(measure(engine, w, solver, name, seed))
                save()
    if not args.no_times and not found:
        found = times(engine, args.rounds)
        save()
    announce("")
    print(report(results, found, args.tasks))
    if args.png:
        draw(results, args.tasks[0], args.png)


if __name__ == "__main__":
    main()

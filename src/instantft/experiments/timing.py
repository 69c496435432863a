"""What takes how long: Skip2-LoRA, Tables 2, 6 and 7 and §4.3; InstantFT, Fig. 7b.

Times on one thread are processor time, so that other programs on the machine count as little as can be; times on
several threads are of the wall. Contestants take turns, and medians are shown. Every trial here runs by itself.

The C core makes a step of training in one piece, so where a paper splits its time, the split is that of the NumPy
engine, which computes the same steps one operation after the other.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters import initial
from ..backbones.builtin import Network
from ..cache.store import Store, memory_store
from ..cost import linear_macs
from ..data.protocols import BATCH, RANK, TASKS, Samples, Task, drifted, network
from ..engine import Engine, Floats, Tensors
from ..engine.reference import ReferenceEngine, ReferenceTrainer
from ..engine.reference import _forward as reference_forward
from ..methods import METHODS, SGD_METHODS, Method
from ..solvers import sgd
from ..spec import NetSpec
from . import plots
from .accuracy import FOUR_BIT, base_network, base_params, engine, small, task_of, with_base
from .core import (
    NOT_HERE,
    Numbers,
    Params,
    Picture,
    Results,
    Section,
    Settings,
    Table,
    Target,
    Trial,
    Where,
    extra,
    machine,
)

__all__ = [
    "ALL_PASSES",
    "CONTESTANTS",
    "ONE_PASS",
    "SKIP2_CACHE",
    "TABLE_2",
    "TABLE_6",
    "TABLE_7",
    "images_trial",
    "layer_times",
    "step_of_layers",
]

NETS = {"Fan": "damage1", "HAR": "har"}
"""Name in the paper to the task whose samples are used; the times of Damage1 and Damage2 are the same."""

TIMED_LR = 0.01
"""Learning rate of what is timed: at the papers' own a method may diverge, and times do not depend on it."""

Times = dict[str, list[float]]


def _measured(task: Task, run: Callable[[Params, Where], Numbers], seconds: float, **more: Any) -> Trial:
    """A trial that measures time: its numbers belong to this machine."""
    params = {**base_params(task, 0), **more, "machine": machine()["cpu"], "isa": os.environ.get("INSTANTFT_ISA", "")}
    return with_base(run, params, seconds, alone=True)


def _turns(jobs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of the seconds that the jobs return, A B C A B C …, after a round that does not count."""
    seen: Times = {name: [] for name in jobs}
    for n in range(rounds + 1):
        for name, job in jobs.items():
            seconds = job()
            if n:
                seen[name].append(seconds)
    return {name: statistics.median(values) for name, values in seen.items()}


def _one_thread() -> AbstractContextManager[object]:
    """NumPy's products on one thread."""
    limits: AbstractContextManager[object] = extra("threadpoolctl", "threadpoolctl").threadpool_limits(1)
    return limits


def _timed(job: Callable[[], object], threads: int = 1) -> float:
    now = time.process_time if threads == 1 else time.perf_counter
    began = now()
    job()
    return now() - began


def _fit(
    eng: Engine, net: Network, m: Method, tune: Samples, task: Task, epochs: int, cache: str | None, threads: int = 1,
    capacity: int | None = None,
) -> tuple[float, Store | None]:  # fmt: skip
    store: Store | None = None

    def job() -> None:
        nonlocal store
        room = len(tune[0]) if capacity is None else capacity
        store = memory_store(cache, net.spec.record, room) if cache and room else None
        sgd.fit(
            eng, net, m, *tune, rank=RANK, epochs=epochs, batch_size=BATCH, lr=TIMED_LR, seed=0, threads=threads,
            store=store, space="primal",
        )  # fmt: skip

    return _timed(job, threads), store


# -- Table 2: the layers of FT-All-LoRA

FORWARD = ("FC1", "LoRA1", "BN1", "Act1", "FC2", "LoRA2", "BN2", "Act2", "FC3", "LoRA3")
BACKWARD = ("FC3", "LoRA3", "Act2", "BN2", "FC2", "LoRA2", "Act1", "BN1", "FC1", "LoRA1")

PAPER_2 = {
    "Fan": {
        "forward": (71.80, 2.75, 2.22, 0.30, 17.52, 1.69, 2.23, 0.30, 0.50, 0.68),
        "backward": (1.28, 1.93, 0.29, 2.81, 34.03, 3.30, 0.29, 2.84, 49.47, 3.76),
    },
    "HAR": {
        "forward": (88.58, 1.72, 0.81, 0.11, 6.63, 0.61, 0.81, 0.11, 0.36, 0.25),
        "backward": (1.22, 1.05, 0.16, 1.55, 18.29, 1.78, 0.15, 1.53, 70.46, 3.80),
    },
}

BN_EPS = np.float32(1e-5)

Arrays = Mapping[str, NDArray[Any]]


class _Watch:
    """Adds up the seconds between one `mark` and the next, by name."""

    def __init__(self) -> None:
        self.seen: Times = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.seen.setdefault(name, []).append(now - self._last)
        self._last = time.perf_counter()


def step_of_layers(p: Arrays, x: NDArray[Any], y: NDArray[Any], watch: _Watch) -> dict[str, NDArray[Any]]:
    """A step of FT-All-LoRA on FC-BN-ReLU, FC-BN-ReLU, FC, one operation after the other, each timed.

    Args:
        p: the tensors of a `dnn` and its adapters k→k+1. x: (B, N). y: (B,).
        watch: told after every layer, "forward FC1" and so on.

    Returns:
        Gradients of all that is trained: W, b, gamma, beta, A, B.
    """
    B, L = np.float32(len(x)), 3
    taps, hidden, normed, deviation, active = [x], {}, {}, {}, {}
    watch.start()
    for k in range(L):
        z = taps[k] @ p[f"layers.{k}.weight"] + p[f"layers.{k}.bias"]
        watch.mark(f"forward FC{k + 1}")
        hidden[k] = taps[k] @ p[f"lora.{k}-{k + 1}.A"]
        z = z + hidden[k] @ p[f"lora.{k}-{k + 1}.B"]
        watch.mark(f"forward LoRA{k + 1}")
        if k == L - 1:
            break
        deviation[k] = np.sqrt(z.var(axis=0) + BN_EPS)
        normed[k] = (z - z.mean(axis=0)) / deviation[k]
        z = normed[k] * p[f"layers.{k}.bn.weight"] + p[f"layers.{k}.bn.bias"]
        watch.mark(f"forward BN{k + 1}")
        active[k] = np.maximum(z, 0)
        taps.append(active[k])
        watch.mark(f"forward Act{k + 1}")
    e = np.exp(z - z.max(axis=1, keepdims=True))
    g = e / e.sum(axis=1, keepdims=True)
    g[np.arange(len(y)), y] -= 1
    g /= B
    grads: dict[str, NDArray[Any]] = {}
    watch.start()
    for k in reversed(range(L)):
        if k < L - 1:
            g = g * (active[k] > 0)
            watch.mark(f"backward Act{k + 1}")
            grads[f"layers.{k}.bn.weight"] = (g * normed[k]).sum(axis=0)
            grads[f"layers.{k}.bn.bias"] = g.sum(axis=0)
            g = g - grads[f"layers.{k}.bn.bias"] / B - normed[k] * (grads[f"layers.{k}.bn.weight"] / B)
            g = g * (p[f"layers.{k}.bn.weight"] / deviation[k])
            watch.mark(f"backward BN{k + 1}")
        grads[f"layers.{k}.weight"] = taps[k].T @ g
        grads[f"layers.{k}.bias"] = g.sum(axis=0)
        below = g @ p[f"layers.{k}.weight"].T if k else g
        watch.mark(f"backward FC{k + 1}")
        gh = g @ p[f"lora.{k}-{k + 1}.B"].T
        grads[f"lora.{k}-{k + 1}.A"] = taps[k].T @ gh
        grads[f"lora.{k}-{k + 1}.B"] = hidden[k].T @ g
        if k:
            below = below + gh @ p[f"lora.{k}-{k + 1}.A"].T
        watch.mark(f"backward LoRA{k + 1}")
        g = below
    return grads


def layer_times(params: Params, where: Where) -> Numbers:
    """Median microseconds of every layer in a step of 20 samples."""
    net = base_network(params, where)
    tune, _ = drifted(task_of(params), where.data, 0)
    p = {**net.tensors, **initial(METHODS["ft-all-lora"], net.spec, RANK, 0)}
    watch = _Watch()
    rng = np.random.default_rng(0)
    with _one_thread():
        for _ in range(params["steps"]):
            rows = rng.integers(0, len(tune[0]), BATCH)
            step_of_layers(p, tune[0][rows], tune[1][rows], watch)
    return {name: statistics.median(values) * 1e6 for name, values in watch.seen.items()}


def _operations(spec: NetSpec) -> dict[str, int]:
    """Operations of every layer of FT-All-LoRA, counted as cost.py does."""
    counted: dict[str, int] = {}
    for k, (macs, g) in enumerate(zip(linear_macs(spec), spec.geometry, strict=True)):
        adapter = 2 * RANK * (g.N + g.M)
        counted[f"forward FC{k + 1}"] = 2 * macs + g.M
        counted[f"forward LoRA{k + 1}"] = adapter
        counted[f"backward FC{k + 1}"] = (4 if k else 2) * macs + g.M
        counted[f"backward LoRA{k + 1}"] = 4 * RANK * g.M + (4 if k else 2) * RANK * g.N
        if k < spec.L - 1:
            counted |= {f"forward BN{k + 1}": 2 * g.M, f"forward Act{k + 1}": g.M}
            counted |= {f"backward BN{k + 1}": 5 * g.M, f"backward Act{k + 1}": g.M}
    return counted


def _task(name: str, settings: Settings) -> Task:
    return small(TASKS[NETS[name]]) if settings.quick else TASKS[NETS[name]]


def _trial_2(name: str, settings: Settings) -> Trial:
    return _measured(_task(name, settings), layer_times, 3, steps=200 if settings.quick else 5000)


def _trials_2(settings: Settings) -> list[Trial]:
    return [_trial_2(name, settings) for name in NETS]


def _shares(values: Mapping[str, float], way: str, names: tuple[str, ...]) -> dict[str, float]:
    total = sum(values[f"{way} {n}"] for n in names)
    return {n: 100 * values[f"{way} {n}"] / total for n in names}


def _section_2(settings: Settings, found: Results) -> Section:
    paper: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    tables = []
    for way, names in (("forward", FORWARD), ("backward", BACKWARD)):
        columns = []
        for net in NETS:
            times = found(_trial_2(net, settings))
            task = task_of(_trial_2(net, settings).params)
            theirs = dict(zip(names, PAPER_2[net][way], strict=True))
            mine = _shares(times, way, names)
            counted = _shares(_operations(network(task)), way, names)
            paper[f"{net}, {way}"] = theirs
            ours[f"{net}, {way}"] = {"share": mine, "microseconds": {n: times[f"{way} {n}"] for n in names}}
            columns += [theirs, mine, counted]
        rows = [[n, *(f"{c[n]:.2f}" for c in columns)] for n in names]
        total = {net: sum(ours[f"{net}, {way}"]["microseconds"].values()) for net in NETS}
        rows.append(["all", *(t for net in NETS for t in ("100.00", f"100.00 ({total[net]:.0f} µs)", "100.00"))])
        head = [f"{way}, %", *(f"{net}: {what}" for net in NETS for what in ("paper", "ours", "operations"))]
        tables.append(Table(head, rows))
    wide = {
        net: [
            sum(side[n] for n in ("FC1", "FC2"))
            for side in (paper[f"{net}, forward"], ours[f"{net}, forward"]["share"])
        ]
        for net in NETS
    }
    shares = ", ".join(f"on {net} {mine:.0f} % beside {theirs:.0f} %" for net, (theirs, mine) in wide.items())
    note = (
        "Timed in NumPy on one thread, one operation after the other, because the C core makes a step in one piece."
        f" FC1 and FC2 take less of the forward pass than in the paper where NumPy's calls weigh: {shares}. On 20 rows"
        " every small operation costs its call, some microseconds, where the paper's C loops cost in proportion to"
        " their work, as the column of operations does."
    )
    return Section(paper, ours, "% of the pass", _steps(settings), note, tables)


def _steps(settings: Settings) -> int:
    return int(_trial_2("Fan", settings).params["steps"])


TABLE_2 = Target(
    "Time of every layer of FT-All-LoRA, forward and backward",
    "Skip2-LoRA, Table 2: shares in %",
    _trials_2,
    _section_2,
)

# -- Tables 6 and 7: a batch of training, a prediction

SPLIT = ("forward", "backward", "weight update")
ROWS = ("Train@batch", *SPLIT, "Predict@sample")

PAPER_6 = {
    "ft-all": (5.864, 2.812, 2.866, 0.186, 0.142),
    "ft-last": (2.633, 2.601, 0.030, 0.002, 0.144),
    "ft-bias": (3.721, 2.832, 0.885, 0.003, 0.148),
    "ft-all-lora": (6.053, 2.868, 2.993, 0.192, 0.150),
    "lora-all": (4.113, 2.942, 1.157, 0.014, 0.155),
    "lora-last": (2.642, 2.613, 0.026, 0.002, 0.143),
    "skip-lora": (2.952, 2.807, 0.136, 0.010, 0.151),
    "skip2-lora": (0.450, 0.309, 0.131, 0.010, 0.154),
}


class _WholeBatches(ReferenceEngine):
    """The NumPy engine, with records of a whole batch at a time: one by one, as it makes them so that they never depend
    on their batch, is no measure of what a forward pass costs."""

    def records(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        run = reference_forward(spec, tensors, [], x)
        out = np.zeros((len(x), spec.record.width), np.float32)
        for s, value in zip(spec.record.segments, [*run.x[1:], run.c], strict=True):
            out[:, s.offset : s.offset + s.size] = value
        return out


class _SplitTrainer(ReferenceTrainer):
    """The NumPy engine's steps, with a clock on forward and update; the rest of a step is backward."""

    seconds_forward = 0.0
    seconds_update = 0.0

    def _forward(self, rows: NDArray[np.int32]) -> Any:
        began = time.process_time()
        run = super()._forward(rows)
        self.seconds_forward += time.process_time() - began
        return run

    def _update(self, grads: dict[str, NDArray[Any]], run: Any) -> None:
        began = time.process_time()
        super()._update(grads, run)
        self.seconds_update += time.process_time() - began


def _split(net: Network, m: Method, tune: Samples, epochs: int, lr: float, cached: bool) -> dict[str, float]:
    """Milliseconds a batch: forward, backward and update of the NumPy engine over whole epochs."""
    T = len(tune[0])
    store = memory_store("fp32", net.spec.record, T) if cached else None
    tensors = {**net.tensors, **initial(m, net.spec, RANK, 0)}
    trainer = _SplitTrainer(
        _WholeBatches(), net.spec, tensors, m, RANK, *tune, np.arange(T, dtype=np.int64), store, BATCH, lr, 0.0
    )
    rng = np.random.default_rng(0)
    began = time.process_time()
    with _one_thread():
        for _ in range(epochs):
            trainer.epochs(rng.permutation(T).astype(np.int32)[None])
    total = time.process_time() - began
    batches = epochs * math.ceil(T / BATCH)
    parts = {"forward": trainer.seconds_forward, "weight update": trainer.seconds_update}
    parts["backward"] = total - sum(parts.values())
    return {name: seconds / batches * 1e3 for name, seconds in parts.items()}


def batch_times(params: Params, where: Where) -> Numbers:
    """Milliseconds of a batch of training and of a prediction, by method.

    Args:
        params: rounds; short: epochs of methods without a cache, whose batches all take the same time; epochs of the
            task: those of methods with one, whose first epoch is longer.
    """
    task, eng = task_of(params), engine(where.engine)
    net = base_network(params, where)
    tune, _ = drifted(task, where.data, 0)
    batches = math.ceil(len(tune[0]) / BATCH)

    def train(m: Method) -> float:
        epochs = task.epochs if m.cached else min(params["short"], task.epochs)
        return _fit(eng, net, m, tune, task, epochs, "fp32" if m.cached else None)[0] / (epochs * batches)

    def forward(tensors: Tensors) -> float:
        def job() -> None:
            for _ in range(params["short"]):
                eng.forward(net.spec, tensors, tune[0])

        return _timed(job) / (int(params["short"]) * batches)

    def predict(tensors: Tensors) -> float:
        sample, calls = tune[0][:1].copy(), 200

        def job() -> None:
            for _ in range(calls):
                eng.forward(net.spec, tensors, sample)

        return _timed(job) / calls

    tensors = {m.name: {**net.tensors, **initial(m, net.spec, RANK, 0)} for m in SGD_METHODS.values()}
    trained = _turns({m.name: partial(train, m) for m in SGD_METHODS.values()}, params["rounds"])
    uncached = {name: t for name, t in tensors.items() if not METHODS[name].cached}
    passed = _turns({name: partial(forward, t) for name, t in uncached.items()}, params["rounds"])
    predicted = _turns({name: partial(predict, t) for name, t in tensors.items()}, params["rounds"])
    return {
        m.name: {
            "Train@batch": trained[m.name] * 1e3,
            "Predict@sample": predicted[m.name] * 1e3,
            "forward, core": passed[m.name] * 1e3 if m.name in passed else None,
            **_split(net, m, tune, task.epochs if m.cached else min(params["short"], task.epochs), TIMED_LR, m.cached),
        }
        for m in SGD_METHODS.values()
    }


def _trial_67(name: str, settings: Settings) -> Trial:
    rounds, short = (1, 2) if settings.quick else (9, 20)
    return _measured(_task(name, settings), batch_times, 60 * rounds / 9, rounds=rounds, short=short)


def _section_67(name: str, settings: Settings, found: Results) -> Section:
    trial = _trial_67(name, settings)
    times = found(trial)
    paper: dict[str, Any]
    if name == "Fan":
        paper = {m: dict(zip(ROWS, cells, strict=True)) for m, cells in PAPER_6.items()}
    else:
        paper = {m: dict.fromkeys(ROWS, NOT_HERE) for m in SGD_METHODS}
        paper["skip2-lora"]["Train@batch"] = 0.595
    head = ["", *(m.title for m in SGD_METHODS.values())]

    def shown(value: float | str) -> str:
        return value if isinstance(value, str) else f"{value:.3f}"

    theirs = [[row, *(shown(paper[m][row]) for m in SGD_METHODS)] for row in ROWS]

    def micro(m: str, row: str) -> str:
        passed = times[m]["forward, core"]
        if row == "rest":
            return "–" if passed is None else f"{(times[m]['Train@batch'] - passed) * 1e3:.1f}"
        return "–" if times[m][row] is None else f"{times[m][row] * 1e3:.1f}"

    core_rows = {
        "Train@batch": "Train@batch",
        "forward": "forward, core",
        "backward and update: the rest": "rest",
        "Predict@sample": "Predict@sample",
    }
    mine = [[label, *(micro(m, row) for m in SGD_METHODS)] for label, row in core_rows.items()]
    parts = [[row, *(micro(m, row) for m in SGD_METHODS)] for row in SPLIT]
    whole = [
        ["paper, Raspberry Pi Zero 2 W", *(shown(paper[m]["Train@batch"]) for m in SGD_METHODS)],
        ["ours, C core", *(f"{times[m]['Train@batch']:.4f}" for m in SGD_METHODS)],
        ["ours, NumPy engine", *(f"{sum(times[m][part] for part in SPLIT):.4f}" for m in SGD_METHODS)],
    ]
    rest = {m: times[m]["Train@batch"] - times[m]["forward, core"] for m in ("skip-lora", "lora-all")}
    less = {
        "train, Skip2-LoRA against LoRA-All": _less(times, "skip2-lora", "lora-all", "Train@batch"),
        "backward, Skip-LoRA against LoRA-All (C core, with update)": 100 * (1 - rest["skip-lora"] / rest["lora-all"]),
        "forward, Skip2-LoRA against Skip-LoRA (NumPy engine)": _less(times, "skip2-lora", "skip-lora", "forward"),
    }
    prose = {"Fan": ("89.0", "88.3", "89.0"), "HAR": ("92.0", "82.5", "93.5")}[name]
    saved = Table(
        ["time saved", "paper", "ours"],
        [[what, f"{p} %", f"{v:.1f} %"] for (what, v), p in zip(less.items(), prose, strict=True)],
        "The paper gives each as a range over both data sets; the fan's end follows from its Table 6, so the other is"
        " HAR's.",
    )
    picture = Picture(
        f"skip2-table{6 if name == 'Fan' else 7}",
        plots.bars(
            {"ours, C core": {m.title: times[m.name]["Train@batch"] for m in SGD_METHODS.values()}}
            | ({"paper, Raspberry Pi Zero 2 W": {m.title: PAPER_6[m.name][0] for m in SGD_METHODS.values()}}
               if name == "Fan" else {}),
            y="Train@batch, ms", log=True,
        ),
        f"Time of a batch of training by method, {name}",
    )  # fmt: skip
    lacking = (
        "" if name == "Fan" else "Table 7 is a picture in our copy; only 0.595 ms and the savings stand in the prose. "
    )
    note = (
        "The split into forward, backward and weight update is timed in the NumPy engine, because the C core makes a"
        f" step in one piece; the C core's whole step stands beside the paper's total. {lacking}The paper's machine is"
        " a Raspberry Pi Zero 2 W at 1 GHz, ours is in the head of this report; ratios compare, milliseconds do not."
        " The C core runs on one thread; its Train@batch is averaged over the whole"
        f" fine-tuning (E={task_of(trial.params).epochs} with the cache's filling for Skip2-LoRA,"
        f" {trial.params['short']} epochs without a cache, where every batch costs the same). Its"
        " forward pass is timed by itself as well, and what is left of a step is backward and update; with a cache even"
        " these cannot be told apart. That rest is a difference of two timings, and a pass by itself costs LoRA-All"
        " more than the one inside its step, so that its rest comes out too small. The NumPy engine's calls cost some"
        " microseconds each, however little they do, so it saves less. Predict@sample is one call from Python for one"
        " sample, and mostly the call."
    )
    ours = {
        "microseconds": {m: {k: v * 1e3 for k, v in cells.items() if v is not None} for m, cells in times.items()},
        "saved, %": less,
    }
    paper = {"milliseconds": paper, "saved, %": dict(zip(less, map(float, prose), strict=True))}
    tables = [
        Table(head, whole, "Train@batch: a whole step, ms"),
        Table(head, theirs, "Paper, ms"),
        Table(head, mine, "Ours, C core, µs"),
        Table(head, parts, "Ours, the split: NumPy engine, µs"),
        saved,
    ]
    return Section(paper, ours, "paper ms, ours µs", trial.params["rounds"], note, tables, [picture])


def _less(times: Mapping[str, Mapping[str, float]], a: str, b: str, row: str) -> float:
    return 100 * (1 - times[a][row] / times[b][row])


def _trials_fan(settings: Settings) -> list[Trial]:
    return [_trial_67("Fan", settings)]


def _trials_har(settings: Settings) -> list[Trial]:
    return [_trial_67("HAR", settings)]


TABLE_6 = Target(
    "Time of a batch and of a prediction, fan", "Skip2-LoRA, Table 6", _trials_fan, partial(_section_67, "Fan")
)
TABLE_7 = Target(
    "Time of a batch and of a prediction, HAR", "Skip2-LoRA, Table 7", _trials_har, partial(_section_67, "HAR")
)

# -- §4.3: a bounded cache

SHARES = (0, 25, 50, 75, 100)
"""Room in the cache, in percent of the samples."""

PAPER_CACHE_BYTES = 358 * 1024


def bounded(params: Params, where: Where) -> Numbers:
    """Skip2-LoRA with room for a part of the samples: seconds, hit rate and bytes, by codec and share."""
    task, eng = task_of(params), engine(where.engine)
    net = base_network(params, where)
    tune, _ = drifted(task, where.data, 0)
    T, m = len(tune[0]), METHODS["skip2-lora"]
    rooms = {(c, share): math.ceil(T * share / 100) for c in params["codecs"] for share in SHARES}
    stores: dict[str, Store | None] = {}

    def job(name: str, codec: str, room: int) -> float:
        seconds, stores[name] = _fit(eng, net, m, tune, task, task.epochs, codec, capacity=room)
        return seconds

    jobs = {f"{c}, {share} %": partial(job, f"{c}, {share} %", c, room) for (c, share), room in rooms.items()}
    seconds = _turns(jobs, params["rounds"])
    found: Numbers = {}
    for name, spent in seconds.items():
        store = stores[name]
        accesses = store.hits + store.misses if store else 1
        size = store.codec.bytes_per_sample(store.record) * store.capacity if store else 0
        found[name] = {"seconds": spent, "hit rate": store.hits / accesses if store else 0.0, "bytes": size}
    return found


def _trial_cache(settings: Settings) -> Trial:
    return _measured(_task("Fan", settings), bounded, 10, rounds=1 if settings.quick else 9, codecs=["fp32", FOUR_BIT])


def _trials_cache(settings: Settings) -> list[Trial]:
    return [_trial_cache(settings)]


def _section_cache(settings: Settings, found: Results) -> Section:
    trial = _trial_cache(settings)
    numbers = found(trial)
    rows = []
    for share in SHARES:
        row = [f"{share} %"]
        for c in ("fp32", FOUR_BIT):
            n = numbers[f"{c}, {share} %"]
            row += [f"{n['hit rate'] * 100:.1f} %", f"{n['seconds'] * 1e3:.1f}", f"{n['bytes'] / 1024:.0f}"]
        rows.append(row)
    head = ["room for", *(f"{c}: {what}" for c in ("fp32", FOUR_BIT) for what in ("hits", "time, ms", "KiB"))]
    picture = Picture(
        "skip2-cache",
        plots.curves(
            {"Fan": {c: (list(SHARES), [numbers[f"{c}, {s} %"]["seconds"] * 1e3 for s in SHARES])
                     for c in ("fp32", FOUR_BIT)}},
            x="room in the cache, % of the samples", y="time of fine-tuning, ms",
        ),
        "Time of Skip2-LoRA against the room in its cache",
    )  # fmt: skip
    whole = numbers["fp32, 100 %"]["bytes"]
    note = (
        f"The paper gives one number, 358 KiB for the whole cache of 470 samples; ours holds {whole / 1024:.0f} KiB of"
        " records. It says that a bounded key-value cache trades time for size, without numbers. Ours is"
        " direct-mapped: what does not fit is computed again in every epoch, so hits grow in proportion to the room."
        f" E={task_of(trial.params).epochs}; at 0 % there is no cache."
    )
    ours = {name: dict(n) for name, n in numbers.items()}
    paper = {"fp32, 100 %": {"bytes": PAPER_CACHE_BYTES, "seconds": NOT_HERE, "hit rate": NOT_HERE}}
    return Section(
        paper, ours, "seconds; fraction; bytes", trial.params["rounds"], note, [Table(head, rows)], [picture]
    )


SKIP2_CACHE = Target(
    "Hit rate, time and bytes against the capacity of the cache", "Skip2-LoRA, §4.3", _trials_cache, _section_cache
)

# -- InstantFT, Fig. 7b: whole fine-tunings on images

ONE_PASS, ALL_PASSES = "inference only, one pass", "inference only, a pass an epoch"
CONTESTANTS: dict[str, tuple[str, str | None]] = {
    **{m.title: (m.name, None) for m in SGD_METHODS.values() if not m.cached},
    "Skip-LoRA, fp32 cache": ("skip2-lora", "fp32"),
    "Skip-LoRA, NF4 cache": ("skip2-lora", FOUR_BIT),
    "Skip-LoRA, NF4 in blocks of 64": ("skip2-lora", "nf4-block64"),
    "Skip-LoRA, relu4 cache": ("skip2-lora", "relu4"),
}


def image_times(params: Params, where: Where) -> Numbers:
    """Seconds of whole fine-tunings, and of inference alone: {"threads": {name: seconds}, "images": T}."""
    task, eng = task_of(params), engine(where.engine)
    net = base_network(params, where)
    tune, _ = drifted(task, where.data, 0)

    def inference(passes: int, threads: int) -> float:
        def job() -> None:
            for _ in range(passes):
                eng.forward(net.spec, net.tensors, tune[0], threads)

        return _timed(job, threads)

    def train(method: str, cache: str | None, threads: int) -> float:
        return _fit(eng, net, METHODS[method], tune, task, task.epochs, cache, threads)[0]

    found: Numbers = {"images": len(tune[0])}
    for threads in params["threads"]:
        jobs: dict[str, Callable[[], float]] = {
            ONE_PASS: partial(inference, 1, threads),
            ALL_PASSES: partial(inference, task.epochs, threads),
        }
        jobs |= {name: partial(train, m, c, threads) for name, (m, c) in CONTESTANTS.items()}
        found[str(threads)] = _turns(jobs, params["rounds"])
    return found


def images_trial(task: Task, settings: Settings) -> Trial:
    """The times of all methods on a task of images."""
    threads = sorted({1, os.cpu_count() or 1})
    rounds = 1 if settings.quick else 9
    return _measured(
        task, image_times, 4 * (rounds + 1) * len(threads) * task.epochs / 10, rounds=rounds, threads=threads
    )

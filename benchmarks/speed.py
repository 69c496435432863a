"""Time of every method against PyTorch eager, and the other figures that the README states: one thread, real data.

    python -m benchmarks.speed --json build/speed.json        a few minutes
    python -m benchmarks.speed --quick                        does it run? (without the data folder too)

Everything is measured in one process and in turn (A B C A B C …, medians): instantft on this machine's best
instruction set, on each narrower one, and PyTorch.

What is timed. *Whole*: data and base network in memory to adapter in memory; for instantft all of `sgd.fit`, for
PyTorch the cache fill and the epochs, without building its modules. *Step*: whole epochs with everything built and the
cache filled, divided by the number of steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    ROOT,
    clock,
    interleaved,
    load,
    machine,
    orders,
    run_flops,
    save_json,
    scaled,
    step_flops,
    table,
    timed,
)
from instantft.adapters import initial
from instantft.backbones.builtin import Network
from instantft.cache.codecs import codec
from instantft.cache.store import memory_store
from instantft.data.drift import rotate
from instantft.engine import Engine, get_engine
from instantft.methods import SGD_METHODS, Method
from instantft.solvers import sgd
from instantft.spec import dnn, lenet5

Floats = NDArray[np.float32]
Jobs = dict[str, Callable[[], float]]

BATCH = 20
RANK = 4
NARROWER = ("x86-64-v3", "x86-64-v2", "scalar")
"""Instruction sets measured beside the machine's widest, where the core has them."""
FOUR_BIT = ("nf4", "relu4")


@dataclass(frozen=True)
class Work:
    """A base network and the samples it is adapted to."""

    name: str
    base: Network
    x: Floats
    y: NDArray[np.int32]
    lr: float
    E: int
    """Epochs of a whole run against PyTorch, and of a timed run of steps."""
    E_own: int
    """Epochs of Skip2-LoRA against our own LoRA-All."""
    E_cached: int
    """Epochs of a timed run of cached steps."""

    def steps(self, E: int) -> int:
        return E * -(-len(self.x) // BATCH)


def _images(data: dict[str, NDArray[Any]], degrees: float, T: int, seed: int) -> tuple[Floats, NDArray[np.int32]]:
    rows = np.random.default_rng(seed).choice(len(data["test_x"]), T, replace=False)
    x = rotate(scaled(data["test_x"][rows]), degrees)
    return np.ascontiguousarray(x.reshape(T, -1), dtype=np.float32), data["test_y"][rows].astype(np.int32)


def works(engine: Engine, quick: bool) -> list[Work]:
    """LeNet-5 on Fashion-MNIST turned by 75°, and the DNN on the fan; a little pre-training will do for times."""
    few = 200 if quick else 6000
    fashion, fan = load("fashion_mnist.npz", quick), load("fan_damage1.npz", quick)
    x = scaled(fashion["train_x"][:few].reshape(few, -1))
    cnn, _ = sgd.pretrain(
        engine, lenet5((1, 28, 28)), x, fashion["train_y"][:few].astype(np.int32),
        epochs=1, batch_size=BATCH, lr=0.1, momentum=0.0, seed=0,
    )  # fmt: skip
    mlp, _ = sgd.pretrain(
        engine, dnn(256, 3), fan["pretrain_x"], fan["pretrain_y"].astype(np.int32),
        epochs=1 if quick else 20, batch_size=BATCH, lr=0.02, momentum=0.0, seed=0,
    )  # fmt: skip
    xf, yf = _images(fashion, 75, 100 if quick else 1024, 0)
    fan_x = np.ascontiguousarray(fan["finetune_x"], np.float32)
    fan_y = fan["finetune_y"].astype(np.int32)
    E, E_own, E_cached = ((2, 2), (2, 3), (2, 4)) if quick else ((10, 20), (10, 300), (10, 200))
    return [
        Work("lenet5", cnn, xf, yf, 0.1, E[0], E_own[0], E_cached[0]),
        Work("dnn", mlp, fan_x, fan_y, 0.02, E[1], E_own[1], E_cached[1]),
    ]


# instantft's side


def native_jobs(engine: Engine, all_works: list[Work]) -> Jobs:
    """What instantft is timed at, by name; each job returns its seconds ("peak": GFLOP/s)."""
    jobs: Jobs = {}
    for w in all_works:
        for m in SGD_METHODS.values():
            if w.name == "lenet5":
                jobs[f"lenet5 whole {m.name}"] = partial(_fit, engine, w, m, w.E)
            jobs[f"{w.name} step {m.name}"] = partial(_epochs, engine, w, m)
        jobs[f"{w.name} own lora-all"] = partial(_fit, engine, w, SGD_METHODS["lora-all"], w.E_own)
        jobs[f"{w.name} own skip2-lora"] = partial(_fit, engine, w, SGD_METHODS["skip2-lora"], w.E_own)
    for name in ("fp32", *FOUR_BIT):
        w = all_works[0]
        jobs[f"lenet5 codec {name}"] = partial(_fit, engine, w, SGD_METHODS["skip2-lora"], w.E, name)
    if engine.name == "native":
        from instantft._core import Core
        from instantft.engine.native import NativeEngine, fma_peak

        assert isinstance(engine, NativeEngine)
        core = Core(engine.isa)
        jobs["peak"] = lambda: fma_peak(core) / 1e9
    return jobs


def _fit(engine: Engine, w: Work, m: Method, E: int, codec_name: str = "fp32") -> float:
    """Seconds from data and base network in memory to adapter in memory, making and filling the cache included."""

    def run() -> None:
        store = memory_store(codec_name, w.base.spec.record, len(w.x)) if m.cached else None
        sgd.fit(engine, w.base, m, w.x, w.y, rank=RANK, epochs=E, batch_size=BATCH, lr=w.lr, seed=0, store=store)

    return timed(run)


def _epochs(engine: Engine, w: Work, m: Method) -> float:
    """Seconds a step, everything built and the cache filled."""
    spec, T = w.base.spec, len(w.x)
    numbers = np.arange(T, dtype=np.int64)
    store = memory_store("fp32", spec.record, T) if m.cached else None
    if store is not None:
        engine.fill(spec, w.base.tensors, w.x, numbers, store)
    start = {**w.base.tensors, **initial(m, spec, RANK, 0)}
    trainer = engine.trainer(spec, start, m, RANK, w.x, w.y, numbers=numbers, store=store, batch_size=BATCH, lr=w.lr)
    E = w.E_cached if m.cached else w.E
    order = orders(T, E, 1)
    begin = clock.now()
    stats = trainer.epochs(order)
    seconds = clock.now() - begin
    if stats.diverged_at is not None:
        raise SystemExit(f"a timed run must not diverge, but {m.name} did at step {stats.diverged_at}")
    return seconds / w.steps(E)


# PyTorch's side


def torch_jobs(all_works: list[Work]) -> Jobs:
    """The same work in PyTorch, by the same names."""
    jobs: Jobs = {}
    for w in all_works:
        for m in SGD_METHODS.values():
            if w.name == "lenet5":
                jobs[f"lenet5 whole {m.name}"] = partial(_torch_fit, w, m)
            jobs[f"{w.name} step {m.name}"] = partial(_torch_epochs, w, m)
    return jobs


def _rival(w: Work, m: Method) -> Any:
    from benchmarks.rivals import Rival

    start = {**w.base.tensors, **initial(m, w.base.spec, RANK, 0)}
    return Rival(w.base.spec, start, m, w.x, w.y, lr=w.lr, batch_size=BATCH)


def _torch_fit(w: Work, m: Method) -> float:
    rival = _rival(w, m)
    order = orders(len(w.x), w.E, 1)
    return timed(lambda: rival.epochs(order))


def _torch_epochs(w: Work, m: Method) -> float:
    rival = _rival(w, m)
    if rival.cached:
        rival.fill()
    order = orders(len(w.x), w.E, 1)
    return timed(lambda: rival.epochs(order)) / w.steps(w.E)


# Import time


IMPORTS = {
    "numpy": "import numpy",
    "package": "import instantft",
    "in use": "from instantft import FineTuner, load",
}
"""What is timed. The package looks names up when they are first used, so the last is the honest figure."""


def import_times(repeats: int) -> dict[str, float]:
    """Median seconds of each of IMPORTS in a fresh interpreter, less those of an interpreter that imports nothing."""

    def job(code: str) -> Callable[[], float]:
        command = [sys.executable, "-c", code]

        def run() -> float:
            start = time.perf_counter()
            subprocess.run(command, check=True, env=_env(), cwd=ROOT)
            return time.perf_counter() - start

        return run

    seen = interleaved({"bare": job("pass"), **{name: job(code) for name, code in IMPORTS.items()}}, repeats)
    bare = statistics.median(seen["bare"])
    return {name: statistics.median(seen[name]) - bare for name in IMPORTS}


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def heavy_imports() -> list[str]:
    """Which of the packages that must stay out the base install imports all the same."""
    heavy = ("torch", "onnx", "matplotlib", "scipy")
    code = f"{IMPORTS['in use']}; import sys; print(*[m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, env=_env(), cwd=ROOT, capture_output=True, text=True)
    return run.stdout.split()


# What it must show


@dataclass(frozen=True)
class Check:
    """A figure and what it must be."""

    what: str
    target: float
    measured: float
    at_most: bool = False
    aim: float | None = None
    unit: str = "×"
    required: bool = True

    @property
    def passed(self) -> bool:
        return self.measured <= self.target if self.at_most else self.measured >= self.target

    def show(self, value: float) -> str:
        return f"{value:.3g}{self.unit}" if value < 100 else f"{value:.0f}{self.unit}"


def checks(ours: Mapping[str, float], torch: Mapping[str, float], all_works: list[Work]) -> list[Check]:
    """Section by section, what is asked for, from the medians of one instruction set and PyTorch's."""
    found: list[Check] = []
    lenet, fan = all_works
    LENET, DNN = f"LeNet-5, {len(lenet.x)} samples, E={lenet.E}", "DNN, fan"

    def against(what: str, key: str, target: float, rival: str | None = None, aim: float | None = None) -> None:
        if torch:
            found.append(Check(what, target, torch[rival or key] / ours[key], aim=aim))

    whole = "lenet5 whole "
    against(f"{LENET}: Skip2-LoRA against PyTorch's Skip2-LoRA", whole + "skip2-lora", 15, aim=20)
    against(f"{LENET}: Skip2-LoRA against PyTorch's LoRA-All", whole + "skip2-lora", 50, whole + "lora-all", 70)
    step = "dnn step "
    against(f"{DNN}: cached step against PyTorch's same step", step + "skip2-lora", 100)
    against(f"{DNN}: cached step against PyTorch's LoRA-All step", step + "skip2-lora", 200, step + "lora-all")
    for names, target in (
        (("ft-last", "lora-last", "skip-lora"), 4.0),
        (("ft-all", "ft-bias", "lora-all", "ft-all-lora"), 1.5),
    ):
        for name in names:
            against(f"{LENET}: {SGD_METHODS[name].title} against PyTorch", whole + name, target)
            against(f"{DNN}: {SGD_METHODS[name].title} step against PyTorch", step + name, target)
    for w, label in ((lenet, LENET), (fan, f"{DNN}, E={fan.E_own}")):
        operations = [run_flops(w.base.spec, SGD_METHODS[n], len(w.x), w.E_own) for n in ("lora-all", "skip2-lora")]
        ratio = ours[f"{w.name} own lora-all"] / ours[f"{w.name} own skip2-lora"]
        what = f"{label}: Skip2-LoRA against our LoRA-All (operations {operations[0] / operations[1]:.1f}×)"
        found.append(Check(what, 0.8 * operations[0] / operations[1], ratio))
    for name in FOUR_BIT:
        slower = ours[f"lenet5 codec {name}"] / ours["lenet5 codec fp32"]
        found.append(Check(f"{LENET}: {name} cache against fp32, time", 1.10, slower, at_most=True))
        size = codec(name).bytes_per_sample(lenet.base.spec.record)
        found.append(Check(f"LeNet-5: {name} cache, bytes a sample", 995, size, at_most=True, unit=" B"))
    if "peak" in ours:
        for what, name, aim in (
            ("ten cached epochs", "skip2-lora", 0.5),
            *((SGD_METHODS[n].title, n, 0.4) for n in ("ft-all", "ft-bias", "lora-all", "ft-all-lora")),
        ):
            fraction = rate(ours, lenet, SGD_METHODS[name]) / ours["peak"]
            found.append(Check(f"LeNet-5: {what}, fraction of FMA peak", aim, fraction, unit="", required=False))
    return found


def rate(ours: Mapping[str, float], w: Work, m: Method) -> float:
    """GFLOP/s of a step, from the operations of the cost model."""
    operations = step_flops(w.base.spec, m, RANK) * len(w.x) * w.E / w.steps(w.E)
    return operations / ours[f"{w.name} step {m.name}"] / 1e9


Medians = Mapping[str, Mapping[str, float]]
"""Side (an instruction set, or "torch") to job to median seconds."""


def report(medians: Medians, imports: Mapping[str, float], all_works: list[Work]) -> str:
    """Markdown: the figures asked for, then the times behind them."""
    sides = [name for name in medians if name != "torch"]
    parts = [_figures(medians, imports, all_works, sides)]
    if "peak" in medians[sides[0]]:
        peaks = ", ".join(f"{s} {medians[s]['peak']:.1f}" for s in sides)
        parts.append(f"Measured fp32 FMA peak, GFLOP/s: {peaks}.")
    lenet, fan = all_works
    parts.append(_times(f"LeNet-5, whole, E={lenet.E}, ms", medians, lenet, "whole", 1e3))
    parts.append(_times("LeNet-5, a step of 20 samples, µs", medians, lenet, "step", 1e6))
    parts.append(_times("DNN, fan, a step of 20 samples, µs", medians, fan, "step", 1e6))

    def milliseconds(key: str) -> list[str]:
        return [f"{medians[s][key] * 1e3:.2f}" for s in sides]

    own = [
        [f"{w.name}, {SGD_METHODS[n].title}, E={w.E_own}", *milliseconds(f"{w.name} own {n}")]
        for w in all_works
        for n in ("lora-all", "skip2-lora")
    ]
    caches = [[f"lenet5, Skip2-LoRA, {n} cache", *milliseconds(f"lenet5 codec {n}")] for n in ("fp32", *FOUR_BIT)]
    parts.append(table(["whole run, ms", *sides], own + caches))
    return "\n\n".join(parts)


def _figures(medians: Medians, imports: Mapping[str, float], all_works: list[Work], sides: list[str]) -> str:
    columns = [checks(medians[s], medians.get("torch", {}), all_works) for s in sides]
    rows: list[list[object]] = []
    for same in zip(*columns, strict=True):
        c = same[0]
        target = f"{'≤' if c.at_most else '≥' if c.required else 'aim ≥'} {c.show(c.target)}"
        if c.aim:
            target += f", aim {c.show(c.aim)}"
        rows.append([c.what, target, *(each.show(each.measured) for each in same), "yes" if c.passed else "no"])
    heavy = heavy_imports()
    for name in ("package", "in use"):
        met = "no" if imports[name] > 0.2 else f"no, brings {' '.join(heavy)}" if heavy else "yes"
        what = (
            f"`{IMPORTS[name]}` (of which numpy {imports['numpy']:.3f} s)" if name == "in use" else f"`{IMPORTS[name]}`"
        )
        rows.append([what, "≤ 0.2 s", f"{imports[name]:.3f} s", *[""] * (len(sides) - 1), met])
    return table([f"one thread, {clock.name} time", "target", *sides, f"met ({sides[0]})"], rows)


def _times(title: str, medians: Medians, w: Work, kind: str, scale: float) -> str:
    sides = [name for name in medians if name != "torch"]
    with_torch = "torch" in medians
    rows: list[list[object]] = []
    for m in SGD_METHODS.values():
        key = f"{w.name} {kind} {m.name}"
        row: list[object] = [m.title]
        if with_torch:
            row.append(f"{medians['torch'][key] * scale:.0f}")
        row += [f"{medians[s][key] * scale:.2f}" for s in sides]
        if with_torch:
            row.append(f"{medians['torch'][key] / medians[sides[0]][key]:.1f}×")
        if kind == "step":
            row.append(f"{rate(medians[sides[0]], w, m):.1f}")
        rows.append(row)
    head = [title, *(["PyTorch"] if with_torch else []), *sides]
    head += [f"PyTorch / {sides[0]}"] if with_torch else []
    return table([*head, *([f"GFLOP/s, {sides[0]}"] if kind == "step" else [])], rows)


def engines(name: str, narrower: bool) -> dict[str, Engine]:
    """Instruction set to engine: the best one, or the one INSTANTFT_ISA names; then the narrower ones if wanted."""
    if name == "reference":
        return {name: get_engine(name)}
    from instantft.engine.native import NativeEngine, isas

    best = NativeEngine()
    found: dict[str, Engine] = {best.isa: best}
    if narrower and "INSTANTFT_ISA" not in os.environ:
        for isa in [i for i in NARROWER if i in isas()]:
            os.environ["INSTANTFT_ISA"] = isa  # read when a core is loaded
            found.setdefault(isa, NativeEngine())
        del os.environ["INSTANTFT_ISA"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny runs: does it work?")
    parser.add_argument("--engine", choices=("native", "reference"), default="native")
    parser.add_argument("--no-torch", action="store_true", help="instantft only")
    parser.add_argument("--no-isas", action="store_true", help="only the widest instruction set")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: for a machine that is not idle")
    args = parser.parse_args()
    if args.cpu_time:
        clock.count_cpu()
    repeats = 1 if args.quick else args.repeats
    sides = engines(args.engine, not args.no_isas)
    all_works = works(next(iter(sides.values())), args.quick)
    jobs_of = {isa: native_jobs(engine, all_works) for isa, engine in sides.items()}
    if not args.no_torch:
        from benchmarks.rivals import single_thread

        single_thread()
        jobs_of["torch"] = torch_jobs(all_works)
    names = next(iter(jobs_of.values()))
    jobs = {(side, name): of[name] for name in names for side, of in jobs_of.items() if name in of}
    seen = interleaved({f"{side}: {name}": job for (side, name), job in jobs.items()}, repeats, warm=not args.quick)
    medians: dict[str, dict[str, float]] = {}
    for side, name in jobs:
        medians.setdefault(side, {})[name] = statistics.median(seen[f"{side}: {name}"])
    imports = import_times(3 if args.quick else 9)
    print(report(medians, imports, all_works))
    save_json(
        args.json,
        {
            "machine": machine(),
            "repeats": repeats,
            "clock": clock.name,
            "medians": medians,
            "all": seen,
            "import": imports,
            "checks": {
                side: [{**vars(c), "passed": c.passed} for c in checks(values, medians.get("torch", {}), all_works)]
                for side, values in medians.items()
                if side != "torch"
            },
        },
    )


if __name__ == "__main__":
    main()

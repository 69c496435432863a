"""The rates of `speed`, measured: small made-up networks are fine-tuned by every method, and the times are fitted.

Some networks, each method, a few sizes: more times than kinds of work. Rates are the least squares of the relative
errors that are not negative.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from .backbones.builtin import Network
from .cache.codecs import CODECS
from .cache.store import memory_store
from .engine import Engine, Floats
from .methods import SGD_METHODS, Method, method
from .solvers import sgd
from .solvers.dual import Space
from .solvers.ridge import fit_ridge
from .spec import NetSpec, dnn, lenet5
from .speed import Calibration, Work, fill_work, this_machine, train_work

__all__ = ["ROUNDS", "Case", "calibrate"]

ROUNDS = 3
"""Times each case is timed, in turns."""

SWEEPS = 3000
"""Of the fit."""


@dataclass(frozen=True)
class Case:
    """One fine-tuning that is timed: `work` counts what `seconds` measures."""

    base: Network
    method: Method
    codec: str | None
    x: Floats
    y: NDArray[np.int32]
    epochs: int = 10
    batch_size: int = 20
    rank: int = 4
    space: Space = "auto"

    @property
    def own_step(self) -> bool:
        """Whether the learning rate is found from the records; that of LoRA-Last now and then makes it diverge."""
        return self.method.cacheable and self.method.adapters != "last"

    def seconds(self, engine: Engine) -> tuple[float, float]:
        """Of filling the cache, and of all that follows."""
        spec, store = self.base.spec, None
        began = _now()
        if self.codec is not None:
            store = memory_store(self.codec, spec.record, len(self.x))
            engine.fill(spec, self.base.tensors, self.x, np.arange(len(self.x), dtype=np.int64), store)
        filled = _now()
        if self.method.solver == "ridge":
            fit_ridge(engine, self.base, self.x, self.y, store=store)
        else:
            sgd.fit(
                engine, self.base, self.method, self.x, self.y,
                rank=self.rank, epochs=self.epochs, batch_size=self.batch_size, store=store,
                lr=None if self.own_step else 0.01, space=self.space,
            )  # fmt: skip
        return _passed(began, filled), _passed(filled, _now())

    def work(self) -> tuple[Work, Work]:
        """Of the same."""
        spec, T = self.base.spec, len(self.x)
        train = train_work(
            spec, self.method, T,
            rank=self.rank, epochs=self.epochs, batch_size=self.batch_size, codec=self.codec, space=self.space,
            own_step=self.own_step,
        )  # fmt: skip
        return fill_work(spec, T, self.codec) if self.codec is not None else {}, train


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _passed(began: tuple[float, float], ended: tuple[float, float]) -> float:
    """Seconds: of the wall, or of the processor where those are fewer, because others have used it in between."""
    return min(b - a for a, b in zip(began, ended, strict=True))


DENSE = (dnn(64, 4, 48), dnn(180, 5, 80), dnn(400, 6, 128), dnn(1000, 10, 64))
CONV = (lenet5((1, 20, 20), 5), lenet5((3, 28, 28), 10))
"""Networks that are timed; the last of either kind with every codec."""


def _samples(spec: NetSpec, T: int) -> tuple[Floats, NDArray[np.int32]]:
    """Noisy points around a centre a class, some labels wrong: there is something to learn, but not all."""
    rng = np.random.default_rng(0)
    N = spec.geometry[0].N
    y = rng.integers(0, spec.C, T).astype(np.int32)
    centres = rng.standard_normal((spec.C, N)).astype(np.float32)
    x = centres[y] + 2 * rng.standard_normal((T, N)).astype(np.float32)
    return x, np.where(rng.random(T) < 0.3, rng.integers(0, spec.C, T), y).astype(np.int32)


def _cases(engine: Engine) -> Iterator[Case]:
    codecs = [name for name in CODECS if name != "fp32"]
    for spec in (*DENSE, *CONV):
        base, _ = sgd.pretrain(engine, spec, *_samples(spec, 300), epochs=2, lr=0.02)
        every = codecs if spec in (*DENSE[-1:], *CONV[-1:]) else []
        for T, epochs, B in ((160, 2, 20), (300, 20 if spec in DENSE else 3, 16)):
            x, y = _samples(spec, T)
            for m in SGD_METHODS.values():
                yield Case(base, m, "fp32" if m.cached else None, x, y, epochs, B)
            for name in ("ft-last", "lora-last"):
                yield Case(base, method(name), "fp32", x, y, epochs, B)
            for codec in every:
                yield Case(base, method("skip2-lora"), codec, x, y, epochs, B)
        yield Case(base, method("skip2-lora"), "fp32", x, y, 1, B, space="dual")
        for T in (150, 400, 900):
            x, y = _samples(spec, T)
            for codec in ("fp32", *(every if T == 400 else ())):
                yield Case(base, method("skip-ridge"), codec, x, y)


def calibrate(engine: Engine, progress: Callable[[float], None] | None = None, rounds: int = ROUNDS) -> Calibration:
    """Measure this machine, which takes a few seconds.

    Args:
        engine: who is timed.
        progress: told how many rounds are done.
        rounds: times that each case is timed, in turns, after a round that is not counted.
    """
    cases = list(_cases(engine))
    times: list[list[tuple[float, float]]] = [[] for _ in cases]
    for done in range(-1, rounds):
        for i, case in enumerate(cases):
            seen = case.seconds(engine)
            if done >= 0:
                times[i].append(seen)
                if progress is not None:
                    progress(done + (i + 1) / len(cases))
    timed = [
        (work, median(seconds))
        for case, seen_all in zip(cases, times, strict=True)
        for work, seconds in zip(case.work(), zip(*seen_all, strict=True), strict=True)
        if work
    ]
    kinds = sorted({kind for work, _ in timed for kind in work})
    A = np.array([[work.get(kind, 0.0) / seconds for kind in kinds] for work, seconds in timed])
    found = _nonnegative(A, np.ones(len(A)))
    error = float(np.quantile(np.abs(A @ found - 1), 0.9))
    return Calibration(dict(zip(kinds, found.tolist(), strict=True)), this_machine(engine.name), error)


def _nonnegative(A: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """x ≥ 0 of the smallest ‖A·x − b‖², one coordinate at a time; columns of any scale."""
    scale = np.maximum(np.linalg.norm(A, axis=0), 1e-300)
    Q, r = (A / scale).T @ (A / scale), (A / scale).T @ b
    x = np.zeros(len(r))
    for _ in range(SWEEPS):
        for k in range(len(x)):
            x[k] = max(0.0, x[k] + r[k] - Q[k] @ x)
    return np.asarray(x / scale)

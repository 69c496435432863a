"""Engines: who does the arithmetic. `reference` is NumPy and readable; `native` is the C11 core and fast.

Both speak the same small language: a `NetSpec`, and one dictionary of tensors that holds the network and whatever a
method adds to it, by name:

    layers.K.weight  layers.K.bias  layers.K.bn.{weight,bias,running_mean,running_var}
    lora.I-J.A (N, R)   lora.I-J.B (R, M)     adapter from tap x^I to the output of layer J (J = I+1, or L)
    output.gain (1,)    output.bias (C,)      y = gain·c + Σ x^k·A_k·B_k + bias; 1 and 0 where absent
    lift.*                                    adds a kernel of the taps (`lift`): for `forward` here, not for engines
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..cache.store import Store
from ..errors import EngineError, UsageError
from ..methods import Method
from ..spec import NetSpec
from ..tasks import Targets
from .dense import Dense

__all__ = [
    "CALL_SECONDS",
    "ENGINES",
    "Engine",
    "EpochStats",
    "Floats",
    "Labels",
    "Progress",
    "Tensors",
    "Trainer",
    "forward",
    "get_engine",
    "parts",
]

Floats = NDArray[np.float32]
Tensors = Mapping[str, Floats]

Labels = NDArray[np.integer[Any]] | Targets
"""Classes (T,) that count alike, or anything that `tasks` knows."""

Progress = Callable[[float], None]
"""Told now and then how much is done."""

CALL_SECONDS = 0.2
"""About how long one call of an engine may last, so that progress is shown and Ctrl-C is heard."""

PART = 1024
"""Parts are multiples of this, so that the results are those of one call: engines work in smaller blocks that divide
it."""


@dataclass(frozen=True)
class EpochStats:
    """What whole epochs of training saw.

    Attributes:
        loss: (E,) float64, mean loss over the samples of each epoch, measured as they were trained on.
        correct: (E,) int64, how many samples of each epoch were told rightly before their step: their class, or all of
            their labels; 0 where they have numbers.
        diverged_at: 1-based step, within this call, whose loss was not finite; training stopped there. None if none.
    """

    loss: NDArray[np.float64]
    correct: NDArray[np.int64]
    diverged_at: int | None = None


class Trainer(Protocol):
    """The state of one training: tensors, data, cache. `epochs` moves it on, `tensors` reads it."""

    def epochs(self, order: NDArray[np.int32], lr: float | None = None) -> EpochStats:
        """Run E whole epochs; `order` is (E, T), the rows of x in the order they are visited.

        Each epoch has ceil(T/B) steps of SGD; the last batch may be smaller.

        Args:
            lr: the learning rate from here on; None: as before. The velocity stays a sum of gradients.
        """
        ...

    def tensors(self) -> dict[str, Floats]:
        """The trained tensors (and, where batch norm is trained, its running statistics), as copies."""
        ...


class Engine(Protocol):
    """What the rest of the package asks of an engine."""

    @property
    def name(self) -> str: ...

    @property
    def dense(self) -> Dense:
        """The matrix algebra of the closed form."""
        ...

    @property
    def own_steps(self) -> bool:
        """Whether its steps are those of a machine: nobody else may make them, and there is no momentum."""
        ...

    def forward(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Logits (T, C) of samples x (T, N), batch norm by running statistics, with whatever adapters are present."""
        ...

    def records(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Record rows (T, spec.record.width) of the frozen network: padded float32, gaps zero (spec.RecordSpec)."""
        ...

    def fill(
        self, spec: NetSpec, tensors: Tensors, x: Floats, numbers: NDArray[np.int64], store: Store, threads: int = 1
    ) -> None:
        """Run the frozen network once for every sample the store lacks and would keep, and put its record there."""
        ...

    def trainer(
        self,
        spec: NetSpec,
        tensors: Tensors,
        method: Method,
        rank: int,
        x: Floats,
        y: Labels,
        *,
        numbers: NDArray[np.int64],
        store: Store | None,
        batch_size: int,
        lr: float,
        momentum: float = 0.0,
    ) -> Trainer:
        """Make a trainer for `method` on samples x (T, N), classes y (T,), or what else they are to teach.

        The loss of a sample is `tasks.loss_and_gradient`.

        Args:
            tensors: the network and the start values of the adapters.
            numbers: (T,), the sample number of each row of x, by which the store knows it.
            store: the forward cache, read and filled on the way; None: every step runs the frozen network.
        """
        ...


def _reference() -> Engine:
    from .reference import ReferenceEngine

    return ReferenceEngine()


def _native() -> Engine:
    from .native import NativeEngine

    return NativeEngine()


ENGINES: dict[str, Callable[[], Engine]] = {"native": _native, "reference": _reference}


def parts(T: int, progress: Progress | None = None) -> Iterator[slice]:
    """Slices of T samples, each of about CALL_SECONDS of whatever the caller does with it.

    Args:
        T: number of samples.
        progress: told how many samples are done.
    """
    start, count = 0, PART
    while start < T:
        stop = min(T, start + count)
        began = time.perf_counter()
        yield slice(start, stop)
        elapsed = time.perf_counter() - began
        if progress is not None:
            progress(stop)
        count = PART * max(1, int((stop - start) * CALL_SECONDS / max(elapsed, 1e-6) / PART))
        start = stop


def forward(
    engine: Engine, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1, progress: Progress | None = None
) -> Floats:
    """`Engine.forward` in parts: the same logits, with memory that does not grow with T, and progress; and with a lift.

    Args:
        progress: told how many samples are done; the others as in `Engine.forward`.
    """
    if lift.BASIS in tensors:
        logits = np.empty((len(x), spec.C), np.float32)
        for rows in parts(len(x), progress):
            logits[rows] = lift.logits(spec, tensors, x[rows], engine.records(spec, tensors, x[rows], threads))
        return logits
    if len(x) <= PART and progress is None:
        return engine.forward(spec, tensors, x, threads)
    logits = np.empty((len(x), spec.C), np.float32)
    for rows in parts(len(x), progress):
        logits[rows] = engine.forward(spec, tensors, x[rows], threads)
    return logits


def get_engine(name: str | None = None) -> Engine:
    """The engine called `name`; with None the native one, or the reference where the core was not built.

    Raises:
        UsageError: there is no engine of that name.
        EngineError: it exists, but its compiled part does not.
    """
    if name is not None:
        if name not in ENGINES:
            raise UsageError(f"engine must be one of {', '.join(ENGINES)}, not {name!r}")
        return ENGINES[name]()
    try:
        return _native()
    except EngineError:
        return _reference()

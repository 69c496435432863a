"""The engine `fixed`: the core's arithmetic (`fixed`) behind the protocol of engines, so that it runs on any task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..cache.store import Store
from ..engine import EpochStats, Floats, Labels, Tensors
from ..engine.dense import NumpyDense
from ..errors import UsageError
from ..methods import Method
from ..spec import NetSpec
from ..tasks import Targets, as_targets
from . import fixed
from .configs import configured
from .fixed import CODEC, Bytes, Saturations
from .formats import Ints
from .image import MAX_SAMPLES
from .layout import BEAT, Build

__all__ = ["METHOD", "FixedEngine", "FixedTrainer"]

METHOD = "skip2-lora"
"""The one row of the methods' table that the core trains."""

CHUNK = 128
"""Samples that go through the frozen network at a time."""


class FixedEngine:
    """The core as its specification says it computes.

    Args:
        config: a name in `configs.CONFIGS`: the profile of formats, and the limits of the build.

    Attributes:
        seen: what was cut off, in the cache, in training and in prediction, since `clear`.
        progress: told how many batches of how many a simulated core (`sim.engine`) has trained on.
    """

    name = "fixed"
    own_steps = True
    dense = NumpyDense()

    def __init__(self, config: str = "k26") -> None:
        self.config = config
        self.seen = Saturations()
        self.progress: Callable[[int, int], None] = lambda done, of: None

    def golden(self) -> FixedEngine:
        """Who computes the same without a simulation, and counts for itself."""
        return FixedEngine(self.config)

    def clear(self) -> None:
        """Count saturations from 0."""
        self.seen = Saturations()

    def report(self) -> dict[str, Any]:
        """What is told of a run, plain values by name."""
        return {"config": self.config, "saturations": asdict(self.seen)}

    def build(self, spec: NetSpec) -> Build:
        """The core for a network.

        Raises:
            UsageError: it cannot hold it.
        """
        return configured(self.config, spec)

    def forward(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Logits (T, C), multiples of 2^-F, from records as the cache gives them back (§4); see `Engine.forward`.

        Raises:
            UsageError: a weight, or something that the adapter has, is not within the core's formats.
        """
        lift.check_none(tensors)
        build = self.build(spec)
        formats = build.formats
        params = fixed.adapter(spec, tensors, build.rank, formats)
        out = np.empty((len(x), spec.C), np.float32)
        for rows, x0, values in self._frozen(spec, tensors, x, self.seen):
            *taps, c = fixed.decode(spec.record, fixed.encode(spec.record, values, formats))
            out[rows] = fixed.forward(params, [x0, *taps], c, formats, self.seen)[1] / 2.0**formats.fraction
        return out

    def records(self, spec: NetSpec, tensors: Tensors, x: Floats, threads: int = 1) -> Floats:
        """Record rows, multiples of 2^-F; see `Engine.records`."""
        F, record = self.build(spec).formats.fraction, spec.record
        out = np.zeros((len(x), record.width), np.float32)
        for rows, _, values in self._frozen(spec, tensors, x, Saturations()):
            for s, v in zip(record.segments, values, strict=True):
                out[rows, s.offset : s.offset + s.size] = v / 2.0**F
        return out

    def fill(
        self, spec: NetSpec, tensors: Tensors, x: Floats, numbers: NDArray[np.int64], store: Store, threads: int = 1
    ) -> None:
        """See `Engine.fill`.

        Raises:
            UsageError: the store's codec is not the core's, or a weight does not lie within ±8.
        """
        if store.codec.name != CODEC:
            raise UsageError(f"the core's cache must be {CODEC}, not {store.codec.name}")
        formats = self.build(spec).formats
        missing = np.flatnonzero(~store.held(numbers) & store.admits(numbers))
        for rows, _, values in self._frozen(spec, tensors, x[missing], self.seen):
            entries = fixed.encode(spec.record, values, formats)
            store.write_encoded(numbers[missing[rows]], _scaled(entries, spec, 16 - formats.fraction))
        store.misses += len(missing)
        store.hits -= len(missing)

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
    ) -> FixedTrainer:
        """Make a trainer; see `Engine.trainer`.

        Raises:
            UsageError: the core cannot do it; the limit is named.
        """
        goal = as_targets(y, spec.C)
        if method.name != METHOD:
            raise UsageError(f"method must be {METHOD} for the core, not {method.name}")
        if store is None:
            raise UsageError(f"the core trains from its cache, which must be {CODEC}, not none")
        self.check(spec, tensors, rank, batch_size, lr, momentum, goal, len(x))
        self.fill(spec, tensors, x, numbers, store)
        if not store.held(numbers).all():
            raise UsageError(f"the core's cache must have room for all {len(x)} samples, not {store.capacity}")
        return FixedTrainer(self, self.build(spec), tensors, rank, x, goal.y, numbers, store, batch_size, lr)

    def check(
        self,
        spec: NetSpec,
        tensors: Tensors,
        rank: int,
        batch_size: int,
        lr: float | None,
        momentum: float | None,
        goal: Targets,
        T: int,
    ) -> None:
        """See that the core can make a training of T samples, before anything of it runs.

        Args:
            tensors: of the frozen network.
            lr, momentum: None: what `solvers.sgd` takes.
            goal: what the samples are to teach.

        Raises:
            UsageError: it cannot; the limit is named.
        """
        build = self.build(spec)
        if rank > build.rank:
            raise UsageError(f"rank must be at most {build.rank} for the core's build {self.config}, not {rank}")
        if batch_size > build.batch:
            raise UsageError(
                f"batch size must be at most {build.batch} for the core's build {self.config}, not {batch_size}"
            )
        if T >= MAX_SAMPLES:
            raise UsageError(f"samples must be at most {MAX_SAMPLES - 1} for the core, not {T}")
        if momentum:
            raise UsageError(f"momentum must be 0 for the core, not {momentum:g}")
        if not goal.plain:
            raise UsageError(
                "the core must be taught classes that count alike, not with weights, smoothing or another task"
            )
        if lr is not None:
            for samples in sorted({min(batch_size, T), T % batch_size or batch_size}):
                fixed.step_size(lr, samples)
        fixed.fold(spec, tensors)

    def _frozen(
        self, spec: NetSpec, tensors: Tensors, x: Floats, seen: Saturations
    ) -> Iterator[tuple[slice, Ints, list[Ints]]]:
        """x^0, and x^1 … c, of samples, some at a time."""
        formats, network = self.build(spec).formats, fixed.fold(spec, tensors)
        for rows in _chunks(len(x)):
            x0 = fixed.quantise_input(x[rows], formats)
            yield rows, x0, fixed.frozen(spec, network, x0, formats, seen)


class FixedTrainer:
    """§4 of the specification, on what the cache gives back."""

    def __init__(
        self,
        engine: FixedEngine,
        build: Build,
        tensors: Tensors,
        rank: int,
        x: Floats,
        y: NDArray[np.integer[Any]],
        numbers: NDArray[np.int64],
        store: Store,
        batch_size: int,
        lr: float,
    ) -> None:
        self._engine, self._build, self._rank = engine, build, rank
        self._x, self._y, self._numbers, self._store = x, y, numbers, store
        self._batch_size, self._lr = batch_size, lr
        self._params = fixed.adapter(build.net, tensors, build.rank, build.formats, balanced=False)

    def epochs(self, order: NDArray[np.int32], lr: float | None = None) -> EpochStats:
        """Run E whole epochs; see `Trainer.epochs`. The loss is that of the core's own logits."""
        self._lr = self._lr if lr is None else lr
        F, (E, T) = self._build.formats.fraction, order.shape
        loss, correct = np.zeros(E), np.zeros(E, np.int64)
        for e in range(E):
            for start in range(0, T, self._batch_size):
                rows = order[e, start : start + self._batch_size]
                *taps, c = self._taps(rows)
                labels = self._y[rows]
                self._params, trace = fixed.step(
                    self._params, taps, c, labels, fixed.step_size(self._lr, len(rows)), self._build.formats,
                    self._engine.seen,
                )  # fmt: skip
                y = trace.y / 2.0**F
                top = y.max(axis=1)
                loss[e] += (top + np.log(np.exp(y - top[:, None]).sum(axis=1)) - y[np.arange(len(y)), labels]).sum()
                correct[e] += int((y.argmax(axis=1) == labels).sum())
        self._store.hits += order.size
        return EpochStats(loss / T, correct)

    def tensors(self) -> dict[str, Floats]:
        """A and B; see `Trainer.tensors`."""
        return fixed.tensors_of(self._params, self._rank)

    def _taps(self, rows: NDArray[np.int32]) -> list[Ints]:
        """x^0 … x^(L-1) and c of a batch."""
        net, formats, store = self._build.net, self._build.formats, self._store
        entries = store.data[store.slots(self._numbers[rows])]
        values = fixed.decode(net.record, _scaled(entries, net, formats.fraction - 16))
        return [fixed.quantise_input(self._x[rows], formats), *values]


def _scaled(entries: Bytes, net: NetSpec, left: int) -> Bytes:
    """Entries whose scales and c are moved left (or right) by so many bits: the product's codec knows Q8.16 only."""
    *taps, c = net.record.segments
    scales, output = 4 * sum(s.groups for s in taps), entries.shape[1] - -(-4 * c.size // BEAT) * BEAT
    if left:
        for words in (entries[:, :scales].view("<i4"), entries[:, output:].view("<i4")):
            words[:] = words << left if left > 0 else words >> -left
    return entries


def _chunks(n: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]

"""The engine `rtl-sim`: fine-tuning on the simulated core, every result of it held against the golden model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.store import Store
from ...engine import EpochStats, Floats, Labels, Tensors
from ...errors import EngineError
from ...methods import Method
from ...spec import NetSpec
from .. import fixed
from ..configs import named
from ..engine import FixedEngine, FixedTrainer
from ..image import holds_pixels, launch, parameters_of
from ..tools import check_extra, verilator
from . import Simulator

__all__ = ["SimulatedEngine"]


class SimulatedEngine(FixedEngine):
    """Trains on the simulated core; all else, prediction too, is the golden model's, which has the same bits.

    Args:
        config: a name in `configs.CONFIGS`.

    Raises:
        EngineError: a tool is missing; what to install.
    """

    name = "rtl-sim"

    def __init__(self, config: str = "k26") -> None:
        super().__init__(config)
        check_extra("amaranth")
        verilator()
        self.cycles: Counter[str] = Counter()
        self.cut: Counter[str] = Counter()

    def clear(self) -> None:
        """Count cycles and saturations from 0."""
        super().clear()
        self.cycles.clear()
        self.cut.clear()

    def report(self) -> dict[str, Any]:
        """Cycles by phase, the clock they are stated at, and what was cut off, all by the core's own counters."""
        if not self.cycles:
            return super().report()
        clock = named(self.config).clock_mhz
        return {
            "config": self.config,
            "cycles": dict(self.cycles),
            "clock_mhz": clock,
            "simulated_seconds": self.cycles["total"] / (clock * 1e6),
            "saturations": dict(self.cut),
        }

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
        """Make a trainer; see `FixedEngine.trainer`."""
        golden = super().trainer(
            spec, tensors, method, rank, x, y,
            numbers=numbers, store=store, batch_size=batch_size, lr=lr, momentum=momentum,
        )  # fmt: skip
        return SimulatedTrainer(self, golden, fixed.fold(spec, tensors))


class SimulatedTrainer(FixedTrainer):
    """A launch of the core for every call of `epochs`; the first one fills the cache."""

    def __init__(self, engine: SimulatedEngine, golden: FixedTrainer, frozen: fixed.Frozen) -> None:
        vars(self).update(vars(golden))
        self._core, self._frozen = engine, frozen
        self._build = replace(
            self._build, input="u8" if len(self._build.net.input_shape) == 3 and holds_pixels(self._x) else "q"
        )
        self._simulator = Simulator(self._build, styles=named(engine.config).device.styles)
        self._cache: fixed.Bytes | None = None

    def epochs(self, order: NDArray[np.int32], lr: float | None = None) -> EpochStats:
        """Run E whole epochs; see `Trainer.epochs`.

        Raises:
            EngineError: the core stops with an error, or its adapter is not the golden model's, bit for bit.
        """
        before = self._params
        stats = super().epochs(order, lr)
        job = launch(
            self._build, self._frozen, before, self._x, order, self._y,
            lr=self._lr, batch_size=self._batch_size, cache=self._cache,
        )  # fmt: skip
        result = self._simulator.run(job, lambda done: self._core.progress(done, job.steps))
        A, B = parameters_of(self._build, job.buffers["out"])
        different = sum(
            int(np.count_nonzero(ours != theirs))
            for ours, theirs in zip((*A, *B), (*self._params.A, *self._params.B), strict=True)
        )
        if different:
            raise EngineError(
                f"the simulated core must train what its specification says, but {different} parameters differ"
            )
        self._cache = job.buffers["cache"]
        self._core.cycles.update(result.cycles)
        self._core.cut.update(result.saturations)
        return stats

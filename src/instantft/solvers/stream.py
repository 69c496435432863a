"""Closed-form adaptation of a stream: the records come from the cache, the updates are exact (`streaming`), and what
was chosen for few samples (λ, weights of the taps, temperature, gain) is chosen again when there are twice as many.

Between two choices, an update costs a row of the factor; at a choice, the samples kept so far are replayed from the
cache, so that nothing is forgotten. Without a bound on their number they are kept until there are more of them than
features; from then on the normal equations hold all there is to know, and the last choice stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters import Adapter
from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import Engine, Floats
from ..tasks import Targets
from .records import Records
from .ridge import METHOD, RidgeResult, adapter_tensors, fit_ridge
from .streaming import StreamingRidge

__all__ = ["Stream"]

Batch = tuple[Floats, NDArray[Any], NDArray[np.float64], NDArray[np.int64]]
"""x, labels, weights as they were given (1 where none were), numbers."""

Make = Callable[[NDArray[Any], NDArray[np.float64] | None], Targets]

GROWTH = 2
"""How many times as many samples call for a new choice."""


class Stream:
    """A stream of samples on one frozen network.

    Args:
        engine, base, threads: who runs the frozen network.
        make: targets of labels and weights.
        seed: as in `fit_ridge`.
        forgetting, support: as in `StreamingRidge`.

    Attributes:
        result: what the last choice was made by.
    """

    def __init__(
        self,
        engine: Engine,
        base: Network,
        make: Make,
        *,
        seed: int,
        threads: int,
        forgetting: float,
        support: int | None,
    ) -> None:
        self._make = make
        self._engine, self.base, self._seed, self._threads = engine, base, seed, threads
        self._forgetting, self._support = forgetting, support
        self.result: RidgeResult | None = None
        self._ridge: StreamingRidge | None = None
        self._goal: Targets | None = None
        self._known: set[int] = set()
        self._chosen_at = 0
        self._parts: list[Batch] | None = []
        self._kept = 0

    def samples(self) -> tuple[Floats, Targets, NDArray[np.int64]] | None:
        """x, targets and numbers of the samples that are kept, oldest first; None once the normal equations suffice."""
        if self._parts is None:
            return None
        x, y, weights, numbers = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        kept = slice(-self._support if self._support else None, None)
        self._parts = [(x[kept], y[kept], weights[kept], numbers[kept])]
        x, y, weights, numbers = self._parts[0]
        self._kept = len(y)
        return x, self._make(y, None if (weights == 1).all() else weights), numbers

    def learn(
        self,
        x: Floats,
        y: NDArray[Any],
        numbers: NDArray[np.int64],
        store: Store | None,
        sample_weight: NDArray[Any] | None = None,
    ) -> Adapter:
        """Learn from a batch, oldest sample first; samples whose number was learnt already are left out.

        Args:
            x, numbers, store: as in `fit_ridge`.
            y: (T,) or (T, C) labels, as `data.as_labels` yields them.
            sample_weight: (T,), or None.

        Returns:
            The adapter that fits all samples so far.
        """
        fresh = np.array([int(n) not in self._known for n in numbers], bool)
        weights = np.ones(len(y)) if sample_weight is None else np.asarray(sample_weight, np.float64)
        batch = np.ascontiguousarray(x[fresh]), y[fresh], weights[fresh], numbers[fresh]
        if not fresh.any():
            return self.adapter()
        if self._parts is not None and self._kept + len(batch[1]) >= GROWTH * self._chosen_at:
            self._choose(batch, store)
        else:
            assert self._ridge is not None
            assert self._goal is not None
            weighted = None if (batch[2] == 1).all() else batch[2]
            self._learn(self._ridge, batch[0], self._goal.more(batch[1], weighted), batch[3], store)
            if self._parts is not None:
                self._parts.append(batch)
                self._kept += len(batch[1])
        if self._support is None and self._kept > sum(self.base.spec.tap_widths):
            self._parts = None
        elif self._support is not None and self._kept >= GROWTH * self._support:
            self.samples()
        self._known.update(int(n) for n in batch[3])
        if self._parts is not None and len(self._known) > GROWTH * self._kept:
            self._known = {int(n) for part in self._parts for n in part[3]}
        return self.adapter()

    def _choose(self, batch: Batch, store: Store | None) -> None:
        """Choose and fit anew, with everything that is kept; nothing has changed if that fails."""
        before, kept = self._parts, self._kept
        self._parts = [*(before or []), batch]
        whole = self.samples()
        assert whole is not None
        try:
            x, goal, numbers = whole
            result = fit_ridge(
                self._engine, self.base, x, goal, store=store, numbers=numbers, seed=self._seed, threads=self._threads
            )
            ridge = StreamingRidge(self.base.spec, result.choice, forgetting=self._forgetting, support=self._support)
            self._learn(ridge, x, goal, numbers, store)
        except BaseException:
            self._parts, self._kept = before, kept
            raise
        self.result, self._ridge, self._chosen_at, self._goal = result, ridge, len(goal), goal

    def adapter(self) -> Adapter:
        """What has been learnt so far."""
        assert self._ridge is not None
        assert self.result is not None
        pairs, bias = self._ridge.pairs()
        C = self.base.spec.C
        config = {**self.result.adapter.config, "samples": self._ridge.seen, "forgetting": self._forgetting}
        tensors = adapter_tensors(self.base.spec, pairs, bias, self.result.calibration, C)
        return Adapter(METHOD, C, self.base.spec, self.base.hash, tensors, config)

    def add_class(self, base: Network) -> None:
        """Go on with `base`, which has one class more."""
        self.base = base
        if self._ridge is not None:
            assert self._goal is not None
            self._goal = self._goal.widened(base.spec.C)
            self._ridge.add_class()

    def _learn(
        self, ridge: StreamingRidge, x: Floats, goal: Targets, numbers: NDArray[np.int64], store: Store | None
    ) -> None:
        if store is not None:
            self._engine.fill(self.base.spec, self.base.tensors, x, numbers, store, self._threads)
            store.hits += len(x)
        records = Records(self._engine, self.base, x, numbers, store, self._threads)
        for rows in records.chunks():
            ridge.update(records.taps(rows), goal.at(rows))

"""Closed-form adaptation of a stream: the records come from the cache, the updates are exact (`streaming`), and what
was chosen for few samples (λ, weights of the taps, temperature, gain) is chosen again when there are twice as many.

Between two choices, an update costs a row of the factor; at a choice, the samples kept so far are replayed from the
cache, so that nothing is forgotten. Without a bound on their number they are kept until there are more of them than
features; from then on the normal equations hold all there is to know, and the last choice stays.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..adapters import Adapter
from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import Engine, Floats
from .records import Records
from .ridge import METHOD, RidgeResult, adapter_tensors, fit_ridge
from .streaming import StreamingRidge

__all__ = ["Stream"]

Batch = tuple[Floats, NDArray[np.int32], NDArray[np.int64]]

GROWTH = 2
"""How many times as many samples call for a new choice."""


class Stream:
    """A stream of samples on one frozen network.

    Args:
        engine, base, threads: who runs the frozen network.
        seed: as in `fit_ridge`.
        forgetting, support: as in `StreamingRidge`.

    Attributes:
        result: what the last choice was made by.
    """

    def __init__(
        self, engine: Engine, base: Network, *, seed: int, threads: int, forgetting: float, support: int | None
    ) -> None:
        self._engine, self.base, self._seed, self._threads = engine, base, seed, threads
        self._forgetting, self._support = forgetting, support
        self.result: RidgeResult | None = None
        self._ridge: StreamingRidge | None = None
        self._known: set[int] = set()
        self._chosen_at = 0
        self._parts: list[Batch] | None = []
        self._kept = 0

    def samples(self) -> Batch | None:
        """x, y and numbers of the samples that are kept, oldest first; None once the normal equations suffice."""
        if self._parts is None:
            return None
        x, y, numbers = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        kept = slice(-self._support if self._support else None, None)
        self._parts = [(x[kept], y[kept], numbers[kept])]
        self._kept = len(self._parts[0][1])
        return self._parts[0]

    def learn(self, x: Floats, y: NDArray[np.int32], numbers: NDArray[np.int64], store: Store | None) -> Adapter:
        """Learn from a batch, oldest sample first; samples whose number was learnt already are left out.

        Args:
            x, y, numbers, store: as in `fit_ridge`.

        Returns:
            The adapter that fits all samples so far.
        """
        fresh = np.array([int(n) not in self._known for n in numbers], bool)
        batch = np.ascontiguousarray(x[fresh]), y[fresh], numbers[fresh]
        if not fresh.any():
            return self.adapter()
        if self._parts is not None and self._kept + len(batch[1]) >= GROWTH * self._chosen_at:
            self._choose(batch, store)
        else:
            assert self._ridge is not None
            self._learn(self._ridge, batch, store)
            if self._parts is not None:
                self._parts.append(batch)
                self._kept += len(batch[1])
        if self._support is None and self._kept > sum(self.base.spec.tap_widths):
            self._parts = None
        elif self._support is not None and self._kept >= GROWTH * self._support:
            self.samples()
        self._known.update(int(n) for n in batch[2])
        if self._parts is not None and len(self._known) > GROWTH * self._kept:
            self._known = {int(n) for part in self._parts for n in part[2]}
        return self.adapter()

    def _choose(self, batch: Batch, store: Store | None) -> None:
        """Choose and fit anew, with everything that is kept; nothing has changed if that fails."""
        before, kept = self._parts, self._kept
        self._parts = [*(before or []), batch]
        whole = self.samples()
        assert whole is not None
        try:
            x, y, numbers = whole
            result = fit_ridge(
                self._engine, self.base, x, y, store=store, numbers=numbers, seed=self._seed, threads=self._threads
            )
            ridge = StreamingRidge(self.base.spec, result.choice, forgetting=self._forgetting, support=self._support)
            self._learn(ridge, whole, store)
        except BaseException:
            self._parts, self._kept = before, kept
            raise
        self.result, self._ridge, self._chosen_at = result, ridge, len(y)

    def adapter(self) -> Adapter:
        """What has been learnt so far."""
        assert self._ridge is not None
        assert self.result is not None
        pairs, bias = self._ridge.pairs()
        C, beta, gain = self.base.spec.C, float(self.result.temperature), self.result.gain
        config = {**self.result.adapter.config, "samples": self._ridge.seen, "forgetting": self._forgetting}
        tensors = adapter_tensors(self.base.spec, pairs, bias, beta, gain, C)
        return Adapter(METHOD, C, self.base.spec, self.base.hash, tensors, config)

    def add_class(self, base: Network) -> None:
        """Go on with `base`, which has one class more."""
        self.base = base
        if self._ridge is not None:
            self._ridge.add_class()

    def _learn(self, ridge: StreamingRidge, batch: Batch, store: Store | None) -> None:
        x, y, numbers = batch
        if store is not None:
            self._engine.fill(self.base.spec, self.base.tensors, x, numbers, store, self._threads)
            store.hits += len(x)
        records = Records(self._engine, self.base, x, numbers, store, self._threads)
        for rows in records.chunks():
            ridge.update(records.taps(rows), y[rows])

"""Fine-tuning by stochastic gradient descent: Algorithm 1 of Skip2-LoRA, for every row of the table of methods.

    Algorithm 1                                            here
    1  function FineTune(T, E, B)                          fit
    2    initialise C_skip                                 the store, which is given
    3    for E epochs do                                   _epochs
    4      for |T|/B batches do                            the engine's trainer, one call for many epochs
    5        x ← a random batch of T                       _orders: every epoch is a permutation of T
    6        forward of the frozen layers, with C_skip     engine.fill beforehand, where all of T fits
    7        add what is new to C_skip                     the same
    8        y ← c + Σ_k x^k·A_k·B_k                       the trainer
    9-10     update A_k, B_k                               the trainer

This file decides what is trained on when. It does no arithmetic on samples, and writes no files.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..adapters import MAX_RANK, Adapter, expected, initial
from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import CALL_SECONDS, Engine, EpochStats, Floats, Progress, Tensors, Trainer, parts
from ..errors import DivergedError, UsageError
from ..methods import SGD_METHODS, Method
from ..methods import method as row
from ..spec import NetSpec
from ..tasks import Targets, as_targets
from .dual import DualTrainer, Space, taps_in_dual
from .records import Records
from .step import default_lr, default_momentum

__all__ = ["FitResult", "Progress", "Seconds", "check_arguments", "fit", "pretrain"]

FIRST_CALL_SAMPLES = 10_240
"""Samples trained on in the first call, before it is known how fast they go."""

LONG_EPOCH = 10_240
"""Epochs of more samples are cut into calls of about so many, whatever their speed: the loss of an epoch is summed by
call, and must not depend on the clock."""

PAPERS_LR = 0.1
"""The papers' learning rate, for methods whose safe step the cache does not tell."""

MAX_ORDER = 1 << 20
"""Most numbers in one order of samples handed to the engine (16 MiB while it is drawn)."""

MAX_EPOCHS = 1_000_000
MAX_BATCH = 1 << 20
MAX_THREADS = 1024
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Seconds:
    """Where the time went, from arrays in memory to an adapter in memory."""

    fill: float
    """Running the frozen network once over the samples, into the cache."""
    train: float

    @property
    def total(self) -> float:
        """fill + train."""
        return self.fill + self.train


@dataclass(frozen=True)
class FitResult:
    """What fine-tuning yields.

    Attributes:
        adapter: the adapter.
        seconds: the time it took.
        steps: steps of SGD, epochs · ⌈T / batch size⌉.
        stats: loss and number of correct samples of every epoch.
    """

    adapter: Adapter
    seconds: Seconds
    steps: int
    stats: EpochStats


def check_arguments(
    *,
    rank: int = 1,
    epochs: int = 1,
    batch_size: int = 1,
    lr: float | None = None,
    momentum: float | None = 0.0,
    seed: int = 0,
    threads: int = 1,
) -> None:
    """See that every setting is of its type and inside its range.

    Raises:
        UsageError: one is not; the rule comes first, then the value.
    """
    for name, value, low, high in (
        ("rank", rank, 1, MAX_RANK),
        ("epochs", epochs, 1, MAX_EPOCHS),
        ("batch_size", batch_size, 1, MAX_BATCH),
        ("threads", threads, 1, MAX_THREADS),
        ("seed", seed, 0, MAX_SEED),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise UsageError(f"{name} must be an integer from {low} to {high}, not {value!r:.60}")
    lr = 1.0 if lr is None else lr
    momentum = 0.0 if momentum is None else momentum
    for name, number in (("lr", lr), ("momentum", momentum)):
        if isinstance(number, bool) or not isinstance(number, (int, float, np.integer, np.floating)):
            raise UsageError(f"{name} must be a number, not {number!r:.60}")
    if not 0 < lr <= float(np.finfo(np.float32).max):
        raise UsageError(f"lr must be above 0 and finite in float32, not {lr!r:.60}")
    if not 0 <= momentum < 1:
        raise UsageError(f"momentum must be at least 0 and below 1, not {momentum!r:.60}")


def fit(
    engine: Engine,
    base: Network,
    method: str | Method,
    x: Floats,
    y: NDArray[np.int32] | Targets,
    *,
    rank: int = 4,
    epochs: int = 10,
    batch_size: int = 20,
    lr: float | None = None,
    momentum: float | None = None,
    seed: int = 0,
    threads: int = 1,
    store: Store | None = None,
    numbers: NDArray[np.int64] | None = None,
    start: Adapter | None = None,
    epochs_before: int = 0,
    space: Space = "auto",
    progress: Progress | None = None,
    filling: Progress | None = None,
) -> FitResult:
    """Fine-tune `base` on labelled samples.

    Args:
        engine: who does the arithmetic.
        base: the frozen network.
        method: a row of `methods.METHODS`, or its name.
        x: (T, N) float32, as `data.as_samples` yields them.
        y: (T,) int32 classes, or what else the samples are to teach.
        rank: R of the adapters.
        epochs, batch_size, lr, momentum: of SGD. lr None: `step.default_lr` where the method leaves records valid, else
            PAPERS_LR. momentum None: `step.default_momentum` with that lr, else 0.
        seed: decides the start of the adapters and the order of the samples, and so the whole result.
        threads: used for filling the cache.
        store: the forward cache; None: the frozen network runs in every step.
        numbers: (T,), the number of each sample in the store; None: 0 … T-1.
        start: the adapter to go on from; None: `adapters.initial`.
        epochs_before: epochs done in earlier calls, so that going on draws new orders.
        space: where the steps are made: "primal", on A itself; "dual", on the Gram matrices of the taps (`dual`);
            "auto": each tap where it is cheaper, in the primal unless the cache holds every sample. The steps are the
            same, but for rounding.
        progress: told how many epochs are done, and of long ones which part.
        filling: told how many samples have gone through the frozen network, while the cache is filled beforehand.

    Returns:
        The adapter, times, steps, and loss and accuracy by epoch.

    Raises:
        UsageError: an argument is out of range, the method makes no steps, a cache is given for one that changes what
            it would hold, or the dual is asked for where it cannot be used (`dual.taps_in_dual`).
        DivergedError: a loss or a trained value is not finite.
    """
    m = row(method) if isinstance(method, str) else method
    check_arguments(
        rank=rank, epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum, seed=seed, threads=threads
    )
    if m.solver != "sgd":
        raise UsageError(f"SGD needs a method that makes steps: one of {', '.join(SGD_METHODS)}, not {m.name}")
    goal = as_targets(y, base.spec.C)
    if goal.task == "regression" and not m.rows_only:
        raise UsageError(
            "regression must go with a method that leaves the network as it is (skip-ridge, skip2-lora, skip-lora, "
            f"lora-last), not {m.name}"
        )
    if store is not None and not m.cacheable:
        raise UsageError(f"a cache must go with a method that leaves the frozen activations as they are, not {m.name}")
    spec, T = base.spec, len(x)
    if numbers is None:
        numbers = np.arange(T, dtype=np.int64)

    if engine.own_steps:
        if space == "dual":
            raise UsageError(f"space must be primal or auto for the engine {engine.name}, not dual")
        space, momentum = "primal", momentum or 0.0
    in_dual = taps_in_dual(space, m, spec.tap_widths, T, rank, epochs, batch_size)
    whole = store is not None and store.capacity >= T
    use_dual = any(in_dual) and (whole or space == "dual")

    began = time.perf_counter()
    if store is not None and whole:
        for rows in parts(T, filling):
            engine.fill(spec, base.tensors, x[rows], numbers[rows], store, threads)
    filled = time.perf_counter()

    if momentum is None:
        momentum = default_momentum(m) if lr is None else 0.0
    if lr is None:
        lr = PAPERS_LR
        if m.cacheable:
            records = Records(engine, base, x, numbers, store, threads)
            lr = default_lr(records, m, rank=rank, batch_size=batch_size, momentum=momentum, seed=seed, goal=goal)
    added = dict(initial(m, spec, rank, seed) if start is None else start.tensors)
    units: _Units | None = None
    if goal.task == "regression":
        records = Records(engine, base, x, numbers, store, threads)
        units = _Units.of(goal, records, added)
        goal, added = units.goal, units.inside(added)
    trainer: Trainer
    if use_dual:
        records = Records(engine, base, x, numbers, store, threads)
        trainer = DualTrainer(records, goal, added, m, in_dual, batch_size=batch_size, lr=lr, momentum=momentum)
        if store is not None:
            store.hits += int(store.held(numbers).sum())  # each record is read once, whatever the epochs
    else:
        trainer = engine.trainer(
            spec,
            {**base.tensors, **added},
            m,
            rank,
            x,
            goal,
            numbers=numbers,
            store=store,
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
        )
    stats = _epochs(trainer, T, epochs, batch_size, lr, _rng(seed, epochs_before), progress)
    steps = epochs * math.ceil(T / batch_size)
    tensors = _finite(trainer.tensors(), steps, lr)
    if units is not None:
        tensors = units.outside(tensors)
    config = {
        **goal.config,
        "epochs": int(epochs) + int(epochs_before),
        "batch_size": int(batch_size),
        "lr": float(lr),
        "momentum": float(momentum),
        "seed": int(seed),
        "samples": T,
        "cache": None if store is None else store.codec.name,
        "engine": engine.name,
    }
    adapter = Adapter(m.name, int(rank), spec, base.hash, tensors, config)
    done = time.perf_counter()
    return FitResult(adapter, Seconds(filled - began, done - filled), steps, stats)


@dataclass(frozen=True)
class _Units:
    """Regression in units in which steps have the size that they have for classes: y' = (y − centre)/σ.

        y' = c/σ + Σ x^k·A_k·B_k/σ + (bias − centre)/σ

    Each output has a σ of its own where c is 0 (a new head), else all have one, since there is one gain. The bias is
    not trained: it is what the frozen output lacks on average, or what an earlier adapter had.

    Attributes:
        goal: the targets with that σ.
        sigma: (C,) σ.
        bias: (C,).
    """

    goal: Targets
    sigma: NDArray[np.float64]
    bias: NDArray[np.float64]

    @classmethod
    def of(cls, goal: Targets, records: Records, start: Tensors) -> _Units:
        """For samples whose records these are, from where an adapter stands."""
        c = np.concatenate([records.frozen(rows) for rows in records.chunks()], dtype=np.float64)
        sigma = np.full(goal.C, np.sqrt((goal.spread**2).mean())) if c.any() else goal.spread
        bias = np.asarray(start["output.bias"] if "output.bias" in start else goal.share @ (goal.y - c), np.float64)
        return cls(replace(goal, spread=sigma), sigma, bias)

    def inside(self, tensors: Tensors) -> dict[str, Floats]:
        """What training starts from."""
        made = {k: (v / self.sigma).astype(np.float32) if k.endswith(".B") else v for k, v in tensors.items()}
        made["output.gain"] = (1 / self.sigma[:1]).astype(np.float32)
        made["output.bias"] = ((self.bias - self.goal.centre) / self.sigma).astype(np.float32)
        return made

    def outside(self, tensors: Tensors) -> dict[str, Floats]:
        """What it ends with, in the targets' own units."""
        made = {k: (v * self.sigma).astype(np.float32) if k.endswith(".B") else v for k, v in tensors.items()}
        return {**made, "output.bias": self.bias.astype(np.float32)}


def pretrain(
    engine: Engine,
    spec: NetSpec,
    x: Floats,
    y: NDArray[np.int32],
    *,
    epochs: int = 10,
    batch_size: int = 20,
    lr: float = 0.1,
    momentum: float = 0.0,
    seed: int = 0,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    progress: Progress | None = None,
) -> tuple[Network, EpochStats]:
    """Train a network from scratch: method ``ft-all`` from `Network.init`, batch norm in training mode.

    Args:
        engine: who does the arithmetic.
        spec: the network's shape.
        x: (T, N) float32; y: (T,) int32.
        epochs, batch_size, lr, momentum, seed, progress: as in `fit`.
        mean, std: the preprocessing that x has had; kept with the network.

    Returns:
        The network with its running statistics, and loss and accuracy by epoch.

    Raises:
        UsageError: an argument is out of range.
        DivergedError: a loss or a trained value is not finite.
    """
    check_arguments(epochs=epochs, batch_size=batch_size, lr=lr, momentum=momentum, seed=seed)
    m, T = row("ft-all"), len(x)
    start = Network.init(spec, seed, mean, std)
    trainer = engine.trainer(
        spec,
        start.tensors,
        m,
        1,
        x,
        y,
        numbers=np.arange(T, dtype=np.int64),
        store=None,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
    )
    stats = _epochs(trainer, T, epochs, batch_size, lr, _rng(seed, 0), progress)
    trained = _finite(trainer.tensors(), epochs * math.ceil(T / batch_size), lr)
    names = expected(m, spec, 1)
    return Network(spec, {**start.tensors, **{k: trained[k] for k in names}}, mean, std), stats


def _epochs(
    trainer: Trainer,
    T: int,
    epochs: int,
    batch_size: int,
    lr: float,
    rng: np.random.Generator,
    progress: Progress | None,
) -> EpochStats:
    """Lines 3 and 4: all epochs, in as few calls as let progress be shown and Ctrl-C be heard."""
    loss, correct = np.empty(epochs), np.empty(epochs, np.int64)
    if T > LONG_EPOCH:
        for e in range(epochs):
            loss[e], correct[e] = _long_epoch(trainer, T, e, batch_size, lr, _orders(rng, 1, T), progress)
        return EpochStats(loss, correct)
    done = 0
    count = max(1, FIRST_CALL_SAMPLES // T)
    while done < epochs:
        count = min(count, epochs - done, max(1, MAX_ORDER // T))
        began = time.perf_counter()
        stats = trainer.epochs(_orders(rng, count, T))
        elapsed = time.perf_counter() - began
        if stats.diverged_at is not None:
            raise DivergedError(done * math.ceil(T / batch_size) + stats.diverged_at, lr)
        loss[done : done + count], correct[done : done + count] = stats.loss, stats.correct
        done += count
        if progress is not None:
            progress(done)
        count = max(1, int(count * CALL_SECONDS / max(elapsed, 1e-6)))
    return EpochStats(loss, correct)


def _long_epoch(
    trainer: Trainer, T: int, done: int, B: int, lr: float, order: NDArray[np.int32], progress: Progress | None
) -> tuple[float, int]:
    """One epoch in several calls, cut between batches: mean loss, and how many samples were classified correctly."""
    size = max(1, LONG_EPOCH // B) * B
    loss, correct = 0.0, 0
    for start in range(0, T, size):
        part = np.ascontiguousarray(order[:, start : start + size])
        stats = trainer.epochs(part)
        if stats.diverged_at is not None:
            raise DivergedError(done * math.ceil(T / B) + start // B + stats.diverged_at, lr)
        n = part.shape[1]
        loss, correct = loss + float(stats.loss[0]) * n, correct + int(stats.correct[0])
        if progress is not None:
            progress(done + 1 if start + n == T else done + (start + n) / T)
    return loss / T, correct


def _rng(seed: int, epochs_before: int) -> np.random.Generator:
    return np.random.default_rng([seed, 1, epochs_before] if epochs_before else [seed, 1])


def _orders(rng: np.random.Generator, count: int, T: int) -> NDArray[np.int32]:
    """Line 5: (count, T) permutations of 0 … T-1, the same whether they are drawn together or one by one.

    Random keys that carry the number in their low bits are sorted: about eight times as fast as shuffling, which
    would take a fifth of a DNN's cached epoch. Keys have at least 20 random bits, so ties do not matter.
    """
    bits = max(1, (T - 1).bit_length())
    key: type[np.uint32] | type[np.uint64] = np.uint32 if bits <= 12 else np.uint64
    keys = rng.integers(0, np.iinfo(key).max, size=(count, T), dtype=key, endpoint=True)
    low = key((1 << bits) - 1)
    keys &= ~low
    keys |= np.arange(T).astype(key)
    keys.sort(axis=1)
    keys &= low
    return keys.view(np.int32) if key is np.uint32 else keys.astype(np.int32)


def _finite(tensors: Tensors, steps: int, lr: float) -> dict[str, Floats]:
    """The tensors, if the very last update was finite too; the losses cannot tell."""
    if not all(np.isfinite(t).all() for t in tensors.values()):
        raise DivergedError(steps, lr)
    return dict(tensors)

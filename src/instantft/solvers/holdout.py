"""A held-out block: how methods that make steps are judged, and how many epochs they are worth.

Ridge regression knows from its factorisation what it would say of samples left out. SGD has to be run without them: a
fifth of the samples, in a few long runs, since neighbours resemble each other, is kept away from a second training with
the same settings. What is judged is that training; what is kept is the one on all samples. Where groups are given,
which may be few, each of them is left out in one of up to five trainings.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import Engine, Floats, forward
from ..methods import Method
from ..tasks import Targets, as_targets
from .calibration import best_losses
from .closed import LONGEST, Judged, consecutive
from .factor import Rows, blocks_of, runs
from .records import subset
from .sgd import fit

__all__ = ["STAIRS", "best_epochs", "hold_out", "split"]

SHARE = 5
"""One sample in so many is held out."""

PIECES = 8
"""Runs of consecutive samples they come in."""

STAIRS = (1, 2, 5, 10, 20, 50, 100)
"""Epochs that are compared."""


def split(T: int, groups: NDArray[Any] | None, seed: int) -> list[Judged]:
    """The rows to judge by, a training at a time: about T/SHARE of them, in PIECES runs; or all, in SHARE lots of whole
    groups that are about as large as each other."""
    if groups is None:
        rows, parts = subset(T, max(1, T // SHARE), seed, PIECES)
        return [Judged(rows, [part[cut] for part in parts for cut in runs(len(part), -(-len(part) // LONGEST))])]
    lots: list[list[Rows]] = [[] for _ in range(SHARE)]
    for block in sorted(blocks_of(groups), key=len, reverse=True):
        min(lots, key=lambda lot: sum(map(len, lot))).append(block)
    return [Judged(np.concatenate(lot), consecutive(lot)) for lot in lots if lot]


def hold_out(
    engine: Engine,
    base: Network,
    m: Method,
    x: Floats,
    y: NDArray[np.int32] | Targets,
    *,
    groups: NDArray[Any] | None,
    store: Store | None,
    numbers: NDArray[np.int64],
    seed: int,
    threads: int,
    **settings: Any,
) -> tuple[Judged, Floats]:
    """Train once more without the held-out samples, or without each lot of groups; with nothing left to train on,
    nothing is learnt.

    Returns:
        Which samples were held out, and their logits (n, C).

    Args:
        groups: (T,) a label a sample; samples of a group are held out together.
        settings: rank, epochs, batch_size, lr, momentum of `sgd.fit`; the other arguments are its too.
    """
    goal = as_targets(y, base.spec.C)
    lots, logits = split(len(x), groups, seed), []
    for judge in lots:
        train = np.setdiff1d(np.arange(len(x)), judge.rows)
        added: dict[str, Floats] = {}
        if len(train):
            fitted = fit(
                engine, base, m, np.ascontiguousarray(x[train]), goal.at(train),
                store=store, numbers=numbers[train], seed=seed, threads=threads, **settings,
            )  # fmt: skip
            added = dict(fitted.adapter.tensors)
        held = np.ascontiguousarray(x[judge.rows])
        logits.append(forward(engine, base.spec, {**base.tensors, **added}, held, threads))
    blocks = [judge.rows[block] for judge in lots for block in judge.blocks]
    return Judged(np.concatenate(blocks), consecutive(blocks)), np.concatenate(logits)


def best_epochs(
    engine: Engine,
    base: Network,
    m: Method,
    x: Floats,
    y: NDArray[np.int32] | Targets,
    *,
    groups: NDArray[Any] | None,
    store: Store | None,
    numbers: NDArray[np.int64],
    seed: int,
    threads: int,
    **settings: Any,
) -> int:
    """The number of epochs, out of STAIRS, after which the loss of held-out samples is least, each at its own
    temperature: SGD grows too sure of itself long before it gets worse at telling the classes apart.

    One training goes up all the stairs. Arguments as for `hold_out`, without epochs.
    """
    goal = as_targets(y, base.spec.C)
    judge = split(len(x), groups, seed)[0]
    train = np.setdiff1d(np.arange(len(x)), judge.rows)
    if not len(train):
        return STAIRS[0]
    rest, held = np.ascontiguousarray(x[train]), np.ascontiguousarray(x[judge.rows])
    done, best, least, start = 0, STAIRS[0], np.inf, None
    for epochs in STAIRS:
        start = fit(
            engine, base, m, rest, goal.at(train),
            store=store, numbers=numbers[train], seed=seed, threads=threads,
            epochs=epochs - done, epochs_before=done, start=start, **settings,
        ).adapter  # fmt: skip
        done = epochs
        logits = forward(engine, base.spec, {**base.tensors, **start.tensors}, held, threads)
        loss = float(best_losses(logits.astype(np.float64), goal.at(judge.rows)).mean())
        if loss < least:
            best, least = epochs, loss
    return best

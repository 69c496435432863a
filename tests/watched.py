"""A small network that knows its world, and worlds that differ from it, for the tests of the watcher."""

from __future__ import annotations

from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from instantft.backbones.builtin import Network
from instantft.engine import get_engine
from instantft.solvers.sgd import pretrain
from instantft.watch.journal import Journal
from instantft.watch.loop import Event, Loop, Sample

from .samples import SPEC, blobs


@cache
def trained() -> Network:
    """About 99 % right on `world(0)`."""
    x, y = blobs(600, seed=7)
    network, _ = pretrain(get_engine(), SPEC, x, y, epochs=30, lr=0.1)
    return network


def world(kind: int, T: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the world that the network knows (0), or of one whose features have changed places (1, 2, …)."""
    x, y = blobs(T, seed=seed)
    order = np.random.default_rng(seed + 1000).permutation(T)
    return np.roll(x, kind, axis=1)[order], y[order]


def samples(kind: int, T: int, seed: int = 0, **more: Any) -> list[Sample]:
    return [Sample(x, None, int(y), **more) for x, y in zip(*world(kind, T, seed), strict=True)]


def at_once(job: Any) -> Future[Any]:
    """Work that is done before one looks away."""
    future: Future[Any] = Future()
    try:
        future.set_result(job())
    except Exception as e:
        future.set_exception(e)
    return future


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def journal_in(folder: Path, keep: int = 600, pending: int = 64, **more: Any) -> Journal:
    return Journal(folder, trained(), keep=keep, pending=pending, **more)


def loop_on(journal: Journal, **more: Any) -> Loop:
    settings: dict[str, Any] = {"work": at_once, "labels": 60, "clock": Clock(), **more}
    return Loop(trained(), get_engine(), journal, **settings)


def run(loop: Loop, messages: list[Any], batch: int = 16) -> list[Event]:
    """All events of these messages but predictions."""
    events: list[Event] = []
    for start in range(0, len(messages), batch):
        events += loop.feed(messages[start : start + batch])
        events += loop.poll()
    return [e for e in events if e["event"] != "prediction"]


def named(events: list[Event], name: str) -> list[Event]:
    return [e for e in events if e["event"] == name]

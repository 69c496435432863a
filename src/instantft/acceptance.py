"""Whether a new adapter may take the place of what is there: what `finetune` does between fitting and saving.

The gate compares two models on samples that neither was fitted to. An adapter on disk may have been fitted to some of
these very samples. So each saved adapter carries the fingerprints of its samples, and what it said of those that were
left out when it was judged: a sample that is new to it is asked of it now, of one that it knows counts what it said
then. Left out in another way (with groups or without), nothing it said then can be compared; if that is all there is,
the new adapter has to be better than the frozen network.

Three can win: the new adapter if it is better than both others, the frozen network if the old adapter is worse than
nothing (`frozen_wins`), and otherwise the old adapter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapters import Adapter, expected, initial
from .claims import UNKNOWN, claims, fingerprints
from .engine import Floats
from .methods import method
from .solvers.gate import Decision
from .tuner import FineTuner

__all__ = ["continues", "decide", "frozen_wins", "succeeds", "untrained"]

Prints = NDArray[np.uint32]


def untrained(adapter: Adapter, base_tensors: Any) -> Adapter:
    """An adapter of the same form that changes nothing: what is saved where a first adapter is refused."""
    m = method(adapter.method)
    tensors = {name: base_tensors[name] for name in expected(m, adapter.spec, adapter.rank) if name in base_tensors}
    tensors |= initial(m, adapter.spec, adapter.rank, 0)
    config = {name: adapter.config[name] for name in ("mean", "std", "task", "classes") if name in adapter.config}
    return Adapter(adapter.method, adapter.rank, adapter.spec, adapter.base_hash, tensors, {**config, "trained": False})


def continues(old: Adapter, x: Floats) -> bool:
    """Whether an adapter fitted to x (T, N) goes on from `old`: most of what that learnt from is among x, and there is
    more.

    Raises:
        FileError: what `old` says about itself makes no sense.
    """
    return _goes_on(claims(old).seen, fingerprints(x))


def succeeds(new: Adapter, old: Adapter) -> bool:
    """The same of an adapter `new` that remembers what it was fitted to.

    Raises:
        FileError: what they say about themselves makes no sense.
    """
    return _goes_on(claims(old).seen, claims(new).seen)


def _goes_on(old: Prints, new: Prints) -> bool:
    return 2 * int(np.isin(old, new).sum()) >= len(old) > 0 and len(new) > len(old)


def frozen_wins(tuner: FineTuner, x: Floats, old: Adapter) -> Decision:
    """Whether the frozen network is better than `old`, by the samples that `decide` goes by. In the network's own world
    nothing can be better than it by much, so that no new adapter gets through the gate there.

    Args:
        tuner: fitted to x (T, N).
        old: the adapter in use, for samples preprocessed as x is.

    Raises:
        FileError: what `old` says about itself makes no sense.
    """
    held = tuner.left_out()
    said = claims(old).about(x, held.grouped)
    # Where nothing is left that it said without the sample, what it learnt by heart counts for it.
    return tuner.judge(old, None if (said[held.judge.rows] == UNKNOWN).all() else said, frozen=True)


def decide(tuner: FineTuner, x: Floats, old: Adapter | None, onward: bool = False) -> Decision:
    """Whether the tuner's adapter is better than `old` and than the frozen network.

    Args:
        tuner: fitted to x (T, N).
        old: the adapter in use, for samples preprocessed as x is; None: there is none.
        onward: whether the tuner's adapter goes on from `old` in the same world by the same method (`continues`). Then
            it need not be better by the gate's margin, but better at all: that more samples of a world teach more is
            what one expects, and the margin is for what one does not. Where labels are wrong it would be out of reach:
            with 30 % of them, a gain of a point is one of 0.55, and 1.7 standard errors of 600 samples are 0.8.

    Raises:
        FileError: what `old` says about itself makes no sense.
    """
    if old is None or not old.config.get("trained", True):
        return tuner.judge()
    held, frozen = tuner.left_out(), tuner.judge()
    said = claims(old).about(x, held.grouped)
    known = said[held.judge.rows]
    if (known == UNKNOWN).all():
        return frozen
    found = tuner.judge(old, said)
    # The same command once more changes nothing, and may do so.
    same = bool((known == held.logits.argmax(axis=1))[known != UNKNOWN].all())
    better = found.accepted or (onward and found.gain > 0)
    return replace(found, accepted=frozen.accepted and (better or same))

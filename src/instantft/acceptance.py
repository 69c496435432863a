"""Whether a new adapter may take the place of what is there: what `finetune` does between fitting and saving.

The gate compares two models on samples that neither was fitted to. An adapter on disk may have been fitted to some of
these very samples. So each saved adapter carries the fingerprints of its samples, and what it said of those that were
left out when it was judged: a sample that is new to it is asked of it now, of one that it knows counts what it said
then. Left out in another way (with groups or without), nothing it said then can be compared; if that is all there is,
the new adapter has to be better than the frozen network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .adapters import Adapter, expected, initial
from .claims import UNKNOWN, claims
from .engine import Floats
from .methods import method
from .solvers.gate import Decision
from .tuner import FineTuner

__all__ = ["decide", "untrained"]


def untrained(adapter: Adapter, base_tensors: Any) -> Adapter:
    """An adapter of the same form that changes nothing: what is saved where a first adapter is refused."""
    m = method(adapter.method)
    tensors = {name: base_tensors[name] for name in expected(m, adapter.spec, adapter.rank) if name in base_tensors}
    tensors |= initial(m, adapter.spec, adapter.rank, 0)
    config = {name: adapter.config[name] for name in ("mean", "std", "task", "classes") if name in adapter.config}
    return Adapter(adapter.method, adapter.rank, adapter.spec, adapter.base_hash, tensors, {**config, "trained": False})


def decide(tuner: FineTuner, x: Floats, old: Adapter | None) -> Decision:
    """Whether the tuner's adapter is better than `old`, or, without one, than the frozen network.

    Args:
        tuner: fitted to x (T, N).
        old: the adapter in use, for samples preprocessed as x is.

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
    return replace(found, accepted=frozen.accepted and (found.accepted or same))

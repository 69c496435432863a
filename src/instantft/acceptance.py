"""Whether a new adapter may take the place of what is there: what `finetune` does between fitting and saving.

The gate compares two models on samples that neither was fitted to. An adapter on disk may have been fitted to some of
these very samples. So each saved adapter carries the fingerprints of its samples, and what it said of those that were
left out when it was judged: a sample that is new to it is asked of it now, of one that it knows counts what it said
then. Left out in another way (with groups or without), nothing it said then can be compared; if that is all there is,
the new adapter has to be better than the frozen network.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapters import Adapter, expected, initial
from .engine import Floats
from .errors import FileError
from .methods import method
from .solvers.gate import Decision
from .tuner import NEW, UNKNOWN, FineTuner, HeldOut

__all__ = ["check_claims", "decide", "fingerprints", "signed", "untrained"]

REMEMBERED = 50_000
"""Most samples that are remembered: 533 kB. Of more samples, the first so many."""


def fingerprints(x: Floats) -> NDArray[np.uint32]:
    """(T,) CRC-32 of each sample of x (T, N), preprocessed.

    Not of its label too: samples whose label has changed since would be those that the old adapter gets wrong.
    """
    return np.fromiter(map(zlib.crc32, np.ascontiguousarray(x)), np.uint32, len(x))


def signed(adapter: Adapter, x: Floats, held: HeldOut, decision: Decision, **more: Any) -> Adapter:
    """The adapter with what a later `decide` needs to know.

    Args:
        x: (T, N) what it was fitted to.
        held: what was said of these samples when they were left out.
        decision: what the gate made of it.
        more: further entries of its config.
    """
    said = np.full(len(x), UNKNOWN)
    said[held.judge.rows] = held.logits.argmax(axis=1)
    left_out = {
        "grouped": held.grouped,
        "seen": _packed(fingerprints(x[:REMEMBERED]), "<u4"),
        "said": _packed(said[:REMEMBERED], "<i4"),
    }
    estimate = {"accuracy": decision.after, "samples": decision.n}
    return replace(adapter, config={**adapter.config, **more, "estimate": estimate, "left_out": left_out})


def untrained(adapter: Adapter, base_tensors: Any) -> Adapter:
    """An adapter of the same form that changes nothing: what is saved where a first adapter is refused."""
    m = method(adapter.method)
    tensors = {name: base_tensors[name] for name in expected(m, adapter.spec, adapter.rank) if name in base_tensors}
    tensors |= initial(m, adapter.spec, adapter.rank, 0)
    config = {name: adapter.config[name] for name in ("mean", "std") if name in adapter.config}
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
    said = _said(old, x, held.grouped)
    known = said[held.judge.rows]
    if (known == UNKNOWN).all():
        return frozen
    found = tuner.judge(old, said)
    # The same command once more changes nothing, and may do so.
    same = bool((known == held.logits.argmax(axis=1))[known != UNKNOWN].all())
    return replace(found, accepted=frozen.accepted and (found.accepted or same))


def check_claims(adapter: Adapter) -> None:
    """See, before any work is done, that what an adapter says about itself makes sense.

    Raises:
        FileError: it does not.
    """
    _claims(adapter)


def _said(old: Adapter, x: Floats, grouped: bool) -> NDArray[np.int64]:
    """(T,): what `old` said of each sample when it was left out in the same way; or NEW, or UNKNOWN."""
    seen, answers, way = _claims(old)
    if way != grouped:
        answers = np.full(len(seen), UNKNOWN)
    order = np.argsort(seen, kind="stable")
    prints = fingerprints(x)
    at = np.minimum(np.searchsorted(seen[order], prints), max(len(seen) - 1, 0))
    if not len(seen):
        return np.full(len(x), NEW)
    found = seen[order][at] == prints
    return np.where(found, answers[order][at], NEW)


def _claims(adapter: Adapter) -> tuple[NDArray[np.uint32], NDArray[np.int64], bool]:
    """Fingerprints of the adapter's samples, what it said of each when left out, and whether in groups."""
    claims = adapter.config.get("left_out", {"seen": "", "said": "", "grouped": False})
    if not isinstance(claims, dict):
        raise FileError(f"an adapter's left_out must be an object, not {str(claims)[:40]!r}")
    seen, said = (_unpacked(claims.get(name), dtype) for name, dtype in (("seen", "<u4"), ("said", "<i4")))
    if len(seen) != len(said) or (len(said) and not UNKNOWN <= said.min() <= said.max() < adapter.spec.C):
        raise FileError(
            f"an adapter must have said of each sample which class it is, 0 to {adapter.spec.C - 1}, but of "
            f"{len(seen)} samples it has said {len(said)}, or others"
        )
    return seen.astype(np.uint32), said.astype(np.int64), bool(claims.get("grouped"))


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpacked(text: object, dtype: str) -> NDArray[Any]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype)  # type: ignore[arg-type]
    except (TypeError, ValueError, binascii.Error):
        raise FileError(f"an adapter's fingerprints must be base64 of whole words, not {str(text)[:40]!r}") from None

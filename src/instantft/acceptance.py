"""Whether a new adapter may take the place of what is there: what `finetune` does between fitting and saving.

The gate compares two models on samples that neither was fitted to. An adapter on disk may have been fitted to some of
these very samples, so each saved adapter carries the fingerprints of its own, and only samples that are new to it
count. Where nearly all are known to it, as when one data set is used twice, its own estimate of then is compared with
that of now, and must be surely exceeded like any other.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapters import Adapter, expected, initial
from .engine import Floats
from .errors import FileError
from .methods import method
from .solvers.gate import INTERVAL, SURE, Decision
from .tuner import FineTuner

__all__ = ["check_claims", "decide", "fingerprints", "signed", "untrained"]

ENOUGH = 30
"""Fewer unknown samples than this are not compared one by one."""

REMEMBERED = 100_000
"""Most fingerprints that are kept: 533 kB. Of more samples, the first so many."""


def fingerprints(x: Floats) -> NDArray[np.uint32]:
    """(T,) CRC-32 of each sample of x (T, N), preprocessed.

    Not of its label too: samples whose label has changed since would be those that the old adapter gets wrong.
    """
    return np.fromiter(map(zlib.crc32, np.ascontiguousarray(x)), np.uint32, len(x))


def signed(adapter: Adapter, x: Floats, decision: Decision, **more: Any) -> Adapter:
    """The adapter with what a later `decide` needs to know: fingerprints of x (T, N), and its own estimate.

    Args:
        more: further entries of its config.
    """
    known = fingerprints(x[:REMEMBERED]).astype("<u4").tobytes()
    estimate = {"accuracy": decision.after, "samples": decision.n}
    config = {**adapter.config, **more, "seen": base64.b64encode(known).decode(), "estimate": estimate}
    return replace(adapter, config=config)


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
    new = ~np.isin(fingerprints(x), _seen(old))
    if new.all():
        return tuner.judge(old)
    if new[tuner.left_out().judge.rows].sum() >= ENOUGH:
        return tuner.judge(old, new)
    said = _said(old)
    if said is None:
        return tuner.judge()
    before, n = said
    found = tuner.judge()
    (p, var_p), (q, var_q) = _shrunk(before, n), _shrunk(found.after, found.n)
    gain, error = q - p, math.sqrt(var_p + var_q)
    interval = max(gain - INTERVAL * error, -1.0), min(gain + INTERVAL * error, 1.0)
    return Decision(found.accepted and gain >= SURE * error, before, found.after, interval, found.n)


def _shrunk(accuracy: float, n: int) -> tuple[float, float]:
    """An accuracy on n samples with one right and one wrong made up, so that its variance, the second, is above 0.

    What Agresti and Caffo (2000) do to compare two proportions of samples that are not the same.
    """
    p = (accuracy * n + 1) / (n + 2)
    return p, p * (1 - p) / (n + 2)


def check_claims(adapter: Adapter) -> None:
    """See, before any work is done, that what an adapter says about itself makes sense.

    Raises:
        FileError: it does not.
    """
    _seen(adapter)
    _said(adapter)


def _said(adapter: Adapter) -> tuple[float, int] | None:
    """The adapter's own estimate of its accuracy, and by how many samples; None: it has none."""
    said = adapter.config.get("estimate")
    if not isinstance(said, dict):
        return None
    accuracy, n = said.get("accuracy"), said.get("samples")
    if type(accuracy) is not float or type(n) is not int or not 0 <= accuracy <= 1 or n < 1:
        raise FileError(f"an adapter's estimate must be an accuracy and a number of samples, not {str(said)[:80]}")
    return accuracy, n


def _seen(adapter: Adapter) -> NDArray[np.uint32]:
    text = adapter.config.get("seen", "")
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<u4").astype(np.uint32)
    except (TypeError, ValueError, binascii.Error):
        raise FileError(f"an adapter's fingerprints must be base64 of whole words, not {str(text)[:40]!r}") from None

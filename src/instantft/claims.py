"""What an adapter says about the samples it was fitted to: their fingerprints, and what it would have said of those
that were left out when it was judged. By this a later adapter is compared with it on samples that neither was fitted
to.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapters import Adapter
from .errors import FileError

__all__ = ["NEW", "UNKNOWN", "Claims", "claims", "fingerprints", "signed"]

NEW, UNKNOWN = -1, -2
"""What an adapter said of a left-out sample: nothing yet, but it may be asked; nothing, and it is too late."""

REMEMBERED = 50_000
"""Most samples that are remembered: 533 kB. Of more samples, the first so many."""


@dataclass(frozen=True)
class Claims:
    """What an adapter remembers.

    Attributes:
        seen: (n,) uint32, fingerprints of its samples.
        said: (n,) the class it gave to each when that was left out, or UNKNOWN.
        grouped: whether samples were left out in groups that somebody had named.
    """

    seen: NDArray[np.uint32]
    said: NDArray[np.int64]
    grouped: bool

    def about(self, x: NDArray[np.float32], grouped: bool) -> NDArray[np.int64]:
        """(T,): the class given to each sample of x (T, N) when left out in the same way; or NEW, or UNKNOWN."""
        if not len(self.seen):
            return np.full(len(x), NEW)
        answers = self.said if grouped == self.grouped else np.full(len(self.seen), UNKNOWN)
        order = np.argsort(self.seen, kind="stable")
        prints = fingerprints(x)
        at = np.minimum(np.searchsorted(self.seen[order], prints), len(self.seen) - 1)
        return np.where(self.seen[order][at] == prints, answers[order][at], NEW)


def fingerprints(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    """(T,) CRC-32 of each sample of x (T, N), preprocessed.

    Not of its label too: samples whose label has changed since would be those that the old adapter gets wrong.
    """
    return np.fromiter(map(zlib.crc32, np.ascontiguousarray(x)), np.uint32, len(x))


def signed(adapter: Adapter, x: NDArray[np.float32], said: NDArray[np.int64], grouped: bool, **more: Any) -> Adapter:
    """The adapter with its claims.

    Args:
        x: (T, N) what it was fitted to.
        said: (T,) the class it gave to each when that was left out, or UNKNOWN.
        grouped: whether in groups.
        more: further entries of its config.
    """
    left_out = {
        "grouped": grouped,
        "seen": _packed(fingerprints(x[:REMEMBERED]), "<u4"),
        "said": _packed(said[:REMEMBERED], "<i4"),
    }
    return replace(adapter, config={**adapter.config, **more, "left_out": left_out})


def claims(adapter: Adapter) -> Claims:
    """The adapter's claims; none where it has none.

    Raises:
        FileError: they make no sense.
    """
    held = adapter.config.get("left_out", {"seen": "", "said": "", "grouped": False})
    if not isinstance(held, dict):
        raise FileError(f"an adapter's left_out must be an object, not {str(held)[:40]!r}")
    seen, said = (_unpacked(held.get(name), dtype) for name, dtype in (("seen", "<u4"), ("said", "<i4")))
    if len(seen) != len(said) or (len(said) and not UNKNOWN <= said.min() <= said.max() < adapter.spec.C):
        raise FileError(
            f"an adapter must have said of each sample which class it is, 0 to {adapter.spec.C - 1}, but of "
            f"{len(seen)} samples it has said {len(said)}, or others"
        )
    return Claims(seen.astype(np.uint32), said.astype(np.int64), bool(held.get("grouped")))


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpacked(text: object, dtype: str) -> NDArray[Any]:
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype)  # type: ignore[arg-type]
    except (TypeError, ValueError, binascii.Error):
        raise FileError(f"an adapter's fingerprints must be base64 of whole words, not {str(text)[:40]!r}") from None

"""Numbers of the core: formats, rounding, tables (docs/hardware.md §1, §3, §5). NumPy only; integers are int64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.codecs import Q16_LEVELS as LEVELS  # (16,) l_i
from ..cache.codecs import Q16_THRESHOLDS as THRESHOLDS  # (15,) t_j

__all__ = [
    "EXP_HIGH",
    "EXP_LOW",
    "INVERSE",
    "LEVELS",
    "PARAMETER_FRACTION",
    "PARAMETER_WIDTH",
    "PROFILES",
    "SCALED_FRACTION",
    "SCALED_WIDTH",
    "STEP_FRACTION",
    "STEP_WIDTH",
    "THRESHOLDS",
    "Formats",
    "Ints",
    "nearest",
    "shift",
]

Ints = NDArray[np.int64]

PARAMETER_WIDTH, PARAMETER_FRACTION = 16, 12
"""Q4.12: weights, biases, A, B, gain, g (InstantFT §4.1)."""

SCALED_WIDTH, SCALED_FRACTION = 18, 20
"""v = η·g and u = η·dh."""

STEP_WIDTH, STEP_FRACTION = 24, 24
"""η, unsigned."""


@dataclass(frozen=True)
class Formats:
    """The one choice there is: how wide activations are."""

    name: str
    width: int
    fraction: int

    @property
    def update_shift(self) -> int:
        """Fraction bits of x·u beyond those of a parameter."""
        return self.fraction + SCALED_FRACTION - PARAMETER_FRACTION


PROFILES = {f.name: f for f in (Formats("q24", 24, 16), Formats("q18", 18, 10))}


def shift(v: Ints, s: int) -> Ints:
    """v / 2^s, rounded to the nearest integer, ties upwards."""
    return v if s == 0 else (v + (1 << (s - 1))) >> s


def nearest(x: NDArray[Any] | float, fraction: int) -> Ints:
    """floor(x·2^fraction + 1/2) of real x, in float64."""
    return np.floor(np.asarray(x, np.float64) * 2.0**fraction + 0.5).astype(np.int64)


EXP_HIGH = np.minimum(65535, nearest(np.exp(-np.arange(128) / 8), 16))
"""(128,) E1."""

EXP_LOW = np.minimum(65535, nearest(np.exp(-np.arange(128) / 1024), 16))
"""(128,) E2."""

INVERSE = nearest(1 / (1 + (np.arange(1024) + 0.5) / 1024), 16)
"""(1024,) I."""

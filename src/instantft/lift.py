"""The lift: what a closed-form adapter may add to its linear map, and what that costs.

The arc-cosine kernel of order 1 (Cho and Saul, 2009), that of infinitely many ReLUs, has two halves:

    k(u, v) = ‖u‖‖v‖/π·(sin θ + (π − θ)·cos θ) = ½·u·v + e(u, v)
    e(u, v) = ‖u‖‖v‖/π·(√(1 − t²) + t·asin t),   t = cos θ = u·v / ‖u‖‖v‖

The first is linear, and A_k, B_k hold all of it. Only the second, which is even, has to be computed against landmarks,
and a few leading directions of the taps are enough for that:

    y = gain·c + Σ x^k·A_k·B_k + bias + e(u, V)·W,   u = Σ x^k·Q_k − o

    lift.basis (D, P): Q_0 … Q_{L-1} one below the other      lift.offset (P,): o
    lift.landmarks (m, P): V                                  lift.coefficients (m, C): W

D = ΣN_k features, P directions, m landmarks, C outputs. This file knows neither solvers nor engines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError
from .spec import NetSpec

__all__ = [
    "BASIS",
    "MAX_DIRECTIONS",
    "MAX_LANDMARKS",
    "LiftCost",
    "check_none",
    "cost",
    "curved",
    "from_taps",
    "lengths",
    "logits",
    "project",
    "shapes",
    "tap_slices",
    "taps_of",
]

Array = NDArray[Any]
Floats = NDArray[np.float32]

BASIS = "lift.basis"
"""The tensor that is there if and only if there is a lift."""

MAX_DIRECTIONS, MAX_LANDMARKS = 1024, 4096
"""Largest P and m."""

BLOCK = 1 << 17
"""Kernel values that are computed at a time, so that they stay in the cache: 512 KiB."""


@dataclass(frozen=True)
class LiftCost:
    """What a lift adds to the prediction of one sample.

    Attributes:
        directions, landmarks: P and m.
        macs: multiply-adds: D·P + m·P + m·C.
            Beside them m kernel values, a square root and an arc sine each.
        bytes: of its tensors in float32.
    """

    directions: int
    landmarks: int
    macs: int
    bytes: int


def cost(spec: NetSpec, directions: int, landmarks: int) -> LiftCost:
    """Cost of a lift of P directions and m landmarks on a network of this shape."""
    D, P, m, C = sum(spec.tap_widths), directions, landmarks, spec.C
    return LiftCost(P, m, D * P + m * P + m * C, 4 * (D * P + P + m * P + m * C))


def shapes(spec: NetSpec, directions: int, landmarks: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of the four tensors.

    Raises:
        UsageError: too few or too many directions or landmarks.
    """
    for what, n, most in (("directions", directions, MAX_DIRECTIONS), ("landmarks", landmarks, MAX_LANDMARKS)):
        if not 1 <= n <= most:
            raise UsageError(f"a lift must have 1 to {most} {what}, not {n}")
    return {
        BASIS: (sum(spec.tap_widths), directions),
        "lift.offset": (directions,),
        "lift.landmarks": (landmarks, directions),
        "lift.coefficients": (landmarks, spec.C),
    }


def check_none(tensors: Mapping[str, Floats]) -> None:
    """For what knows linear adapters only.

    Raises:
        UsageError: there is a lift.
    """
    if BASIS in tensors:
        raise UsageError("an adapter with a lift must be run by instantft.engine.forward, not by an engine's own")


def tap_slices(spec: NetSpec) -> Iterator[slice]:
    """Rows of the basis that belong to x^0, x^1, …"""
    for a, b in itertools.pairwise([0, *itertools.accumulate(spec.tap_widths)]):
        yield slice(a, b)


def curved(dots: Array, a: Array, b: Array) -> Array:
    """e(u, v) of n by m pairs, from their inner products and norms; of the type of `dots`.

    Args:
        dots: (n, m), u·v.
        a: (n,), ‖u‖.
        b: (m,), ‖v‖.
    """
    tiny, one = np.finfo(dots.dtype).tiny, dots.dtype.type(1)
    t = dots / np.maximum(a, tiny)[:, None]
    t /= np.maximum(b, tiny)
    np.minimum(t, one, out=t)
    np.maximum(t, -one, out=t)
    e = t * t
    np.subtract(one, e, out=e)
    np.sqrt(e, out=e)
    angle = np.arcsin(t)
    angle *= t
    e += angle
    e *= a[:, None]
    e *= b * dots.dtype.type(1 / np.pi)
    return np.asarray(e)


def lengths(u: Array) -> Array:
    """‖u‖ (n,) of the rows of u (n, P)."""
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", u, u)))


def project(spec: NetSpec, taps: Sequence[Floats], basis: Floats, offset: Floats) -> Floats:
    """u (n, P) of taps x^0 … x^{L-1}, (n, N_k) each."""
    u = np.repeat(-offset[None], len(taps[0]), axis=0)
    for x, rows in zip(taps, tap_slices(spec), strict=True):
        u += x @ basis[rows]
    return u


def from_taps(spec: NetSpec, tensors: Mapping[str, Floats], taps: Sequence[Floats], c: Floats) -> Floats:
    """y (n, C) of samples with these taps, by the equation above, whose last term is there if the tensors have a lift.

    Args:
        tensors: of an adapter, all of which lead to the output, with whatever else there is.
        taps: x^0 … x^{L-1}, (n, N_k) each.
        c: (n, C), the frozen network's output.
    """
    y = np.asarray(tensors.get("output.gain", np.float32(1)) * c + tensors.get("output.bias", np.float32(0)))
    for k, tap in enumerate(taps):
        name = f"lora.{k}-{spec.L}"
        if f"{name}.A" in tensors:
            y += (tap @ tensors[f"{name}.A"]) @ tensors[f"{name}.B"]
    if BASIS in tensors:
        V = tensors["lift.landmarks"]
        u = project(spec, taps, tensors[BASIS], tensors["lift.offset"])
        y += curved(u @ V.T, lengths(u), lengths(V)) @ tensors["lift.coefficients"]
    return y


def taps_of(spec: NetSpec, x: Floats, records: Floats) -> tuple[list[Floats], Floats]:
    """x^0 … x^{L-1}, (n, N_k) each, and c (n, C), of samples x (n, N) and their record rows (n, width)."""
    *behind, c = (records[:, s.offset : s.offset + s.size] for s in spec.record.segments)
    return [x[:, : spec.tap_widths[0]], *behind], c


def logits(spec: NetSpec, tensors: Mapping[str, Floats], x: Floats, records: Floats) -> Floats:
    """y (T, C) of samples x (T, N) and their record rows (T, width), with a lift."""
    y = np.empty((len(x), spec.C), np.float32)
    count = max(1, BLOCK // len(tensors["lift.landmarks"]))
    for start in range(0, len(x), count):
        at = slice(start, start + count)
        y[at] = from_taps(spec, tensors, *taps_of(spec, x[at], records[at]))
    return y

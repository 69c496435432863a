"""How a lift is found: the leading directions of the taps, the landmarks, and the share of the kernel in the system.

    G = diag(c)·(K + 1 + η·E)·diag(c) + λI     K linear as without a lift, E_ij = e(u_i, u_j) of `lift.curved`

so that λ, left-out scores, temperature and the gate come from the same factorisation as without a lift. The directions
and the centre depend on the samples' features, not on their labels; given them, left-out scores are exact.

It is taken only where left-out samples are better off with it.

``arccos``   every sample is a landmark. Dual only.
``nystrom``  m landmarks V and E ≈ Φ·Φᵀ, Φ = e(U, V)·N with N·Nᵀ = e(V, V)⁻¹: m more features, in either space.

n samples, D = ΣN_k features, P directions, m landmarks, C outputs; c and scale as in `taps.system`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .. import lift
from ..errors import UsageError
from ..spec import NetSpec
from ..tasks import Targets
from . import taps
from .factor import Rows, blocks_of, inverse_factor
from .records import Records, subset
from .taps import Choice, System, shrinkage, system

__all__ = ["DIRECTIONS", "LANDMARKS", "LIFTS", "SHARE", "Kind", "Lifting", "Map", "choose", "find", "size"]

Array = NDArray[Any]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

Kind = Literal["arccos", "nystrom"]

LIFTS: tuple[Kind, ...] = ("arccos", "nystrom")

SHARE = 2.0
"""η: 2 is the arc-cosine kernel, twice: K itself is the linear half. 1 to 4: docs/decisions/0009-lift.md."""

DIRECTIONS = {"arccos": 128, "nystrom": 64}
"""Most directions, P; never more than half the samples they are found on, or those would not look like new ones."""

LANDMARKS = 256
"""m of ``nystrom``."""

SAMPLES = 1024
"""Most samples on which directions and landmarks are found, and it is decided whether they help."""

SPARE, ROUNDS = 8, 2
"""Of the subspace iteration: directions more than wanted, and how often they are multiplied and made orthogonal."""

LEAST = 1e-6
"""Eigenvalues below this share of the largest are rounding in float32, and no direction."""

NUGGET = 1e-6
"""Added to the diagonal of e(V, V), whose values are of order 1, so that landmarks may be alike."""


@dataclass(frozen=True)
class Map:
    """What a fit yields: the tensors of `lift`, before the temperature."""

    basis: Floats
    offset: Floats
    landmarks: Floats
    coefficients: Doubles

    def tensors(self, scale: Doubles) -> dict[str, Floats]:
        """What goes into the adapter; the factors of the outputs (C,) go into the coefficients."""
        return {
            lift.BASIS: self.basis,
            "lift.offset": self.offset,
            "lift.landmarks": self.landmarks,
            "lift.coefficients": (scale * self.coefficients).astype(np.float32),
        }


@dataclass(frozen=True)
class Lifting:
    """A lift whose coefficients are not known yet.

    Attributes:
        spec: of the network.
        basis: (D, P), 0 for taps that are not in use.
        offset: (P,).
        landmarks: (m, P); None: all samples are.
        root: N (m, m), with N·Nᵀ = e(V, V)⁻¹; None with `landmarks`.
    """

    spec: NetSpec
    basis: Floats
    offset: Floats
    landmarks: Floats | None = None
    root: Doubles | None = None

    @property
    def width(self) -> int:
        """m of a bounded lift, 0 of one by all samples: how many features it adds."""
        return 0 if self.root is None else len(self.root)

    def project(self, taps: list[Floats]) -> Floats:
        """u (n, P) of taps (n, N_k)."""
        return lift.project(self.spec, taps, self.basis, self.offset)

    def features(self, u: Floats) -> Doubles:
        """√η·Φ (n, m) of a bounded lift."""
        assert self.landmarks is not None
        assert self.root is not None
        return np.asarray(np.sqrt(SHARE) * (_kernel(u, self.landmarks) @ self.root))

    def gram(self, u: Floats, dtype: type[np.float32] | type[np.float64]) -> Array:
        """η·E (n, n) of n samples."""
        if self.root is None:
            return np.asarray(dtype(SHARE) * _kernel(u, u, dtype))
        phi = self.features(u).astype(dtype)
        return np.asarray(phi @ phi.T)

    def of_samples(self, u: Floats, weights: Array) -> Map:
        """The map, from the solution of the dual.

        Args:
            u: (T, P) of all samples.
            weights: (T, C), c·α.
        """
        if self.root is None:
            return Map(self.basis, self.offset, u, SHARE * np.asarray(weights, np.float64))
        return self.of_features(self.features(u).T @ weights)

    def of_features(self, weights: Array) -> Map:
        """The map, from the weights (m, C) of `features`."""
        assert self.landmarks is not None
        assert self.root is not None
        return Map(self.basis, self.offset, self.landmarks, np.sqrt(SHARE) * (self.root @ weights))


def size(kind: Kind, T: int) -> tuple[int, int]:
    """P and m of a lift that is found on T samples."""
    return min(DIRECTIONS[kind], max(1, min(T, SAMPLES) // 2)), T if kind == "arccos" else min(T, LANDMARKS)


def find(records: Records, choice: Choice, kind: Kind, seed: int) -> Lifting:
    """Directions and landmarks of a lift, from at most SAMPLES records.

    The directions are the leading ones of the centred, weighted taps, by subspace iteration on their Gram matrix.

    Raises:
        UsageError: there is no such lift, or ``arccos`` would have too many landmarks.
    """
    T = len(records)
    if kind not in LIFTS:
        raise UsageError(f"a lift must be one of {', '.join(LIFTS)}, not {kind!r:.60}")
    if kind == "arccos" and T > lift.MAX_LANDMARKS:
        raise UsageError(f"lift arccos must have at most {lift.MAX_LANDMARKS} samples, not {T}: use nystrom")
    rows, _ = subset(T, SAMPLES, seed)
    n, s, weights = len(rows), choice.scale, choice.weights
    G = _gram(records, weights, rows)
    c = shrinkage(np.sqrt(np.maximum(np.diagonal(G), 0)), choice.limit)
    G *= s * s
    share = c / c.sum()
    mean = G @ share  # inner products with the centre
    G += float(share @ mean) - mean[:, None] - mean
    vectors, values = _leading(c[:, None] * G * c, size(kind, T)[0], seed)
    M = c[:, None] * vectors / np.sqrt(values)
    M -= share[:, None] * M.sum(axis=0)

    spec = records.spec
    basis = np.zeros((sum(spec.tap_widths), M.shape[1]), np.float32)
    small = M.astype(np.float32)
    for w, at, x in zip(weights, lift.tap_slices(spec), records.taps(rows), strict=True):
        if w:
            basis[at] = np.float32(s * s * w) * (x.T @ small)
    offset = (mean @ M).astype(np.float32)
    made = Lifting(spec, basis, offset)
    if kind == "arccos":
        return made
    u = made.project(records.taps(rows))
    chosen = np.sort(np.random.default_rng([seed, 6]).permutation(n)[:LANDMARKS])
    V = u[chosen]
    inner = _kernel(V, V)
    inner[np.diag_indices_from(inner)] += NUGGET
    return Lifting(spec, basis, offset, V, inverse_factor(inner).T)


def choose(
    records: Records, goal: Targets, choice: Choice, kind: Kind, seed: int, groups: Array | None, few: Rows
) -> tuple[Lifting | None, float]:
    """A lift and its λ; or no lift, and the λ of `choice`, where left-out samples are better off without.

    Args:
        goal: what the samples are to teach.
        choice: what is best without a lift.
        groups: (T,) a label a sample, or None.
        few: samples that λ is found on, as `taps.best_lambda` finds it without a lift.

    Raises:
        UsageError: see `find`.
    """
    found = find(records, choice, kind, seed)
    made = _system(records, _gram(records, choice.weights, few), few, found, goal.at(few))
    lam, _ = taps.best_lambda(made, goal.at(few).Y, choice.lam)
    rows, blocks = subset(len(records), SAMPLES, seed)
    if groups is not None:
        blocks = blocks_of(groups[rows])
    G = _gram(records, choice.weights, rows)
    before, after = (
        _loss(_system(records, G, rows, lifting, goal.at(rows)), goal.at(rows), at, blocks)
        for lifting, at in ((None, choice.lam), (found, lam))
    )
    return (found, lam) if _helps(before, after) else (None, choice.lam)


def _helps(before: float, after: float) -> bool:
    """Of the loss of blocks as long as those that taps are chosen by: shorter ones flatter what interpolates."""
    return after < before


def _system(records: Records, G: Doubles, rows: Rows, lifting: Lifting | None, goal: Targets) -> System:
    """What is solved, for some samples of Gram matrix G, and what they are to teach."""
    made = system([G], (1.0,), records.dense, goal.roots)
    if lifting is not None:
        made.K[...] += made.c[:, None] * made.c * lifting.gram(lifting.project(records.taps(rows)), np.float32)
    return made


def _loss(made: System, goal: Targets, lam: float, blocks: Sequence[Rows]) -> float:
    """Mean loss of samples left out with their blocks, at the best calibration."""
    return float(taps.loss_of(taps.left_out(made, goal.Y, lam, blocks), made, goal).mean())


def _gram(records: Records, weights: Sequence[float], rows: Rows) -> Doubles:
    """Σ w_k·X_k·X_kᵀ (n, n) of some samples, from the products that choosing taps has left where they are there."""
    behind = itertools.groupby(range(2, len(weights)), key=lambda k: weights[k])
    parts = [(0,), (1,), *(tuple(run) for _, run in behind)]
    G = np.zeros((len(rows), len(rows)))
    for part in parts:
        if part[0] < len(weights) and weights[part[0]]:
            G += weights[part[0]] * records.triangle(part, rows)
    G = np.tril(G)
    G += np.tril(G, -1).T
    return G


def _kernel(u: Floats, v: Floats, dtype: type[np.float32] | type[np.float64] = np.float64) -> Array:
    """e (n, m) of projected samples."""
    a: Array = u.astype(dtype, copy=False)
    b: Array = v.astype(dtype, copy=False)
    return lift.curved(a @ b.T, lift.lengths(a), lift.lengths(b))


def _leading(S: Doubles, P: int, seed: int) -> tuple[Doubles, Doubles]:
    """About the P leading eigenvectors (n, P) of a positive semidefinite S, and their Rayleigh quotients (P,).

    Fewer where S has fewer; where it has none, one of quotient infinity, so that what is divided by it is 0.
    """
    n = len(S)
    start = np.random.default_rng([seed, 5]).standard_normal((n, min(P + SPARE, n)))
    basis = np.asarray(start, np.float32)
    small = S.astype(np.float32)
    for _ in range(ROUNDS):
        basis = np.linalg.qr(small @ basis)[0]
    wide = np.linalg.qr(np.asarray(basis, np.float64))[0]
    values, inner = np.linalg.eigh(wide.T @ (S @ wide))
    values, inner = values[::-1][:P], inner[:, ::-1][:, :P]
    kept = values > max(LEAST * float(values[0]), np.finfo(np.float32).tiny)
    if not kept.any():
        return np.zeros((n, 1)), np.array([np.inf])
    return wide @ inner[:, kept], values[kept]

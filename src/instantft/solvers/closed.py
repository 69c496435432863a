"""The two systems of ridge regression on records, and everything that falls out of their factorisation.

In the dual, where there are fewer samples than features, G = diag(c)·(s²·Σ w_k·X_k·X_kᵀ + 1)·diag(c) + λI is (T, T);
in the primal, ZᵀZ + λI is (D+1, D+1) and the samples pass by in chunks, however many they are. Both yield the same
maps and the same left-out scores (`factor`).

c shrinks records beyond the limit (`taps.system`), and their targets alike; scores are those of the shrunk records.
Where samples have weights, c is times their roots, which no score shows.
T samples, L taps, N_k their widths, D the sum over those in use, C outputs, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .factor import DType, Factor, Rows, blocks_of, inverse_factor, precision, primal_left_out, runs
from .lifting import Lifting, Map
from .lowrank import FeatureSpace, Pair, SampleSpace, reduce_rank
from .records import CHUNK, Records, subset
from .taps import Choice, diagonal, shrinkage, unweighted

__all__ = ["KEPT", "SCORED", "TOO_LARGE", "Fitted", "Judged", "consecutive", "dual", "judged", "primal"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]

KEPT = 4096
"""Most samples of which the products of every part of the taps are kept: 3·64 MB."""

SCORED = 4096
"""Most samples for which the primal computes left-out scores; the dual has them for all."""

LONGEST = 16
"""Longest run of consecutive samples that is left out together; docs/decisions/0005-ridge.md."""

TOO_LARGE = "records must be finite and small enough to be squared, not NaN, Inf or above about 1e18"


@dataclass(frozen=True)
class Judged:
    """The samples by which a fit is judged: rows of x (n,), and blocks of them, as places in `rows`."""

    rows: Rows
    blocks: list[Rows]


def judged(T: int, groups: Array | None, most: int, seed: int) -> Judged:
    """About `most` samples: runs of consecutive ones, or whole groups, at least one of them.

    Args:
        T: number of samples.
        groups: (T,) a label a sample, or None.
    """
    if groups is None:
        rows, parts = subset(T, most, seed)
        return Judged(rows, [part[cut] for part in parts for cut in runs(len(part), -(-len(part) // LONGEST))])
    blocks = blocks_of(groups)
    if most < T:
        order = np.random.default_rng([seed, 4]).permutation(len(blocks))
        sizes = np.cumsum([len(blocks[i]) for i in order])
        blocks = [blocks[i] for i in order[: max(1, int(np.searchsorted(sizes, most, side="right")))]]
    return Judged(np.concatenate(blocks), consecutive(blocks))


def consecutive(blocks: Sequence[Rows]) -> list[Rows]:
    """The places of these blocks in one row after the other."""
    cuts = np.cumsum([0, *map(len, blocks)]).tolist()
    return [np.arange(a, b) for a, b in itertools.pairwise(cuts)]


@dataclass(frozen=True)
class Fitted:
    """What solving yields, all of it before the temperature.

    Attributes:
        pairs: A_k (N_k, R) and B_k (R, C) of each tap in use.
        bias: (C,).
        alone: (n, C), scores of judged samples that were left out one at a time.
        blocked: (n, C), scores of judged samples that were left out with their block.
        lift: the lifted part, if there is one.
    """

    pairs: dict[int, Pair]
    bias: Doubles
    alone: Doubles
    blocked: Doubles
    lift: Map | None = None


def dual(
    records: Records,
    Y: Doubles,
    choice: Choice,
    judge: Judged,
    rank: int | None = None,
    lifting: Lifting | None = None,
    roots: Doubles | None = None,
) -> Fitted:
    """Solve in the space of samples.

    Args:
        records: of T samples.
        Y: (T, C) targets.
        choice: λ, weights, scale and limit.
        judge: which samples to score.
        rank: R; None, or C and more: full rank, B_k = I. Only without a lift.
        lifting: adds its share of the kernel to the system.
        roots: (T,), the root of each sample's weight; None: all alike.

    Raises:
        DataError: records that cannot be squared.
    """
    dtype = precision(len(Y), choice.lam)  # the largest eigenvalue of K + 1 is about T at most
    with np.errstate(over="ignore", invalid="ignore"):
        parts, weights = records.parts(choice.weights, dtype)
        squares = diagonal(parts, weights)
    if not np.isfinite(squares).all():  # then so is all else: |x·y| ≤ ‖x‖·‖y‖
        raise DataError(TOO_LARGE)
    s, c = choice.scale, shrinkage(np.sqrt(np.maximum(squares, 0)), choice.limit)
    if roots is not None:
        c = c * roots
    K = records.dense.combine(parts, weights, s * c, c)
    del parts
    if lifting is not None:
        u = lifting.project(records.taps(slice(0, len(records))))
        K += c[:, None].astype(dtype) * c.astype(dtype) * lifting.gram(u, dtype)
    factor = Factor(K, records.dense, choice.lam)
    targets = c[:, None] * Y
    alpha = factor.solve(targets.astype(dtype))
    everyone = [judge.rows[block] for block in judge.blocks]
    alone = unweighted(targets - factor.left_out(alpha), roots)
    blocked = unweighted(targets - factor.left_out(alpha, everyone), roots)

    weighted = c[:, None] * alpha
    small, bias = weighted.astype(np.float32), weighted.sum(axis=0, dtype=np.float64)
    stretch = {k: s * float(np.sqrt(w)) for k, w in enumerate(choice.weights) if w > 0}
    W = {k: stretch[k] * product for k, product in records.products_with(small, list(stretch)).items()}
    pairs = {k: (full, np.eye(Y.shape[1])) for k, full in W.items()}
    if rank is not None and rank < Y.shape[1]:
        taps = records.taps(slice(0, len(records)))
        X = {k: (root * c)[:, None] * taps[k] for k, root in stretch.items()}
        pairs, reduced = reduce_rank(SampleSpace(X, c, targets, choice.lam), W, bias, rank)
        # What the cut changes about a sample's own fit is taken for what it changes about its left-out score.
        change = c[:, None] * (reduced - bias)
        for k, (A, B) in pairs.items():
            change += (X[k] @ A) @ B - X[k] @ W[k]
        change = unweighted(change, roots)
        alone, blocked, bias = alone + change, blocked + change, reduced
    lifted = None if lifting is None else lifting.of_samples(u, weighted)
    pairs = {k: (stretch[k] * A, B) for k, (A, B) in pairs.items()}
    return Fitted(pairs, bias, alone[judge.rows], blocked[judge.rows], lifted)


class _Features:
    """Z (n, D+1), scaled and clipped, with its targets, for any samples; the features of a lift count in D.

    Attributes:
        lifted: columns of the lift.
        places: columns of each tap in use.
        stretch: (D,), what the features are multiplied by before clipping.
        dense: who factorises.
    """

    def __init__(
        self, records: Records, Y: Doubles, choice: Choice, lifting: Lifting | None, roots: Doubles | None
    ) -> None:
        used = [k for k, w in enumerate(choice.weights) if w > 0]
        cuts = np.cumsum([0, *(records.spec.tap_widths[k] for k in used)]).tolist()
        self.places = {k: slice(a, b) for k, (a, b) in zip(used, itertools.pairwise(cuts), strict=True)}
        self._linear = cuts[-1]
        self.D: int = cuts[-1] + (0 if lifting is None else lifting.width)
        self.lifted = slice(self._linear, self.D)
        self.stretch = np.empty(self._linear)
        for k, at in self.places.items():
            self.stretch[at] = choice.scale * np.sqrt(choice.weights[k])
        self.dense = records.dense
        self._records, self._Y, self._limit = records, Y, choice.limit * choice.scale
        self._lifting, self._roots = lifting, roots

    def __call__(self, which: slice | Rows, dtype: DType) -> tuple[Array, Array]:
        parts = self._records.taps(which)
        Z = np.ones((len(parts[0]), self.D + 1), dtype)
        taps = Z[:, : self._linear]
        np.concatenate([parts[k] for k in self.places], axis=1, out=taps)
        taps *= self.stretch.astype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", taps, taps))
        if not np.isfinite(norms).all():
            raise DataError(TOO_LARGE)
        if self._lifting is not None:
            Z[:, self.lifted] = self._lifting.features(self._lifting.project(parts))
        c = shrinkage(norms, self._limit)[:, None]
        if self._roots is not None:
            c *= self._roots[which, None]
        if (c != 1).any():
            Z *= c.astype(dtype)
        return Z, (c * self._Y[which]).astype(dtype)


def primal(
    records: Records,
    Y: Doubles,
    choice: Choice,
    judge: Judged,
    rank: int | None = None,
    lifting: Lifting | None = None,
    roots: Doubles | None = None,
) -> Fitted:
    """Solve in the space of features; arguments as for `dual`, but no more than CHUNK records are needed at a time."""
    T, C, features = len(records), Y.shape[1], _Features(records, Y, choice, lifting, roots)
    dtype = precision(np.sqrt(T * min(T, CHUNK)), choice.lam)  # float32 only within a chunk, float64 between them
    A, R = np.zeros((features.D + 1, features.D + 1)), np.zeros((features.D + 1, C))
    for rows in records.chunks():
        Z, targets = features(rows, dtype)
        A += Z.T @ Z
        R += Z.T @ targets
    G = A if rank is None or rank >= C else A.copy()
    G[np.diag_indices_from(G)] += choice.lam
    V = inverse_factor(G, records.dense)
    W = V.T @ (V @ R)
    pairs = {k: (W[at], np.eye(C)) for k, at in features.places.items()}
    final = W
    if rank is not None and rank < C:
        full = {k: W[at] for k, at in features.places.items()}
        pairs, bias = reduce_rank(FeatureSpace(A, R, features.places, choice.lam), full, W[-1], rank)
        final = np.concatenate([*(P @ Q for P, Q in pairs.values()), bias[None]])

    alone, blocked = np.empty((len(judge.rows), C)), np.empty((len(judge.rows), C))
    for places in _together(judge.blocks):
        at = np.concatenate(places)
        if len(at) > CHUNK:  # one block, too long for a matrix of its own size: solved again without it
            without = _without(features, judge.rows[at], G, R)
        for some in np.array_split(at, -(-len(at) // CHUNK)):
            Z, targets = features(judge.rows[some], np.float64)
            residuals, change = targets - Z @ W, Z @ (final - W)
            alone[some] = targets - primal_left_out(Z, residuals, V) + change
            if len(at) > CHUNK:
                blocked[some] = Z @ without + change
            else:
                inside = [np.searchsorted(at, block) for block in places]
                blocked[some] = targets - primal_left_out(Z, residuals, V, inside) + change
    if roots is not None:
        alone, blocked = (unweighted(scores, roots[judge.rows]) for scores in (alone, blocked))
    pairs = {k: (features.stretch[features.places[k]][:, None] * P, Q) for k, (P, Q) in pairs.items()}
    lifted = None if lifting is None else lifting.of_features(W[features.lifted])
    return Fitted(pairs, final[-1], alone, blocked, lifted)


def _together(blocks: list[Rows]) -> Iterator[list[Rows]]:
    """The blocks in order, several at a time as long as they have at most CHUNK rows."""
    batch: list[Rows] = []
    for block in blocks:
        if batch and sum(map(len, batch)) + len(block) > CHUNK:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def _without(features: _Features, rows: Rows, G: Doubles, R: Doubles) -> Doubles:
    """W (D+1, C) of the fit without these rows."""
    G, R = G.copy(), R.copy()
    for some in np.array_split(rows, -(-len(rows) // CHUNK)):
        Z, targets = features(some, np.float64)
        G -= Z.T @ Z
        R -= Z.T @ targets
    V = inverse_factor(G, features.dense)
    return np.asarray(V.T @ (V @ R))

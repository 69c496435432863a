"""Fine-tuning in closed form: ridge regression of one-hot targets on the taps. No epochs, no learning rate.

    Z = [√w_0·s·x^0 | … | √w_{L-1}·s·x^{L-1} | 1]         features (T, D+1)
    min_W ‖Z·W − Y‖² + λ‖W‖²                              Y one-hot, (T, C)

in the dual where T < D,   (K + 1 + λI)·α = Y,  K = s²·Σ_k w_k·X_k·X_kᵀ,  W_k = s²·w_k·X_kᵀ·α,  bias = Σ_i α_i
in the primal otherwise,   (ZᵀZ + λI)·W = ZᵀY, streamed over chunks of samples

s makes the mean norm of a record 1; records beyond 3 median norms are shrunk (`taps.system`). λ and the weights w of
the taps (`taps.choose`) are found on a few hundred samples by exact leave-one-out; the temperature β (`calibration`) on
the left-out scores of all. What comes out is an adapter of the general form y = gain·c + Σ x^k·A_k·B_k + bias, with
gain 0, A_k·B_k = β·W_k, so that evaluation, prediction and export have no second path.

This file says what is solved; `factor` and `taps` say how. T samples, L taps, N_k their widths, D = ΣN_k, C outputs.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..adapters import Adapter
from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import Engine, Floats
from ..errors import DataError, UsageError
from ..spec import NetSpec
from . import taps as selection
from .calibration import Temperature, expected_calibration_error, fit_temperature, softmax
from .factor import Factor, Rows, blocks_of, inverse_factor, primal_left_out
from .lowrank import FeatureSpace, Pair, SampleSpace, padded, reduce_rank
from .sgd import Seconds, check_arguments

__all__ = ["METHOD", "Records", "RidgeResult", "fit_ridge"]

METHOD = "skip-ridge"

Array = NDArray[Any]
Doubles = NDArray[np.float64]

FEW, MANY = 256, 512
"""Samples on which λ and the weights of the taps are found, and those that decide between weights that are close."""

BLOCKS = 32
"""Runs of consecutive samples that both consist of."""

CHUNK = 1024
"""Samples that the primal sees at a time."""

HARMLESS = 0.01
"""Share of λ by which rounding may move an eigenvalue before float64 takes over."""

TOO_LARGE = "records must be finite and small enough to be squared, not NaN, Inf or above about 1e18"

MAX_SYSTEM = 20_000
"""Largest system that is factorised, in rows: 3.2 GB in float64."""

SCORED = 4096
"""Most samples for which the primal computes left-out scores by itself; the dual has them for all."""


@dataclass(frozen=True)
class RidgeResult:
    """What a closed-form fit yields.

    Attributes:
        adapter: the adapter, method ``skip-ridge``.
        seconds: the time it took, as `sgd.Seconds`.
        lam: λ.
        weights: (L,) w_k of each tap; 0: not used.
        scale: s, by which all taps were multiplied.
        temperature: β, folded into the adapter.
        space: which system was solved.
        loo_scores: (n, C) float32, logits β·z of samples that were left out, one at a time or with their group.
        loo_rows: (n,) rows of x they belong to.
        labels: (n,) their labels.
    """

    adapter: Adapter
    seconds: Seconds
    lam: float
    weights: tuple[float, ...]
    scale: float
    temperature: Temperature
    space: Literal["dual", "primal"]
    loo_scores: Floats = field(repr=False)
    loo_rows: Rows = field(repr=False)
    labels: NDArray[np.int32] = field(repr=False)

    @property
    def taps(self) -> tuple[int, ...]:
        """The taps in use."""
        return tuple(k for k, w in enumerate(self.weights) if w > 0)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,): which left-out samples were classified correctly."""
        return np.asarray(self.loo_scores.argmax(axis=1) == self.labels)

    @property
    def loo_accuracy(self) -> float:
        """Share of left-out samples classified correctly."""
        return float(self.correct.mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the left-out probabilities."""
        return expected_calibration_error(softmax(self.loo_scores), self.labels)


class Records:
    """Taps of T samples: x^0 from the data, the others from the store, or from the frozen network where it lacks them.

    Args:
        engine, base, threads: who computes what the store lacks.
        x: (T, N) float32.
        numbers: (T,), the number of each sample in the store.
        store: the forward cache; what it holds is used as its codec gives it.
    """

    def __init__(
        self,
        engine: Engine,
        base: Network,
        x: Floats,
        numbers: NDArray[np.int64],
        store: Store | None,
        threads: int = 1,
    ) -> None:
        self._engine, self._base, self._threads = engine, base, threads
        self._x, self._numbers, self._store = x, numbers, store
        self._rows: Floats | None = None
        self.spec: NetSpec = base.spec
        ends = [s.offset + s.size for s in base.spec.record.segments[:-1]]
        self._places = [(s.offset, s.offset + s.size) for s in base.spec.record.segments[:-1]]
        self._used = ends[-1] if ends else 0

    def __len__(self) -> int:
        return len(self._x)

    def keep(self) -> None:
        """Hold the records of all samples decoded in memory from now on."""
        if self._rows is None:
            self._rows = self._read(slice(0, len(self)))

    def taps(self, which: slice | Rows) -> list[Floats]:
        """x^0 … x^{L-1} of some samples, (n, N_k) each."""
        rows = self._rows[which] if self._rows is not None else self._read(which)
        return [self._x[which], *(rows[:, a:b] for a, b in self._places)]

    def chunks(self) -> Iterator[slice]:
        """All samples, CHUNK at a time."""
        for start in range(0, len(self), CHUNK):
            yield slice(start, min(start + CHUNK, len(self)))

    def gram(self, weights: Sequence[float], dtype: type[np.float32] | type[np.float64]) -> Array:
        """K = Σ_k w_k·X_k·X_kᵀ (T, T), computed in `dtype`.

        Neighbouring taps of one weight are one product: the zeros between them add nothing.
        """
        self.keep()
        assert self._rows is not None
        parts = [(weights[0], self._x)] if weights[0] else []
        behind = itertools.groupby(range(1, len(weights)), key=lambda k: weights[k])
        for weight, run in behind:
            taps = list(run)
            if weight:
                columns = slice(self._places[taps[0] - 1][0], self._places[taps[-1] - 1][1])
                parts.append((weight, self._rows[:, columns]))
        K = np.zeros((0, 0), dtype)
        for weight, part in parts:
            X = part.astype(dtype, copy=False)
            product = X @ X.T
            if weight != 1:
                product *= dtype(weight)
            K = K + product if K.size else product
        return K

    def _read(self, which: slice | Rows) -> Floats:
        """Record rows (n, width)."""
        numbers, x = self._numbers[which], self._x[which]
        store = self._store
        if store is None:
            return self._engine.records(self.spec, self._base.tensors, x, self._threads)
        held = store.held(numbers)
        if held.all():
            return store.read(numbers)
        rows = np.empty((len(x), self.spec.record.width), np.float32)
        rows[held] = store.read(numbers[held])
        fresh = self._engine.records(self.spec, self._base.tensors, np.ascontiguousarray(x[~held]), self._threads)
        rows[~held] = store.codec.decode(store.codec.encode(fresh, store.record), store.record)
        return rows


def fit_ridge(
    engine: Engine,
    base: Network,
    x: Floats,
    y: NDArray[np.int32],
    *,
    store: Store | None = None,
    numbers: NDArray[np.int64] | None = None,
    rank: int | None = None,
    seed: int = 0,
    threads: int = 1,
    groups: Array | None = None,
    taps: Literal["auto", "all"] | Sequence[int] = "auto",
) -> RidgeResult:
    """Adapt `base` to labelled samples in closed form.

    Args:
        engine: who runs the frozen network.
        base: the frozen network.
        x: (T, N) float32, as `data.as_samples` yields them.
        y: (T,) int32 labels.
        store: the forward cache; None: the frozen network runs once a sample and nothing is kept.
        numbers: (T,), the number of each sample in the store; None: 0 … T-1.
        rank: R of the adapter of each tap (`lowrank`); None, or C and more: full rank, A_k = W_k and B_k = I.
        seed: which samples λ and the weights of the taps are found on.
        threads: used for running the frozen network.
        groups: (T,) a label a sample; samples of a group are left out together, for the scores and for choosing
            taps. Give them where samples resemble others: one group a recording, a person, a stretch of time.
        taps: "auto": weighted by leave-one-out (`taps.choose`); "all": equal weights; or the taps to use, equally.

    Returns:
        The adapter, λ, weights, temperature and left-out scores.

    Raises:
        UsageError: an argument is out of range, or the system would be too large.
        DataError: labels or records that cannot be used.
    """
    spec, T = base.spec, len(x)
    check_arguments(seed=seed, threads=threads, rank=1 if rank is None else rank)
    groups = _check(spec, x, y, groups)
    if numbers is None:
        numbers = np.arange(T, dtype=np.int64)
    D = sum(spec.tap_widths)
    if min(T, D + 1) > MAX_SYSTEM:
        raise UsageError(
            f"ridge regression needs at most {MAX_SYSTEM} samples or features, not {T} samples of {D} features: "
            "use fewer samples, or a method that makes steps"
        )

    began = time.perf_counter()
    if store is not None and store.capacity >= T:
        engine.fill(spec, base.tensors, x, numbers, store, threads)
    records = Records(engine, base, x, numbers, store, threads)
    dual = T <= D
    if dual or T * spec.record.width <= MAX_SYSTEM * CHUNK:
        records.keep()
    filled = time.perf_counter()

    choice = _choose(records, y, groups, seed, taps)
    Y = np.eye(spec.C)[y]
    fitted = _dual(records, Y, choice, groups, rank) if dual else _primal(records, Y, choice, groups, seed, rank)
    beta = fit_temperature(fitted.scores, y[fitted.rows])
    R = spec.C if rank is None else int(rank)
    tensors = _tensors(spec, fitted, float(beta), R)
    config = {
        "samples": T,
        "lambda": choice.lam,
        "taps": [float(w) for w in choice.weights],
        "temperature": float(beta),
        "space": "dual" if dual else "primal",
        "seed": int(seed),
        "cache": None if store is None else store.codec.name,
        "engine": engine.name,
    }
    adapter = Adapter(METHOD, R, spec, base.hash, tensors, config)
    scores = (float(beta) * fitted.scores).astype(np.float32)
    done = time.perf_counter()
    return RidgeResult(
        adapter,
        Seconds(filled - began, done - filled),
        choice.lam,
        choice.weights,
        choice.scale,
        beta,
        "dual" if dual else "primal",
        scores,
        fitted.rows,
        y[fitted.rows],
    )


def _check(spec: NetSpec, x: Floats, y: NDArray[np.int32], groups: Array | None) -> Array | None:
    T = len(x)
    if T < 1 or np.shape(y) != (T,):
        raise DataError(f"samples and labels must be of one length, at least 1, not {T} and {list(np.shape(y))}")
    if int(np.min(y)) < 0 or int(np.max(y)) >= spec.C:
        raise DataError(f"labels must be 0 to {spec.C - 1}, not {np.min(y)} to {np.max(y)}")
    if groups is None:
        return None
    groups = np.asarray(groups)
    if groups.shape != (T,):
        raise DataError(f"groups must be one label a sample, ({T},), not {list(groups.shape)}")
    return groups


def _choose(
    records: Records, y: NDArray[np.int32], groups: Array | None, seed: int, taps: str | Sequence[int]
) -> selection.Choice:
    """λ and weights, found on few samples."""
    T, L, C = len(records), records.spec.L, records.spec.C

    def sample(n: int) -> selection.Sample:
        rows, blocks = subset(T, n, seed)
        if groups is not None:
            blocks = blocks_of(groups[rows])
        with np.errstate(over="ignore", invalid="ignore"):
            grams = [np.asarray(part @ part.T, np.float64) for part in records.taps(rows)]
        if not all(np.isfinite(K).all() for K in grams):
            raise DataError(TOO_LARGE)
        return selection.Sample(grams, np.eye(C)[y[rows]], blocks)

    few = sample(FEW)
    if isinstance(taps, str):
        if taps not in ("auto", "all"):
            raise UsageError(f"taps must be 'auto', 'all' or numbers of taps, not {taps!r:.60}")
        if taps == "auto":
            return selection.choose(few, (lambda: sample(MANY)) if T > FEW else None)
        weights = (1.0,) * L
    else:
        wanted = set(taps)
        if not wanted or not wanted <= set(range(L)):
            raise UsageError(f"taps must be some of 0 to {L - 1}, not {list(taps)!r:.60}")
        weights = tuple(float(k in wanted) for k in range(L))
    return selection.with_weights(few.grams, few.Y, weights)


def subset(T: int, most: int, seed: int) -> tuple[Rows, list[Rows]]:
    """At most `most` rows of T in order: BLOCKS runs of consecutive samples, spread evenly with a random start.

    Runs, so that samples that resemble their neighbours (consecutive spectra, overlapping windows) do so here too,
    and are left out together.

    Returns:
        The rows, and for each run its place among them.
    """
    n = min(T, most)
    cuts = np.arange(BLOCKS + 1) * n // BLOCKS
    blocks = [np.arange(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    if n == T:
        return np.arange(T), blocks
    gaps = np.floor((np.arange(BLOCKS) + np.random.default_rng([seed, 3]).random()) * (T - n) / BLOCKS)
    return np.concatenate([rows + int(gap) for rows, gap in zip(blocks, gaps, strict=True)]), blocks


@dataclass(frozen=True)
class _Fitted:
    """A_k, B_k of each tap in use, bias (C,), and left-out scores (n, C) of some rows (n,), all before β."""

    pairs: dict[int, Pair]
    bias: Doubles
    scores: Doubles
    rows: Rows


def _precision(error: float, lam: float) -> type[np.float32] | type[np.float64]:
    """float32 where rounding of this relative size moves no eigenvalue of the system by much beside λ, else float64."""
    return np.float32 if error * float(np.finfo(np.float32).eps) <= HARMLESS * lam else np.float64


def _dual(
    records: Records, Y: Doubles, choice: selection.Choice, groups: Array | None, rank: int | None = None
) -> _Fitted:
    dtype = _precision(len(Y), choice.lam)  # the largest eigenvalue of K + 1 is about T at most
    with np.errstate(over="ignore", invalid="ignore"):
        G = records.gram(choice.weights, dtype)
    squares = np.diagonal(G)
    if not np.isfinite(squares).all():
        raise DataError(TOO_LARGE)
    s, c = choice.scale, selection.shrinkage(np.sqrt(np.maximum(squares, 0)), choice.limit)
    if (c == 1).all():
        G *= dtype(s * s)
        G += dtype(1)
    else:
        G *= (s * c)[:, None].astype(dtype) * (s * c).astype(dtype)
        G += c[:, None].astype(dtype) * c.astype(dtype)
    G[np.diag_indices_from(G)] += dtype(choice.lam)
    factor = Factor(G)
    targets = c[:, None] * Y
    alpha = factor.solve(targets.astype(dtype))
    residuals = factor.left_out(alpha, None if groups is None else blocks_of(groups))
    scores = targets - residuals
    weighted = c[:, None] * alpha
    small, bias = weighted.astype(np.float32), weighted.sum(axis=0, dtype=np.float64)
    parts = records.taps(slice(0, len(records)))
    roots = {k: s * float(np.sqrt(w)) for k, w in enumerate(choice.weights) if w > 0}
    W = {k: root * np.asarray(parts[k].T @ small, np.float64) for k, root in roots.items()}
    pairs = {k: (full, np.eye(Y.shape[1])) for k, full in W.items()}
    if rank is not None and rank < Y.shape[1]:
        X = {k: (root * c)[:, None] * parts[k] for k, root in roots.items()}
        pairs, reduced = reduce_rank(SampleSpace(X, c, targets, choice.lam), W, bias, rank)
        # What the cut changes about a sample's own fit is taken for what it changes about its left-out score.
        scores += c[:, None] * (reduced - bias)
        for k, (A, B) in pairs.items():
            scores += (X[k] @ A) @ B - X[k] @ W[k]
        bias = reduced
    pairs = {k: (roots[k] * A, B) for k, (A, B) in pairs.items()}
    return _Fitted(pairs, bias, scores, np.arange(len(Y)))


def _primal(
    records: Records, Y: Doubles, choice: selection.Choice, groups: Array | None, seed: int, rank: int | None = None
) -> _Fitted:
    used = [k for k, w in enumerate(choice.weights) if w > 0]
    widths = [records.spec.tap_widths[k] for k in used]
    roots = np.repeat([np.sqrt(choice.weights[k]) for k in used], widths)
    T, D, s = len(records), sum(widths), choice.scale
    dtype = _precision(np.sqrt(T * min(T, CHUNK)), choice.lam)  # float32 only within a chunk, float64 between them
    A, R = np.zeros((D + 1, D + 1)), np.zeros((D + 1, Y.shape[1]))

    def clipped(which: slice | Rows, dtype: type[np.float32] | type[np.float64]) -> tuple[Array, Array]:
        """Z (n, D+1) and the targets that go with it."""
        parts = records.taps(which)
        Z = np.ones((len(parts[0]), D + 1), dtype)
        np.concatenate([parts[k] for k in used], axis=1, out=Z[:, :D])
        Z[:, :D] *= roots.astype(dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.einsum("ij,ij->i", Z[:, :D], Z[:, :D]))
        if not np.isfinite(norms).all():
            raise DataError(TOO_LARGE)
        c = selection.shrinkage(norms, choice.limit)[:, None]
        Z[:, :D] *= dtype(s)
        if (c < 1).any():
            Z *= c.astype(dtype)
        return Z, (c * Y[which]).astype(dtype)

    for rows in records.chunks():
        Z, targets = clipped(rows, dtype)
        A += Z.T @ Z
        R += Z.T @ targets
    G = A.copy()
    G[np.diag_indices_from(G)] += choice.lam
    V = inverse_factor(G)
    W = V.T @ (V @ R)
    cuts = np.cumsum([0, *widths])
    places = {k: slice(a, b) for k, (a, b) in zip(used, itertools.pairwise(cuts.tolist()), strict=True)}
    pairs = {k: (W[at], np.eye(Y.shape[1])) for k, at in places.items()}
    final = W
    if rank is not None and rank < Y.shape[1]:
        space = FeatureSpace(A, R, places, choice.lam)
        pairs, bias = reduce_rank(space, {k: W[at] for k, at in places.items()}, W[D], rank)
        final = np.concatenate([*(P @ Q for P, Q in pairs.values()), bias[None]])
    scored = _scored(T, groups, seed)
    scores = np.empty((len(scored), Y.shape[1]))
    for start, stop in _whole_blocks(scored, groups):
        some = scored[start:stop]
        Z, targets = clipped(some, np.float64)
        e = primal_left_out(Z, targets - Z @ W, V, None if groups is None else blocks_of(groups[some]))
        scores[start:stop] = targets - e + Z @ (final - W)
    pairs = {k: (s * roots[places[k]][:, None] * P, Q) for k, (P, Q) in pairs.items()}
    return _Fitted(pairs, final[D], scores, scored)


def _scored(T: int, groups: Array | None, seed: int) -> Rows:
    """The rows of which the primal computes left-out scores: all, or about SCORED of them in whole groups."""
    if T <= SCORED:
        return np.arange(T) if groups is None else np.concatenate(blocks_of(groups))
    rng = np.random.default_rng([seed, 4])
    if groups is None:
        return np.sort(rng.choice(T, SCORED, replace=False))
    blocks = blocks_of(groups)
    chosen: list[Rows] = []
    for i in rng.permutation(len(blocks)):
        if chosen and sum(map(len, chosen)) + len(blocks[i]) > SCORED:
            break
        chosen.append(blocks[i])
    return np.concatenate(chosen)


def _whole_blocks(rows: Rows, groups: Array | None) -> Iterator[tuple[int, int]]:
    """Cuts of `rows` at about CHUNK, never inside a group."""
    if groups is None:
        for start in range(0, len(rows), CHUNK):
            yield start, min(start + CHUNK, len(rows))
        return
    labels = groups[rows]
    ends = np.append(np.flatnonzero(labels[1:] != labels[:-1]) + 1, len(rows))
    start = 0
    for i, end in enumerate(ends):
        if end - start >= CHUNK or i == len(ends) - 1:
            yield start, int(end)
            start = int(end)


def _tensors(spec: NetSpec, fitted: _Fitted, beta: float, rank: int) -> dict[str, Floats]:
    """The adapter's tensors; taps that are not in use are zero."""
    tensors: dict[str, Floats] = {}
    for k in range(spec.L):
        nothing = np.zeros((spec.tap_widths[k], 0)), np.zeros((0, spec.C))
        A, B = padded(fitted.pairs.get(k, nothing), rank)
        tensors[f"lora.{k}-{spec.L}.A"] = (beta * A).astype(np.float32)
        tensors[f"lora.{k}-{spec.L}.B"] = B.astype(np.float32)
    tensors["output.gain"] = np.zeros(1, np.float32)
    tensors["output.bias"] = (beta * fitted.bias).astype(np.float32)
    return tensors

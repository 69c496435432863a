"""Fine-tuning in closed form: ridge regression of targets on the taps. No epochs, no learning rate.

    Z = [√w_0·s·x^0 | … | √w_{L-1}·s·x^{L-1} | 1]         features (T, D+1)
    min_W ‖Z·W − Y‖² + λ‖W‖²                              Y (T, C): one-hot, labels, or standardised numbers (`tasks`)

in the dual where T < D,   (K + 1 + λI)·α = Y,  K = s²·Σ_k w_k·X_k·X_kᵀ,  W_k = s²·w_k·X_kᵀ·α,  bias = Σ_i α_i
in the primal otherwise,   (ZᵀZ + λI)·W = ZᵀY, streamed over chunks of samples

s makes the mean norm of a record 1; records beyond 3 median norms are shrunk (`taps.system`). λ and the weights w of
the taps (`taps.choose`) are found on a few hundred samples by exact leave-one-out; the temperature β and the gain on
the frozen output (`calibration`) on scores of left-out samples. What comes out is an adapter of the general form
y = gain·c + Σ x^k·A_k·B_k + bias, with A_k·B_k = β·W_k, so that evaluation, prediction and export have no second path.

Weights of samples multiply rows of Z and Y by their roots. Nothing else changes, and left-out scores stay exact. (In
regression they are so for the mean and the deviation of all targets, which a left-out sample has moved by 1/T.)

With a lift (`lifting`) the kernel of the taps is added to K, or its landmarks to Z, and all else stays the same.

This file says what is solved; `taps` chooses, `closed` solves, `gate` judges.
T samples, L taps, N_k their widths, D = ΣN_k, C outputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..adapters import Adapter
from ..backbones.builtin import Network
from ..cache.store import Store
from ..engine import Engine, Floats, Progress, parts
from ..errors import DataError, UsageError
from ..spec import NetSpec
from ..tasks import Targets, as_targets
from . import closed, lifting
from . import taps as selection
from .calibration import (
    Calibration,
    Temperature,
    calibrate,
    calibrate_with,
    expected_calibration_error,
    losses,
    softmax,
)
from .factor import Rows, blocks_of
from .gate import Decision, compare
from .lowrank import Pair, padded
from .records import CHUNK, Records, alike, subset
from .sgd import Seconds, check_arguments

__all__ = ["MAX_SYSTEM", "METHOD", "RidgeResult", "adapter_tensors", "fit_ridge"]

METHOD = "skip-ridge"

Array = NDArray[Any]

FEW, MANY = 256, 512
"""Samples on which λ and the weights of the taps are found, and those that decide between weights that are close."""

HELPS = 1.0
"""Standard errors by which the log loss of left-out blocks must fall for the frozen output to be mixed in."""

MAX_SYSTEM = 10_000
"""Largest system that is factorised, in rows: 2.4 GB for six matrices in float32, twice that in float64."""


@dataclass(frozen=True)
class RidgeResult:
    """What a closed-form fit yields.

    The left-out scores are those of n samples: all of them in the dual, about `closed.SCORED` in the primal.

    Attributes:
        adapter: the adapter, method ``skip-ridge``.
        seconds: the time it took, as `sgd.Seconds`.
        choice: λ, weights of the taps, scale and limit.
        calibration: what makes outputs of scores, folded into the adapter; gain 0 where that does not help.
        space: which system was solved.
        lift: which lift the adapter has; None: none was asked for, or it would not help.
        rows: (n,) rows of x.
        goal: what these were to teach.
        blocks: places in `rows` that were left out together: runs of consecutive samples, or the groups.
        loo_scores: (n, C) float32, outputs for samples left out one at a time.
        block_scores: (n, C) float32, outputs for samples left out with their block.
        frozen_scores: (n, C) float32, outputs of the frozen network.
    """

    adapter: Adapter
    seconds: Seconds
    choice: selection.Choice
    calibration: Calibration
    space: Literal["dual", "primal"]
    lift: lifting.Kind | None
    rows: Rows = field(repr=False)
    goal: Targets = field(repr=False)
    blocks: list[Rows] = field(repr=False)
    loo_scores: Floats = field(repr=False)
    block_scores: Floats = field(repr=False)
    frozen_scores: Floats = field(repr=False)

    @property
    def temperature(self) -> Temperature:
        """β of classes, folded into the adapter; of labels and numbers, which have one each, the mean."""
        return Temperature(self.calibration.scale.mean())

    @property
    def gain(self) -> float:
        """Of the frozen network's output; 0 where that does not help."""
        return self.calibration.gain

    @property
    def labels(self) -> Array:
        """(n,) classes, or (n, C), of `rows`."""
        return self.goal.y

    @property
    def lam(self) -> float:
        """λ."""
        return self.choice.lam

    @property
    def weights(self) -> tuple[float, ...]:
        """(L,) w_k of each tap; 0: not used."""
        return self.choice.weights

    @property
    def taps(self) -> tuple[int, ...]:
        """The taps in use."""
        return tuple(k for k, w in enumerate(self.weights) if w > 0)

    @property
    def loo_score(self) -> float:
        """Accuracy, R² or share of right labels (`tasks.METRICS`) of samples left out one at a time; flatters where
        neighbours are alike."""
        return self.goal.score(self.loo_scores)

    @property
    def block_score(self) -> float:
        """The same of samples left out in blocks."""
        return self.goal.score(self.block_scores)

    @property
    def loss(self) -> float:
        """Mean loss (`calibration.losses`) of samples left out in blocks."""
        return float(self.goal.share @ losses(self.block_scores, self.goal))

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error of the probabilities of classes of samples left out in blocks; else None."""
        if self.goal.task != "classification":
            return None
        return expected_calibration_error(softmax(self.block_scores), self.labels)

    def decide(self, before: Floats | None = None) -> Decision:
        """Whether this adapter should replace what there is, by samples left out in blocks (`gate.gate`).

        Args:
            before: (n, C) logits for ``x[rows]`` of the adapter in use, which must not have been fitted to them; None:
                those of the frozen network.
        """
        old = self.frozen_scores if before is None else np.asarray(before)
        if old.shape != self.block_scores.shape:
            raise UsageError(f"scores to compare with must be {list(self.block_scores.shape)}, not {list(old.shape)}")
        return compare(self.goal, old, self.block_scores, self.blocks)


def fit_ridge(
    engine: Engine,
    base: Network,
    x: Floats,
    y: NDArray[np.int32] | Targets,
    *,
    store: Store | None = None,
    numbers: NDArray[np.int64] | None = None,
    rank: int | None = None,
    seed: int = 0,
    threads: int = 1,
    groups: Array | None = None,
    taps: Literal["auto", "all"] | Sequence[int] = "auto",
    lift: lifting.Kind | None = None,
    decoded: bool = True,
    filling: Progress | None = None,
) -> RidgeResult:
    """Adapt `base` to labelled samples in closed form.

    Args:
        engine: who runs the frozen network.
        base: the frozen network.
        x: (T, N) float32, as `data.as_samples` yields them.
        y: (T,) int32 classes; or what else the samples are to teach.
        store: the forward cache; None: the frozen network runs once a sample and nothing is kept.
        numbers: (T,), the number of each sample in the store; None: 0 … T-1.
        rank: R of the adapter of each tap (`lowrank`); None, or C and more: full rank, A_k = W_k and B_k = I.
        seed: which samples λ and the weights of the taps are found on.
        threads: used for running the frozen network.
        groups: (T,) a label a sample; samples of a group are left out together, for the scores and for choosing
            taps. Give them where samples resemble others: one group a recording, a person, a stretch of time.
        decoded: whether all records may be held decoded in memory; if not, they are read from the store CHUNK at a
            time, again and again. With full rank and no lift only.
        filling: told how many samples have gone through the frozen network.
        taps: "auto": weighted by leave-one-out (`taps.choose`); "all": equal weights; or the taps to use, equally.
        lift: "arccos": every sample a landmark, 4,096 at most; "nystrom": 256 landmarks; taken only where left-out
            samples are better off with it (`RidgeResult.lift`). None: linear.

    Returns:
        The adapter, λ, weights, temperature and left-out scores.

    Raises:
        UsageError: an argument is out of range, or the system would be too large.
        DataError: labels or records that cannot be used.
    """
    spec, T = base.spec, len(x)
    check_arguments(seed=seed, threads=threads, rank=1 if rank is None else rank)
    goal = as_targets(y, spec.C)
    groups = _check(spec, x, goal, groups)
    if lift is not None and rank is not None and rank < spec.C:
        raise UsageError(f"a lift must go with full rank, {spec.C} or more, not {rank}")
    if not decoded and (store is None or lift is not None or (rank is not None and rank < spec.C)):
        raise UsageError("records must be held in memory for a lift, a rank below full, and where there is no cache")
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
        for rows in parts(T, filling):
            engine.fill(spec, base.tensors, x[rows], numbers[rows], store, threads)
        store.hits += T  # every record is looked at once
    elif store is not None:
        held = int(store.held(numbers).sum())
        store.hits, store.misses = store.hits + held, store.misses + T - held
    records = Records(engine, base, x, numbers, store, threads)
    space: Literal["dual", "primal"] = "dual" if T <= D or lift == "arccos" else "primal"
    if decoded and (space == "dual" or T * spec.record.width <= MAX_SYSTEM * CHUNK):
        records.keep()
    filled = time.perf_counter()

    choice = _choose(records, goal, groups, seed, taps)
    found = None
    if lift is not None:
        found, lam = lifting.choose(records, goal, choice, lift, seed, groups, subset(T, FEW, seed)[0])
        choice, lift = replace(choice, lam=lam), None if found is None else lift
    if space == "dual":
        judge = closed.judged(T, groups, T, seed)
        fitted = closed.dual(records, goal.Y, choice, judge, rank, found, goal.roots)
    else:
        judge = closed.judged(T, groups, closed.SCORED, seed)
        fitted = closed.primal(records, goal.Y, choice, judge, rank, found, goal.roots)
    judged, frozen = goal.at(judge.rows), records.frozen(judge.rows)
    made = _calibrated(fitted.blocked, frozen, judged, judge.blocks)
    R = spec.C if rank is None else int(rank)
    config = {
        **goal.config,
        "samples": T,
        "lambda": choice.lam,
        "taps": [float(w) for w in choice.weights],
        "temperature": float(made.scale.mean()),
        "gain": made.gain,
        "space": space,
        "lift": lift,
        "seed": int(seed),
        "cache": None if store is None else store.codec.name,
        "engine": engine.name,
    }
    tensors = adapter_tensors(spec, fitted.pairs, fitted.bias, made, R)
    if fitted.lift is not None:
        tensors |= fitted.lift.tensors(made.scale)
    adapter = Adapter(METHOD, R, spec, base.hash, tensors, config)
    done = time.perf_counter()
    return RidgeResult(
        adapter,
        Seconds(filled - began, done - filled),
        choice,
        made,
        space,
        lift,
        judge.rows,
        judged,
        judge.blocks,
        made(fitted.alone, frozen).astype(np.float32),
        made(fitted.blocked, frozen).astype(np.float32),
        frozen,
    )


def _check(spec: NetSpec, x: Floats, goal: Targets, groups: Array | None) -> Array | None:
    T, y = len(x), goal.y
    wanted = (T,) if goal.task == "classification" else (T, spec.C)
    if T < 1 or np.shape(y) != wanted:
        raise DataError(f"samples and labels must be of one length, at least 1, not {T} and {list(np.shape(y))}")
    if goal.task == "classification" and (int(np.min(y)) < 0 or int(np.max(y)) >= spec.C):
        raise DataError(f"labels must be 0 to {spec.C - 1}, not {np.min(y)} to {np.max(y)}")
    if groups is None:
        return None
    groups = np.asarray(groups)
    if groups.shape != (T,):
        raise DataError(f"groups must be one label a sample, ({T},), not {list(groups.shape)}")
    if T > 1 and (groups == groups[0]).all():
        raise DataError(f"groups must be two or more, one of which can be left out, not all {groups[0]!s:.60}")
    return groups


def _choose(
    records: Records, goal: Targets, groups: Array | None, seed: int, taps: str | Sequence[int]
) -> selection.Choice:
    """λ and weights, found on few samples."""
    T, L = len(records), records.spec.L
    first = records.spec.first_tap
    if isinstance(taps, str):
        if taps not in ("auto", "all"):
            raise UsageError(f"taps must be 'auto', 'all' or numbers of taps, not {taps!r:.60}")
        # The ladder has three weights at most: of the first tap, as a rule the raw input, of the next, of all others.
        weights = tuple(float(k >= first) for k in range(L))
        parts = [(first,), (first + 1,), tuple(range(first + 2, L))][: min(L - first, 3)]
        if taps == "all":
            parts = alike(weights)
    else:
        if not set(taps) or not set(taps) <= set(range(first, L)):
            raise UsageError(f"taps must be some of {first} to {L - 1}, not {list(taps)!r:.60}")
        weights = tuple(float(k in set(taps)) for k in range(L))
        parts = alike(weights)

    def sample(n: int) -> selection.Sample:
        rows, blocks = subset(T, n, seed)
        if groups is not None:
            blocks = blocks_of(groups[rows])
        with np.errstate(over="ignore", invalid="ignore"):
            grams = [records.triangle(part, rows) for part in parts]
        if not all(np.isfinite(np.diagonal(K)).all() for K in grams):  # then so is all else: |x·y| ≤ ‖x‖·‖y‖
            raise DataError(closed.TOO_LARGE)
        return selection.Sample(grams, goal.at(rows), blocks, records.dense)

    if taps == "auto":
        most = min(closed.KEPT, sum(records.spec.tap_widths))
        if most >= T:
            with np.errstate(over="ignore", invalid="ignore"):
                for part in parts:  # wanted for the system anyway; the samples are cut out of them
                    records.triangle(part)
        found = selection.choose(sample(FEW), (lambda: sample(MANY)) if T > FEW else None)
        weights = tuple(found.weights[min(k - first, 2)] if k >= first else 0.0 for k in range(L))
    else:
        few = sample(FEW)
        found = selection.with_weights(few, (1.0,) * len(parts))
    return replace(found, weights=weights)


def _calibrated(scores: Array, frozen: Floats, goal: Targets, blocks: list[Rows]) -> Calibration:
    """What makes outputs of scores; with the frozen output only if that is surely better on left-out samples."""
    alone = calibrate(scores, goal)
    mixed = calibrate_with(scores, frozen, goal, alone)
    before, after = alone(scores), mixed(scores, frozen)
    fall = losses(before, goal) - losses(after, goal)
    surely = selection.excess(fall if goal.weights is None else goal.weights * fall, blocks) >= HELPS
    if mixed.gain > 0 and surely and goal.score(after) >= goal.score(before):
        return mixed
    return alone


def adapter_tensors(
    spec: NetSpec, pairs: Mapping[int, Pair], bias: Array, made: Calibration, rank: int
) -> dict[str, Floats]:
    """The adapter's tensors; taps that are not in use are zero.

    Args:
        pairs: A_k (N_k, R) and B_k (R, C) of each tap in use; bias: (C,).
        made: the calibration. A factor that all outputs share goes into A, else they go into B.
        rank: R of the adapter.
    """
    beta, each = (float(made.scale[0]), np.ones(1)) if len(made.scale) == 1 else (1.0, made.scale)
    tensors: dict[str, Floats] = {}
    for k in range(spec.first_tap, spec.L):
        nothing = np.zeros((spec.tap_widths[k], 0)), np.zeros((0, spec.C))
        A, B = padded(pairs.get(k, nothing), rank)
        tensors[f"lora.{k}-{spec.L}.A"] = (beta * A).astype(np.float32)
        tensors[f"lora.{k}-{spec.L}.B"] = (each * B).astype(np.float32)
    tensors["output.gain"] = np.array([made.gain], np.float32)
    tensors["output.bias"] = (made.scale * bias + made.shift).astype(np.float32)
    return tensors

"""The steps of Skip-LoRA made in the space of samples: features are met before the first step and after the last.

SGD only ever adds multiples of samples to A_k, so A_k = A_k(0) − X_kᵀ·C_k with one row of C_k (T, R) a sample. Then

    h_k = x^k·A_k = X_k·A_k(0) − K_k·C_k,       K_k = X_k·X_kᵀ   (T, T), once
    y = c + Σ_k h_k·B_k                          as ever (Skip2-LoRA eq. 17)
    dB_k = h_kᵀ·g,   dh_k = g·B_kᵀ               as ever (eqs. 10-12)
    A_k ← A_k − lr·X_bᵀ·dh_k     is  C_k[b] ← C_k[b] + lr·dh_k: rows of the batch b, no product at all

so that a step costs S·T·R multiply-adds a tap in place of 2·S·N·R. With momentum the velocity of A_k is a combination
of samples too, U_k (T, R): U ← μU, U[b] ← U[b] + dh, C ← C + lr·U. In exact arithmetic A_k and B_k are those of the
primal (tests/test_dual.py names what rounding leaves).

A tap that is not much wider than there are samples is cheaper as it is: it keeps A_k and its features, in the same step
(`cost.spaces` decides). T samples, S of a batch, R rank, C outputs, N_k widths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .. import cost
from ..engine import EpochStats, Floats, Labels, Tensors
from ..errors import UsageError
from ..methods import Method, connections
from ..tasks import as_targets, loss_and_gradient
from .records import Records

__all__ = ["SPACES", "DualTrainer", "Space", "check_space", "taps_in_dual"]

Space = Literal["primal", "dual", "auto"]
SPACES: tuple[Space, ...] = ("auto", "primal", "dual")


def check_space(space: str, method: Method) -> None:
    """See that there is such a space, and that the method can be trained in it.

    Raises:
        UsageError: see `taps_in_dual`.
    """
    if space not in SPACES:
        raise UsageError(f"space must be one of {', '.join(SPACES)}, not {space!r:.60}")
    if space == "dual" and (method.solver != "sgd" or not method.rows_only):
        raise UsageError(
            f"space 'dual' must go with a method whose steps train only adapters to the output, not {method.name}"
        )


def taps_in_dual(
    space: Space, method: Method, widths: tuple[int, ...], T: int, rank: int, epochs: int, batch_size: int
) -> tuple[bool, ...]:
    """Which adapters of the method, in the order of `connections`, train in the dual; all False: none.

    Args:
        space: "primal": none; "dual": all; "auto": those where it pays (`cost.spaces`).
        method: the row.
        widths: N_k of all taps; 0 for an x^0 that is none.
        T, rank, epochs, batch_size: of the run.

    Raises:
        UsageError: no such space; or "dual" with a method that trains more than adapters to the output, or with Gram
            matrices that are too large.
    """
    check_space(space, method)
    if not method.rows_only:
        return ()
    used = [widths[i] for i, _ in connections(method, len(widths), int(widths[0] == 0))]
    if space == "primal":
        return (False,) * len(used)
    chosen = cost.spaces(used, T, rank, epochs, batch_size, always=space == "dual")
    if space == "dual" and not all(chosen):
        raise UsageError(
            f"space 'dual' must keep its Gram matrices within {cost.MAX_GRAM_BYTES} bytes, not {4 * T * T * len(used)} "
            f"for {T} samples: use 'auto' or 'primal'"
        )
    return chosen


@dataclass
class _Tap:
    """The adapter of one tap in training.

    Attributes:
        name: of its tensors, without .A and .B.
        columns: its ranks among those of all taps.
        features: rows that a step reads: K_k (T, T) in the dual, X_k (T, N) in the primal.
        A: what they are multiplied by: −C_k (T, R), or A_k (N, R).
        velocity: of A; None without momentum.
        start: X_k·A_k(0) (T, R) in the dual; None in the primal.
    """

    name: str
    columns: slice
    features: Floats
    A: Floats
    velocity: Floats | None
    start: Floats | None


class DualTrainer:
    """An `engine.Trainer` whose steps read Gram matrices where that is cheaper. Sums in float32, like the engines.

    Args:
        records: of the T samples; they are kept in memory, decoded.
        y: (T,) int32 classes, or what else the samples are to teach.
        tensors: the adapters' start values, and gain and bias of the output where they are not 1 and 0.
        method: a row with adapters to the output only (`Method.rows_only`).
        dual: for each of the method's adapters, whether it trains in the dual.
        batch_size, lr, momentum: of SGD.
    """

    def __init__(
        self,
        records: Records,
        y: Labels,
        tensors: Tensors,
        method: Method,
        dual: tuple[bool, ...],
        *,
        batch_size: int,
        lr: float,
        momentum: float = 0.0,
    ) -> None:
        records.keep()
        T = len(records)
        X = records.taps(slice(0, T))
        self._goal, self._batch_size = as_targets(y, records.spec.C), batch_size
        self._lr, self._momentum = np.float32(lr), np.float32(momentum)
        self._c = np.array(records.frozen(slice(0, T)) * tensors.get("output.gain", np.float32(1)), np.float32)
        self._c += tensors.get("output.bias", np.float32(0))
        self._X: dict[str, Floats] = {}
        self._A0: dict[str, Floats] = {}
        self._taps: list[_Tap] = []
        B, at = [], 0
        for (i, j), in_dual in zip(connections(method, records.spec.L, records.spec.first_tap), dual, strict=True):
            name = f"lora.{i}-{j}"
            A = np.array(tensors[f"{name}.A"], np.float32)
            B.append(tensors[f"{name}.B"])
            columns = slice(at, at + A.shape[1])
            at = columns.stop
            self._X[name], self._A0[name] = X[i], A
            features = records.product((i,)) if in_dual else X[i]
            moving = np.zeros((T, A.shape[1]), np.float32) if in_dual else A.copy()
            velocity = np.zeros_like(moving) if momentum else None
            self._taps.append(_Tap(name, columns, features, moving, velocity, X[i] @ A if in_dual else None))
        self._B = np.concatenate(B, dtype=np.float32)
        self._velocity = np.zeros_like(self._B)

    def epochs(self, order: NDArray[np.int32], lr: float | None = None) -> EpochStats:
        """Run E whole epochs of steps over the rows in `order` (E, T); see `Trainer.epochs`."""
        if lr is not None:
            ratio = np.float32(lr) / self._lr  # velocities hold −lr·v
            self._velocity *= ratio
            for tap in self._taps:
                if tap.velocity is not None:
                    tap.velocity *= ratio
            self._lr = np.float32(lr)
        E, T = order.shape
        loss, correct, steps = np.full(E, np.nan), np.zeros(E, np.int64), 0
        for e in range(E):
            total = 0.0
            for first in range(0, T, self._batch_size):
                steps += 1
                rows = order[e, first : first + self._batch_size]
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    batch_loss, hits = self._step(rows)
                if not np.isfinite(batch_loss):
                    return EpochStats(loss, correct, diverged_at=steps)
                total += batch_loss
                correct[e] += hits
            loss[e] = total / T
        return EpochStats(loss, correct)

    def _step(self, rows: NDArray[np.int32]) -> tuple[float, int]:
        """One batch: forward, loss, backward, update. Returns the sum of the losses, and how many were right."""
        S = len(rows)
        h = np.empty((S, len(self._B)), np.float32)
        seen = []
        for tap in self._taps:
            x = tap.features[rows]
            seen.append(x)
            np.matmul(x, tap.A, out=h[:, tap.columns])
            if tap.start is not None:
                h[:, tap.columns] += tap.start[rows]
        y = self._c[rows] + h @ self._B

        if self._goal.plain:
            labels, samples = self._goal.y[rows], np.arange(S)
            y -= y.max(axis=1, keepdims=True)
            own, g = y[samples, labels], np.exp(y)
            sums = g.sum(axis=1, keepdims=True)
            loss = float((np.log(sums[:, 0]) - own).sum(dtype=np.float64))
            g /= sums
            g[samples, labels] -= 1
            hits = int((y.argmax(axis=1) == labels).sum())
        else:
            goal = self._goal.at(rows)
            losses, g = loss_and_gradient(goal, y)
            loss, hits = float(losses.sum()), goal.hits(y)
        if not np.isfinite(loss):
            return loss, 0
        g *= -self._lr / np.float32(S)  # every update below is an addition

        dh = g @ self._B.T
        if self._momentum:
            self._velocity *= self._momentum
            self._velocity += h.T @ g
            self._B += self._velocity
        else:
            self._B += h.T @ g
        for tap, x in zip(self._taps, seen, strict=True):
            target = tap.A
            if tap.velocity is not None:
                target = tap.velocity
                target *= self._momentum
            if tap.start is not None:
                target[rows] += dh[:, tap.columns]  # a sample is in a batch only once
            else:
                target += x.T @ dh[:, tap.columns]
            if tap.velocity is not None:
                tap.A += tap.velocity
        return loss, hits

    def tensors(self) -> dict[str, Floats]:
        """The trained A_k (N, R) and B_k (R, C), as copies; see `Trainer.tensors`."""
        out: dict[str, Floats] = {}
        for tap in self._taps:
            A = tap.A.copy() if tap.start is None else self._A0[tap.name] + self._X[tap.name].T @ tap.A
            out |= {f"{tap.name}.A": A, f"{tap.name}.B": self._B[tap.columns].copy()}
        return out

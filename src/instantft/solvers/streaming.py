"""Ridge regression that goes on: one sample or a batch more, exactly as if everything had been fitted again.

With samples z_1 … z_n (rows [s·√w_k·x^k … | 1], clipped), targets y_i and forgetting γ, after every update

    W minimises  Σ_i γ^(n−i)·‖y_i − z_i·W‖² + λ_n·‖W‖²

In the dual, for up to D + 1 samples, G = Z·Zᵀ + Λ with Λ_i = λ_n/γ^(n−i). That ratio never changes, so a new sample
only adds a row and a column to G, and one row to V, the inverse of its Cholesky factor: O(n²), where fitting again is
O(n³).

    l = V·k,  d² = z·zᵀ + λ_n − lᵀl,  new row of V = [−lᵀV | 1]/d      k = Z·zᵀ

In the primal, P = (Σ γ^(n−i)·z_iᵀz_i + λ_n·I)⁻¹ takes any number of samples (block recursive least squares):

    Q = P·Zᵀ·(I + Z·P·Zᵀ)⁻¹,  P ← P − Q·Z·P,  W ← W + Q·(Y − Z·W)

λ_n shrinks with γ as the weight of old samples does. Before it has halved it is set right, and the system factorised
again, which costs one fit every ln 2/(1 − γ) samples. With γ = 1, λ_n is λ for ever.

A bounded support keeps the newest samples only and stays in the dual: when it is full and a quarter more, the oldest go
and the rest is factorised again. n samples in use, D features, C outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, UsageError
from ..spec import NetSpec
from ..tasks import Targets, as_targets
from .calibration import Temperature, fit_temperature
from .closed import TOO_LARGE
from .factor import inverse_factor
from .lowrank import Pair
from .taps import Choice, shrinkage

__all__ = ["StreamingRidge", "check_stream"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

TOLERANCE = 1e-4
"""How far W may be from that of fitting again, relative to its largest value: the features are float32."""

ROOM = 1.25
"""How far a bounded support may grow before the oldest samples go."""

NEGLIGIBLE = 1e-7
"""Weight below which a forgotten sample is dropped."""

BLOCKS = 4
"""Parts in which a triangle is read, so that most of its zeros are not."""


def check_stream(forgetting: float, support: int | None) -> None:
    """See that the settings of a stream are in range.

    Raises:
        UsageError: one is not.
    """
    if isinstance(forgetting, bool) or not isinstance(forgetting, (int, float)) or not 0 < forgetting <= 1:
        raise UsageError(f"forgetting must be above 0 and at most 1, not {forgetting!r:.60}")
    if support is not None and (isinstance(support, bool) or not isinstance(support, int) or support < 1):
        raise UsageError(f"support must be at least 1 sample, not {support!r:.60}")


class StreamingRidge:
    """The state of a stream.

    Args:
        spec: the network whose taps are regressed on.
        choice: λ, weights, scale and limit, as `fit_ridge` found them (`RidgeResult.choice`); they stay.
        forgetting: γ, above 0 and at most 1.
        support: most samples to keep; None: all, and from D + 1 samples on the primal, which needs none.

    Attributes:
        classes: C.
        seen: samples so far.

    Raises:
        UsageError: an argument is out of range.
    """

    def __init__(self, spec: NetSpec, choice: Choice, *, forgetting: float = 1.0, support: int | None = None) -> None:
        check_stream(forgetting, support)
        if not (np.isfinite(choice.lam) and choice.lam > 0):
            raise UsageError(f"lambda must be above 0 and finite, not {choice.lam!r:.60}")
        self.spec, self.choice, self.forgetting, self.support = spec, choice, float(forgetting), support
        self.classes = spec.C
        self.seen = 0
        self._used = [k for k, w in enumerate(choice.weights) if w > 0]
        self._widths = [spec.tap_widths[k] for k in self._used]
        self._stretch = np.repeat([choice.scale * np.sqrt(choice.weights[k]) for k in self._used], self._widths)
        self._D = sum(self._widths)
        self._lam = choice.lam
        self._n = 0
        self._W: Doubles = np.zeros((self._D + 1, self.classes))
        # dual
        self._Z: Floats = np.empty((0, self._D + 1), np.float32)
        self._Y: Doubles = np.empty((0, self.classes))
        self._Lambda: Doubles = np.empty(0)
        self._V: Doubles = np.empty((0, 0))
        self._alpha: Doubles = np.empty((0, self.classes))
        self._diagonal: Doubles = np.empty(0)
        # primal
        self._P: Doubles | None = None
        self._A: Doubles = np.empty((0, 0))
        self._R: Doubles = np.empty((0, 0))

    # -- what it knows -----------------------------------------------------------------------------------------------

    @property
    def lam(self) -> float:
        """λ_n, the λ at which fitting again gives the same."""
        return self._lam

    @property
    def retained(self) -> int:
        """Samples in the dual; 0 in the primal, which keeps none."""
        return self._n

    @property
    def W(self) -> Doubles:
        """(D+1, C), the maps of the taps in use, for features as they are scaled here, and the bias in the last row."""
        return self._W

    def pairs(self) -> tuple[dict[int, Pair], Doubles]:
        """A_k (N_k, C), B_k = I of each tap in use, and the bias (C,), as `closed.Fitted` has them."""
        W = self._W[:-1] * self._stretch[:, None]
        cuts = np.cumsum([0, *self._widths])
        eye = np.eye(self.classes)
        return {k: (W[cuts[i] : cuts[i + 1]], eye) for i, k in enumerate(self._used)}, self._W[-1].copy()

    def left_out(self) -> tuple[Doubles, NDArray[np.intp]]:
        """Of classes that count alike: exact leave-one-out scores (n, C) of those retained, and their labels (n,); none
        in the primal.

        Forgotten samples count as little here as there: a score is that of the others, weighted as they are.
        """
        e = self._alpha[: self._n] / self._diagonal[: self._n, None]
        # (G⁻¹)_ii belongs to K + Λ; its residual is that of the unweighted sample.
        return self._Y[: self._n] - e, self._Y[: self._n].argmax(axis=1)

    def temperature(self) -> Temperature | None:
        """β by the left-out scores; None in the primal."""
        if self._n == 0:
            return None
        return fit_temperature(*self.left_out())

    # -- what it learns ----------------------------------------------------------------------------------------------

    def add_class(self) -> int:
        """One more output, which no sample so far belongs to; returns C."""
        self.classes += 1
        self._W, self._Y, self._alpha, self._R = (
            np.pad(a, ((0, 0), (0, 1))) for a in (self._W, self._Y, self._alpha, self._R)
        )
        return self.classes

    def update(self, taps: Sequence[Floats], y: NDArray[np.integer[Any]] | Targets) -> None:
        """Learn from a batch, oldest sample first.

        Args:
            taps: x^0 … x^{L-1}, (b, N_k) each, as `Records.taps` gives them.
            y: (b,) classes, 0 to C-1; or what else the samples are to teach, in the terms of earlier ones
                (`Targets.more`).

        Raises:
            DataError: they cannot be used; nothing has changed.
        """
        goal = as_targets(y if isinstance(y, Targets) else np.asarray(y), self.classes)
        labels = goal.y
        Z = self._features(taps)
        b = len(Z)
        classes = goal.task == "classification"
        if not classes and labels.shape != (b, self.classes):
            raise DataError(f"labels must be ({b}, {self.classes}), one an output, not {list(labels.shape)}")
        if (classes and labels.shape != (b,)) or (
            classes and b and (int(labels.min()) < 0 or int(labels.max()) >= self.classes)
        ):
            raise DataError(f"labels must be one a sample, 0 to {self.classes - 1}, not {labels!r:.60}")
        if b == 0:
            return
        Y = Z[:, -1:].astype(np.float64) * goal.Y
        if goal.roots is not None:
            Y *= goal.roots[:, None]
            Z *= goal.roots[:, None].astype(np.float32)
        self.seen += b
        # In parts, so that neither λ nor the support strays far within one batch.
        most = b if self.forgetting == 1 else max(1, int(np.log(2) / 4 / -np.log(self.forgetting)))
        if self.support is not None:
            most = min(most, max(1, int((ROOM - 1) * self.support)))
        for start in range(0, b, most):
            part = slice(start, start + most)
            if self._P is None and self.support is None and self._n + len(Z[part]) > self._D + 1:
                self._to_primal()
            if self._P is None:
                self._grow(Z[part], Y[part])
            else:
                self._recurse(Z[part], Y[part])
            self._tidy()

    def _features(self, taps: Sequence[Floats]) -> Floats:
        parts = [np.asarray(taps[k], np.float32) for k in self._used]
        if any(p.ndim != 2 or p.shape[1] != n for p, n in zip(parts, self._widths, strict=True)):
            raise DataError(f"taps must be (b, N) with N of {self._widths}, not {[list(p.shape) for p in parts]}")
        if len({len(p) for p in parts}) != 1:
            raise DataError(f"taps must hold the same samples, not {[len(p) for p in parts]}")
        Z = np.ones((len(parts[0]), self._D + 1), np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            np.concatenate(parts, axis=1, out=Z[:, :-1])
            Z[:, :-1] *= self._stretch.astype(np.float32)
            norms = np.sqrt(np.einsum("ij,ij->i", Z[:, :-1], Z[:, :-1]))
        if not np.isfinite(norms).all():
            raise DataError(TOO_LARGE)
        c = shrinkage(norms, self.choice.limit * self.choice.scale)
        if (c < 1).any():
            Z *= c[:, None].astype(np.float32)
        return Z

    def _weights(self, b: int) -> Doubles:
        """λ_n after each of b new samples."""
        return np.asarray(self._lam * self.forgetting ** np.arange(1, b + 1))

    def _grow(self, Z: Floats, Y: Doubles) -> None:
        """The dual, b samples larger."""
        n, b = self._n, len(Z)
        self._reserve(n + b)
        Lambda = self._weights(b)
        k = np.asarray(self._Z[:n] @ Z.T, np.float64)
        L = _lower_times(self._V[:n, :n], k)
        S = np.asarray(Z @ Z.T, np.float64) - L.T @ L
        S[np.diag_indices_from(S)] += Lambda
        V22 = inverse_factor(S)
        V21 = -V22 @ _lower_times_from_left(L.T, self._V[:n, :n])
        t = V22 @ (Y - k.T @ self._alpha[:n])
        self._V[n : n + b, :n], self._V[n : n + b, n : n + b] = V21, V22
        self._Z[n : n + b], self._Y[n : n + b], self._Lambda[n : n + b] = Z, Y, Lambda
        change = V21.T if b < self.classes else V21.T @ t
        moved = self._Z[:n].T @ change.astype(np.float32)
        self._W += moved @ t if b < self.classes else moved
        self._alpha[:n] += V21.T @ t
        self._alpha[n : n + b] = V22.T @ t
        self._W += Z.T @ self._alpha[n : n + b]
        self._diagonal[:n] += np.einsum("ij,ij->j", V21, V21)
        self._diagonal[n : n + b] = np.einsum("ij,ij->j", V22, V22)
        self._n, self._lam = n + b, float(Lambda[-1])

    def _reserve(self, n: int) -> None:
        """Room for n samples in the dual, twice as much as before where it is short."""
        have = len(self._Z)
        if n <= have:
            return
        enough = self._D + 1 if self.support is None else int(ROOM * self.support) + 1
        more = max(n, min(2 * have, enough)) - have
        self._Z = np.pad(self._Z, ((0, more), (0, 0)))
        self._Y, self._alpha = (np.pad(a, ((0, more), (0, 0))) for a in (self._Y, self._alpha))
        self._Lambda, self._diagonal = np.pad(self._Lambda, (0, more)), np.pad(self._diagonal, (0, more))
        self._V = np.pad(self._V, ((0, more), (0, more)))

    def _refit(self, keep: NDArray[np.intp], lam: float) -> None:
        """Factorise the dual again, of some samples in order, with their weights as they are."""
        Z, Y = self._Z[keep], self._Y[keep]
        Lambda = self._Lambda[keep] * (lam / self._lam)
        n = len(keep)
        G = np.asarray(Z @ Z.T, np.float64)
        G[np.diag_indices_from(G)] += Lambda
        V = inverse_factor(G)
        alpha = V.T @ (V @ Y)
        self._Z[:n], self._Y[:n], self._Lambda[:n], self._alpha[:n] = Z, Y, Lambda, alpha
        self._V[:n, :n] = V
        self._diagonal[:n] = np.einsum("ij,ij->j", V, V)
        self._W = np.asarray(Z.T @ alpha.astype(np.float32), np.float64)
        self._n, self._lam = n, lam

    def _to_primal(self) -> None:
        """From samples to normal equations; the samples are no longer needed."""
        n = self._n
        weights = self._lam / self._Lambda[:n]
        Z = self._Z[:n].astype(np.float64)
        self._A = (Z.T * weights) @ Z
        self._R = (Z.T * weights) @ self._Y[:n]
        self._solve_primal()
        self._n = 0
        self._Z, self._V, self._Y = self._Z[:0].copy(), np.empty((0, 0)), self._Y[:0].copy()
        self._alpha, self._Lambda, self._diagonal = self._alpha[:0].copy(), np.empty(0), np.empty(0)

    def _solve_primal(self) -> None:
        G = self._A.copy()
        G[np.diag_indices_from(G)] += self._lam
        V = inverse_factor(G)
        self._P = V.T @ V
        self._W = V.T @ (V @ self._R)

    def _recurse(self, Z: Floats, Y: Doubles) -> None:
        """The primal, b samples on; in parts, so that the small system stays small."""
        assert self._P is not None
        for start in range(0, len(Z), 256):
            z, y = Z[start : start + 256].astype(np.float64), Y[start : start + 256]
            b = len(z)
            decay = self.forgetting**b
            roots = self.forgetting ** (np.arange(b - 1, -1, -1) / 2)[:, None]
            z, y = roots * z, roots * y
            self._A *= decay
            self._A += z.T @ z
            self._R *= decay
            self._R += z.T @ y
            self._lam *= decay
            self._P /= decay
            PZ = self._P @ z.T
            V = inverse_factor(np.eye(b) + z @ PZ)
            half = PZ @ V.T
            self._W += half @ (V @ (y - z @ self._W))
            self._P -= half @ half.T

    def _tidy(self) -> None:
        """Set λ right before it has halved; drop samples that are too many, or forgotten."""
        low = self._lam < self.choice.lam / np.sqrt(2)
        lam = self.choice.lam * float(np.sqrt(2)) if low else self._lam
        if self._P is not None:
            if low:
                self._lam = lam
                self._solve_primal()
            return
        n = self._n
        full = self.support is not None and n >= ROOM * self.support and n > self.support
        if low or full:
            keep = np.flatnonzero(self._lam / self._Lambda[:n] >= NEGLIGIBLE)
            if full and self.support is not None:
                keep = keep[-self.support :]
            self._refit(keep, lam)


def _lower_times(V: Doubles, X: Doubles) -> Doubles:
    """V·X for lower triangular V (n, n), most of whose zeros are skipped."""
    n = len(V)
    out = np.empty((n, X.shape[1]))
    for a, b in _cuts(n):
        np.matmul(V[a:b, :b], X[:b], out=out[a:b])
    return out


def _lower_times_from_left(X: Doubles, V: Doubles) -> Doubles:
    """X·V for lower triangular V (n, n)."""
    n = len(V)
    out = np.zeros((len(X), n))
    for a, b in _cuts(n):
        out[:, :b] += X[:, a:b] @ V[a:b, :b]
    return out


def _cuts(n: int) -> list[tuple[int, int]]:
    edges = [n * i // BLOCKS for i in range(BLOCKS + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if b > a]

"""A step size for SGD from the cache alone, so that training does not diverge unless it is asked to.

Where the frozen part is frozen, the output is linear in what is trained last: y = c + Σ h_i·B with fixed features h_i
(h = [x^k·A_k] at the start of LoRA, [x^{L-1} | 1] for FT-Last). The Hessian of cross-entropy is then at most half the
features' second moment (features of samples with weights times their roots), and SGD with batches of B is stable up to

    lr < 4 / M,      M = (1 − 1/B)·λ_max(HᵀH / T) + max_i ‖h_i‖² / B,

where the second term is what a batch may see that the average does not. λ_max comes from power iteration. A LoRA's
features grow as A is trained too, so it gets a smaller share of the bound than a map that is linear for good (SHARE;
docs/decisions/0006-default-step.md has the measurements). A soon leaves the directions it was drawn in, so what it was
drawn with says little where there is one tap: M is then no less than it is on average over draws, which AVERAGE columns
instead of R tell. Of several taps, with a draw each, the sum is nearer its average by itself. Momentum μ moves further
by 1/(1 − μ), so the step shrinks by 1 − μ; but it also averages the noise of batches, and skip adapters stand AVERAGED
times that (0008-multinomial.md).

T samples, B batch size, R rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters import initial
from ..errors import UsageError
from ..methods import Method, connections
from ..tasks import Targets
from .records import Records, subset

__all__ = ["MOMENTUM", "default_lr", "default_momentum", "features", "largest_eigenvalue"]

Array = NDArray[Any]
Doubles = NDArray[np.float64]

SHARE = {"linear": 2.0, "bilinear": 0.5}
"""lr·M: half and an eighth of the bound."""

MOMENTUM = 0.8
"""Of skip adapters, where neither step nor momentum is asked for."""

AVERAGED = 3.0
"""How much further than without momentum skip adapters may move in all, where gradients are bounded (the squared error
has larger ones the further it is off, and samples of large weight have), and of several taps (of embeddings alone it
diverges)."""

MOST = 1024
"""Samples that are looked at."""

AVERAGE = 128
"""Columns of A that stand for the average over draws: it is off by 1/8 (√(2/128)) where one direction rules."""

AT_ONCE = 128
"""Samples whose records are decoded together."""

LARGEST = 1.0
"""The step where features are nearly zero and the bound says nothing."""

LABELS = 2.0
"""Step of the loss of labels in steps of cross-entropy: it is a mean over the outputs that A gets something from, and
its second derivative by an output is half as large."""

SQUARED = 0.25
"""Step of the squared error, a mean over C outputs, in steps of cross-entropy and in √C: its second derivative by an
output is 2/C, four times as large as that of cross-entropy for C = 1; but A gets something from every output."""

ITERATIONS, SETTLED = 100, 1e-4


def largest_eigenvalue(H: Array) -> float:
    """λ_max of HᵀH / T by power iteration, for H (T, n).

    From the sum of the rows, which for features that are mostly positive is nearly the answer.
    """
    H = np.asarray(H, np.float64)
    rng = np.random.default_rng(0)
    v = H.sum(axis=0) + 1e-3 * np.abs(H).mean() * rng.standard_normal(H.shape[1])
    value = 0.0
    for _ in range(ITERATIONS):
        norm = float(np.linalg.norm(v))
        if norm == 0:
            return 0.0
        v = H.T @ (H @ (v / norm)) / len(H)
        last, value = value, float(np.linalg.norm(v))
        if abs(value - last) <= SETTLED * value:
            break
    return value


def features(records: Records, method: Method, rank: int, seed: int) -> Doubles:
    """H (n, ·) of at most MOST samples: what the method's first step is linear in.

    Raises:
        UsageError: the method changes the frozen activations, so that the cache does not tell.
    """
    if not method.cacheable:
        raise UsageError(f"a step size from the cache needs a method that leaves it valid, not {method.name}")
    rows, _ = subset(len(records), MOST, seed)
    spec = records.spec
    start = initial(method, spec, rank, seed)
    H = []
    for at in range(0, len(rows), AT_ONCE):
        taps = records.taps(rows[at : at + AT_ONCE])
        parts = [taps[i] @ start[f"lora.{i}-{j}.A"] for i, j in connections(method, spec.L, spec.first_tap)]
        H.append(np.concatenate(parts or [taps[-1], np.ones((len(taps[-1]), 1))], axis=1, dtype=np.float64))
    return np.concatenate(H)


def _bound(H: Doubles, B: int) -> float:
    """M, for features H (T, n) and batches of B."""
    return (1 - 1 / B) * largest_eigenvalue(H) + float(np.einsum("ij,ij->i", H, H).max()) / B


def default_momentum(method: Method) -> float:
    """μ for a method whose step comes from `default_lr`: MOMENTUM for skip adapters, 0 where it was found to harm."""
    return MOMENTUM if method.adapters == "skip" else 0.0


def default_lr(
    records: Records,
    method: Method,
    *,
    rank: int = 4,
    batch_size: int = 20,
    momentum: float = 0.0,
    seed: int = 0,
    goal: Targets | None = None,
) -> float:
    """The learning rate for a method on these records.

    Args:
        records: of the fine-tuning set.
        method: a row of `methods.METHODS` that leaves records valid.
        rank, seed: of the adapters' start.
        batch_size, momentum: of SGD.
        goal: what the samples are to teach; None: classes that count alike.

    Raises:
        UsageError: see `features`.
    """
    H = features(records, method, rank, seed)
    factor, roots = 1.0, None
    if goal is not None:
        roots = goal.at(subset(len(records), MOST, seed)[0]).roots
        H = H if roots is None else H * roots[:, None]
        factor = {"classification": 1.0, "multi-label": LABELS, "regression": SQUARED * goal.C**0.5}[goal.task]
    B = max(1, min(batch_size, len(records)))
    M = _bound(H, B)
    if method.adapters != "none" and len(connections(method, records.spec.L, records.spec.first_tap)) == 1:
        H = features(records, method, AVERAGE, seed) * (rank / AVERAGE) ** 0.5
        M = max(M, _bound(H if roots is None else H * roots[:, None], B))
    share = SHARE["linear" if method.adapters == "none" else "bilinear"]
    bounded = goal is None or (goal.task != "regression" and goal.weights is None)
    further = AVERAGED if method.adapters == "skip" and records.spec.L > 1 and bounded else 1.0
    return factor * (min(share * min(1.0, further * (1 - momentum)) / M, LARGEST) if M > 0 else LARGEST)

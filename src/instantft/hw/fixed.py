"""The core's arithmetic in NumPy, to be read beside docs/hardware.md: what the RTL must compute, bit for bit.

Integers are int64 arrays, letters those of the specification. Sums of products go through float64 BLAS, which is exact
while every partial sum stays below 2^53: `products` asserts that from the formats, not from the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.codecs import codec
from ..engine import Tensors
from ..engine.reference import BN_EPS
from ..errors import UsageError
from ..spec import NetSpec, RecordSpec
from .formats import (
    EXP_HIGH,
    EXP_LOW,
    INVERSE,
    PARAMETER_FRACTION,
    PARAMETER_WIDTH,
    SCALED_WIDTH,
    STEP_FRACTION,
    STEP_WIDTH,
    Formats,
    Ints,
    nearest,
    shift,
)

__all__ = [
    "CODEC",
    "Frozen",
    "Parameters",
    "Saturations",
    "Trace",
    "adapter",
    "decode",
    "encode",
    "fold",
    "forward",
    "frozen",
    "parameter",
    "products",
    "quantise_input",
    "softmax",
    "step",
    "step_size",
    "tensors_of",
]

Bytes = NDArray[np.uint8]

CODEC = "nf4-hw"
"""The codec of the cache (§3)."""

UNIT = np.float32(1 << 16)
"""Of the codec's integers."""

STEP_ERROR = 0.01
"""By how much of itself η may be off once it is rounded."""

ENOUGH = 0.25
"""How large the largest of a row of B stays where A is made larger: h is within ±128, and so adds up to ±32 to y."""


@dataclass
class Saturations:
    """How many values were cut off (§8)."""

    activations: int = 0
    """z, h, y."""
    gradients: int = 0
    """v, u."""
    parameters: int = 0
    """A, B."""


@dataclass(frozen=True)
class Frozen:
    """The frozen network, Q4.12, batch norm folded in (§2).

    Attributes:
        weights: of each layer, (N, M) for fc and (out, in, kh, kw) for conv.
        biases: of each layer, (out,).
    """

    weights: tuple[Ints, ...]
    biases: tuple[Ints, ...]


@dataclass(frozen=True)
class Parameters:
    """A general adapter.

    Attributes:
        A: of each tap, (N_k, R), Q4.12.
        B: of each tap, (R, C), Q4.12.
        gain: Q4.12.
        bias: (C,), an activation.
    """

    A: tuple[Ints, ...]
    B: tuple[Ints, ...]
    gain: int
    bias: Ints


@dataclass(frozen=True)
class Trace:
    """What a batch of b samples went through on its way.

    Attributes:
        h: of each tap, (b, R), activations.
        y: (b, C), activations.
        p: (b, C), 12 bits of fraction.
        v: (b, C), scaled gradients.
        u: of each tap, (b, R), scaled gradients.
    """

    h: tuple[Ints, ...]
    y: Ints
    p: Ints
    v: Ints
    u: tuple[Ints, ...]


def saturate(v: Ints, width: int) -> tuple[Ints, int]:
    """sat(v, width), and how many values it changes (§1)."""
    limit = 1 << (width - 1)
    kept = np.clip(v, -limit, limit - 1)
    return kept, int(np.count_nonzero(kept != v))


def products(a: Ints, b: Ints, bits: int) -> Ints:
    """Σ_n a[…, n]·b[n, …], exactly.

    Args:
        bits: widths of both formats together, so that |a·b| ≤ 2^(bits-2).
    """
    assert a.shape[-1] << (bits - 2) < 1 << 53, (a.shape, bits)
    return np.asarray(a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def parameter(x: NDArray[Any], name: str) -> Ints:
    """x in Q4.12, rounded to the nearest.

    Raises:
        UsageError: a value does not lie within ±8.
    """
    v, cut = saturate(nearest(np.clip(x, -16, 16), PARAMETER_FRACTION), PARAMETER_WIDTH)
    if cut:
        worst = float(np.abs(np.asarray(x, np.float64)).max())
        raise UsageError(f"{name} must lie within ±8 for the core, which holds Q4.12, but the largest is {worst:.4g}")
    return v


def step_size(lr: float, samples: int) -> int:
    """η of a batch of so many samples (§1).

    Raises:
        UsageError: its format does not hold it, or is too coarse for it.
    """
    eta = int(nearest(min(lr / samples, 1.0), STEP_FRACTION))
    if not 0 < eta < 1 << STEP_WIDTH or abs(eta / 2**STEP_FRACTION * samples / lr - 1) > STEP_ERROR:
        low = 0.5 / STEP_ERROR / 2**STEP_FRACTION
        raise UsageError(
            f"the learning rate over the samples of a batch must be {low:.2g} to below 1 for the core, "
            f"not {lr:g}/{samples}"
        )
    return eta


# -- §2, the frozen network -------------------------------------------------------------------------------------------


def fold(net: NetSpec, tensors: Tensors) -> Frozen:
    """The network's weights and biases as the core holds them.

    Raises:
        UsageError: one does not lie within ±8 once batch norm is folded in.
    """
    weights, biases = [], []
    for k, layer in enumerate(net.layers):
        w, b = (np.asarray(tensors[f"layers.{k}.{name}"], np.float64) for name in ("weight", "bias"))
        if layer.batch_norm:
            gamma, beta, mean, variance = (
                np.asarray(tensors[f"layers.{k}.bn.{name}"], np.float64)
                for name in ("weight", "bias", "running_mean", "running_var")
            )
            s = gamma / np.sqrt(variance + BN_EPS)
            w = w * (s if layer.kind == "fc" else s[:, None, None, None])
            b = (b - mean) * s + beta
        folded = " with its batch norm folded in" if layer.batch_norm else ""
        weights.append(parameter(w, f"weights of layer {k}{folded}"))
        biases.append(parameter(b, f"biases of layer {k}{folded}"))
    return Frozen(tuple(weights), tuple(biases))


def quantise_input(x: NDArray[Any], formats: Formats) -> Ints:
    """x^0: of pixels (uint8), or of numbers."""
    if x.dtype == np.uint8:
        p = x.astype(np.int64)
        q = 257 * p + (p >> 7)
    else:
        q = saturate(nearest(np.clip(x, -256, 256), 16), 24)[0]
    return saturate(shift(q, 16 - formats.fraction), formats.width)[0]


def frozen(net: NetSpec, network: Frozen, x0: Ints, formats: Formats, seen: Saturations) -> list[Ints]:
    """x^1 … x^(L-1) and c of samples x0 (T, N), each (T, values)."""
    out, x = [], x0
    for layer, g, w, b in zip(net.layers, net.geometry, network.weights, network.biases, strict=True):
        bits, T = formats.width + PARAMETER_WIDTH, len(x)
        if layer.kind == "fc":
            total = products(x, w, bits) + (b << formats.fraction)
        else:
            (kh, kw), (ph, pw) = layer.kernel, layer.padding
            image = np.pad(x.reshape(T, *g.in_shape), ((0, 0), (0, 0), (ph, ph), (pw, pw)))
            windows = np.lib.stride_tricks.sliding_window_view(image, (kh, kw), axis=(2, 3))  # T, in, h, w, kh, kw
            rows, columns = (n // layer.pool * layer.pool for n in g.linear_shape[1:])  # those that pooling looks at
            windows = windows[:, :, :rows, :columns].transpose(0, 2, 3, 1, 4, 5)
            flat = windows.reshape(T, rows * columns, -1)
            total = products(flat, w.reshape(len(w), -1).T, bits) + (b << formats.fraction)
        z, cut = saturate(shift(total, PARAMETER_FRACTION), formats.width)
        seen.activations += cut
        if layer.relu:
            z = np.maximum(z, 0)
        if layer.kind == "conv":
            p = layer.pool
            z = z.reshape(T, rows // p, p, columns // p, p, layer.out).max(axis=(2, 4)).transpose(0, 3, 1, 2)
        x = z.reshape(T, -1)
        out.append(x)
    return out


# -- §3, the cache ----------------------------------------------------------------------------------------------------


def encode(record: RecordSpec, values: Sequence[Ints], formats: Formats) -> Bytes:
    """Cache entries (T, bytes) of records: x^1 … c, each (T, size).

    They are those of the product's codec, which is told that activations have 16 bits of fraction: it computes with the
    integers alone. Of the taps, the one that has no negative becomes its neighbour, with the same code and the scale of
    §3.
    """
    rows = np.zeros((len(values[0]), record.width), np.float32)
    for s, v in zip(record.segments, values, strict=True):
        rows[:, s.offset : s.offset + s.size] = v / UNIT
    taps = rows[:, : record.segments[-1].offset]
    np.maximum(taps, (1 - (1 << (formats.width - 1))) / UNIT, out=taps)
    return codec(CODEC).encode(rows, record)


def decode(record: RecordSpec, entries: Bytes) -> list[Ints]:
    """x^1 … c, each (T, size), as training sees them."""
    rows = (codec(CODEC).decode(entries, record) * UNIT).astype(np.int64)
    return [rows[:, s.offset : s.offset + s.size] for s in record.segments]


# -- §4, the adapter --------------------------------------------------------------------------------------------------


def adapter(net: NetSpec, tensors: Tensors, rank: int, formats: Formats, balanced: bool = True) -> Parameters:
    """An adapter as the core holds it, filled up with zeros to the core's rank and taps.

    Column r of A_k times 2^e and row r of B_k over 2^e are the same adapter. Of the e at which both fit Q4.12, and
    which leave B no smaller than it was or at least ENOUGH, the one with the smallest error of A·B is taken, 0 among
    equals; so what the core has trained stays as it is.

    Args:
        tensors: whatever of ``lora.k-L.A``, ``lora.k-L.B``, ``output.gain`` and ``output.bias`` there is.
        rank: of the core.
        balanced: False: e is 0, which an adapter that is to be trained on asks for.

    Raises:
        UsageError: it has other tensors, a larger rank, or values that the formats do not hold.
    """
    names = [f"lora.{k}-{net.L}" for k in range(net.L)]
    others = [name for name in tensors if name.startswith("lora.") and name[:-2] not in names]
    if others:
        raise UsageError(f"the core holds adapters to the output only, not {others[0]}")
    A, B = [], []
    for k, name in enumerate(names):
        if f"{name}.A" not in tensors:
            A.append(np.zeros((net.tap_widths[k], rank), np.int64))
            B.append(np.zeros((rank, net.C), np.int64))
            continue
        a, b = (np.asarray(tensors[f"{name}.{part}"], np.float64) for part in "AB")
        more = rank - len(b)
        if more < 0:
            raise UsageError(f"rank must be at most {rank} for this build of the core, not {len(b)}")
        if balanced:
            e = np.array([_balance(a[:, r], b[r]) for r in range(len(b))], np.float64)
            a, b = a * 2.0**e, b * 2.0 ** -e[:, None]
        A.append(np.pad(parameter(a, f"{name}.A"), ((0, 0), (0, more))))
        B.append(np.pad(parameter(b, f"{name}.B"), ((0, more), (0, 0))))
    gain = int(parameter(tensors.get("output.gain", np.ones(1, np.float32)), "output.gain")[0])
    given = np.asarray(tensors.get("output.bias", np.zeros(net.C, np.float32)), np.float64)
    limit = 2.0 ** (formats.width - formats.fraction - 1)
    bias, cut = saturate(nearest(np.clip(given, -2 * limit, 2 * limit), formats.fraction), formats.width)
    if cut:
        raise UsageError(f"output.bias must lie within ±{limit:g} for the core, not {np.abs(given).max():.4g}")
    return Parameters(tuple(A), tuple(B), gain, bias)


def _balance(a: NDArray[np.float64], b: NDArray[np.float64]) -> int:
    """e for a column of A (N,) and a row of B (C,); 0 where none fits."""
    best, least, unit = 0, float("inf"), 2.0**-PARAMETER_FRACTION
    for e in sorted(range(-16, 17), key=abs):
        x, y = a * 2.0**e, b * 2.0**-e
        if (e > 0 and np.abs(y).max() < ENOUGH) or max(np.abs(x).max(), np.abs(y).max()) >= 8 - unit:
            continue
        qx, qy = nearest(x, PARAMETER_FRACTION) * unit, nearest(y, PARAMETER_FRACTION) * unit
        error = float((qx @ qx) * (qy @ qy) - 2 * (qx @ x) * (qy @ y) + (x @ x) * (y @ y))  # ‖qx·qyᵀ - x·yᵀ‖²
        if error < least * (1 - 1e-9):
            best, least = e, error
    return best


def tensors_of(params: Parameters, rank: int) -> dict[str, NDArray[np.float32]]:
    """A and B by name, float32, which holds them exactly; the first `rank` columns and rows."""
    L, one = len(params.A), np.float32(1 << PARAMETER_FRACTION)
    made: dict[str, NDArray[np.float32]] = {}
    for k, (A, B) in enumerate(zip(params.A, params.B, strict=True)):
        made[f"lora.{k}-{L}.A"] = A[:, :rank].astype(np.float32) / one
        made[f"lora.{k}-{L}.B"] = B[:rank].astype(np.float32) / one
    return made


# -- §5, softmax ------------------------------------------------------------------------------------------------------


def softmax(y: Ints, formats: Formats) -> Ints:
    """p (…, C), 12 bits of fraction, of logits y (…, C)."""
    delta = (y.max(axis=-1, keepdims=True) - y) >> (formats.fraction - 10)
    near = np.minimum(delta, (16 << 10) - 1)
    e = np.where(delta >= 16 << 10, 0, (EXP_HIGH[near >> 7] * EXP_LOW[near & 127] + (1 << 15)) >> 16)
    Z = e.sum(axis=-1, keepdims=True)
    n = np.frexp(Z.astype(np.float64))[1].astype(np.int64) - 1
    f = (Z >> (n - 10)) & 1023
    return np.asarray((e * INVERSE[f] + (1 << (n + 3))) >> (n + 4), np.int64)


# -- §4, fine-tuning --------------------------------------------------------------------------------------------------


def forward(
    params: Parameters, taps: Sequence[Ints], c: Ints, formats: Formats, seen: Saturations
) -> tuple[tuple[Ints, ...], Ints]:
    """h of each tap (b, R) and y (b, C), from taps x^0 … x^(L-1) (b, N_k) and c (b, C)."""
    W = formats.width
    total = params.gain * c + (params.bias << PARAMETER_FRACTION)
    h = []
    for x, A, B in zip(taps, params.A, params.B, strict=True):
        h_k, cut = saturate(shift(products(x, A, W + PARAMETER_WIDTH), PARAMETER_FRACTION), W)
        seen.activations += cut
        total = total + products(h_k, B, W + PARAMETER_WIDTH)
        h.append(h_k)
    y, cut = saturate(shift(total, PARAMETER_FRACTION), W)
    seen.activations += cut
    return tuple(h), y


def step(
    params: Parameters,
    taps: Sequence[Ints],
    c: Ints,
    labels: NDArray[np.integer[Any]],
    eta: int,
    formats: Formats,
    seen: Saturations,
) -> tuple[Parameters, Trace]:
    """One batch: new parameters, and what led to them.

    Args:
        params: those of the batch's start.
        taps: x^0 … x^(L-1), (b, N_k); all but x^0 as the cache gives them back.
        c: (b, C), likewise.
        labels: (b,) classes.
        eta: η of this batch (`step_size`).
        seen: saturations are added here.
    """
    h, y = forward(params, taps, c, formats, seen)
    p = softmax(y, formats)
    g = (np.arange(y.shape[-1]) == labels[:, None]) * (1 << PARAMETER_FRACTION) - p
    v, cut = saturate(shift(g * eta, 16), SCALED_WIDTH)
    seen.gradients += cut
    A, B, u = [], [], []
    for x, h_k, A_k, B_k in zip(taps, h, params.A, params.B, strict=True):
        u_k, cut = saturate(shift(products(v, B_k.T, SCALED_WIDTH + PARAMETER_WIDTH), PARAMETER_FRACTION), SCALED_WIDTH)
        seen.gradients += cut
        A.append(_updated(A_k, x, u_k, formats, seen))
        B.append(_updated(B_k, h_k, v, formats, seen))
        u.append(u_k)
    return replace(params, A=tuple(A), B=tuple(B)), Trace(h, y, p, v, tuple(u))


def _updated(old: Ints, left: Ints, right: Ints, formats: Formats, seen: Saturations) -> Ints:
    """Parameters (n, m) once Σ_b left[b, n]·right[b, m] is added."""
    s = formats.update_shift
    new, cut = saturate(shift((old << s) + products(left.T, right, formats.width + SCALED_WIDTH), s), PARAMETER_WIDTH)
    seen.parameters += cut
    return new

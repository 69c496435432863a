"""The peak memory of a run, stated ahead, and the limit that a run must keep within.

What is counted is what a run of the native engine adds to a process that has loaded the package and the network:
memory of its own (anonymous), not the pages of a cache file, which the system drops when it wants them.

    peak = FIXED + the network + samples (twice while they are read) + cache + the largest of the phases:
           reading, step size, training, training without the held-out samples (the gate), the closed form

T samples, N inputs, D sum of the taps' widths, C outputs, B batch size, R rank, E epochs; everything in bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .cache.codecs import codec
from .cost import MAX_GRAM_BYTES
from .errors import UsageError
from .methods import Method, connections, layer_types, method
from .solvers.closed import KEPT, SCORED
from .solvers.dual import Space, taps_in_dual
from .solvers.lifting import SAMPLES
from .solvers.records import CHUNK
from .solvers.ridge import MANY, MAX_SYSTEM
from .solvers.sgd import LONG_EPOCH, MAX_ORDER
from .solvers.step import AT_ONCE, AVERAGE, MOST
from .spec import PAD, NetSpec, pad

__all__ = ["FIXED", "Plan", "check_limit", "peak_memory", "size_of", "size_text"]

FIXED = 8 << 20
"""What any run takes: code that was not yet in memory, buffers of the linear algebra, small objects."""

PRODUCTS = 3
"""Gram matrices that are kept while taps are chosen: the input's, the first layer's, and one of all others."""

IN_FLIGHT = 64
"""Samples whose records a trainer has in hand (IFT_CHUNK of the core)."""

MAX_SIZE = 1 << 60

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Plan:
    """A run whose memory is asked for.

    Attributes:
        spec: the network.
        method: a row of the table of methods.
        T: samples to adapt to.
        rank, epochs, batch_size, space: of the run, as in `solvers.sgd.fit`; the rank is a number here.
        codec: of the cache; None: there is none.
        capacity: samples that the cache has room for; None: all.
        on_disk: whether the cache is a file.
        decoded: whether the closed form holds all records decoded (`solvers.ridge.fit_ridge`).
        lift: of the closed form, or None.
        others: further samples that are in memory, such as those to evaluate on.
        itemsize: bytes a value in the file that the samples are read from; 0: they are in memory already.
        foreign: what the runtime of a foreign network takes, as measured.
    """

    spec: NetSpec
    method: Method
    T: int
    rank: int
    epochs: int = 10
    batch_size: int = 20
    space: Space = "auto"
    codec: str | None = None
    capacity: int | None = None
    on_disk: bool = False
    decoded: bool = True
    lift: str | None = None
    others: int = 0
    itemsize: int = 4
    foreign: int = 0


def peak_memory(p: Plan) -> dict[str, int]:
    """Bytes at the peak by what they are for; their sum is the peak."""
    spec, T, N = p.spec, p.T, p.spec.geometry[0].N
    store = 0
    if p.codec is not None:
        slots = min(T, p.capacity or T)
        store = slots * (8 if p.on_disk else codec(p.codec).stride(spec.record) + 8)
    elif not spec.own and p.method.solver == "sgd":  # whose records are all kept, whoever asks
        store = T * (4 * spec.record.width + 8)
    working = _closed_form(p) if p.method.solver == "ridge" else _training(p)
    reading = max(T, p.others) * (p.itemsize * N + N) if p.itemsize else 0  # as in the file, and which are finite
    return {
        "fixed": FIXED,
        "network": 16 * sum(math.prod(s) for s in spec.parameters.values()) + p.foreign,
        "samples": (T + p.others) * (4 * N + 24),
        "cache": store,
        "work": max(working, reading - store),
    }


def _training(p: Plan) -> int:
    """SGD: the step size; tensors and order of the samples. The gate trains again on a copy of most samples."""
    spec, m, T, N = p.spec, p.method, p.T, p.spec.geometry[0].N
    pairs, width = connections(m, spec.L, spec.first_tap), spec.record.width
    looking = 0
    if m.cacheable:
        n, together = min(T, MOST), min(T, AT_ONCE)
        columns = max(p.rank, AVERAGE) if len(pairs) == 1 else len(pairs) * p.rank
        decoding = 4 if p.codec is None else 8 if p.codec == "fp32" else 12
        looking = together * decoding * width + 32 * n * (columns or spec.tap_widths[-1] + 1)
    order = 16 * (T if T > LONG_EPOCH else min(p.epochs * T, max(MAX_ORDER, T)))
    in_dual: tuple[bool, ...] = ()
    if p.codec is not None or p.space == "dual":
        in_dual = taps_in_dual(p.space, m, spec.tap_widths, T, p.rank, p.epochs, p.batch_size)
    if any(in_dual):
        decoded = 0 if p.codec == "fp32" else 4 * T * width
        steps = decoded + 4 * T * T * (sum(in_dual) + 2) + 24 * T * p.rank * len(in_dual)
    else:
        parameters = sum(s[0] * pad(math.prod(s[1:])) for s in spec.parameters.values())
        parameters += sum(pad(p.rank) * (pad(spec.geometry[i].N) + pad(spec.geometry[j - 1].M)) for i, j in pairs)
        trains_inside = any(t != "FC_y" for t in layer_types(m, spec.L)) or m.adapters == "layers"
        values = sum(g.N + 3 * g.M + 2 * g.n_out for g in spec.geometry) if spec.own else 0
        lanes = PAD + (pad(min(p.batch_size, T)) if trains_inside else 0)
        steps = 4 * (5 * parameters + lanes * values + 2 * IN_FLIGHT * width)
        steps += 4 * T * pad(N) if pad(N) != N and spec.input_tap else 0
    return max(looking, steps + order) + 4 * T * N


def _closed_form(p: Plan) -> int:
    """Records where they must be decoded; then choosing the taps, or the system, its copy and the inverse factor."""
    spec, T, C = p.spec, p.T, p.spec.C
    D, width = sum(spec.tap_widths), spec.record.width
    dual = T <= D or p.lift == "arccos"
    whole = p.decoded and (dual or T * width <= MAX_SYSTEM * CHUNK)
    decoding = 4 * width + (codec(p.codec).stride(spec.record) if p.codec else 0)
    records = 0 if p.codec == "fp32" and whole else (T if whole else min(T, CHUNK)) * decoding
    choosing = 6 * 8 * min(T, MANY) ** 2 + (4 * PRODUCTS * T * T if min(KEPT, D) >= T else 0)
    if dual:
        system = 21 * T * T + (12 * T * D if p.rank < C else 0)
    else:
        n = D + 1
        chunk = 8 * n * min(T, CHUNK)
        system = max(24 * n * n + (16 * n * n if p.rank < C else 0), 16 * n * n + 3 * chunk)
    if p.lift is not None:
        choosing += 10 * 8 * min(T, SAMPLES) ** 2
        system += 32 * T * T if p.lift == "arccos" else 16 * min(T, CHUNK) ** 2
    scores = 16 * T * C + 8 * 8 * (T if dual else min(T, SCORED)) * C
    # The solution in float64, scaled, with its temperature, as an adapter, and as a file; panels of the frozen network.
    solution = 56 * D * C + 4 * PAD * D
    return records + max(choosing, system) + scores + solution


# -- limits ----------------------------------------------------------------------------------------------------------


def size_of(text: str | int) -> int:
    """Bytes of a size such as 64M or 1.5G; K, M, G and T are powers of 1024.

    Raises:
        UsageError: it is no size, or not above 0.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]?)(?:I?B)?", str(text).strip().upper(), re.ASCII)
    value = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not 1 <= value <= MAX_SIZE:
        raise UsageError(f"a memory limit must be a size such as 64M or 1.5G, not {str(text)!r:.40}")
    return int(value)


def size_text(n: int) -> str:
    """A size for people: MiB with one decimal."""
    return f"{n / (1 << 20):,.1f} MiB"


def check_limit(p: Plan, limit: int) -> Plan:
    """The plan, if its peak is within the limit; with records read in chunks, where that is what makes it fit.

    Raises:
        UsageError: it is not; says what would.
    """
    fits = _frugal(p, limit)
    if fits is not None:
        return fits
    other = "; ".join(_alternatives(p, limit)) or "nothing does with this network"
    kept = f" with a cache in {p.codec}" if p.codec else ""
    raise UsageError(
        f"the run must fit in {size_text(limit)} of memory, but {p.method.name}{kept} of {p.T:,} samples needs "
        f"{size_text(sum(peak_memory(p).values()))}; what fits: {other}"
    )


def _frugal(p: Plan, limit: int) -> Plan | None:
    if sum(peak_memory(p).values()) <= limit:
        return p
    chunked = replace(p, decoded=False)
    able = p.method.solver == "ridge" and p.codec and p.lift is None and p.rank >= p.spec.C
    return chunked if able and sum(peak_memory(chunked).values()) <= limit else None


def _alternatives(p: Plan, limit: int) -> Iterator[str]:
    """Changes that would do, each by itself, the mildest first."""

    def fits(**changes: object) -> bool:
        return _frugal(replace(p, **changes), limit) is not None  # type: ignore[arg-type]

    if p.codec is not None:
        for name in ("fp16", "int8", "relu4", "relu2"):
            if codec(name).stride(p.spec.record) < codec(p.codec).stride(p.spec.record) and fits(codec=name):
                yield f"--cache {name}"
                break
        if not p.on_disk and fits(on_disk=True):
            yield "--cache-file"
        if p.method.solver == "sgd" and p.spec.own and fits(capacity=1):
            low, high = 1, p.T
            while high - low > max(1, low // 100):
                middle = (low + high) // 2
                low, high = (middle, high) if fits(capacity=middle) else (low, middle)
            yield f"--cache-capacity {low}"
    if p.method.solver == "ridge":
        steps = method("skip2-lora")
        if _frugal(replace(p, method=steps, rank=4, lift=None), limit) is not None:
            yield f"--method {steps.name}"
    elif p.method.rows_only and p.codec is not None and p.space == "auto" and fits(space="primal"):
        yield "--space primal"
    elif (
        p.method.rows_only and p.space == "primal" and 4 * p.T * p.T * p.spec.L <= MAX_GRAM_BYTES and fits(space="dual")
    ):
        yield "--space dual"
    if fits(T=1):
        low, high = 1, p.T
        while high - low > max(1, low // 100):
            middle = (low + high) // 2
            low, high = (middle, high) if fits(T=middle) else (low, middle)
        yield f"{low:,} samples"

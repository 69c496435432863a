"""How a record is written: codecs from padded float32 rows to bytes and back.

Every codec but ``fp32`` writes a sample as ``[scales][codes][kept]``; which of the three are there, and how, is *data*:
a grid of levels for each segment, a way of grouping values under one scale, a format for the scales, which segments are
kept as they are (in binary16), and whether there is padding in between. The arithmetic is float32, in the order written
here, and the C core repeats it bit for bit:

    m       the largest |v| of a group (the largest v on a nonnegative grid)
    scale   m / span                         rounded up to bfloat16 where scales are bfloat16
    inv     span / m                         or 1 / scale where scales are bfloat16
    n       v · inv
    code    on a table: how many thresholds lie below n;  on integers: n rounded to nearest even and clamped
    value   level[code] · scale              or code · scale

A group with m < 1e-30 gets scale 0 and the code of level 0. Values must be finite (and, for scales in
bfloat16, at most 3.38e38, so that a scale rounded up is finite too).

``nf4-hw`` is the codec of the hardware core, in integers (docs/hardware.md §3, where the padding is told too): values
and scales are Q8.16, so that what lies outside ±128 is clipped. ⌊·⌋ rounds down, t are the thresholds and l the levels:

    v       ⌊value · 2^16 + 1/2⌋, at least −2^23 and at most 2^23 − 1
    scale   m, the largest |v| of a group, at most 2^23 − 1
    code    how many of ⌊(t·m + 2^15) / 2^16⌋ lie below v
    value   ⌊(l[code]·m + 2^15) / 2^16⌋ / 2^16

and c, which is kept, is v itself, in 32 bits.

============ ================================================== ========================= ==================
name         grid                                               groups                    bytes for LeNet-5
============ ================================================== ========================= ==================
fp32         the padded row itself                              –                         7160
fp16         IEEE binary16, clipped to ±65504                   –                         3580
int8         −127 … 127                                         channel or vector         1890
nf4          NF4 of QLoRA (InstantFT §3.2)                      channel or vector         995
nf4-block64  NF4                                                64 values of the record   1008
nf4-hw       NF4, c in Q8.16                                    channel or vector         1026 (1136 padded)
relu4        0 … 15 after a ReLU, NF4 elsewhere, c in binary16  channel or vector         958
relu2        0 … 3 after a ReLU, NF4 elsewhere, c in binary16   channel or vector         513
============ ================================================== ========================= ==================

This file knows nothing about sample numbers or about where the bytes are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, nearest
from ..spec import RecordSpec, Segment

__all__ = [
    "CODECS",
    "NF4_LEVELS",
    "NF4_THRESHOLDS",
    "Q16_LEVELS",
    "Q16_THRESHOLDS",
    "Codec",
    "Grid",
    "codec",
    "fixed_codes",
    "fixed_values",
    "nf4_levels",
]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

TINY = np.float32(1e-30)
"""Groups whose largest value is below this are written as zeros: 1/m must stay far from overflow."""

HALF_MAX = np.float32(65504)
"""Largest finite binary16."""

NF4_LEVELS: Floats = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The 4-bit NormalFloat: QLoRA (Dettmers et al. 2023), Appendix E; `nf4_levels` derives it."""

NF4_THRESHOLDS: Floats = ((NF4_LEVELS[:-1].astype(np.float64) + NF4_LEVELS[1:].astype(np.float64)) / 2).astype(
    np.float32
)
"""(15,): midpoints of neighbouring levels, computed in float64 and rounded to float32."""

Q16_LEVELS: Ints = np.floor(NF4_LEVELS.astype(np.float64) * 2**16 + 0.5).astype(np.int64)
"""(16,): l in 16 bits of fraction."""

Q16_THRESHOLDS: Ints = np.floor(NF4_THRESHOLDS.astype(np.float64) * 2**16 + 0.5).astype(np.int64)
"""(15,): t in 16 bits of fraction."""

BEAT, BLOCK = 16, 16
"""Of padded records: scales, the codes of a segment, and what is kept, fill whole beats of 16 bytes; a group, blocks of
16 codes."""


def nf4_levels() -> NDArray[np.float64]:
    """The NF4 levels from the normal quantiles, as in QLoRA §3 (equation 4) and its code.

    Eight quantiles of N(0, 1) between 1 − d and 1/2 for the negative half, seven for the positive one, and zero, all
    divided by the largest; d = 1 − (1/2)(1/32 + 1/30) keeps the outermost ones finite. Returns (16,) float64.
    """
    d = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(p)) for p in np.linspace(d, 0.5, 9)[:-1]]
    negative = [-quantile(float(p)) for p in np.linspace(d, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*positive, 0.0, *negative], np.float64))
    return np.asarray(levels / levels.max(), np.float64)


def fixed_codes(v: Ints, width: int = 24) -> tuple[Ints, Bytes]:
    """Scales and codes of groups of integers (docs/hardware.md §3).

    Args:
        v: (…, n), of `width` bits.
        width: bits of a value; a scale has one fewer, since it has no sign.

    Returns:
        m (…) and the numbers of NF4 levels (…, n).
    """
    m = np.minimum(np.abs(v).max(axis=-1), 2 ** (width - 1) - 1)
    codes = np.zeros(v.shape, np.uint8)
    for t in Q16_THRESHOLDS.tolist():
        codes += v > ((t * m + 2**15) >> 16)[..., None]
    return m, codes


def fixed_values(m: Ints, codes: NDArray[Any]) -> Ints:
    """The integers (…, n) that codes (…, n) under scales m (…) stand for."""
    return np.asarray((Q16_LEVELS[codes] * m[..., None] + 2**15) >> 16)


@dataclass(frozen=True)
class Grid:
    """The values that a code can stand for, before they are multiplied by a group's scale.

    Attributes:
        span: level of the largest value of a group.
        low, high: smallest and largest code.
        zero: code of level 0.
        bits: of a code: 8, 4 or 2, so many to a byte, the first one low.
        table: True: codes number the NF4 levels; False: a code is its own level.
    """

    span: float
    low: int
    high: int
    zero: int
    bits: int
    table: bool = False

    @property
    def nonnegative(self) -> bool:
        """True where values below 0 are written as 0."""
        return self.low == 0 and not self.table

    def codes(self, n: Floats) -> Bytes:
        """Codes (two's complement where negative) of normalised values n, same shape."""
        if self.table:
            return np.searchsorted(NF4_THRESHOLDS, n, side="left").astype(np.uint8)
        return np.clip(np.rint(n), self.low, self.high).astype(np.int8).view(np.uint8)

    def levels(self, codes: Bytes) -> Floats:
        """Levels that `codes` stand for, same shape."""
        if self.table:
            return NF4_LEVELS[codes]
        return codes.view(np.int8).astype(np.float32)


NF4 = Grid(span=1, low=0, high=15, zero=7, bits=4, table=True)
INT8 = Grid(span=127, low=-127, high=127, zero=0, bits=8)
UINT4 = Grid(span=15, low=0, high=15, zero=0, bits=4)
UINT2 = Grid(span=3, low=0, high=3, zero=0, bits=2)


@dataclass(frozen=True)
class _Part:
    """A run of values with one grid, and where its codes lie in an encoded sample."""

    columns: NDArray[np.intp] | slice
    """Of a record row. Values past `size` up to groups·n are taken as zero."""
    size: int
    groups: int
    """Each of the same number of values."""
    stored: int
    """Values stored: size, or a whole number of blocks."""
    gap: int
    """Codes of padding behind each group."""
    grid: Grid
    scales: int
    """Offset of its scales, in bytes."""
    codes: int
    """Offset of its codes, in bytes."""
    code_bytes: int


@dataclass(frozen=True)
class _Plan:
    parts: tuple[_Part, ...]
    kept: NDArray[np.intp]
    """Columns of the values that are kept as they are."""
    kept_at: int
    kept_bytes: int
    """Without padding."""
    nbytes: int
    padding: int
    """Bytes of these that are padding."""


@dataclass(frozen=True)
class Codec:
    """One way to write records. The codes of every segment start at a byte of their own.

    Scales in Q8.16 stand for a codec that computes in integers throughout, on NF4.

    Attributes:
        name: by which the command line and files know it.
        signed: grid of segments that may be negative; None where nothing is quantised.
        nonnegative: grid of segments after a ReLU.
        scale: format of the scales.
        block: 0: a scale for every channel or vector; otherwise for so many values of the whole record, in order.
        kept: which segments are kept behind the codes, in binary16, or in 32 bits where scales are in Q8.16.
        padded: whether zeros fill up scales, the codes of each segment, and what is kept, to 16 bytes, and the codes of
            each group to 8.
        plain: True: the padded row as it is, and none of the above.
        version: of how it writes, for files: one that was written otherwise is refused.
    """

    name: str
    signed: Grid | None = None
    nonnegative: Grid | None = None
    scale: Literal["float32", "bfloat16", "q8.16"] = "float32"
    block: int = 0
    kept: Literal["none", "last", "all"] = "none"
    padded: bool = False
    plain: bool = False
    version: int = 1

    @property
    def fixed(self) -> bool:
        """True where it computes in integers."""
        return self.scale == "q8.16"

    def bytes_per_sample(self, record: RecordSpec) -> int:
        """Bytes of codes and scales of a sample, without any padding (995 for nf4 on LeNet-5)."""
        if self.plain:
            return 4 * record.size
        plan = _plan(self, record)
        return plan.nbytes - plan.padding

    def nbytes(self, record: RecordSpec) -> int:
        """Bytes that encoding a sample writes, padding included; for fp32 that of its row."""
        return 4 * record.width if self.plain else _plan(self, record).nbytes

    def stride(self, record: RecordSpec) -> int:
        """Bytes from one encoded sample to the next: `nbytes` rounded up to a multiple of 8."""
        return -(-self.nbytes(record) // 8) * 8

    def encode(self, rows: Floats, record: RecordSpec) -> Bytes:
        """Write samples.

        Args:
            rows: (T, record.width) float32, finite; what stands in the gaps is not looked at, except by fp32.
            record: layout of the rows.

        Returns:
            (T, stride) uint8, C-contiguous; bytes past `nbytes` are zero.

        Raises:
            UsageError: rows do not have the shape of the record.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        if rows.ndim != 2 or rows.shape[1] != record.width:
            raise UsageError(f"rows of a record must be (T, {record.width}), not {list(rows.shape)}")
        T = len(rows)
        out = np.zeros((T, self.stride(record)), np.uint8)
        if self.plain:
            out[:] = rows.view(np.uint8)
            return out
        plan = _plan(self, record)
        scale_bytes = _SCALES[self.scale].size
        for part in plan.parts:
            values = np.zeros((T, part.stored), np.float32)
            values[:, : part.size] = rows[:, part.columns]
            scale, codes = self._quantise(values.reshape(T, part.groups, part.stored // part.groups), part.grid)
            out[:, part.scales : part.scales + part.groups * scale_bytes] = _SCALES[self.scale].write(scale)
            codes = np.pad(codes, ((0, 0), (0, 0), (0, part.gap)))
            packed = _pack(codes.reshape(T, part.stored + part.groups * part.gap), part.grid.bits)
            out[:, part.codes : part.codes + packed.shape[1]] = packed
        kept = rows[:, plan.kept]
        words = _fixed(kept).astype("<i4") if self.fixed else np.clip(kept, -HALF_MAX, HALF_MAX).astype("<f2")
        out[:, plan.kept_at : plan.kept_at + plan.kept_bytes] = np.ascontiguousarray(words).view(np.uint8)
        return out

    def decode(self, data: Bytes, record: RecordSpec) -> Floats:
        """Read samples: the rows that `encode` wrote, to the precision of the codec.

        Args:
            data: (T, stride) uint8.
            record: layout of the rows.

        Returns:
            (T, record.width) float32; the gaps are zero.

        Raises:
            UsageError: data do not have the shape of encoded records.
        """
        data = np.ascontiguousarray(data, np.uint8)
        if data.ndim != 2 or data.shape[1] != self.stride(record):
            raise UsageError(f"encoded records must be (T, {self.stride(record)}) bytes, not {list(data.shape)}")
        T = len(data)
        if self.plain:
            return np.array(data.view(np.float32), np.float32)
        rows = np.zeros((T, record.width), np.float32)
        plan = _plan(self, record)
        scale_bytes = _SCALES[self.scale].size
        for part in plan.parts:
            scale = _SCALES[self.scale].read(data[:, part.scales : part.scales + part.groups * scale_bytes])
            each, stored = part.stored // part.groups, part.stored + part.groups * part.gap
            codes = _unpack(data[:, part.codes : part.codes + part.code_bytes], part.grid.bits, stored)
            v = self._dequantise(scale, codes.reshape(T, part.groups, each + part.gap)[:, :, :each], part.grid)
            rows[:, part.columns] = v.reshape(T, part.stored)[:, : part.size]
        kept = np.ascontiguousarray(data[:, plan.kept_at : plan.kept_at + plan.kept_bytes])
        if self.fixed:  # the low 24 bits count, and have a sign
            rows[:, plan.kept] = (kept.view("<i4").astype(np.int32) << 8 >> 8) * np.float32(2**-16)
        else:
            rows[:, plan.kept] = kept.view("<f2")
        return rows

    def _quantise(self, v: Floats, grid: Grid) -> tuple[NDArray[Any], Bytes]:
        """Scales (T, G) and codes (T, G, n) of groups v (T, G, n)."""
        if self.fixed:
            return fixed_codes(_fixed(v))
        scale, inv, empty = self._scales(v, grid)
        codes = grid.codes(v * inv[:, :, None])
        codes[empty] = grid.zero
        return scale, codes

    def _dequantise(self, scale: NDArray[Any], codes: Bytes, grid: Grid) -> Floats:
        """Values (T, G, n)."""
        if self.fixed:
            return np.asarray(fixed_values(scale, codes) * 2.0**-16, np.float32)
        return np.asarray(grid.levels(codes) * scale[:, :, None], np.float32)

    def _scales(self, v: Floats, grid: Grid) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """scale, inv and emptiness (T, G) of groups v (T, G, n); scale and inv are 0 where a group is empty."""
        span = np.float32(grid.span)
        m: Floats = (v if grid.nonnegative else np.abs(v)).max(axis=2)
        empty = m < TINY
        safe = np.where(empty, np.float32(1), m)
        if self.scale == "float32":
            scale, inv = safe / span, span / safe
        else:
            scale = _bfloat16_up(safe / span)
            inv = np.float32(1) / scale
        zero = np.float32(0)
        return np.where(empty, zero, scale), np.where(empty, zero, inv), empty


def _fixed(v: Floats) -> Ints:
    """v in Q8.16, rounded to the nearest, ties upwards."""
    q = np.clip(v.astype(np.float64) * 2**16, -(2**23), 2**23 - 1)  # before it is rounded: the same, and finite
    return np.floor(q + 0.5).astype(np.int64)


def _pack(codes: Bytes, bits: int) -> Bytes:
    """(T, n) codes of so many bits to bytes, the first one low; what is left of the last byte is 0."""
    if bits == 8:
        return codes
    each = 8 // bits
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
    packed: Bytes = codes[:, 0::each].copy()
    for i in range(1, each):
        packed |= codes[:, i::each] << np.uint8(bits * i)
    return packed


def _unpack(data: Bytes, bits: int, n: int) -> Bytes:
    """The first n codes of each row."""
    if bits == 8:
        return np.ascontiguousarray(data)
    each = 8 // bits
    codes = np.empty((len(data), each * data.shape[1]), np.uint8)
    for i in range(each):
        codes[:, i::each] = (data >> np.uint8(bits * i)) & np.uint8(2**bits - 1)
    return np.ascontiguousarray(codes[:, :n])


@dataclass(frozen=True)
class _ScaleFormat:
    size: int
    write: Callable[[NDArray[Any]], Bytes]
    """(T, G) float32, or integers, to (T, G·size) bytes, little endian."""
    read: Callable[[Bytes], NDArray[Any]]


def _bfloat16_up(x: Floats) -> Floats:
    """Positive x rounded up to a bfloat16, so that no value of a group exceeds its span; still float32."""
    bits = (x.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    return np.asarray(bits, np.uint32).view(np.float32)


def _write_bfloat16(x: Floats) -> Bytes:
    high = np.ascontiguousarray(x).view(np.uint32) >> np.uint32(16)
    return np.ascontiguousarray(high, "<u2").view(np.uint8)


def _read_bfloat16(data: Bytes) -> Floats:
    high = np.ascontiguousarray(data).view("<u2").astype(np.uint32)
    return np.asarray(high << np.uint32(16), np.uint32).view(np.float32)


_SCALES: dict[str, _ScaleFormat] = {
    "float32": _ScaleFormat(
        4,
        lambda x: np.ascontiguousarray(x, "<f4").view(np.uint8),
        lambda b: np.ascontiguousarray(b).view("<f4").astype(np.float32),
    ),
    "bfloat16": _ScaleFormat(2, _write_bfloat16, _read_bfloat16),
    "q8.16": _ScaleFormat(  # what a damaged word has beyond 23 bits is not looked at
        4,
        lambda m: np.ascontiguousarray(m, "<u4").view(np.uint8),
        lambda b: np.ascontiguousarray(b).view("<u4").astype(np.int64) & 0x7FFFFF,
    ),
}


@lru_cache(maxsize=256)
def _plan(c: Codec, record: RecordSpec) -> _Plan:
    """Resolve every offset of an encoded sample once."""
    kept = {"none": (), "last": record.segments[-1:], "all": record.segments}[c.kept]
    quantised = tuple(s for s in record.segments if s not in kept)
    runs: list[tuple[NDArray[np.intp] | slice, int, int, int, Grid]] = []
    if c.block and quantised:
        assert c.signed is not None
        size = sum(s.size for s in quantised)
        blocks = -(-size // c.block)
        runs.append((_columns(quantised), size, blocks, blocks * c.block, c.signed))
    else:
        for s in quantised:
            grid = c.nonnegative if s.nonnegative else c.signed
            assert grid is not None
            runs.append((slice(s.offset, s.offset + s.size), s.size, s.groups, s.size, grid))
    beat, block = (BEAT, BLOCK) if c.padded else (1, 1)
    scales = 0
    used = sum(groups for _, _, groups, _, _ in runs) * _SCALES[c.scale].size
    codes = -(-used // beat) * beat
    parts: list[_Part] = []
    for columns, size, groups, stored, grid in runs:
        gap = -(stored // groups) % block
        n = -(-(stored + groups * gap) * grid.bits // 8)
        n = -(-n // beat) * beat
        parts.append(_Part(columns, size, groups, stored, gap, grid, scales, codes, n))
        scales += groups * _SCALES[c.scale].size
        codes += n
        used += -(-stored * grid.bits // 8)
    columns = _columns(kept)
    n = (4 if c.fixed else 2) * len(columns)
    nbytes = -(-(codes + n) // beat) * beat
    return _Plan(tuple(parts), columns, codes, n, nbytes, nbytes - used - n)


def _columns(segments: tuple[Segment, ...]) -> NDArray[np.intp]:
    """Columns of a record row that hold the segments' values, in order."""
    ranges: list[NDArray[Any]] = [np.arange(s.offset, s.offset + s.size, dtype=np.intp) for s in segments]
    return np.concatenate([np.empty(0, np.intp), *ranges])


CODECS: dict[str, Codec] = {
    c.name: c
    for c in (
        Codec("fp32", plain=True),
        Codec("fp16", kept="all"),
        Codec("int8", signed=INT8, nonnegative=INT8),
        Codec("nf4", signed=NF4, nonnegative=NF4),
        Codec("nf4-block64", signed=NF4, nonnegative=NF4, block=64),
        Codec("nf4-hw", signed=NF4, nonnegative=NF4, scale="q8.16", kept="last", padded=True, version=2),
        Codec("relu4", signed=NF4, nonnegative=UINT4, scale="bfloat16", kept="last"),
        Codec("relu2", signed=NF4, nonnegative=UINT2, scale="bfloat16", kept="last"),
    )
}


def codec(name: str) -> Codec:
    """The codec called `name`.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise UsageError(f"codec must be one of {', '.join(CODECS)}, not {name!r}{nearest(name, CODECS)}") from None

"""One battery for every codec, the shared vectors, and what each codec promises."""

from __future__ import annotations

import json
import math
import runpy
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from instantft.cache.codecs import (
    CODECS,
    NF4_LEVELS,
    NF4_THRESHOLDS,
    codec,
    fixed_codes,
    fixed_values,
    nf4_levels,
)
from instantft.errors import UsageError
from instantft.spec import NetSpec, RecordSpec, lenet5

VECTORS = Path(__file__).parent.parent / "vectors"
DESCRIPTION = json.loads((VECTORS / "codecs.json").read_text())
ARRAYS = np.load(VECTORS / "codecs.npz", allow_pickle=False)
LAYOUTS = {name: NetSpec.from_json(d["net"]).record for name, d in DESCRIPTION["layouts"].items()}
SMALL = LAYOUTS["small"]
LENET = lenet5((1, 28, 28)).record

f32 = np.float32

RELU_MADE = {"relu4": 15, "relu2": 3}
"""Codecs with scales in bfloat16, the output in binary16, and so many equal steps after a ReLU."""

every_codec = pytest.mark.parametrize("name", CODECS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)

HALF_GAP = float(np.diff(NF4_LEVELS).max()) / 2
LIMIT = float(f32(1e20))
magnitudes = st.floats(-LIMIT, LIMIT, width=32, allow_subnormal=False)


def rows_of(record: RecordSpec, values: np.ndarray) -> np.ndarray:
    """(T, width): values (T, size) with gaps; no negative ones where the record says so."""
    rows = np.zeros((len(values), record.width), np.float32)
    start = 0
    for s in record.segments:
        v = values[:, start : start + s.size]
        rows[:, s.offset : s.offset + s.size] = np.abs(v) if s.nonnegative else v
        start += s.size
    return rows


def random_rows(record: RecordSpec, T: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rows_of(record, rng.normal(size=(T, record.size)) * rng.choice([0.01, 1, 100], (T, 1)))


def gaps(record: RecordSpec) -> np.ndarray:
    mask = np.ones(record.width, bool)
    for s in record.segments:
        mask[s.offset : s.offset + s.size] = False
    return mask


# --- the rules once more, one value at a time -------------------------------------------------------------------------


def slow_group(v: list[f32], grid: str, bfloat16: bool) -> tuple[bytes, list[int]]:
    """Scale and codes of one group, from the rules on the page."""
    span = {"table": f32(1), "steps 15": f32(15), "steps 3": f32(3), "int8": f32(127)}[grid]
    m = max(v) if grid.startswith("steps") else max(abs(x) for x in v)
    if m < f32(1e-30):
        return bytes(2 if bfloat16 else 4), [7 if grid == "table" else 0] * len(v)
    scale = m / span
    inv = span / m
    raw = struct.pack("<f", scale)
    if bfloat16:
        bits = (struct.unpack("<I", raw)[0] + 0xFFFF) >> 16
        raw = struct.pack("<H", bits)
        inv = f32(1) / f32(struct.unpack("<f", struct.pack("<I", bits << 16))[0])
    codes = []
    for x in v:
        if grid == "table":
            codes.append(sum(x * inv > t for t in NF4_THRESHOLDS))
        elif grid.startswith("steps"):
            codes.append(int(min(span, np.rint(max(x, f32(0)) * inv))))
        else:
            codes.append(int(np.clip(np.rint(x * inv), -127, 127)) & 0xFF)
    return raw, codes


def rounded(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def slow_fixed(v: list[f32]) -> list[int]:
    """In the integers of docs/hardware.md §3, with fractions."""
    return [min(max(rounded(Fraction(float(x)) * 2**16), -(2**23)), 2**23 - 1) for x in v]


def slow_fixed_group(v: list[f32]) -> tuple[bytes, list[int]]:
    """Scale and codes of a group of these."""
    q = slow_fixed(v)
    m = min(max(abs(x) for x in q), 2**23 - 1)
    t = [rounded(Fraction(float(t)) * 2**16) for t in NF4_THRESHOLDS]
    return struct.pack("<I", m), [sum(x > rounded(Fraction(j * m, 2**16)) for j in t) for x in q]


def slow_fixed_value(m: int, code: int) -> Fraction:
    level = math.floor(Fraction(float(NF4_LEVELS[code])) * 2**16 + Fraction(1, 2))
    return Fraction(math.floor(Fraction(level * m, 2**16) + Fraction(1, 2)), 2**16)


def packed(codes: list[int], bits: int) -> bytes:
    """One number whose lowest bits are the first code, lowest byte first."""
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) * bits // 8), "little")


def halves(v: list[f32]) -> bytes:
    return b"".join(struct.pack("<e", np.clip(x, f32(-65504), f32(65504))) for x in v)


def slow_encode(name: str, row: np.ndarray, record: RecordSpec) -> bytes:
    segments = [(s, list(row[s.offset : s.offset + s.size])) for s in record.segments]
    everything = [x for _, v in segments for x in v]
    if name == "fp32":
        return row.tobytes()
    if name == "fp16":
        return halves(everything)
    scales, codes, tail = b"", b"", b""
    if name == "nf4-block64":
        for start in range(0, len(everything), 64):
            scale, block = slow_group(everything[start : start + 64], "table", False)
            scales += scale
            codes += packed(block + [7] * (64 - len(block)), 4)
        return scales + codes
    if name == "nf4-hw":
        for s, v in segments[:-1]:
            n = s.size // s.groups
            for g in range(s.groups):
                scale, group = slow_fixed_group(v[g * n : g * n + n])
                scales += scale
                codes += packed(group + [0] * (-n % 16), 4)
            codes += bytes(-len(codes) % 16)
        tail = b"".join(struct.pack("<i", x) for x in slow_fixed(segments[-1][1]))
        return scales + bytes(-len(scales) % 16) + codes + tail + bytes(-len(tail) % 16)
    for s, v in segments:
        if name in RELU_MADE and s.name == "c":
            tail = halves(v)
            continue
        grid = "int8" if name == "int8" else "table"
        if name in RELU_MADE and s.nonnegative:
            grid = f"steps {RELU_MADE[name]}"
        n = s.size // s.groups
        found: list[int] = []
        for g in range(s.groups):
            scale, group = slow_group(v[g * n : g * n + n], grid, name in RELU_MADE)
            scales += scale
            found += group
        codes += packed(found, {"int8": 8, "steps 3": 2}.get(grid, 4))
    return scales + codes + tail


# --- vectors ----------------------------------------------------------------------------------------------------------


@every_codec
@every_layout
def test_vectors_encode(layout: str, name: str) -> None:
    record, c = LAYOUTS[layout], codec(name)
    encoded = c.encode(ARRAYS[f"{layout}.rows"], record)
    expected = ARRAYS[f"{layout}.{name}.bytes"]
    for row, case in enumerate(DESCRIPTION["layouts"][layout]["rows"]):
        np.testing.assert_array_equal(encoded[row, : c.nbytes(record)], expected[row], err_msg=case)


@every_codec
@every_layout
def test_vectors_decode(layout: str, name: str) -> None:
    record, c = LAYOUTS[layout], codec(name)
    stored = ARRAYS[f"{layout}.{name}.bytes"]
    data = np.zeros((len(stored), c.stride(record)), np.uint8)
    data[:, : stored.shape[1]] = stored
    expected = ARRAYS[f"{layout}.rows"] if name == "fp32" else ARRAYS[f"{layout}.{name}.decoded"]
    np.testing.assert_array_equal(c.decode(data, record).view(np.uint32), expected.view(np.uint32))


@every_codec
@every_layout
def test_vectors_follow_the_rules(layout: str, name: str) -> None:
    """The vectors come from the codecs; this says that they are also what the rules say, value by value."""
    expected = ARRAYS[f"{layout}.{name}.bytes"]
    for row, values in enumerate(ARRAYS[f"{layout}.rows"]):
        case = DESCRIPTION["layouts"][layout]["rows"][row]
        assert slow_encode(name, values, LAYOUTS[layout]) == expected[row].tobytes(), case


def test_vectors_are_what_the_script_makes() -> None:
    description, arrays = runpy.run_path(str(VECTORS / "make.py"))["make"]()
    assert json.loads(json.dumps(description)) == DESCRIPTION
    assert set(arrays) == set(ARRAYS.files)
    for key, value in arrays.items():
        np.testing.assert_array_equal(value, ARRAYS[key], err_msg=key)
    assert sum(file.stat().st_size for file in VECTORS.iterdir() if file.is_file()) <= 300_000


# --- the battery ------------------------------------------------------------------------------------------------------


@every_codec
@every_layout
def test_sizes(layout: str, name: str) -> None:
    record, c = LAYOUTS[layout], codec(name)
    stated = DESCRIPTION["layouts"][layout]["codecs"][name]
    assert c.bytes_per_sample(record) == stated["bytes_per_sample"]
    assert c.nbytes(record) == stated["nbytes"]
    assert c.stride(record) == stated["stride"]
    assert 0 <= c.stride(record) - c.nbytes(record) < 8
    assert c.stride(record) % 8 == 0


@every_codec
@every_layout
def test_shapes_types_and_gaps(layout: str, name: str) -> None:
    record, c = LAYOUTS[layout], codec(name)
    for T in (0, 1, 5):
        rows = random_rows(record, T)
        data = c.encode(rows, record)
        assert data.shape == (T, c.stride(record))
        assert data.dtype == np.uint8
        assert data.flags.c_contiguous
        assert not data[:, c.nbytes(record) :].any()
        back = c.decode(data, record)
        assert back.shape == (T, record.width)
        assert back.dtype == np.float32
        assert back.flags.writeable
        assert not back[:, gaps(record)].any()


@every_codec
def test_a_sample_is_written_by_itself(name: str) -> None:
    c, rows = codec(name), random_rows(SMALL, 6)
    together = c.encode(rows, SMALL)
    for row in range(6):
        np.testing.assert_array_equal(c.encode(rows[row : row + 1], SMALL)[0], together[row])
    np.testing.assert_array_equal(c.decode(together[2:3], SMALL)[0], c.decode(together, SMALL)[2])


@every_codec
def test_zeros_stay_zeros(name: str) -> None:
    c = codec(name)
    for value in (0.0, -0.0):
        rows = np.full((2, SMALL.width), value, np.float32)
        rows[:, gaps(SMALL)] = 0
        assert not c.decode(c.encode(rows, SMALL), SMALL).any()


@every_codec
def test_gaps_are_not_looked_at(name: str) -> None:
    c, rows = codec(name), random_rows(SMALL, 2)
    if c.plain:
        pytest.skip("fp32 writes the row as it is")
    dirty = rows.copy()
    dirty[:, gaps(SMALL)] = 1e9
    np.testing.assert_array_equal(c.encode(dirty, SMALL), c.encode(rows, SMALL))


@every_codec
def test_wrong_shapes_are_refused(name: str) -> None:
    c = codec(name)
    with pytest.raises(UsageError, match=rf"must be \(T, {SMALL.width}\), not \[2, {SMALL.width - 1}\]"):
        c.encode(np.zeros((2, SMALL.width - 1), np.float32), SMALL)
    with pytest.raises(UsageError, match=r"encoded records must be .* not \[7\]"):
        c.decode(np.zeros(7, np.uint8), SMALL)


@every_codec
@settings(max_examples=25, deadline=None)
@given(values=hnp.arrays(np.float32, (2, SMALL.size), elements=magnitudes))
def test_error_is_bounded(name: str, values: np.ndarray) -> None:
    """No value is further off than half the widest gap between levels, in units of its group's scale."""
    c, rows = codec(name), rows_of(SMALL, values)
    back = c.decode(c.encode(rows, SMALL), SMALL).astype(np.float64)
    start = 0
    flat = np.concatenate([rows[:, s.offset : s.offset + s.size] for s in SMALL.segments], axis=1)
    for s in SMALL.segments:
        v = rows[:, s.offset : s.offset + s.size].astype(np.float64)
        if name == "nf4-hw":
            v = np.clip(v, -128, 128 - 2.0**-16)
        e = np.abs(back[:, s.offset : s.offset + s.size] - v)
        if name == "fp32":
            bound = np.zeros_like(v)
        elif name == "fp16" or (name in RELU_MADE and s.name == "c"):
            e = np.abs(back[:, s.offset : s.offset + s.size] - np.clip(v, -65504, 65504))
            bound = np.abs(v) * 2.0**-11 + 2.0**-25
        elif name == "nf4-hw" and s.name == "c":
            bound = np.zeros_like(v)  # but for what is added below: half a unit is what rounding costs
        elif name == "nf4-block64":
            absmax = np.stack(
                [np.abs(flat[:, i // 64 * 64 : i // 64 * 64 + 64]).max(axis=1) for i in range(start, start + s.size)],
                axis=1,
            )
            bound = absmax * HALF_GAP * (1 + 1e-5)
        else:
            m = np.abs(v.reshape(2, s.groups, -1)).max(axis=2).repeat(s.size // s.groups, axis=1)
            half = 0.5 / 127 if name == "int8" else HALF_GAP
            if name in RELU_MADE and s.nonnegative:
                half = 0.5 / RELU_MADE[name]
            bound = m * half * (1 + 2.0**-7 + 1e-5)
        if name == "nf4-hw":
            bound += 2 * 2.0**-16  # v, its threshold, its level and its value are all rounded: half a unit each
        assert (e <= bound + 1e-29).all(), s.name
        start += s.size


@pytest.mark.parametrize("name", [n for n in CODECS if n not in ("int8", "nf4-hw")])
@settings(max_examples=25, deadline=None)
@given(values=hnp.arrays(np.float32, (1, SMALL.size), elements=magnitudes.filter(lambda x: x == 0 or abs(x) > 1e-20)))
def test_writing_again_changes_nothing(name: str, values: np.ndarray) -> None:
    """What was read is written as the same bytes. (int8 has a scale that two roundings can move; nf4-hw is below.)"""
    c = codec(name)
    once = c.encode(rows_of(SMALL, values), SMALL)
    np.testing.assert_array_equal(c.encode(c.decode(once, SMALL), SMALL), once)


def test_fp32_is_exact() -> None:
    rows = random_rows(SMALL, 3)
    c = codec("fp32")
    np.testing.assert_array_equal(c.decode(c.encode(rows, SMALL), SMALL), rows)


# --- promises ---------------------------------------------------------------------------------------------------------


def test_bytes_of_lenet5() -> None:
    """InstantFT's 995 B; the poster's 1,012 B with its 4-byte flag; our own at no more."""
    assert codec("nf4-hw").nbytes(LENET) == codec("nf4-hw").stride(LENET) == 71 * 16
    sizes = {name: c.bytes_per_sample(LENET) for name, c in CODECS.items()}
    assert sizes == {
        "fp32": 7160,
        "fp16": 3580,
        "int8": 1890,
        "nf4": 995,
        "nf4-block64": 1008,
        "nf4-hw": 1026,
        "relu4": 958,
        "relu2": 513,
    }


def test_nf4_table_follows_from_the_normal_distribution() -> None:
    np.testing.assert_allclose(nf4_levels(), NF4_LEVELS, rtol=0, atol=1e-6)
    assert NF4_LEVELS[7] == 0
    assert NF4_LEVELS.dtype == NF4_THRESHOLDS.dtype == np.float32
    assert (np.diff(NF4_LEVELS) > 0).all()
    assert ((NF4_LEVELS[:-1] < NF4_THRESHOLDS) & (NF4_LEVELS[1:] > NF4_THRESHOLDS)).all()


def test_relu4_beats_nf4_after_a_relu() -> None:
    """On ReLU(N(0, 1)) two fifths of the squared error or less, at fewer bytes."""
    rng = np.random.default_rng(0)
    rows = np.zeros((50, LENET.width), np.float32)
    for s in LENET.segments[:-1]:
        rows[:, s.offset : s.offset + s.size] = np.maximum(rng.normal(size=(50, s.size)), 0)

    def error(name: str) -> float:
        back = codec(name).decode(codec(name).encode(rows, LENET), LENET)
        return float(((back - rows) ** 2).sum() / (rows**2).sum())

    assert error("relu4") < 0.4 * error("nf4")
    assert error("relu4") < 0.4 * error("nf4-block64")


@pytest.mark.parametrize("name", RELU_MADE)
def test_negative_values_after_a_relu_count_as_zero(name: str) -> None:
    rows = np.zeros((1, SMALL.width), np.float32)
    rows[0, :25] = np.linspace(-5, 3, 25)
    back = codec(name).decode(codec(name).encode(rows, SMALL), SMALL)[0, :25]
    assert (back[rows[0, :25] <= 0] == 0).all()
    assert np.abs(back - np.maximum(rows[0, :25], 0)).max() <= 3 / RELU_MADE[name] / 2 * 1.01


@settings(max_examples=50, deadline=None)
@given(values=hnp.arrays(np.float32, (2, SMALL.size), elements=magnitudes))
def test_relu2_is_four_values_a_channel_and_nf4_where_there_is_no_relu(values: np.ndarray) -> None:
    """0, 1, 2 and 3 thirds of a channel's maximum, which is kept to the precision of its scale; order is kept too."""
    rows = rows_of(SMALL, values)
    two = codec("relu2").decode(codec("relu2").encode(rows, SMALL), SMALL)
    four = codec("relu4").decode(codec("relu4").encode(rows, SMALL), SMALL)
    for s in SMALL.segments:
        v, w = (r[:, s.offset : s.offset + s.size].reshape(2, s.groups, -1) for r in (rows, two))
        if not s.nonnegative:
            np.testing.assert_array_equal(w, four[:, s.offset : s.offset + s.size].reshape(w.shape))
            continue
        top = v.max(axis=2, keepdims=True)
        held = np.where(top < f32(1e-30), f32(0), w.max(axis=2, keepdims=True))
        np.testing.assert_array_equal(w.max(axis=2, keepdims=True), held)
        assert (((top <= held) & (held <= top * (1 + 2.0**-7 + 1e-6))) | (top < f32(1e-30))).all()
        steps = np.divide(3 * w.astype(np.float64), held, out=np.zeros(w.shape), where=held > 0)
        np.testing.assert_array_equal(steps, np.rint(steps))
        order = v.argsort(axis=2, kind="stable")
        assert (np.diff(np.take_along_axis(w, order, axis=2), axis=2) >= 0).all()


def test_relu2_is_near_the_best_four_values() -> None:
    """On ReLU(N(0, 1)) at most 1.6 times the squared error of the best four values, which Lloyd's steps find."""
    rng = np.random.default_rng(0)
    rows = np.zeros((50, LENET.width), np.float32)
    for s in LENET.segments[:-1]:
        rows[:, s.offset : s.offset + s.size] = np.maximum(rng.normal(size=(50, s.size)), 0)
    v = np.concatenate([rows[:, s.offset : s.offset + s.size].ravel() for s in LENET.segments[:-1]]).astype(np.float64)
    best = np.array([0, 0.5, 1, 2])
    for _ in range(100):
        nearest = np.abs(v[:, None] - best).argmin(axis=1)
        best = np.array([v[nearest == i].mean() for i in range(4)])
    back = codec("relu2").decode(codec("relu2").encode(rows, LENET), LENET)
    assert ((back - rows) ** 2).sum() < 1.6 * ((v - best[nearest]) ** 2).sum()


def test_nf4_hw_is_nf4_where_the_integers_are_fine() -> None:
    """At the size of activations it loses what NF4 loses, and nothing to speak of beside."""
    rows = rows_of(LENET, np.random.default_rng(0).normal(size=(20, LENET.size)))

    def error(name: str) -> float:
        back = codec(name).decode(codec(name).encode(rows, LENET), LENET)
        taps = slice(LENET.segments[-1].offset)
        return float(((back - rows)[:, taps] ** 2).sum() / (rows[:, taps] ** 2).sum())

    assert error("nf4-hw") == pytest.approx(error("nf4"), rel=1e-3)


@given(data=st.data())
def test_nf4_hw_keeps_the_output_as_it_is(data: st.DataObject) -> None:
    """Every number of 24 bits comes back; of a word of the entry only these count."""
    c, at = codec("nf4-hw"), SMALL.segments[-1].offset
    numbers = data.draw(st.lists(st.integers(-(2**23), 2**23 - 1), min_size=5, max_size=5))
    rows = np.zeros((1, SMALL.width), np.float32)
    rows[0, at : at + 5] = np.array(numbers) / 2.0**16
    entry = c.encode(rows, SMALL)
    assert entry[0, -32:].view("<i4").tolist() == [*numbers, 0, 0, 0]
    np.testing.assert_array_equal(c.decode(entry, SMALL), rows)
    entry[0, [-29, -25, -21, -17, -13]] = list(data.draw(st.binary(min_size=5, max_size=5)))
    np.testing.assert_array_equal(c.decode(entry, SMALL), rows)


@pytest.mark.parametrize("m", [0, 1, 2, 3, 77, 2**16, 2**22 + 1, 2**23 - 1])
def test_nf4_hw_reads_what_the_rules_say(m: int) -> None:
    record = NetSpec.from_json(DESCRIPTION["layouts"]["dnn"]["net"]).record
    data = np.zeros((1, codec("nf4-hw").stride(record)), np.uint8)
    data[0, :4] = list(m.to_bytes(4, "little"))
    data[0, 16:24] = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    got = codec("nf4-hw").decode(data, record)[0, :16]
    assert [Fraction(float(x)) for x in got] == [slow_fixed_value(m, code) for code in range(16)]


@settings(max_examples=50, deadline=None)
@given(data=hnp.arrays(np.uint8, (2, codec("nf4-hw").stride(SMALL))))
def test_nf4_hw_reads_anything(data: np.ndarray) -> None:
    """Of a damaged entry every value is within its scale; bits beyond the scale's 23 and the padding do not count."""
    c = codec("nf4-hw")
    got = c.decode(data, SMALL)
    assert (np.abs(got) <= 128).all()
    clean = data.copy()
    words = sum(s.groups for s in SMALL.segments[:-1])
    clean[:, : 4 * words] = (data[:, : 4 * words].copy().view("<u4") & 0x7FFFFF).view(np.uint8)
    clean[:, 4 * words : -(-4 * words // 16) * 16] = 0
    np.testing.assert_array_equal(c.decode(clean, SMALL), got)


def test_nf4_hw_written_again() -> None:
    """What was read is written as the same bytes from a scale of 22 units on: levels and thresholds stay apart then."""
    m = np.concatenate([np.arange(21, 5000), np.arange(5000, 2**23, 997), [2**23 - 1]])
    codes = np.broadcast_to(np.arange(16), (len(m), 16))
    again, found = fixed_codes(fixed_values(m, codes))
    same = (again == m) & (found == codes).all(axis=1)
    assert same[1:].all()
    assert not same[0]


def test_unknown_codec() -> None:
    with pytest.raises(
        UsageError, match=r"^codec must be one of fp32, fp16, int8, nf4, nf4-block64, nf4-hw, relu4, relu2, not 'zip'$"
    ):
        codec("zip")

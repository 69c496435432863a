"""The core's arithmetic (hw/fixed.py) against floating point, against exact integers, and where it saturates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instantft.cache.codecs import Q16_LEVELS, Q16_THRESHOLDS, fixed_codes
from instantft.engine.reference import ReferenceEngine, gradients
from instantft.errors import UsageError
from instantft.hw import fixed
from instantft.hw.formats import INVERSE, PROFILES, Formats, Ints
from instantft.methods import SGD_METHODS
from instantft.spec import LayerSpec, NetSpec, RecordSpec, Segment, dnn, pad
from tests.nets import NETS, samples_for, tensors_for

EITHER = pytest.mark.parametrize("formats", PROFILES.values(), ids=str)
SKIP2 = SGD_METHODS["skip2-lora"]


def rounded(v: int, s: int) -> int:
    """round(v, s) of the specification, by its meaning: nearest, ties upwards."""
    return math.floor(Fraction(v, 1 << s) + Fraction(1, 2))


def clipped(v: int, width: int) -> int:
    return min(max(v, -(1 << (width - 1))), (1 << (width - 1)) - 1)


def random_parameters(
    rng: np.random.Generator, widths: Sequence[int], rank: int, C: int, size: int, formats: Formats
) -> fixed.Parameters:
    def draw(*shape: int) -> Ints:
        return rng.integers(-size, size, shape)

    return fixed.Parameters(
        tuple(draw(n, rank) for n in widths),
        tuple(draw(rank, C) for _ in widths),
        int(rng.integers(-(1 << 15), 1 << 15)),
        rng.integers(-(1 << (formats.width - 1)), 1 << (formats.width - 1), C),
    )


# -- inputs and weights -----------------------------------------------------------------------------------------------


def test_pixels_are_rounded_255ths() -> None:
    p = np.arange(256, dtype=np.uint8)
    wanted = [math.floor(Fraction(int(n) << 16, 255) + Fraction(1, 2)) for n in p]
    assert fixed.quantise_input(p, PROFILES["q24"]).tolist() == wanted
    assert fixed.quantise_input(p, PROFILES["q18"]).tolist() == [rounded(q, 6) for q in wanted]


@EITHER
def test_pixels_and_their_numbers_are_the_same_input(formats: Formats) -> None:
    p = np.arange(256, dtype=np.uint8)
    numbers = p.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(fixed.quantise_input(numbers, formats), fixed.quantise_input(p, formats))


@EITHER
def test_inputs_beyond_the_format_are_cut_off(formats: Formats) -> None:
    top = (1 << (formats.width - 1)) - 1
    x = np.array([127.99999, 128, 1e30, -128, -129, -1e30], np.float32)
    assert fixed.quantise_input(x, formats).tolist() == [top, top, top, -top - 1, -top - 1, -top - 1]


def test_weights_beyond_eight_are_refused() -> None:
    spec = dnn(6, 3, 5)
    tensors = tensors_for(spec)
    fixed.fold(spec, tensors)
    tensors["layers.1.bn.weight"] = np.full(5, 100, np.float32)
    with pytest.raises(UsageError, match="weights of layer 1 with its batch norm folded in must lie within ±8"):
        fixed.fold(spec, tensors)


@pytest.mark.parametrize(("lr", "samples", "eta"), [(0.1, 20, 83886), (0.1, 4, 419430), (0.025, 20, 20972)])
def test_steps(lr: float, samples: int, eta: int) -> None:
    assert fixed.step_size(lr, samples) == eta


@pytest.mark.parametrize(("lr", "samples"), [(20, 20), (1e-8, 20), (3.4 * 20 / 2**24, 20), (1, 1)])
def test_steps_that_the_format_does_not_hold_are_refused(lr: float, samples: int) -> None:
    with pytest.raises(UsageError, match="learning rate over the samples of a batch must be"):
        fixed.step_size(lr, samples)


# -- the frozen network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@EITHER
def test_records_are_those_of_floating_point(name: str, formats: Formats) -> None:
    """Each layer adds at most the rounding of its output, of its bias, and of its n weights, half a unit each, to what
    the errors of its inputs become; a factor 2 allows for weights that add up rather than cancel."""
    spec = NETS[name]
    tensors, (x, _) = tensors_for(spec), samples_for(spec, 3)
    wanted = ReferenceEngine().records(spec, tensors, x)
    network, seen = fixed.fold(spec, tensors), fixed.Saturations()
    x0 = fixed.quantise_input(x, formats)
    found = fixed.frozen(spec, network, x0, formats, seen)
    assert seen == fixed.Saturations()
    unit, weight = 2.0**-formats.fraction, 2.0**-12
    error, inputs = unit / 2, x
    for s, w, v in zip(spec.record.segments, network.weights, found, strict=True):
        by_output = np.abs(w if w.ndim == 2 else w.reshape(len(w), -1).T) * weight
        error = (
            error * by_output.sum(axis=0).max() + weight / 2 * (len(by_output) * np.abs(inputs).max() + 1) + unit / 2
        )
        inputs = wanted[:, s.offset : s.offset + s.size]
        assert np.abs(v * unit - inputs).max() <= 2 * error
        assert np.abs(v * unit - inputs).mean() < 0.02 * max(1, np.abs(inputs).max())


def frozen_exactly(net: NetSpec, network: fixed.Frozen, x0: Ints, formats: Formats) -> tuple[list[list[int]], int]:
    """§2 in Python integers, for one sample; and how many z saturate."""
    out, x, cut = [], [int(v) for v in x0], 0
    for layer, g, w, b in zip(net.layers, net.geometry, network.weights, network.biases, strict=True):
        if layer.kind == "fc":
            sums = {(m, 0, 0): sum(x[n] * int(w[n, m]) for n in range(g.N)) for m in range(layer.out)}
            rows = columns = 1
        else:
            channels, height, width = g.in_shape
            rows, columns = (n // layer.pool for n in g.linear_shape[1:])
            sums = {}
            for m in range(layer.out):
                for i in range(rows * layer.pool):
                    for j in range(columns * layer.pool):
                        total = 0
                        for c in range(channels):
                            for di in range(layer.kernel[0]):
                                for dj in range(layer.kernel[1]):
                                    r, q = i + di - layer.padding[0], j + dj - layer.padding[1]
                                    if 0 <= r < height and 0 <= q < width:
                                        total += x[(c * height + r) * width + q] * int(w[m, c, di, dj])
                        sums[m, i, j] = total
        z = {}
        for (m, i, j), total in sums.items():
            value = rounded(total + (int(b[m]) << formats.fraction), 12)
            cut += value != clipped(value, formats.width)
            value = clipped(value, formats.width)
            z[m, i, j] = max(value, 0) if layer.relu else value
        p = layer.pool
        x = [
            max(z[m, i * p + di, j * p + dj] for di in range(p) for dj in range(p))
            for m in range(layer.out)
            for i in range(rows)
            for j in range(columns)
        ]
        out.append(x)
    return out, cut


SMALL = NetSpec(
    (2, 7, 6),
    (
        LayerSpec("conv", 3, (3, 2), (1, 0), relu=True, pool=2),
        LayerSpec("conv", 2, (2, 2)),
        LayerSpec("fc", 5, relu=True),
        LayerSpec("fc", 3),
    ),
)


@EITHER
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_records_are_those_of_exact_integers(formats: Formats, scale: float) -> None:
    rng = np.random.default_rng(7)
    shapes = [SMALL.parameters[f"layers.{k}.weight"] for k in range(SMALL.L)]
    network = fixed.Frozen(
        tuple((rng.integers(-(1 << 15), 1 << 15, s) * scale).astype(np.int64) for s in shapes),
        tuple(rng.integers(-(1 << 15), 1 << 15, y.out) for y in SMALL.layers),
    )
    top = 1 << (formats.width - 1)
    x0 = (rng.integers(-top, top, (4, 84)) * scale).astype(np.int64)
    seen = fixed.Saturations()
    found = fixed.frozen(SMALL, network, x0, formats, seen)
    cut = 0
    for t in range(4):
        wanted, n = frozen_exactly(SMALL, network, x0[t], formats)
        assert [v[t].tolist() for v in found] == wanted
        cut += n
    assert seen.activations == cut
    assert (cut > 0) == (scale == 1.0)


# -- the cache --------------------------------------------------------------------------------------------------------


def values_of(spec: NetSpec, T: int, formats: Formats, seed: int, spread: float) -> list[Ints]:
    rng = np.random.default_rng(seed)
    top = 1 << (formats.width - 1)
    made = []
    for s in spec.record.segments:
        v = np.clip(rng.normal(0, spread * top, (T, s.size)).astype(np.int64), -top, top - 1)
        made.append(np.maximum(v, 0) if s.nonnegative else v)
    return made


@EITHER
@pytest.mark.parametrize("name", NETS)
def test_entries_come_back_as_their_nearest_levels(name: str, formats: Formats) -> None:
    spec = NETS[name]
    values = values_of(spec, 3, formats, 1, 0.01)
    values[0][0] = 0  # empty groups
    entries = fixed.encode(spec.record, values, formats)
    assert entries.shape[1] % 16 == 0
    found = fixed.decode(spec.record, entries)
    for s, v, w in zip(spec.record.segments, values, found, strict=True):
        groups, decoded = v.reshape(3, s.groups, -1), w.reshape(3, s.groups, -1)
        m = np.abs(groups).max(axis=2, keepdims=True)
        # half of the widest gap between levels (0.304 of m, the lowest), two roundings
        assert (np.abs(groups - decoded) <= 0.152 * m + 1.5).all()
    np.testing.assert_array_equal(found[-1], values[-1])
    # written again, what came back does not change
    np.testing.assert_array_equal(fixed.encode(spec.record, found, formats), entries)


@EITHER
def test_an_entry_in_exact_integers(formats: Formats) -> None:
    rng = np.random.default_rng(2)
    top = 1 << (formats.width - 1)
    groups = (rng.integers(-top, top, 40), np.array([-top, top - 1, 0]), rng.integers(-3, 4, 16), np.zeros(5, np.int64))
    for v in groups:
        record = RecordSpec((Segment("x^1", len(v), 1, False, 0), Segment("c", 3, 1, False, pad(len(v)))))
        c = np.array([[-top, top - 1, -1]])
        m = min(max(abs(int(x)) for x in v), top - 1)
        T = [rounded(int(t) * m, 16) for t in Q16_THRESHOLDS]
        codes = [sum(int(x) > t for t in T) for x in v]
        values = [clipped(rounded(int(Q16_LEVELS[c]) * m, 16), formats.width) for c in codes]
        entry = fixed.encode(record, [v[None], c], formats)
        nibbles = np.stack([entry[0, 16:-16] & 15, entry[0, 16:-16] >> 4], axis=1).reshape(-1)
        assert entry[0, -16:].view("<i4").tolist() == [*c[0], 0]
        assert int.from_bytes(entry[0, :16].tobytes(), "little") == m
        assert nibbles.tolist() == codes + [0] * (len(nibbles) - len(v))
        assert [x[0].tolist() for x in fixed.decode(record, entry)] == [values, c[0].tolist()]


def test_the_entry_of_lenet5_has_71_beats() -> None:
    spec = NETS["lenet5"]
    values = values_of(spec, 1, PROFILES["q24"], 3, 0.01)
    entry = fixed.encode(spec.record, values, PROFILES["q24"])[0]
    assert len(entry) == 1136
    channel = values[0].reshape(6, 196)[1]
    assert int.from_bytes(entry[4:8].tobytes(), "little") == np.abs(channel).max()
    second = entry[96 + 104 : 96 + 208]  # 196 codes, padded to 208
    _, codes = fixed_codes(channel)
    assert [int(b) & 15 for b in second[:98]] == codes[::2].tolist()
    assert [int(b) >> 4 for b in second[:98]] == codes[1::2].tolist()
    assert not second[98:].any()
    assert entry[-48:].view("<i4").tolist() == [*values[-1][0], 0, 0]


# -- softmax ----------------------------------------------------------------------------------------------------------

LOGITS = st.lists(st.integers(-(1 << 23), (1 << 23) - 1), min_size=1, max_size=16)
NEAR = st.lists(st.integers(-(10 << 16), 10 << 16), min_size=1, max_size=16)


@given(st.one_of(LOGITS, NEAR))
@settings(deadline=None)
def test_softmax(logits: list[int]) -> None:
    """Off by half a unit of p, by 2^-10 for the bits of δ that are dropped, as much for those of Z (a table of 1024),
    and for e by the 16 bits of its tables."""
    y = np.array(logits, np.int64)
    p = fixed.softmax(y, PROFILES["q24"])
    exact = np.exp((y - y.max()) / 65536.0)
    exact /= exact.sum()
    assert np.abs(p / 4096 - exact).max() <= 0.5 / 4096 + 2 * 2.0**-10 + len(y) * 2.0**-15
    assert p.min() >= 0
    assert p.max() <= 4097


def test_the_inverse_table_at_its_ends() -> None:
    assert (len(INVERSE), int(INVERSE[0]), int(INVERSE[-1])) == (1024, 65504, 32776)


# -- training ---------------------------------------------------------------------------------------------------------


def step_exactly(
    params: fixed.Parameters, taps: list[Ints], c: Ints, labels: list[int], eta: int, formats: Formats
) -> tuple[list[list[list[int]]], list[list[list[int]]], list[list[int]], tuple[int, int, int]]:
    """§4 in Python integers: A, B, y, and what saturates of activations, gradients and parameters."""
    W, F, b, L = formats.width, formats.fraction, len(labels), len(taps)
    R, C = params.B[0].shape
    cuts = [0, 0, 0]

    def sat(v: int, width: int, kind: int) -> int:
        cuts[kind] += v != clipped(v, width)
        return clipped(v, width)

    A, B = [a.tolist() for a in params.A], [a.tolist() for a in params.B]
    x = [t.tolist() for t in taps]
    h = [[[0] * R for _ in range(b)] for _ in range(L)]
    u = [[[0] * R for _ in range(b)] for _ in range(L)]
    v = [[0] * C for _ in range(b)]
    y = [[0] * C for _ in range(b)]
    for i in range(b):
        for k in range(L):
            for r in range(R):
                h[k][i][r] = sat(rounded(sum(x[k][i][n] * A[k][n][r] for n in range(len(A[k]))), 12), W, 0)
        for j in range(C):
            total = sum(h[k][i][r] * B[k][r][j] for k in range(L) for r in range(R))
            y[i][j] = sat(rounded(total + params.gain * int(c[i, j]) + (int(params.bias[j]) << 12), 12), W, 0)
        p = fixed.softmax(np.array(y[i]), formats).tolist()
        for j in range(C):
            v[i][j] = sat(rounded((4096 * (labels[i] == j) - p[j]) * eta, 16), 18, 1)
        for k in range(L):
            for r in range(R):
                u[k][i][r] = sat(rounded(sum(B[k][r][j] * v[i][j] for j in range(C)), 12), 18, 1)
    new_A = [
        [
            [
                sat(rounded((A[k][n][r] << (F + 8)) + sum(x[k][i][n] * u[k][i][r] for i in range(b)), F + 8), 16, 2)
                for r in range(R)
            ]
            for n in range(len(A[k]))
        ]
        for k in range(L)
    ]
    new_B = [
        [
            [
                sat(rounded((B[k][r][j] << (F + 8)) + sum(h[k][i][r] * v[i][j] for i in range(b)), F + 8), 16, 2)
                for j in range(C)
            ]
            for r in range(R)
        ]
        for k in range(L)
    ]
    return new_A, new_B, y, (cuts[0], cuts[1], cuts[2])


@EITHER
@given(
    seed=st.integers(0, 2**32), rank=st.integers(1, 4), C=st.integers(2, 5), b=st.integers(1, 4),
    size=st.sampled_from([300, 1 << 12, 1 << 15]), eta=st.sampled_from([50, 83886, (1 << 24) - 1]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_a_step_is_that_of_exact_integers(
    formats: Formats, seed: int, rank: int, C: int, b: int, size: int, eta: int
) -> None:
    rng = np.random.default_rng(seed)
    top = 1 << (formats.width - 1)
    widths = (7, 5, 3)
    params = random_parameters(rng, widths, rank, C, size, formats)
    taps = [rng.integers(-top, top, (b, n)) >> int(rng.integers(0, 8)) for n in widths]
    c = rng.integers(-top, top, (b, C)) >> 4
    labels = rng.integers(0, C, b)
    seen = fixed.Saturations()
    new, trace = fixed.step(params, taps, c, labels, eta, formats, seen)
    A, B, y, cuts = step_exactly(params, taps, c, labels.tolist(), eta, formats)
    assert [a.tolist() for a in new.A] == A
    assert [a.tolist() for a in new.B] == B
    assert trace.y.tolist() == y
    assert (seen.activations, seen.gradients, seen.parameters) == cuts
    assert new.gain == params.gain
    np.testing.assert_array_equal(new.bias, params.bias)


def test_every_kind_of_saturation_happens_and_is_counted() -> None:
    formats = PROFILES["q24"]
    params = fixed.Parameters((np.full((4, 1), 32767),), (np.full((1, 2), 32767),), 4096, np.array([0, -(1 << 23)]))
    x = np.full((2, 4), (1 << 23) - 1)
    seen = fixed.Saturations()
    new, trace = fixed.step(params, [x], np.zeros((2, 2), np.int64), np.array([1, 1]), (1 << 24) - 1, formats, seen)
    assert (trace.h[0] == (1 << 23) - 1).all()
    assert (trace.y == (1 << 23) - 1).all()
    assert trace.v.tolist() == [[-(1 << 17), (1 << 17) - 1]] * 2
    # h and y of both samples, v of both, u = (2^17-1-2^17)·8 fits; B_0 down to -8 and B_1 beyond 8
    assert seen == fixed.Saturations(activations=2 + 4, gradients=4, parameters=2)
    assert new.B[0].tolist() == [[-32768, 32767]]


@EITHER
def test_a_step_is_that_of_floating_point(formats: Formats) -> None:
    """The change of A and B, in units of parameters: within half a unit for its own rounding and one for g's 12 bits,
    softmax's tables, v, u and h together."""
    spec = dnn(61, 3, 24)
    tensors, (x, y) = tensors_for(spec, SKIP2), samples_for(spec, 20)
    x0 = fixed.quantise_input(x, formats)
    *taps, c = (x0, *fixed.frozen(spec, fixed.fold(spec, tensors), x0, formats, fixed.Saturations()))
    params = fixed.Parameters(
        tuple(fixed.parameter(tensors[f"lora.{k}-3.A"], "A") for k in range(3)),
        tuple(fixed.parameter(tensors[f"lora.{k}-3.B"], "B") for k in range(3)),
        4096,
        np.zeros(3, np.int64),
    )
    seen = fixed.Saturations()
    new, _ = fixed.step(params, taps, c, y, fixed.step_size(0.1, 20), formats, seen)
    assert seen == fixed.Saturations()
    wanted = gradients(spec, tensors, SKIP2, x, y)
    for k in range(3):
        for name, before, after in (("A", params.A[k], new.A[k]), ("B", params.B[k], new.B[k])):
            change = -0.1 * wanted[f"lora.{k}-3.{name}"].astype(np.float64) * 4096
            assert np.abs(after - before - change).max() <= 1.5
            assert np.abs(change).max() > 3  # there was something to see


def test_products_refuse_what_float64_would_round() -> None:
    with pytest.raises(AssertionError):
        fixed.products(np.zeros((1, 1 << 15), np.int64), np.zeros((1 << 15, 1), np.int64), 40)

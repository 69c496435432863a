"""Makes the test vectors of the codecs: what every implementation must write and read, byte for byte; and of the
detectors of drift: at which samples they raise an alarm.

    python vectors/make.py

writes, beside itself, ``drift.json`` (see `drift`), ``codecs.json`` (networks, their record segments, names of the
rows, sizes) and ``codecs.npz``:

    LAYOUT.rows            (T, width) float32   record rows, gaps zero
    LAYOUT.CODEC.bytes     (T, nbytes) uint8    what encoding them gives
    LAYOUT.CODEC.decoded   (T, width) float32   what decoding that gives (not for fp32, which gives the rows)

The rows are those where implementations differ: groups of zeros, of one value, huge and tiny ones, negative zeros, ties
between two codes and the neighbours of ties, clipping, outliers, and ties and limits of integers of 24 bits. Nothing
here is random but by a fixed seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from instantft.cache.codecs import CODECS, NF4_THRESHOLDS
from instantft.spec import LayerSpec, NetSpec, RecordSpec, dnn, lenet5
from instantft.watch.detectors import Adwin, Cusum, Scale

Floats = NDArray[np.float32]

VERSION = 1

SMALL = NetSpec(
    (1, 5, 5),
    (
        LayerSpec("conv", 4, (1, 1), relu=True),
        LayerSpec("conv", 3, (3, 3)),
        LayerSpec("fc", 33, relu=True),
        LayerSpec("fc", 71),
        LayerSpec("fc", 5),
    ),
)
"""Channels of 25, of 9 (an odd number altogether), an odd vector after a ReLU, an odd one that may be negative."""

POINTS = NetSpec((3, 1, 1), (LayerSpec("conv", 19, relu=True), LayerSpec("conv", 6), LayerSpec("fc", 2)))
"""Groups of a single value."""

LAYOUTS: dict[str, NetSpec] = {"small": SMALL, "points": POINTS, "dnn": dnn(16, 3), "lenet5": lenet5((1, 28, 28))}


def cases(size: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Named runs of `size` values; the rows are cut from them, signs and all, whatever a segment's nature."""
    ties = np.float32(1) * NF4_THRESHOLDS
    around = np.concatenate([[1], ties, np.nextafter(ties, np.float32(2)), np.nextafter(ties, np.float32(-2))])
    edge = np.float32(128)
    clipped = [edge, -edge, np.nextafter(edge, 0), np.nextafter(-edge, -129), 127.999992, -127.99999, 200, -1e6, 1, -90]
    normal = rng.normal(size=size)
    mixed = np.where(rng.random(size) < 0.5, 0.0, normal) * 10.0 ** rng.integers(-6, 6, size)
    halves = [
        65504,
        65519,
        65520,
        1e5,
        -65504,
        -65536,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        2.0**-24,
        2.0**-25,
        3 * 2.0**-26,
    ]
    values = {
        "zeros": np.zeros(size),
        "negative zeros": np.full(size, -0.0),
        "ones": np.ones(size),
        "minus ones": -np.ones(size),
        "thirds": np.full(size, 1 / 3),
        "tiny": np.full(size, 1e-35) * rng.choice([-1, 1], size),
        "just below the limit": np.full(size, np.nextafter(np.float32(1e-30), np.float32(0))),
        "at the limit": np.full(size, np.float32(1e-30)),
        "huge": 1e30 * normal,
        "very huge": 1e37 * np.clip(normal / 4, -1, 1),
        "normal": normal,
        "relu of normal": np.maximum(normal, 0),
        "relu of normal, shifted": np.maximum(normal + 1.5, 0) * 0.37,
        "never positive": -np.abs(normal),
        "heavy tails": rng.standard_cauchy(size),
        "many magnitudes": mixed,
        "one outlier": np.where(np.arange(size) % 25 == 7, 1000.0, 1e-3 * normal),
        "levels and ties of a table": np.resize(around, size),
        "ties of a table, scaled": np.resize(around, size) * 0.7,
        "ties of 15 levels": np.resize(np.concatenate([[15], np.arange(0, 15) + 0.5, [0.49999997, 2.4999998]]), size),
        "ties of 127 levels": np.resize(
            np.concatenate([[127], np.arange(0, 127, 5) + 0.5, -np.arange(0, 127, 7) - 0.5]), size
        ),
        "limits of binary16": np.resize(halves, size),
        "subnormals of binary16": 2.0**-15 * normal * rng.random(size),
        "ties of 3 levels": np.resize(
            [3, 0.5, 1.5, 2.5, 0.49999997, 1.4999999, 2.4999998, 0.50000006, 1.5000001, 2.5000002, -0.5], size
        ),
        "limits of Q8.16": np.resize(clipped, size),
        "ties of Q8.16": (np.arange(size) - size // 2 + 0.5) * 2.0**-16,
        "scales of a few units": (np.arange(size) % 7 - 3) * 2.0**-16 * (1 + np.arange(size) // 25 % 3),
        "half a unit and below": np.resize([0.5, -0.5, 0.49999997, -0.50000006, -0.49999997], size) * 2.0**-16,
    }
    return {name: np.asarray(value, np.float64).astype(np.float32) for name, value in values.items()}


def rows_of(record: RecordSpec, values: list[Floats]) -> Floats:
    """(T, width): the values of each sample, in order, with the gaps between segments zero."""
    rows = np.zeros((len(values), record.width), np.float32)
    for row, v in zip(rows, values, strict=True):
        start = 0
        for s in record.segments:
            row[s.offset : s.offset + s.size] = v[start : start + s.size]
            start += s.size
    return rows


def nets_rows(spec: NetSpec, T: int, rng: np.random.Generator) -> Floats:
    """(T, width): rows as a network gives them, a ReLU's output where there is one."""
    rows = np.zeros((T, spec.record.width), np.float32)
    for s in spec.record.segments:
        v = rng.normal(size=(T, s.size)) * rng.uniform(0.2, 5, (T, 1))
        rows[:, s.offset : s.offset + s.size] = np.maximum(v, 0) if s.nonnegative else v
    return rows


def make() -> tuple[dict[str, object], dict[str, NDArray[np.generic]]]:
    """The contents of codecs.json and codecs.npz."""
    rng = np.random.default_rng(20250613)
    arrays: dict[str, NDArray[np.generic]] = {}
    layouts: dict[str, object] = {}
    for layout, spec in LAYOUTS.items():
        record = spec.record
        if layout in ("small", "points"):
            named = cases(record.size, rng)
            names, rows = list(named), rows_of(record, list(named.values()))
        else:
            names = ["as a network gives it"] * (3 if layout == "dnn" else 1)
            rows = nets_rows(spec, len(names), rng)
        arrays[f"{layout}.rows"] = rows
        for name, codec in CODECS.items():
            encoded = codec.encode(rows, record)
            arrays[f"{layout}.{name}.bytes"] = encoded[:, : codec.nbytes(record)]
            if not codec.plain:
                arrays[f"{layout}.{name}.decoded"] = codec.decode(encoded, record)
        layouts[layout] = {
            "net": spec.to_json(),
            "segments": [[s.name, s.size, s.groups, s.nonnegative, s.offset] for s in record.segments],
            "width": record.width,
            "rows": names,
            "codecs": {
                name: {
                    "bytes_per_sample": codec.bytes_per_sample(record),
                    "nbytes": codec.nbytes(record),
                    "stride": codec.stride(record),
                }
                for name, codec in CODECS.items()
            },
        }
    return {"version": VERSION, "layouts": layouts}, arrays


ERRORS: list[dict[str, Any]] = [
    {"seed": 1, "expected": 0, "known": 0, "length": [1000, 200], "rate": [0.1, 0.6]},
    {"seed": 2, "expected": 0, "known": 0, "length": [3000, 1500], "rate": [0.05, 0.12]},
    {"seed": 3, "expected": 200, "known": 0.1, "length": [100, 0], "rate": [0.5, 0]},
    {"seed": 4, "expected": 0, "known": 0, "length": [500, 500], "rate": [0.6, 0.1]},
    {"seed": 5, "expected": 0, "known": 0, "length": [5000, 0], "rate": [0.2, 0]},
    {"seed": 6, "expected": 256, "known": 0.02, "length": [40, 60], "rate": [0.02, 0.9]},
    {"seed": 7, "expected": 400_000, "known": 0.3, "length": [64, 400], "rate": [0.3, 0.6]},
]
"""Streams of right and wrong answers in two parts; `expected` answers of the rate `known` before them. The last is
longer than the window."""

MOVES: list[dict[str, Any]] = [
    {"seed": 11, "both": False, "length": [5000, 300], "rate": [0, 1]},
    {"seed": 12, "both": True, "length": [2000, 300], "rate": [0, -1]},
    {"seed": 13, "both": False, "length": [2000, 300], "rate": [0, -1]},
    {"seed": 14, "both": True, "length": [3000, 100], "rate": [0, 3]},
]
"""Streams of values whose mean moves by so many deviations, the deviation 0.5, the mean 2."""


def uniform(seed: int) -> Iterator[float]:
    """Numbers from 0 to 1 that any language can draw: the upper 24 bits of x ← 1664525 x + 1013904223 mod 2³²."""
    while True:
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        yield (seed >> 8) / 16777216


def drift() -> dict[str, Any]:
    """The streams, with the samples at which an alarm comes and how many values are of the new world then; of errors
    also how many answers are in the window at the end, and how many of them are wrong. After an alarm of a move a new
    detector begins."""
    errors, moves = [], []
    for stream in ERRORS:
        numbers, adwin, alarms = uniform(stream["seed"]), Adwin(), []
        adwin.expect(stream["known"], stream["expected"])
        rates = [rate for rate, n in zip(stream["rate"], stream["length"], strict=True) for _ in range(n)]
        for at, rate in enumerate(rates):
            if adwin.add(float(next(numbers) < rate)):
                alarms.append([at, len(adwin)])
        errors.append({**stream, "alarms": alarms, "wrong": round(adwin.mean * len(adwin)), "window": len(adwin)})
    for stream in MOVES:
        numbers, cusum, alarms = uniform(stream["seed"]), Cusum(Scale(2.0, 0.5), stream["both"]), []
        means = [mean for mean, n in zip(stream["rate"], stream["length"], strict=True) for _ in range(n)]
        for at, mean in enumerate(means):
            u = [next(numbers) for _ in range(4)]
            if cusum.add(2 + 0.5 * (mean + (u[0] + u[1] + u[2] + u[3] - 2) * 1.75)):
                alarms.append([at, cusum.begun])
                cusum = Cusum(Scale(2.0, 0.5), stream["both"])
        moves.append({**stream, "alarms": alarms})
    return {"version": VERSION, "errors": errors, "moves": moves}


def main() -> None:
    """Write all files."""
    here = Path(__file__).parent
    (here / "drift.json").write_text(json.dumps(drift(), indent=1) + "\n")
    description, arrays = make()
    (here / "codecs.json").write_text(json.dumps(description, indent=1) + "\n")
    np.savez_compressed(here / "codecs.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

"""hw/rtl/records.py against the golden model: what is read is what the entries and rows say, for every lane count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra hw (amaranth)")

from amaranth.sim import Simulator

from instantft.hw.fixed import decode, encode, quantise_input
from instantft.hw.formats import PROFILES, Ints
from instantft.hw.layout import Build
from instantft.hw.rtl.records import C_LATENCY, LATENCY, SETTLE, Records
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5

SMALL = NetSpec(
    (1, 12, 12), (LayerSpec("conv", 3, (5, 5), (2, 2), relu=True, pool=2), LayerSpec("fc", 20), LayerSpec("fc", 7))
)

BUILDS = [
    ("u8", "q24", 16, SMALL, 3),
    ("u8", "q18", 48, SMALL, 2),
    ("u8", "q24", 64, lenet5((1, 28, 28)), 2),
    ("u8", "q24", 80, lenet5((3, 32, 32)), 1),
    ("q", "q24", 32, dnn(100, 3), 3),
    ("q", "q18", 16, dnn(70, 16), 2),
]


def beats(data: np.ndarray[Any, Any]) -> list[int]:
    return [int.from_bytes(row.tobytes(), "little") for row in data.reshape(-1, 16)]


def rows_of(x: np.ndarray[Any, Any], build: Build) -> list[int]:
    """Rows of X0 as §7 lays them out."""
    out = np.zeros((len(x), 16 * build.taps[0].blocks), np.uint8 if build.input == "u8" else np.int32)
    out[:, : x.shape[1]] = x
    return beats(np.ascontiguousarray(out).view(np.uint8))


def expected(build: Build, taps: list[Ints]) -> Ints:
    """(samples, chunks, N): x of every lane."""
    out = []
    for tap, x in zip(build.taps, taps, strict=True):
        padded = np.concatenate([x, np.zeros((len(x), 1), np.int64)], axis=1)[:, tap.columns]
        short = tap.chunks * build.lanes - padded.shape[1]
        out.append(np.pad(padded, ((0, 0), (0, short))).reshape(len(x), tap.chunks, build.lanes))
    return np.concatenate(out, axis=1)


@pytest.mark.parametrize(("kind", "profile", "lanes", "net", "batch"), BUILDS)
def test_records_give_what_the_cache_holds(kind: Any, profile: str, lanes: int, net: NetSpec, batch: int) -> None:
    build = Build(net, lanes, 4 if lanes < 80 else 2, PROFILES[profile], kind, batch)
    formats, rng = build.formats, np.random.default_rng(lanes)
    top = 1 << (formats.width - 1)
    count = 2 * batch
    values = [rng.integers(-top, top, (count, s.size)) // rng.integers(1, 3000) for s in net.record.segments]
    values[0][0] = -top  # the largest scale there is
    entries = encode(net.record, values, formats)
    size = net.geometry[0].N
    if kind == "u8":
        raw = rng.integers(0, 256, (count, size)).astype(np.uint8)
        x0 = quantise_input(raw, formats)
    else:
        raw = rng.integers(-(1 << 23), 1 << 23, (count, size)).astype(np.int32)
        x0 = quantise_input(raw / 2.0**16, formats)
    labels = rng.integers(0, 16, count)
    *taps, c = decode(net.record, entries)
    want = expected(build, [x0, *taps])

    dut = Records(build)

    async def write(ctx: Any, name: str, words: list[int]) -> None:
        for word in words:
            while rng.random() < 0.3:
                await ctx.tick()
            ctx.set(getattr(dut, f"{name}_data"), word)
            ctx.set(getattr(dut, f"{name}_valid"), 1)
            _, _, taken = await ctx.tick().sample(getattr(dut, f"{name}_ready"))
            while not taken:
                _, _, taken = await ctx.tick().sample(getattr(dut, f"{name}_ready"))
            ctx.set(getattr(dut, f"{name}_valid"), 0)

    async def testbench(ctx: Any) -> None:
        for bank in (0, 1):
            mine = slice(bank * batch, (bank + 1) * batch)
            ctx.set(dut.bank, bank)
            ctx.set(dut.restart, 1)
            await ctx.tick()
            ctx.set(dut.restart, 0)
            await write(ctx, "x", rows_of(raw[mine], build))
            await write(ctx, "entry", beats(entries[mine]))
            for label in labels[mine]:
                ctx.set(dut.label, int(label))
                ctx.set(dut.label_valid, 1)
                await ctx.tick()
            ctx.set(dut.label_valid, 0)
            for _ in range(SETTLE):
                await ctx.tick()
        asked = [(n // batch, n % batch, j) for n in range(count) for j in range(build.chunks)]
        rng.shuffle(asked)
        got = []
        for i in range(len(asked) + LATENCY):
            bank, sample, chunk = asked[min(i, len(asked) - 1)]
            ctx.set(dut.read_bank, bank)
            ctx.set(dut.sample, sample)
            ctx.set(dut.chunk, chunk)
            if i >= LATENCY:
                got.append(list(ctx.get(dut.values.as_value()).to_bytes(-(-lanes * formats.width // 8), "little")))
            await ctx.tick()
        bits = np.unpackbits(np.array(got, np.uint8), axis=1, bitorder="little")[:, : lanes * formats.width]
        x = bits.reshape(len(asked), lanes, formats.width).astype(np.int64) @ (1 << np.arange(formats.width))
        x -= (x >= top) * 2 * top
        np.testing.assert_array_equal(x, [want[bank * batch + sample, chunk] for bank, sample, chunk in asked])
        for n in range(count):
            ctx.set(dut.read_bank, n // batch)
            ctx.set(dut.c_sample, n % batch)
            ctx.set(dut.label_sample, n % batch)
            outputs = []
            for i in range(net.C + C_LATENCY):
                ctx.set(dut.c_class, min(i, net.C - 1))
                if i == 1:
                    assert ctx.get(dut.class_of) == labels[n]
                if i >= C_LATENCY:
                    outputs.append(ctx.get(dut.c))
                await ctx.tick()
            np.testing.assert_array_equal(outputs, c[n])

    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    simulator.add_testbench(testbench)
    simulator.run()

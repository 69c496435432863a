"""Adapters, Small, Softmax and the lane array together against hw/fixed.py, bit for bit."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from instantft.hw import fixed
from instantft.hw.formats import PROFILES, Ints
from instantft.hw.layout import BEAT, CHANNELS, Build
from instantft.spec import LayerSpec, NetSpec, dnn, lenet5

pytest.importorskip("amaranth", reason="Amaranth is not here: pip install instantft[hw]")

from amaranth import Module, unsigned
from amaranth.lib import memory, wiring
from amaranth.sim import Simulator

from instantft.hw.rtl.adapters import Adapters
from instantft.hw.rtl.array import LaneArray
from instantft.hw.rtl.pieces import later

LATENCY, C_LATENCY = 5, 3
"""Of the stand-in for `Records`; other than the real ones, so that nothing hangs on these."""


class Stand(wiring.Component):
    """The units, and memories in the place of `Records`."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.adapters, self.array = Adapters(build, LATENCY, C_LATENCY, trace=True), LaneArray(build)
        width = build.formats.width
        self.x = memory.Memory(shape=unsigned(width * build.lanes), depth=2 * build.batch * build.chunks, init=[])
        self.c = memory.Memory(shape=unsigned(width), depth=2 * build.batch * build.net.C, init=[])
        self.labels = memory.Memory(shape=unsigned(4), depth=2 * build.batch, init=[])
        super().__init__({})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        one, two, build = self.adapters, self.array, self.build
        m.submodules.adapters, m.submodules.array = one, two
        m.submodules.x, m.submodules.c, m.submodules.labels = self.x, self.c, self.labels
        x, c, label = self.x.read_port(), self.c.read_port(), self.labels.read_port()
        sample = one.read_bank * build.batch + one.sample
        m.d.comb += [
            x.addr.eq(sample * build.chunks + one.chunk),
            one.values.eq(later(m, x.data, LATENCY - 1)),
            c.addr.eq((one.read_bank * build.batch + one.c_sample) * build.net.C + one.c_class),
            one.c.eq(later(m, c.data, C_LATENCY - 1).as_signed()),
            label.addr.eq(one.read_bank * build.batch + one.label_sample),
            one.class_of.eq(label.data),
            two.select.eq(0),
            one.lane_heads.eq(two.lane_heads),
            one.p.eq(two.p),
        ]
        wiring.connect(m, one.array, two.adapters)
        return m


# -- layouts of §6 and §7, from their words


def rows_of_a(build: Build, A: tuple[Ints, ...]) -> list[list[int]]:
    """Of every chunk, its N·R parameters; 0 in padding."""
    out = []
    for tap, a in zip(build.taps, A, strict=True):
        padded = np.zeros((tap.chunks * build.lanes, build.rank), np.int64)
        columns = tap.columns
        padded[: len(columns)][columns >= 0] = a[columns[columns >= 0]]
        out += padded.reshape(tap.chunks, -1).tolist()
    return out


def rows_of_b(B: tuple[Ints, ...]) -> list[list[int]]:
    """Of every tap and rank, 16 classes."""
    return [[*row, *[0] * (CHANNELS - len(row))] for b in B for row in b.tolist()]


def packed(values: list[int], width: int) -> int:
    return sum((v & ((1 << width) - 1)) << (i * width) for i, v in enumerate(values))


def unpacked(word: int, width: int, count: int) -> list[int]:
    values = [(word >> (i * width)) & ((1 << width) - 1) for i in range(count)]
    return [v - (v >> (width - 1) << width) for v in values]


def beats(rows: list[list[int]], width: int) -> list[int]:
    """Rows as beats of 128 bits."""
    each = 8 * BEAT // width
    return [packed(row[i : i + each], width) for row in rows for i in range(0, len(row), each)]


# -- cases


@dataclass
class Batch:
    taps: list[Ints]
    c: Ints
    labels: Ints
    train: bool = True
    eta: int = 1 << 20


@dataclass
class Seen:
    """What came out."""

    y: list[list[int]] = field(default_factory=list)
    a: dict[int, list[int]] = field(default_factory=dict)
    b: dict[int, list[int]] = field(default_factory=dict)
    saturated: list[int] = field(default_factory=lambda: [0, 0, 0])
    cycles: list[int] = field(default_factory=list)
    logits: list[int] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)


def draw(rng: np.random.Generator, shape: tuple[int, ...], scale: float, width: int) -> Ints:
    """Normal integers, cut at their format."""
    top = 1 << (width - 1)
    return np.clip(np.rint(rng.normal(0, scale * top, shape)), -top, top - 1).astype(np.int64)


def case(build: Build, seed: int, sizes: list[tuple[int, bool]], loud: float) -> tuple[fixed.Parameters, list[Batch]]:
    """Parameters and batches (samples, train); `loud` is how far activations reach, 0.3 makes most sums saturate."""
    rng = np.random.default_rng(seed)
    W, C, R = build.formats.width, build.net.C, build.rank
    params = fixed.Parameters(
        A=tuple(draw(rng, (tap.size, R), 0.3, 16) for tap in build.taps),
        B=tuple(draw(rng, (R, C), 0.3, 16) for _ in build.taps),
        gain=int(rng.integers(-(1 << 15), 1 << 15)),
        bias=draw(rng, (C,), loud, W),
    )
    batches = [
        Batch(
            taps=[draw(rng, (n, tap.size), loud, W) for tap in build.taps],
            c=draw(rng, (n, C), loud, W),
            labels=rng.integers(0, C, n),
            train=train,
            eta=int(rng.integers(1, 1 << rng.integers(8, 25))),
        )
        for n, train in sizes
    ]
    return params, batches


def run(build: Build, params: fixed.Parameters, batches: list[Batch], hold_up: float = 0.0) -> Seen:
    """Load, every batch in banks 0, 1, 0, …, store. The streams' ready is low `hold_up` of the time."""
    dut, seen = Stand(build), Seen()
    core, width, count = dut.adapters, build.formats.width, build.lanes * build.rank
    rng = np.random.default_rng(0)

    async def clock(ctx: Any) -> None:
        ready = int(rng.random() >= hold_up)
        ctx.set(core.logits_ready, ready)
        ctx.set(core.stored_ready, ready)
        if ctx.get(core.logits_valid) and ready:
            seen.logits.append(ctx.get(core.logits_data))
        if ctx.get(core.stored_valid) and ready:
            seen.stored.append(ctx.get(core.stored_data))
        if ctx.get(core.trace_y_valid):
            seen.y.append(unpacked(ctx.get(core.trace_y), width, build.net.C))
            assert ctx.get(core.trace_y_sample) == (len(seen.y) - 1 - sum(done)) % build.batch
        if ctx.get(core.trace_a_valid):
            seen.a[ctx.get(core.trace_a_chunk)] = unpacked(ctx.get(core.trace_a), 16, count)
        if ctx.get(core.trace_b_valid):
            seen.b[ctx.get(core.trace_b_row)] = unpacked(ctx.get(core.trace_b), 16, CHANNELS)
        for i, name in enumerate(("activations", "gradients", "parameters")):
            seen.saturated[i] += ctx.get(getattr(core, f"saturated_{name}"))
        await ctx.tick()

    done: list[int] = []

    async def pulse(ctx: Any, signal: Any) -> None:
        ctx.set(signal, 1)
        await clock(ctx)
        ctx.set(signal, 0)

    async def bench(ctx: Any) -> None:
        await pulse(ctx, core.restart)
        for strobe, words in (
            (core.a, beats(rows_of_a(build, params.A), 16)),
            (core.b, beats(rows_of_b(params.B), 16)),
            (core.bias, beats([[*params.bias.tolist(), *[0] * (CHANNELS - build.net.C)]], 32)),
        ):
            for word in words:
                ctx.set(core.data, word)
                await pulse(ctx, strobe)
                if hold_up:
                    await clock(ctx)
        ctx.set(core.gain, params.gain)
        for i, batch in enumerate(batches):
            bank = i % 2
            for s in range(len(batch.labels)):
                place = bank * build.batch + s
                ctx.set(dut.labels.data[place], int(batch.labels[s]))
                for k in range(build.net.C):
                    ctx.set(dut.c.data[place * build.net.C + k], int(batch.c[s, k]) & ((1 << width) - 1))
                columns = [(x[s : s + 1].T,) for x in batch.taps]
                one = Build(build.net, build.lanes, 1, build.formats, build.input, build.batch)
                for j, row in enumerate(rows_of_a(one, tuple(c[0] for c in columns))):
                    ctx.set(dut.x.data[place * build.chunks + j], packed(row, width))
            ctx.set(core.bank, bank)
            ctx.set(core.train, batch.train)
            ctx.set(core.eta, batch.eta)
            ctx.set(core.samples, len(batch.labels))
            await pulse(ctx, core.start)
            cycles = 1
            while ctx.get(core.busy):
                assert ctx.get(core.forward) + ctx.get(core.backward) == 1
                await clock(ctx)
                cycles += 1
                assert cycles < 3_000, i
            seen.cycles.append(cycles)
            done.append(len(batch.labels))
        for _ in range(20):
            await clock(ctx)
        await pulse(ctx, core.store)
        for _ in range(4 * (build.a_beats + build.b_beats + 5 * build.chunks)):
            await clock(ctx)

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(40_000)  # wide rows are deep expressions to Amaranth's simulator
    try:
        sim = Simulator(dut)
        sim.add_clock(1e-6)
        sim.add_testbench(bench)
        sim.run()
    finally:
        sys.setrecursionlimit(limit)
    return seen


def check(
    build: Build, seed: int, sizes: list[tuple[int, bool]], loud: float, hold_up: float = 0.0
) -> fixed.Saturations:
    """Run a case; every number must be the model's. Returns how often the model saturated."""
    params, batches = case(build, seed, sizes, loud)
    seen = run(build, params, batches, hold_up)
    cuts, y, logits = fixed.Saturations(), [], []
    for batch in batches:
        if batch.train:
            params, trace = fixed.step(params, batch.taps, batch.c, batch.labels, batch.eta, build.formats, cuts)
            y += trace.y.tolist()
        else:
            answers = fixed.forward(params, batch.taps, batch.c, build.formats, cuts)[1].tolist()
            y += answers
            logits += beats([[*row, *[0] * (CHANNELS - len(row))] for row in answers], 32)
    assert seen.y == y
    assert seen.logits == logits
    a, b = rows_of_a(build, params.A), rows_of_b(params.B)
    if any(batch.train for batch in batches):
        assert [seen.a[i] for i in range(build.chunks)] == a
        assert [seen.b[i] for i in range(len(b))] == b
    assert seen.stored == beats(a, 16) + beats(b, 16)
    assert seen.saturated == [cuts.activations, cuts.gradients, cuts.parameters]
    return cuts


TINY = dnn(40, 3, hidden=20)
PICTURES = NetSpec((1, 8, 8), (LayerSpec("conv", 3, (3, 3), relu=True, pool=2), LayerSpec("fc", 5)))


@pytest.mark.parametrize(
    ("net", "lanes", "rank", "profile", "batch"),
    [
        (TINY, 16, 4, "q24", 4),
        (PICTURES, 16, 2, "q18", 3),
        pytest.param(TINY, 32, 2, "q24", 4, marks=pytest.mark.slow),
        pytest.param(PICTURES, 16, 8, "q18", 3, marks=pytest.mark.slow),
        pytest.param(PICTURES, 48, 1, "q24", 5, marks=pytest.mark.slow),
        pytest.param(dnn(20, 16, hidden=16), 16, 16, "q24", 2, marks=pytest.mark.slow),
    ],
)
def test_batches_are_the_models(net: NetSpec, lanes: int, rank: int, profile: str, batch: int) -> None:
    """Whole and partial batches, a prediction between them, small numbers and such as saturate everywhere."""
    build = Build(net, lanes, rank, PROFILES[profile], "q", batch)
    sizes = [(batch, True), (batch, True), (1, True), (batch, False), (batch - 1, True)]
    check(build, 1, sizes, 0.002)
    cuts = check(build, 2, sizes, 0.3, hold_up=0.5)
    assert min(cuts.activations, cuts.gradients, cuts.parameters) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "profile", "loud"), [(16, "q18", 0.002), (64, "q24", 0.3)])
def test_lenet_is_the_models(lanes: int, profile: str, loud: float) -> None:
    """The shapes that are built: a minute each in Amaranth's simulator."""
    build = Build(lenet5((1, 28, 28)), lanes, 4, PROFILES[profile], "u8", 2)
    check(build, 1, [(2, True), (1, True), (2, False)], loud)

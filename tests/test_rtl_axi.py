"""hw/rtl/axi.py and fetch.py before a memory and a host that take their time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra hw (amaranth)")

from amaranth.sim import Simulator

from instantft.hw.formats import PROFILES
from instantft.hw.layout import Build
from instantft.hw.rtl.axi import REGISTERS, Control, Fifo, Reader, SkidBuffer, Writer
from instantft.hw.rtl.fetch import Fetch, Product
from instantft.spec import LayerSpec, NetSpec

BEAT = 16


class Dram:
    """Memory behind one port: bursts answered in order, after a while, with gaps; it checks the rules of AXI."""

    def __init__(self, data: bytes, seed: int, bad: int | None = None) -> None:
        self.data, self.bad = bytearray(data), bad
        self.rng = np.random.default_rng(seed)
        self.bursts: list[tuple[int, int]] = []

    def burst(self, address: int, length: int) -> tuple[int, int]:
        assert address % BEAT == 0
        assert address // 4096 == (address + length * BEAT + BEAT - 1) // 4096, "crosses 4 KiB"
        self.bursts.append((address, length + 1))
        return address, length + 1

    def read(self, bus: Any) -> Callable[[Any], Any]:
        async def serve(ctx: Any) -> None:
            todo: list[tuple[int, int, int]] = []
            now, waiting = 0, None
            while True:
                ready = self.rng.random() < 0.6
                ctx.set(bus.arready, ready)
                beat = (
                    todo[0] if todo and todo[0][2] <= now and (ctx.get(bus.rvalid) or self.rng.random() < 0.7) else None
                )
                ctx.set(bus.rvalid, beat is not None)
                if beat is not None:
                    address, left, _ = beat
                    ctx.set(bus.rdata, int.from_bytes(self.data[address : address + BEAT], "little"))
                    ctx.set(bus.rlast, left == 1)
                    ctx.set(bus.rresp, 2 if address == self.bad else 0)
                _, _, valid, address, length, taken = await ctx.tick().sample(
                    bus.arvalid, bus.araddr, bus.arlen, bus.rready
                )
                now += 1
                if waiting is not None:
                    assert (valid, address, length) == waiting, "AR changed before it was taken"
                waiting = (valid, address, length) if valid and not ready else None
                if beat is not None and taken:
                    ctx.set(bus.rvalid, 0)
                    at, left, due = todo[0]
                    todo[0] = (at + BEAT, left - 1, due)
                    if left == 1:
                        todo.pop(0)
                if valid and ready:
                    at, beats = self.burst(address, length)
                    todo.append((at, beats, now + int(self.rng.integers(5, 40))))
                assert len(todo) <= 8

        return serve

    def write(self, bus: Any) -> Callable[[Any], Any]:
        async def serve(ctx: Any) -> None:
            todo: list[list[int]] = []
            answers: list[tuple[int, int]] = []
            now = 0
            waiting = w_waiting = None
            while True:
                ready, w_ready = self.rng.random() < 0.5, bool(todo) and self.rng.random() < 0.7
                answer = answers[0] if answers and answers[0][0] <= now else None
                ctx.set(bus.awready, ready)
                ctx.set(bus.wready, w_ready)
                ctx.set(bus.bvalid, answer is not None)
                ctx.set(bus.bresp, answer[1] if answer else 0)
                _, _, valid, address, length, w_valid, word, strobe, last, taken = await ctx.tick().sample(
                    bus.awvalid, bus.awaddr, bus.awlen, bus.wvalid, bus.wdata, bus.wstrb, bus.wlast, bus.bready
                )
                now += 1
                if waiting is not None:
                    assert (valid, address, length) == waiting, "AW changed before it was taken"
                if w_waiting is not None:
                    assert (w_valid, word, strobe, last) == w_waiting, "W changed before it was taken"
                waiting = (valid, address, length) if valid and not ready else None
                w_waiting = (w_valid, word, strobe, last) if w_valid and not w_ready else None
                if answer and taken:
                    answers.pop(0)
                if w_valid and w_ready:
                    at, left = todo[0]
                    if strobe:
                        self.data[at : at + BEAT] = word.to_bytes(BEAT, "little")
                    assert last == (left == 1), "WLAST"
                    todo[0] = [at + BEAT, left - 1]
                    if left == 1:
                        todo.pop(0)
                        answers.append((now + int(self.rng.integers(5, 40)), 2 if at == self.bad else 0))
                if valid and ready:
                    todo.append(list(self.burst(address, length)))
                assert len(todo) + len(answers) <= 8

        return serve


def run(dut: Any, *benches: Callable[[Any], Any], background: tuple[Callable[[Any], Any], ...] = ()) -> None:
    simulator = Simulator(dut)
    simulator.add_clock(1e-8)
    for bench in benches:
        simulator.add_testbench(bench)
    for bench in background:
        simulator.add_testbench(bench, background=True)
    simulator.run()


def source(dut: Any, prefix: str, words: list[int], rng: np.random.Generator) -> Callable[[Any], Any]:
    """A stream's other end, that offers words now and then."""

    async def bench(ctx: Any) -> None:
        for word in words:
            while rng.random() < 0.4:
                await ctx.tick()
            ctx.set(getattr(dut, f"{prefix}data"), word)
            ctx.set(getattr(dut, f"{prefix}valid"), 1)
            taken = False
            while not taken:
                _, _, taken = await ctx.tick().sample(getattr(dut, f"{prefix}ready"))
            ctx.set(getattr(dut, f"{prefix}valid"), 0)

    return bench


def sink(dut: Any, prefix: str, count: int, rng: np.random.Generator, got: list[int]) -> Callable[[Any], Any]:
    async def bench(ctx: Any) -> None:
        for _ in range(5000):
            ready = rng.random() < 0.6
            ctx.set(getattr(dut, f"{prefix}ready"), ready)
            _, _, valid, word = await ctx.tick().sample(getattr(dut, f"{prefix}valid"), getattr(dut, f"{prefix}data"))
            if valid and ready:
                got.append(word)
            if len(got) == count:
                return
        raise AssertionError(f"{len(got)} of {count} came")

    return bench


@pytest.mark.parametrize("dut", [Fifo(16, 4), Fifo(16, 2), SkidBuffer(16)], ids=["fifo 4", "fifo 2", "skid"])
def test_what_goes_in_comes_out(dut: Any) -> None:
    rng = np.random.default_rng(1)
    got: list[int] = []
    words = rng.integers(0, 1 << 16, 200).tolist()
    run(dut, source(dut, "in_", words, rng), sink(dut, "out_", len(words), rng, got))
    assert got == words


@pytest.mark.parametrize("seed", range(3))
def test_reader_reads_what_is_there(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dram = Dram(rng.bytes(1 << 15), seed)
    asked = [
        (16 * int(a), int(n), i % 2)
        for i, (a, n) in enumerate(zip(rng.integers(0, 1400, 8), rng.integers(1, 600, 8), strict=True))
    ]
    dut = Reader()
    got: list[tuple[bytes, int, int]] = []

    async def ask(ctx: Any) -> None:
        for address, beats, tag in asked:
            ctx.set(dut.command.address, address)
            ctx.set(dut.command.beats, beats)
            ctx.set(dut.tag_in, tag)
            ctx.set(dut.command.valid, 1)
            taken = False
            while not taken:
                _, _, taken = await ctx.tick().sample(dut.command.ready)
            ctx.set(dut.command.valid, 0)

    async def take(ctx: Any) -> None:
        while len(got) < sum(n for _, n, _ in asked):
            ready = rng.random() < 0.8
            ctx.set(dut.ready, ready)
            _, _, valid, word, tag, last = await ctx.tick().sample(dut.valid, dut.data, dut.tag, dut.last)
            if valid and ready:
                got.append((word.to_bytes(BEAT, "little"), tag, last))
        for _ in range(5):
            await ctx.tick()
        assert ctx.get(dut.idle)

    run(dut, ask, take, background=(dram.read(dut.bus),))
    want = [
        (bytes(dram.data[a + BEAT * i : a + BEAT * (i + 1)]), tag, int(i == n - 1))
        for a, n, tag in asked
        for i in range(n)
    ]
    assert got == want
    assert max(n for _, n in dram.bursts) > 200


@pytest.mark.parametrize("seed", range(3))
def test_writer_writes_what_it_is_given(seed: int) -> None:
    rng = np.random.default_rng(seed)
    dram = Dram(bytes(1 << 15), seed)
    want = bytearray(1 << 15)
    asked = [(16 * int(a), int(n)) for a, n in zip(rng.integers(0, 1400, 8), rng.integers(1, 600, 8), strict=True)]
    words = []
    for address, beats in asked:
        data = rng.bytes(BEAT * beats)
        want[address : address + len(data)] = data
        words += [int.from_bytes(data[i : i + BEAT], "little") for i in range(0, len(data), BEAT)]
    dut = Writer()

    async def ask(ctx: Any) -> None:
        for address, beats in asked:
            ctx.set(dut.command.address, address)
            ctx.set(dut.command.beats, beats)
            ctx.set(dut.command.valid, 1)
            taken = False
            while not taken:
                _, _, taken = await ctx.tick().sample(dut.command.ready)
            ctx.set(dut.command.valid, 0)
        await ctx.tick().until(dut.idle)
        assert bytes(dram.data) == bytes(want)

    run(dut, ask, source(dut, "", words, rng), background=(dram.write(dut.bus),))


@pytest.mark.parametrize("dut", [Reader(), Writer()], ids=["reader", "writer"])
def test_an_error_stops_it_and_it_works_again(dut: Any) -> None:
    """A bad answer is told; `flush` leaves nothing on its way; the next command is served."""
    reads = isinstance(dut, Reader)
    dram = Dram(bytes(range(256)) * 64, 0, bad=4096 + 16 * (100 if reads else 255))
    rng = np.random.default_rng(0)

    async def bench(ctx: Any) -> None:
        async def ask(address: int, beats: int) -> None:
            ctx.set(dut.command.address, address)
            ctx.set(dut.command.beats, beats)
            ctx.set(dut.command.valid, 1)
            await ctx.tick().until(dut.command.ready)
            ctx.set(dut.command.valid, 0)

        ctx.set(dut.ready if reads else dut.valid, 1)
        await ask(2048, 5000)
        await ctx.tick().until(dut.error)
        ctx.set(dut.ready if reads else dut.valid, 0)
        ctx.set(dut.flush, 1)
        await ctx.tick().until(dut.idle)
        for _ in range(int(rng.integers(3, 9))):
            await ctx.tick()
        assert ctx.get(dut.idle)
        before = sum(n for _, n in dram.bursts)
        assert before < 5000
        ctx.set(dut.flush, 0)
        ctx.set(dut.data, 0x77) if not reads else None
        await ask(256, 1)
        if reads:
            ctx.set(dut.ready, 1)
            word, last = await ctx.tick().sample(dut.data, dut.last).until(dut.valid)
            assert (word.to_bytes(BEAT, "little"), last) == (bytes(range(16)), 1)
        else:
            ctx.set(dut.valid, 1)
            await ctx.tick().until(dut.ready)
            ctx.set(dut.valid, 0)
        await ctx.tick().until(dut.idle)
        assert ctx.get(dut.error) == 0
        if not reads:
            assert dram.data[256] == 0x77

    run(dut, bench, background=(dram.read(dut.bus) if reads else dram.write(dut.bus),))


async def host(
    ctx: Any, bus: Any, rng: np.random.Generator, offset: int, value: int | None = None, strobe: int = 15
) -> int:
    """Writes a register (address and data in any order), or reads it."""
    if value is None:
        ctx.set(bus.araddr, offset)
        ctx.set(bus.arvalid, 1)
        await ctx.tick().until(bus.arready)
        ctx.set(bus.arvalid, 0)
        while rng.random() < 0.5:
            await ctx.tick()
        ctx.set(bus.rready, 1)
        word, answer = await ctx.tick().sample(bus.rdata, bus.rresp).until(bus.rvalid)
        ctx.set(bus.rready, 0)
        assert answer == 0
        return int(word)
    order = [("aw", bus.awaddr, offset), ("w", bus.wdata, value)]
    ctx.set(bus.wstrb, strobe)
    for name, payload, given in order if rng.random() < 0.5 else order[::-1]:
        ctx.set(payload, given)
        ctx.set(getattr(bus, f"{name}valid"), 1)
        await ctx.tick().until(getattr(bus, f"{name}ready"))
        ctx.set(getattr(bus, f"{name}valid"), 0)
    while rng.random() < 0.5:
        await ctx.tick()
    ctx.set(bus.bready, 1)
    (answer,) = await ctx.tick().sample(bus.bresp).until(bus.bvalid)
    ctx.set(bus.bready, 0)
    return int(answer)


def test_registers() -> None:
    dut, rng = Control(0x12345678), np.random.default_rng(3)
    starts = []

    async def watch(ctx: Any) -> None:
        while True:
            _, _, start = await ctx.tick().sample(dut.start)
            starts.append(start)

    async def bench(ctx: Any) -> None:
        given = {}
        for offset, width in REGISTERS.values():
            for i in range(0, width, 32):
                given[offset + i // 8] = int(rng.integers(0, 1 << 32)) & ((1 << min(32, width - i)) - 1)
        for offset in rng.permutation(list(given)).tolist():
            assert await host(ctx, dut.bus, rng, offset, given[offset]) == 0
        for offset, value in given.items():
            assert await host(ctx, dut.bus, rng, offset) == value
        assert ctx.get(dut.logits) == given[0x58] | given[0x5C] << 32
        await host(ctx, dut.bus, rng, 0x20, 0xFFFFFFFF, strobe=0b0010)
        assert await host(ctx, dut.bus, rng, 0x20) == given[0x20] | 0xFF00
        assert await host(ctx, dut.bus, rng, 0x08) == 0x49465431
        assert await host(ctx, dut.bus, rng, 0x0C) == 0x12345678
        ctx.set(dut.steps, 77)
        ctx.set(dut.parameters, 99)
        ctx.set(dut.error, 3)
        ctx.set(dut.done, 1)
        assert await host(ctx, dut.bus, rng, 0xA0) == 77
        assert await host(ctx, dut.bus, rng, 0xAC) == 99
        assert await host(ctx, dut.bus, rng, 0x04) == 0x302
        assert await host(ctx, dut.bus, rng, 0xFC) == 0
        assert sum(starts) == 0
        await host(ctx, dut.bus, rng, 0x00, 1)
        await host(ctx, dut.bus, rng, 0x00, 2)
        assert sum(starts) == 1
        ctx.set(dut.busy, 1)
        await host(ctx, dut.bus, rng, 0x00, 1)
        await host(ctx, dut.bus, rng, 0x14, 5)
        assert sum(starts) == 1
        assert await host(ctx, dut.bus, rng, 0x14) == given[0x14]

    run(dut, bench, background=(watch,))


def test_product() -> None:
    dut = Product(24, 12)

    async def bench(ctx: Any) -> None:
        for a, b in ((0, 5), (7, 0), ((1 << 24) - 1, (1 << 12) - 1), (1234, 70)):
            ctx.set(dut.a, a)
            ctx.set(dut.b, b)
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            while ctx.get(dut.busy):
                await ctx.tick()
            assert ctx.get(dut.result) == a * b

    run(dut, bench)


NET = NetSpec((1, 8, 8), (LayerSpec("conv", 2, (3, 3), relu=True, pool=2), LayerSpec("fc", 5)))


@pytest.mark.parametrize(("T", "E", "B"), [(7, 3, 3), (6, 2, 3), (1, 2, 1), (9, 1, 4)])
def test_fetch_brings_the_batches_in_order(T: int, E: int, B: int) -> None:
    build = Build(NET, 16, 4, PROFILES["q24"], "u8", 4)
    rng = np.random.default_rng(T)
    numbers = np.concatenate([rng.permutation(T) for _ in range(E)])
    classes = rng.integers(0, 5, E * T)
    order = np.zeros(-(-E * T // 4) * 4, np.uint32)
    order[: E * T] = numbers | classes << 24
    beats = [int.from_bytes(row.tobytes(), "little") for row in order.reshape(-1, 4)]
    dut = Fetch(build)
    entries, inputs, labels, banks = [], [], [], []

    async def memory(ctx: Any) -> None:
        """Takes commands, gives ORDER's beats, says when records are there."""
        pending: list[str] = []
        words: list[int] = []
        while True:
            ready = (rng.random(2) < 0.5).tolist()
            ctx.set(dut.entries.ready, ready[0])
            ctx.set(dut.inputs.ready, ready[1])
            done = pending.pop(0) if pending and rng.random() < 0.2 else ""
            ctx.set(dut.entry_done, done == "entry")
            ctx.set(dut.input_done, done == "input")
            ctx.set(dut.order_valid, bool(words))
            if words:
                ctx.set(dut.order_data, words.pop(0))
            (
                _,
                _,
                e_valid,
                e_at,
                e_beats,
                i_valid,
                i_at,
                i_beats,
                tag,
                restart,
                bank,
                labelled,
                label,
            ) = await ctx.tick().sample(
                *(dut.entries.valid, dut.entries.address, dut.entries.beats),
                *(dut.inputs.valid, dut.inputs.address, dut.inputs.beats, dut.inputs_tag),
                *(dut.restart, dut.bank, dut.label_valid, dut.label),
            )
            if e_valid and ready[0]:
                assert e_beats == build.entry_beats
                entries.append((e_at - 0x8_4000_0000) // 16 / build.entry_beats)
                pending.append("entry")
            if i_valid and ready[1] and tag:
                first = (i_at - 0x1000) // 16
                words += beats[first : first + i_beats]
                assert first + i_beats <= len(beats)
            elif i_valid and ready[1]:
                assert i_beats == build.input_beats
                inputs.append((i_at - 0x10_0000_0000) // 16 / build.input_beats)
                pending.append("input")
            if restart:
                banks.append(bank)
            if labelled:
                labels.append(label)

    async def train(ctx: Any) -> None:
        for name, value in {
            **{"samples": T, "epochs": E, "batch": B, "order": 0x1000, "order_beats": len(beats)},
            **{"cache": 0x8_4000_0000, "x0": 0x10_0000_0000},
        }.items():
            ctx.set(getattr(dut, name), value)
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        at = bank = 0
        for epoch in range(E):
            for first in range(0, T, B):
                count = min(B, T - first)
                await ctx.tick().until(dut.full.bit_select(bank, 1))
                at += count
                assert entries[:at] == inputs[:at] == numbers[:at].tolist()
                assert labels[:at] == classes[:at].tolist()
                assert ctx.get(getattr(dut, f"count_{bank}")) == count
                assert ctx.get(getattr(dut, f"ends_epoch_{bank}")) == (first + B >= T)
                assert ctx.get(getattr(dut, f"ends_run_{bank}")) == (first + B >= T and epoch == E - 1)
                assert len(entries) <= at + B, "the bank that is trained must not be written"
                for _ in range(int(rng.integers(0, 60))):
                    await ctx.tick()
                ctx.set(dut.release, 1 << bank)
                await ctx.tick()
                ctx.set(dut.release, 0)
                bank ^= 1
        for _ in range(100):
            await ctx.tick()
        assert len(entries) == len(inputs) == E * T
        assert ctx.get(dut.full) == ctx.get(dut.bad) == 0

    run(dut, train, background=(memory,))
    assert banks == [i % 2 for i in range(len(banks))]


@pytest.mark.parametrize("word", [7, 3 | 5 << 24])
def test_fetch_refuses_an_order_out_of_range(word: int) -> None:
    dut = Fetch(Build(NET, 16, 4, PROFILES["q24"], "u8", 4))

    async def bench(ctx: Any) -> None:
        for name, value in {"samples": 7, "epochs": 1, "batch": 4, "order_beats": 2}.items():
            ctx.set(getattr(dut, name), value)
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        ctx.set(dut.inputs.ready, 1)
        ctx.set(dut.entries.ready, 1)
        await ctx.tick().until(dut.inputs.valid & dut.inputs_tag)
        ctx.set(dut.order_data, 6 | word << 32)  # the first one is right
        ctx.set(dut.order_valid, 1)
        await ctx.tick()
        ctx.set(dut.order_valid, 0)
        await ctx.tick().until(dut.entries.valid)
        for _ in range(40):
            if ctx.get(dut.bad):
                return
            await ctx.tick()
        raise AssertionError("taken for good")

    run(dut, bench)

"""Records of the batch that is trained and of the next one: entries of the cache in, activations of N lanes out
(docs/hardware.md §3, §6, §10).

Letters: N lanes, W width of activations, F their fraction.
"""

from __future__ import annotations

from amaranth import Array, Cat, Module, Mux, Signal, Value, signed, unsigned
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from ..formats import LEVELS
from ..layout import BEAT, BLOCK, Build
from .pieces import saturate

__all__ = ["C_LATENCY", "LATENCY", "Records"]

LATENCY = 8
"""Cycles from (read_bank, sample, chunk) to `values`."""

C_LATENCY = 3
"""Cycles from (read_bank, c_sample, c_class) to `c`."""

SETTLE = 4
"""Cycles from the last beat written to the first in which it may be asked for."""

IN_URAM = 2
"""Of the blocks' memories of scales, so many may be in URAM: with all of them in one kind of memory, that kind would be
more than 70 % full on a K26."""

LEVEL = signed(18)
"""A level of NF4, -2^16 to 2^16."""

WORDS = BEAT // 4
"""Scales of a beat."""


class Records(wiring.Component):
    """Two banks of `build.batch` records each, written beat by beat, read a chunk a cycle.

    Args:
        build: the core.
        ram: `ram_style` of the large memories.

    Ports:
        bank: where the beats go. restart (pulse): its sample 0 comes next; not with a beat nor for SETTLE cycles after
            one.
        x_valid, x_data, x_ready: stream of rows of X0, sample after sample. entry_…: of entries of the cache.
        label_valid, label: classes, sample after sample.
        read_bank, sample, chunk: what `values` are LATENCY cycles later: the activations of the chunk's N columns,
            0 in padding.
        c_sample, c_class: what `c` is C_LATENCY cycles later. label_sample: what `class_of` is one cycle later.
    """

    def __init__(self, build: Build, ram: str = "block") -> None:
        self.build, self.ram = build, ram
        samples, width = range(build.batch), build.formats.width
        super().__init__(
            {
                "bank": In(1),
                "restart": In(1),
                "x_valid": In(1),
                "x_data": In(8 * BEAT),
                "x_ready": Out(1),
                "entry_valid": In(1),
                "entry_data": In(8 * BEAT),
                "entry_ready": Out(1),
                "label_valid": In(1),
                "label": In(4),
                "read_bank": In(1),
                "sample": In(samples),
                "chunk": In(range(build.chunks)),
                "values": Out(data.ArrayLayout(signed(width), build.lanes)),
                "c_sample": In(samples),
                "c_class": In(4),
                "c": Out(signed(width)),
                "label_sample": In(samples),
                "class_of": Out(4),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._write_inputs(m)
        self._write_entries(m)
        self._read(m)
        self._read_output(m)
        self._labels(m)
        return m

    # -- memories and tables

    def _memory(self, m: Module, name: str, width: int, depth: int, style: str = "") -> memory.Memory:
        made = memory.Memory(shape=unsigned(width), depth=depth, init=[], attrs={"ram_style": style or self.ram})
        m.submodules[name] = made
        return made

    def _table(self, m: Module, name: str, rows: list[int], address: Value, width: int = 1) -> Value:
        """rows[address], a cycle later."""
        width = max(width, max(rows).bit_length())
        made = memory.Memory(shape=unsigned(width), depth=len(rows), init=rows)
        m.submodules[name] = made
        port = made.read_port()
        m.d.comb += port.addr.eq(address)
        return port.data

    def _slots(self, rows: int) -> list[int]:
        """First row of each (bank, sample) in a memory with so many rows a sample; addressed by Cat(sample, bank)."""
        places = 1 << ceil_log2(self.build.batch)
        return [
            rows * (bank * self.build.batch + min(sample, self.build.batch - 1))
            for bank in range(2)
            for sample in range(places)
        ]

    # -- writing

    def _write_inputs(self, m: Module) -> None:
        build = self.build
        first, wide, activation = build.taps[0], build.lane_blocks, build.formats.width
        depth = 2 * build.batch * first.chunks
        m.d.comb += self.x_ready.eq(1)

        # A block is one beat of pixels, or four of numbers: three wait for the fourth.
        block = Signal(BLOCK * (8 if build.input == "u8" else activation), reset_less=True)
        complete, arrived = Signal(), Signal()
        if build.input == "u8":
            m.d.comb += complete.eq(1)
            m.d.sync += block.eq(self.x_data)
        else:
            drop = 16 - build.formats.fraction
            four = []
            for word in range(WORDS):
                value = self.x_data[32 * word : 32 * word + 24].as_signed()
                rounded = Signal(signed(activation + 1), name=f"rounded_{word}")  # 24 bits less `drop`, or one more
                m.d.comb += rounded.eq((value + (1 << drop >> 1)) >> drop)
                four.append(saturate(rounded, activation)[0])
            quarter = Signal(2)
            with m.If(self.restart):
                m.d.sync += quarter.eq(0)
            with m.Elif(self.x_valid):
                m.d.sync += [quarter.eq(quarter + 1), block.eq(Cat(block[WORDS * activation :], *four))]
            m.d.comb += complete.eq(quarter == 3)
        m.d.sync += arrived.eq(self.x_valid & complete)

        lane, left, row = Signal(range(wide)), Signal(range(first.blocks)), Signal(range(depth))
        with m.If(self.restart):
            m.d.sync += [lane.eq(0), left.eq(first.blocks - 1), row.eq(Mux(self.bank, depth // 2, 0))]
        with m.Elif(arrived):
            m.d.sync += [lane.eq(lane + 1), left.eq(left - 1)]
            with m.If((lane == wide - 1) | (left == 0)):
                m.d.sync += [lane.eq(0), row.eq(row + 1)]
            with m.If(left == 0):
                m.d.sync += left.eq(first.blocks - 1)
        self._inputs = []
        for i in range(wide):
            ram = self._memory(m, f"x_{i}", len(block), depth)
            port = ram.write_port()
            m.d.comb += [port.addr.eq(row), port.data.eq(block), port.en.eq(arrived & (lane == i))]
            self._inputs.append(ram.read_port())

    def _write_entries(self, m: Module) -> None:
        build = self.build
        wide = build.lane_blocks
        self.output_bits = ceil_log2(build.output_beats)
        self.code_rows = build.chunks - build.taps[0].chunks
        halves = 2 if wide == 1 else 1  # a single bank takes one block a cycle

        # What to do with each beat (or half): scales, one or two blocks of codes, each for (row, bank), or c.
        places = {
            tap.first_block + b: (tap.first_chunk - build.taps[0].chunks + b // wide, b % wide)
            for tap in build.taps[1:]
            for b in range(tap.blocks)
        }
        steps = []
        layout = data.StructLayout(
            {
                "scales": 1,
                "output": 1,
                "output_row": max(1, self.output_bits),
                "low": 1,
                "low_row": range(max(2, self.code_rows)),
                "low_bank": range(wide),
                "high": 1,
                "high_row": range(max(2, self.code_rows)),
                "high_bank": range(wide),
            }
        )
        for step in range(build.entry_beats * halves):
            beat, half = divmod(step, halves)
            at = 2 * (beat - build.scale_beats)
            both = beat >= build.scale_beats
            output = beat - build.scale_beats - build.code_beats
            last_half = half == halves - 1
            low = places.get(at if halves == 1 else at + half) if both else None
            high = places.get(at + 1) if both and halves == 1 else None
            steps.append(
                {
                    "scales": int(not both and last_half),
                    "output": int(output >= 0 and last_half),
                    "output_row": max(0, output),
                    "low": int(low is not None),
                    "low_row": low[0] if low else 0,
                    "low_bank": low[1] if low else 0,
                    "high": int(high is not None),
                    "high_row": high[0] if high else 0,
                    "high_bank": high[1] if high else 0,
                }
            )
        count = Signal(range(len(steps)))
        last = count == len(steps) - 1
        if halves == 2:
            m.d.comb += self.entry_ready.eq(count[0])
        else:
            m.d.comb += self.entry_ready.eq(1)
        with m.If(self.restart):
            m.d.sync += count.eq(0)
        with m.Elif(self.entry_valid):
            m.d.sync += count.eq(Mux(last, 0, count + 1))
        table = self._table(m, "steps", [layout.const(s).as_value().value for s in steps], count, layout.size)
        todo = data.View(layout, table)

        # One cycle behind the stream: the beat and what to do with it; the sample's first rows and its number.
        valid, over = Signal(), Signal()
        word = Signal(8 * BEAT, reset_less=True)
        m.d.sync += [valid.eq(self.entry_valid), over.eq(last)]
        m.d.sync += word.eq(Mux(count[0], self.entry_data >> 64, self.entry_data) if halves == 2 else self.entry_data)
        whole = Signal(8 * BEAT, reset_less=True)  # not halved
        m.d.sync += whole.eq(self.entry_data)
        codes = Signal(range(max(2, 2 * build.batch * self.code_rows)))
        scale_row = Signal(range(2 * build.batch * build.scale_beats))
        number = Signal(range(build.batch))
        with m.If(self.restart):
            m.d.sync += [
                codes.eq(Mux(self.bank, build.batch * self.code_rows, 0)),
                scale_row.eq(Mux(self.bank, build.batch * build.scale_beats, 0)),
                number.eq(0),
            ]
        with m.Elif(valid):
            with m.If(todo.scales):
                m.d.sync += scale_row.eq(scale_row + 1)
            with m.If(over):
                m.d.sync += [codes.eq(codes + self.code_rows), number.eq(number + 1)]

        # Two cycles behind: addresses.
        low_row, high_row = (Signal.like(codes, name=n, reset_less=True) for n in ("low_row", "high_row"))
        low, high = (Signal(wide, name=n) for n in ("low", "high"))
        blocks = Signal(8 * BEAT, reset_less=True)
        m.d.sync += [
            low_row.eq(codes + todo.low_row),
            high_row.eq(codes + todo.high_row),
            low.eq(Mux(valid & todo.low, 1 << todo.low_bank, 0)),
            high.eq(Mux(valid & todo.high, 1 << todo.high_bank, 0)),
            blocks.eq(word),
        ]
        self._codes = []
        for i in range(wide):
            ram = self._memory(m, f"codes_{i}", 64, max(1, 2 * build.batch * self.code_rows))
            port = ram.write_port()
            m.d.comb += [
                port.addr.eq(Mux(high[i], high_row, low_row)),
                port.data.eq(Mux(high[i], blocks[64:], blocks[:64])),
                port.en.eq(low[i] | high[i]),
            ]
            self._codes.append(ram.read_port())

        magnitude = build.formats.width - 1
        four = Cat(whole[32 * i : 32 * i + magnitude] for i in range(WORDS))
        self._scales = []
        for i in range(wide):
            style = self.ram if i < IN_URAM else "block"
            ram = self._memory(m, f"scales_{i}", len(four), 2 * build.batch * build.scale_beats, style)
            port = ram.write_port()
            m.d.comb += [port.addr.eq(scale_row), port.data.eq(four), port.en.eq(valid & todo.scales)]
            self._scales.append(ram.read_port())

        # Values of c, four of a sample in a row.
        four_c = self._memory(m, "c", WORDS * build.formats.width, 1 << len(number) + 1 + self.output_bits)
        port = four_c.write_port()
        m.d.comb += [
            port.addr.eq(Cat(todo.output_row[: self.output_bits], number, self.bank)),
            port.data.eq(Cat(whole[32 * i : 32 * i + build.formats.width] for i in range(WORDS))),
            port.en.eq(valid & todo.output),
        ]
        self._c = four_c.read_port()

    # -- reading

    def _read(self, m: Module) -> None:
        build = self.build
        wide, width, first = build.lane_blocks, build.formats.width, build.taps[0]

        # What each chunk is: where, under which scales, and which of its lanes hold a value.
        rows, masks, inputs = [], [], []
        scales: list[list[int]] = [[] for _ in range(wide)]
        for tap in build.taps:
            columns = tap.columns
            for j in range(tap.chunks):
                inputs.append(int(tap.k == 0))
                rows.append(j if tap.k == 0 else tap.first_chunk - first.chunks + j)
                here = columns[j * build.lanes : (j + 1) * build.lanes]
                masks.append(sum(1 << n for n, v in enumerate(here.tolist()) if v >= 0))
                for i in range(wide):
                    block = min(j * wide + i, tap.blocks - 1)
                    scales[i].append(tap.first_scale + block // tap.group_blocks if tap.k else 0)

        slot = Cat(self.sample, self.read_bank)
        row = self._table(m, "rows", rows, self.chunk)
        is_input = self._table(m, "inputs", inputs, self.chunk)
        mask = self._table(m, "masks", masks, self.chunk, build.lanes)
        x_base = self._table(m, "x_base", self._slots(first.chunks), slot)
        code_base = self._table(m, "code_base", self._slots(self.code_rows), slot)
        scale_base = self._table(m, "scale_base", self._slots(build.scale_beats), slot)

        x_row = Signal.like(self._inputs[0].addr, reset_less=True)
        code_row = Signal.like(self._codes[0].addr, reset_less=True)
        m.d.sync += [x_row.eq(x_base + row), code_row.eq(code_base + row)]
        is_input = self._late(m, "is_input", is_input, LATENCY - 2)
        mask = self._late(m, "mask", mask, LATENCY - 2)

        for i in range(wide):
            index = self._table(m, f"scale_index_{i}", scales[i], self.chunk)
            scale_row = Signal.like(self._scales[i].addr, name=f"scale_row_{i}", reset_less=True)
            m.d.sync += scale_row.eq(scale_base + (index >> 2))
            m.d.comb += [
                self._inputs[i].addr.eq(x_row),
                self._codes[i].addr.eq(code_row),
                self._scales[i].addr.eq(scale_row),
            ]
            which = self._late(m, f"which_{i}", index[:2], 3)
            four = self._late(m, f"four_{i}", self._scales[i].data, 1)
            scale = Signal(width - 1, name=f"scale_{i}", reset_less=True)
            m.d.sync += scale.eq(Array(four.word_select(n, width - 1) for n in range(WORDS))[which])
            codes = self._late(m, f"codes_{i}", self._codes[i].data, 1)
            raw = self._late(m, f"raw_{i}", self._inputs[i].data, 3)
            for n in range(BLOCK):
                lane = BLOCK * i + n
                value = _dequantised(m, f"{lane}", codes.word_select(n, 4), scale)
                given = Signal(signed(width), name=f"given_{lane}", reset_less=True)
                if build.input == "u8":
                    pixel = raw.word_select(n, 8)
                    drop = 16 - build.formats.fraction
                    whole = Cat(pixel, pixel)  # 257·p
                    m.d.sync += given.eq((whole + pixel[7] + (1 << drop >> 1)) >> drop)
                else:
                    m.d.sync += given.eq(raw.word_select(n, width).as_signed())
                out = Signal(signed(width), name=f"value_{lane}", reset_less=True)
                m.d.sync += out.eq(Mux(mask[lane], Mux(is_input, given, value), 0))
                m.d.comb += self.values[lane].eq(out)

    def _read_output(self, m: Module) -> None:
        m.d.comb += self._c.addr.eq(Cat(self.c_class[2 : 2 + self.output_bits], self.c_sample, self.read_bank))
        four, which = self._late(m, "c_four", self._c.data, 1), self._late(m, "c_which", self.c_class[:2], 2)
        given = Signal(signed(self.build.formats.width), name="c_given", reset_less=True)
        m.d.sync += given.eq(four.word_select(which, self.build.formats.width))
        m.d.comb += self.c.eq(given)

    def _labels(self, m: Module) -> None:
        number = Signal(range(self.build.batch))
        with m.If(self.restart):
            m.d.sync += number.eq(0)
        with m.Elif(self.label_valid):
            m.d.sync += number.eq(number + 1)
        labels = self._memory(m, "labels", 4, 2 << len(number), "distributed")
        write, read = labels.write_port(), labels.read_port()
        m.d.comb += [
            write.addr.eq(Cat(number, self.bank)),
            write.data.eq(self.label),
            write.en.eq(self.label_valid),
            read.addr.eq(Cat(self.label_sample, self.read_bank)),
            self.class_of.eq(read.data),
        ]

    def _late(self, m: Module, name: str, value: Value, cycles: int) -> Signal:
        """The value, so many cycles later."""
        for i in range(cycles):
            later = Signal(len(value), name=f"{name}_late_{i}", reset_less=True)
            m.d.sync += later.eq(value)
            value = later
        return value


def _dequantised(m: Module, name: str, code: Value, scale: Value) -> Signal:
    """The value of a code, three cycles after it and two after its scale: level, product, rounded.

    |level| is 2^16 at most, so a value is no larger than its scale and needs no saturation."""
    level = Signal(LEVEL, name=f"level_{name}", reset_less=True)
    with m.Switch(code):
        for i, v in enumerate(LEVELS.tolist()):
            with m.Case(i):
                m.d.sync += level.eq(v)
    signed_scale = Cat(scale, 0).as_signed()
    product = Signal(signed(len(level) + len(signed_scale)), name=f"product_{name}", reset_less=True)
    value = Signal(signed(len(signed_scale)), name=f"dequantised_{name}", reset_less=True)
    m.d.sync += [product.eq(level * signed_scale), value.eq((product + (1 << 15)) >> 16)]
    return value

"""A memory of trainable parameters: loaded, read, updated in place, stored (docs/hardware.md §4, §7)."""

from __future__ import annotations

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from ..formats import PARAMETER_WIDTH, Formats
from ..layout import BEAT
from .array import values
from .pieces import saturate, tree

__all__ = ["ParameterMemory"]


class ParameterMemory(wiring.Component):
    """Rows of Q4.12 parameters.

    Args:
        formats: of the sums that a parameter becomes.
        rows: how many.
        beats: beats of a row in PARAMS, at least 2.
        count: parameters of a row that there are, the first ones; the others are not kept, and stored as 0.
        width: bits of a sum.
        reads: read ports. Port 0 serves the store while that lasts.
        ram: `ram_style` of the memory.

    Ports:
        restart: the next beat is the first one of row 0. load: `data` is a beat.
        update: row `row` becomes sat(sums >> (F+8)); it can be read two cycles later.
        address_i, values_i: row to read; its (count,) parameters one cycle later.
        store: start the stream `stored_…` of all rows, beat by beat. storing: it is not through yet.
        saturated: how many parameters an update cut, some cycles ago.
        written, written_row, written_values: an updated row goes into the memory, all its parameters side by side.
    """

    def __init__(
        self, formats: Formats, rows: int, beats: int, count: int, width: int, reads: int, ram: str | None
    ) -> None:
        self.formats, self.rows, self.beats, self.count, self.reads, self.ram = formats, rows, beats, count, reads, ram
        super().__init__(
            {
                "restart": In(1),
                "load": In(1),
                "data": In(8 * BEAT),
                "update": In(1),
                "row": In(range(rows)),
                "sums": In(values(width, count)),
                **{f"address_{i}": In(range(rows)) for i in range(reads)},
                **{f"values_{i}": Out(values(PARAMETER_WIDTH, count)) for i in range(reads)},
                "store": In(1),
                "storing": Out(1),
                "stored_valid": Out(1),
                "stored_data": Out(8 * BEAT),
                "stored_ready": In(1),
                "saturated": Out(range(count + 1)),
                "written": Out(1),
                "written_row": Out(range(rows)),
                "written_values": Out(PARAMETER_WIDTH * count),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        kept = PARAMETER_WIDTH * self.count
        attributes = {} if self.ram is None else {"ram_style": self.ram}
        m.submodules.memory = cells = memory.Memory(shape=unsigned(kept), depth=self.rows, init=[], attrs=attributes)
        into = cells.write_port()

        # The one register between everything that comes in or goes out and the memory.
        word = Signal(8 * BEAT * self.beats, reset_less=True)
        row = Signal(range(self.rows), reset_less=True)
        write, trained = Signal(), Signal()
        m.d.comb += [into.addr.eq(row), into.data.eq(word), into.en.eq(write)]
        m.d.comb += [self.written.eq(write & trained), self.written_row.eq(row), self.written_values.eq(word)]

        next_row = Signal(range(self.rows + 1))
        beat = Signal(range(self.beats))
        fetched = Signal(2)
        last_beat = beat == self.beats - 1
        cuts = Signal(self.count)

        m.d.sync += [write.eq(0), trained.eq(self.update), cuts.eq(0), fetched.eq(fetched << 1)]
        with m.If(self.update):
            new = [saturate(s >> self.formats.update_shift, PARAMETER_WIDTH) for s in self.sums]
            m.d.sync += [word.eq(Cat(v for v, _ in new)), cuts.eq(Cat(cut for _, cut in new))]
            m.d.sync += [row.eq(self.row), write.eq(1)]
        with m.Elif(self.load):
            m.d.sync += [word.eq(Cat(word[8 * BEAT :], self.data)), row.eq(next_row)]
            m.d.sync += beat.eq(Mux(last_beat, 0, beat + 1))
            with m.If(last_beat):
                m.d.sync += [write.eq(1), next_row.eq(next_row + 1)]
        with m.Elif(fetched[1]):
            m.d.sync += [word.eq(self.values_0.as_value()), self.stored_valid.eq(1), next_row.eq(next_row + 1)]
        with m.Elif(self.stored_valid & self.stored_ready):
            m.d.sync += [word.eq(word >> (8 * BEAT)), beat.eq(Mux(last_beat, 0, beat + 1))]
            with m.If(last_beat):
                m.d.sync += self.stored_valid.eq(0)
                with m.If(next_row == self.rows):
                    m.d.sync += self.storing.eq(0)
                with m.Else():
                    m.d.sync += fetched.eq(1)
        with m.If(self.restart | self.store):
            m.d.sync += [next_row.eq(0), beat.eq(0)]
        with m.If(self.store):
            m.d.sync += [self.storing.eq(1), fetched.eq(1)]
        m.d.comb += self.stored_data.eq(word)

        for i in range(self.reads):
            port = cells.read_port()
            address = getattr(self, f"address_{i}")
            m.d.comb += port.addr.eq(Mux(self.storing, next_row, address) if i == 0 else address)
            m.d.comb += getattr(self, f"values_{i}").as_value().eq(port.data)

        total, _ = tree(m, list(cuts))
        m.d.comb += self.saturated.eq(total)
        return m

